// Runs the products of a native library on cases from a file and says how far each is from what is expected there: for
// processors that no test machine has, under an emulator (test_native.py writes the file).
//
//   native_check LIBRARY CASES
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

struct Stored {
    int bits, n, k, group;
    const void *codes, *scales, *floats, *bias, *order;
};

template <class T>
static std::vector<T> read(FILE* file, size_t count) {
    std::vector<T> values(count);
    if (fread(values.data(), sizeof(T), count, file) != count) return {};
    return values;
}

int main(int, char** arguments) {
    void* library = dlopen(arguments[1], RTLD_NOW);
    FILE* file = fopen(arguments[2], "rb");
    if (!library || !file) return fprintf(stderr, "%s\n", library ? "no cases" : dlerror()), 1;
    auto engine_new = (const char* (*)(int, void**))dlsym(library, "gemvg_engine");
    auto multiply = (const char* (*)(void*, const Stored*, int, const float*, int, float*))dlsym(library, "gemvg_multiply");
    void* engine = nullptr;
    if (engine_new(2, &engine)) return 1;
    for (;;) {
        const auto head = read<int32_t>(file, 6);  // bits, n, k, group, channels, rows
        if (head.empty()) return 0;
        const size_t n = head[1], k = head[2], blocks = (k + head[3] - 1) / head[3], m = head[5];
        const auto codes = read<uint8_t>(file, n * blocks * head[3] * head[0] / 8);
        const auto scales = read<float>(file, n * blocks), bias = read<float>(file, n);
        const auto x = read<float>(file, m * k), expected = read<float>(file, m * n);
        std::vector<float> out(m * n);
        const Stored stored{head[0], head[1], head[2], head[3], codes.data(), scales.data(), nullptr, bias.data(), nullptr};
        if (multiply(engine, &stored, head[4], x.data(), head[5], out.data())) return 1;
        double error = 0, size = 0;
        for (size_t i = 0; i < out.size(); i++) {
            error += (out[i] - expected[i]) * (out[i] - expected[i]);
            size += expected[i] * expected[i];
        }
        printf("%.3g\n", std::sqrt(error / size));
    }
}
