// The C interface of the library: networks are filled with a bundle's layers one by one, then run. Compiled once per
// instruction set, each into a library of its own (build.py), so that no code of one can end up in another.
//
// Every function that can fail gives null, or a sentence that stays until the thread's next call.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#else
#include <arm_neon.h>
#endif

#include "buffer.h"
#include "pool.h"
#include "simd.h"

#include "weights.h"

#include "rows.h"

#include "products.h"

#include "attention.h"

#include "work.h"

#include "language.h"
#include "vision.h"

namespace {
struct Engine {
    explicit Engine(int threads) : work(threads) {}
    std::mutex turn;
    Work work;
};
struct Network {
    Vision vision;
    Language language;
    bool sees = false;
    std::vector<Linear>& linears() { return sees ? vision.linears : language.linears; }
    std::vector<Norm>& norms() { return sees ? vision.norms : language.norms; }
};

thread_local std::string said;

template <class Action>
const char* trying(const Action& action) {
    try {
        action();
        return nullptr;
    } catch (const std::bad_alloc&) {
        said = "there is not enough memory";
    } catch (const std::exception& error) {
        said = error.what();
    }
    return said.c_str();
}
}  // namespace

extern "C" {
#define EXPORT __attribute__((visibility("default")))

EXPORT int gemvg_version() { return 1; }

EXPORT const char* gemvg_engine(int threads, void** engine) {
    return trying([&] { *engine = new Engine(threads); });
}
EXPORT void gemvg_engine_free(void* engine) { delete (Engine*)engine; }

// shape: depth, width, heads, head_dim, patches a token, hidden, activation (0 quick GELU, 1 GELU).
EXPORT const char* gemvg_vision(const int32_t* shape, void** network) {
    return trying([&] {
        auto made = new Network;
        made->sees = true;
        Vision& v = made->vision;
        v.depth = shape[0], v.width = shape[1], v.heads = shape[2], v.head_dim = shape[3];
        v.merged = shape[4], v.hidden = shape[5], v.activation = shape[6] ? GELU : QUICK_GELU;
        *network = made;
    });
}
// shape: layers, hidden, heads, kv_heads, head_dim, vocab.
EXPORT const char* gemvg_language(const int32_t* shape, void** network) {
    return trying([&] {
        auto made = new Network;
        Language& l = made->language;
        l.layers = shape[0], l.hidden = shape[1], l.heads = shape[2], l.kv_heads = shape[3];
        l.head_dim = shape[4], l.vocab = shape[5];
        *network = made;
    });
}
EXPORT void gemvg_network_free(void* network) { delete (Network*)network; }

// The next layer, in the order of the graph's products.
EXPORT const char* gemvg_add_linear(void* engine, void* network, const Stored* stored) {
    return trying([&] {
        auto& own = *(Engine*)engine;
        std::lock_guard<std::mutex> lock(own.turn);
        auto& net = *(Network*)network;
        net.linears().emplace_back();
        pack(*stored, net.linears().back(), net.sees, own.work.pool);
    });
}
EXPORT const char* gemvg_add_norm(void* network, const float* weight, const float* bias, int n, float epsilon) {
    return trying([&] {
        Norm norm;
        keep_vector(norm.weight, weight, n);
        if ((norm.centred = bias)) keep_vector(norm.bias, bias, n);
        norm.epsilon = epsilon;
        ((Network*)network)->norms().push_back(std::move(norm));
    });
}
EXPORT int64_t gemvg_network_bytes(void* network) {
    size_t bytes = 0;
    for (auto& linear : ((Network*)network)->linears()) bytes += linear.bytes();
    return (int64_t)bytes;
}

// One product by itself, for tests and measurements: x (m, k) -> out (m, n). `channels`: as the vision tower has it.
EXPORT const char* gemvg_multiply(void* engine, const Stored* stored, int channels, const float* x, int m, float* out) {
    return trying([&] {
        auto& own = *(Engine*)engine;
        std::lock_guard<std::mutex> lock(own.turn);
        Linear w;
        pack(*stored, w, channels, own.work.pool);
        const int wide = rounded(w.n, PANEL);
        float* y = own.work.last.need(area(m, wide));
        own.work.multiply(own.work.round(m, w, x, w.k), w, y, wide, STORE);
        for (int i = 0; i < m; i++) std::memcpy(out + area(i, w.n), y + area(i, wide), (size_t)w.n * 4);
    });
}

EXPORT const char* gemvg_encode(void* engine, void* network, const float* patches, int pictures, int n, const float* cos,
                                const float* sin, float* out) {
    return trying([&] {
        auto& own = *(Engine*)engine;
        std::lock_guard<std::mutex> lock(own.turn);
        ((Network*)network)->vision.run(own.work, patches, pictures, n, cos, sin, out);
    });
}

EXPORT const char* gemvg_cache(void* network, int capacity, int64_t* bytes, void** cache) {
    return trying([&] {
        const Language& l = ((Network*)network)->language;
        auto made = new Cache(capacity, l.layers, l.kv_heads, l.head_dim);
        *bytes = (int64_t)(made->keys.bytes() + made->values.bytes());
        *cache = made;
    });
}
EXPORT void gemvg_cache_free(void* cache) { delete (Cache*)cache; }
EXPORT void gemvg_cache_copy(const void* source, void* target, int tokens) {
    const Cache &from = *(const Cache*)source, &to = *(const Cache*)target;
    for (int layer = 0; layer < from.layers; layer++)
        for (int head = 0; head < from.heads; head++) {
            std::memcpy(to.keys.get() + to.plane(layer, head), from.keys.get() + from.plane(layer, head),
                        area(rounded(tokens, 16), from.head_dim) * 2);
            std::memcpy(to.values.get() + to.plane(layer, head), from.values.get() + from.plane(layer, head),
                        area(tokens, from.head_dim) * 2);
        }
}

EXPORT const char* gemvg_forward(void* engine, void* network, const Tokens* steps, int count) {
    return trying([&] {
        auto& own = *(Engine*)engine;
        std::lock_guard<std::mutex> lock(own.turn);
        ((Network*)network)->language.run(own.work, steps, count);
    });
}
}
