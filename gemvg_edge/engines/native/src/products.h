// Rows times weights: tiles of accumulators over panels, for many rows and for few.
#pragma once

constexpr size_t IN_CACHE = 512 << 10;  // bytes of panels that stay in a core's second cache beside some rows
constexpr int AHEAD = 8192;     // bytes: weights are asked for so early, since a processor's own guess stops at each page

enum Then { STORE, ADD, QUICK_GELU, GELU, SILU, TIMES };  // what a product does with what is there

static inline f32x16 then(f32x16 v, f32x16 there, Then what) {
    switch (what) {
        case ADD: return there + v;
        case QUICK_GELU: return v * sigmoid(v * 1.702f);
        case GELU: return gelu(v);
        case SILU: return v * sigmoid(v);
        case TIMES: return there * v;
        default: return v;
    }
}

// A tile of M rows and 16 * V outputs: the steps of `b`, which lie `apart` vectors of 64 bytes from each other.
template <class Op, int M, int V>
static inline void tile(const char* a, size_t stride, const i32x16* b, int apart, int steps, typename Op::Sums (&acc)[M][V]) {
#if defined(HALF_REGISTERS)
    typename Op::Half sums[M][2 * V];
    std::memcpy(sums, acc, sizeof sums);
    for (const char* to = (const char*)b; steps > 0; steps--, a += 4, to += apart * 64) {
        typename Op::Half w[2 * V];
#pragma GCC unroll 4
        for (int v = 0; v < 2 * V; v++) w[v] = Op::load(to + v * 32);
#pragma GCC unroll 3
        for (int m = 0; m < M; m++) {
            const typename Op::Half x = Op::all(a + (size_t)m * stride);
#pragma GCC unroll 4
            for (int v = 0; v < 2 * V; v++) sums[m][v] = Op::mac(sums[m][v], x, w[v]);
        }
    }
    std::memcpy(acc, sums, sizeof sums);
#else
    // Every third row has a pointer: those between are reached by adding the stride once or twice, within an instruction.
    const char* rows[(M + 2) / 3];
    for (int m = 0; m < M; m += 3) rows[m / 3] = a + (size_t)m * stride;
    for (int i = 0; i < steps; i++, b += apart) {
        i32x16 w[V];
#pragma GCC unroll 2
        for (int v = 0; v < V; v++) w[v] = b[v];
#pragma GCC unroll 12
        for (int m = 0; m < M; m++) {
            uint32_t x;
            std::memcpy(&x, rows[m / 3] + (size_t)(m % 3) * stride, 4);
#pragma GCC unroll 2
            for (int v = 0; v < V; v++) acc[m][v] = Op::mac(acc[m][v], x, w[v]);
        }
#pragma GCC unroll 4
        for (auto& row : rows) row += 4;
    }
#endif
}

struct Target {
    float* at;
    int stride;  // floats of a row, in whole panels
    Then what;

    // Fetch where a tile goes while it is computed.
    void expect(int m, int rows, int p) const {
        for (int i = 0; i < rows; i++)
            for (int v = 0; v < 2; v++) __builtin_prefetch(at + area(m + i, stride) + p * PANEL + v * 16, 1);
    }
    void put(int m, int n, f32x16 y) const {
        float* to = at + area(m, stride) + n;
        store(to, what == STORE ? y : then(y, load<f32x16>(to), what));
    }
};

template <int M>
static void tile8(const Rows& rows, int m, const Linear& w, int p, const uint8_t* panel, const Target& out) {
    i32x16 acc[M][2] = {};
    const i32x16* b = (const i32x16*)panel;
    out.expect(m, M, p);
    if (!rows.words.empty()) {
        const char* a = (const char*)rows.high.get() + area(m, rows.high_stride);
        for (size_t i = 0; i < rows.words.size(); i++)
            tile<Int8, M, 2>(a + i * 4, (size_t)rows.high_stride, b + (size_t)rows.words[i] * 2, 2, 1, acc);
        for (auto& row : acc)
            for (auto& one : row) one *= HIGH;
    }
    tile<Int8, M, 2>((const char*)rows.low.get() + area(m, rows.stride), (size_t)rows.stride, b, 2, w.steps, acc);
    for (int v = 0; v < 2; v++) {
        const int n = p * PANEL + v * 16;
        const f32x16 scale = load<f32x16>(w.scales.get() + n);
        const f32x16 bias = w.biased ? load<f32x16>(w.bias.get() + n) : f32x16{};
        for (int i = 0; i < M; i++) {
            const i32x16 dots = acc[i][v] - 128 * rows.sums.get()[m + i];
            out.put(m + i, n, to_float(dots) * (scale * rows.scales.get()[m + i]) + bias);
        }
    }
}

template <int M>
static void tile_floats(const Rows& rows, int m, const Linear& w, int p, const uint8_t* panel, const Target& out) {
    f32x16 acc[M][2] = {};
    tile<Float32, M, 2>((const char*)(rows.values.get() + area(m, rows.k)), (size_t)rows.k * 4, (const i32x16*)panel, 2,
                        w.steps, acc);
    for (int v = 0; v < 2; v++) {
        const int n = p * PANEL + v * 16;
        const f32x16 bias = w.biased ? load<f32x16>(w.bias.get() + n) : f32x16{};
        for (int i = 0; i < M; i++) out.put(m + i, n, acc[i][v] + bias);
    }
}

// Codes of 4 bits, in the low half of each byte -> 8-bit codes counted from 128: ((code - 8) * ratio + 128) / 256 + 128,
// where the four bytes of an output share its ratio and what is added, all modulo 2^16.
static inline i32x16 widen4(u16x32 codes, u16x32 ratio, u16x32 added) {
    const u16x32 even = (codes & 15) * ratio + added, odd = (codes >> 8 & 15) * ratio + added;
    return (i32x16)(even >> 8 | (odd & 0xff00));
}

// Codes of a panel's groups -> 8-bit codes with one scale an output, counted from 128.
static void widen(const Linear& w, int p, uint8_t* to) {
    const bool four = w.kind == GROUPS4;
    const uint8_t* from = w.panel(p);
    const int words = w.group / 4;
    for (int g = 0; g < w.groups; g++, from += w.group_bytes()) {
        i32x16 fixed[2];  // each output's group scale in its own, in 256ths or 32768ths
        for (int v = 0; v < 2; v++) {
            const int n = p * PANEL + v * 16;
            const f32x16 part = from_half((const uint16_t*)(from + w.group_bytes() - 64) + v * 16) *
                                load<f32x16>(w.units.get() + n) / larger(load<f32x16>(w.scales.get() + n), all(1e-30f));
            fixed[v] = nearest(part * (four ? 256.0f : 32767.0f));
        }
        if (four) {
            u16x32 ratio[2], added[2];
            for (int v = 0; v < 2; v++) {
                ratio[v] = (u16x32)((fixed[v] & 0xffff) | fixed[v] << 16);
                added[v] = 128 * 256 + 128 - 8 * ratio[v];
            }
            for (int i = 0; i < words; i++, to += 128) {
                const u16x32 codes = load<u16x32>(from + i * 64);
                store(to, widen4(codes, ratio[0], added[0]));
                store(to + 64, widen4(codes >> 4, ratio[1], added[1]));
            }
            continue;
        }
        int16_t ratio[128];
        for (int i = 0; i < 128; i++) ratio[i] = (int16_t)fixed[i / 64][i / 4 % 16];
        for (int i = 0; i < words; i++, to += 128)
            for (int j = 0; j < 128; j++)
                to[j] = (uint8_t)((((from[i * 128 + j] - 128) * ratio[j] + 16384) >> 15) + 128);
    }
}

// M rows of a panel, for M that only the run knows.
template <int M = TILE_ROWS>
static void some_rows(const Rows& rows, int m, int count, const Linear& w, int p, const uint8_t* panel, const Target& out) {
    if constexpr (M > 1)
        if (count < M) return some_rows<M - 1>(rows, m, count, w, p, panel, out);
    rows.floats ? tile_floats<M>(rows, m, w, p, panel, out) : tile8<M>(rows, m, w, p, panel, out);
}

// Rows of the next tile: the last two share what is left, since one of few rows waits for each product.
static inline int tile_of(int left) {
    return left > TILE_ROWS && left < 2 * TILE_ROWS ? (left + 1) / 2 : std::min(left, TILE_ROWS);
}

using Panels = std::vector<int>;

static void many_rows(const Rows& rows, const Linear& w, const Target& out, Pool& pool, Buffer<uint8_t>* scratch,
                      const Panels* only) {
    const bool resident = w.kind == FLOATS || w.kind == CHANNELS8;
    const int panels = only ? (int)only->size() : w.count();
    // Some panels stay in a core's cache while all rows pass by; a panel that is widened is so once for all rows.
    const size_t size = (size_t)w.steps * 128;
    const int fit = std::max(1, (int)(IN_CACHE / size)), fair = std::max(1, panels / (8 * pool.threads()));
    const int together = std::min(fit, fair), groups = (panels + together - 1) / together;
    const int least = rounded(96, TILE_ROWS), wanted = (8 * pool.threads() + groups - 1) / groups;
    const int blocks = resident ? std::max(1, std::min(wanted, rows.m / least)) : 1;
    const int block = rounded((rows.m + blocks - 1) / blocks, TILE_ROWS);
    pool.each(blocks * groups, [&](int task, int thread) {
        const int first = task % groups * together, some = std::min(together, panels - first);
        const auto number = [&](int i) { return only ? (*only)[(size_t)(first + i)] : first + i; };
        uint8_t* wide = resident ? nullptr : scratch[thread].need((size_t)some * size);
        for (int i = 0; !resident && i < some; i++) widen(w, number(i), wide + (size_t)i * size);
        const int begin = task / groups * block, end = std::min(rows.m, begin + block);
        for (int m = begin, count; m < end; m += count) {
            count = tile_of(end - m);
            for (int i = 0; i < some; i++) {
                const uint8_t* panel = resident ? w.panel(number(i)) : wide + (size_t)i * size;
                some_rows(rows, m, count, w, number(i), panel, out);
            }
        }
    });
}

// What a group of a panel gives M rows, of both bytes of their numbers; `high` and `low` go on behind the group.
template <int M, bool FOUR>
static inline void dots_of_group(const uint8_t* from, int words, size_t stride, const int8_t*& high, const int8_t*& low,
                                 i32x16 (&coarse)[M][2], i32x16 (&fine)[M][2]) {
#if defined(HALF_REGISTERS)
    __m256i tops[M][4], ends[M][4];
    std::memcpy(tops, coarse, sizeof tops), std::memcpy(ends, fine, sizeof ends);
    for (int i = 0; i < words; i++, high += 4, low += 4, from += FOUR ? 64 : 128) {
        __m256i b[4];
        __builtin_prefetch(from + AHEAD);
        if constexpr (!FOUR) __builtin_prefetch(from + AHEAD + 64);
#pragma GCC unroll 4
        for (int v = 0; v < 4; v++) {
            b[v] = Int8::load((const char*)from + (FOUR ? v % 2 : v) * 32);
            if constexpr (FOUR) b[v] = _mm256_and_si256(v < 2 ? b[v] : _mm256_srli_epi16(b[v], 4), _mm256_set1_epi8(15));
        }
#pragma GCC unroll 4
        for (int r = 0; r < M; r++) {
            const __m256i x1 = Int8::all((const char*)high + (size_t)r * stride);
            const __m256i x0 = Int8::all((const char*)low + (size_t)r * stride);
#pragma GCC unroll 4
            for (int v = 0; v < 4; v++) {
                tops[r][v] = FOUR ? small_dot4(tops[r][v], x1, b[v]) : half_dot4(tops[r][v], x1, b[v]);
                ends[r][v] = FOUR ? small_dot4(ends[r][v], x0, b[v]) : half_dot4(ends[r][v], x0, b[v]);
            }
        }
    }
    std::memcpy(coarse, tops, sizeof tops), std::memcpy(fine, ends, sizeof ends);
#else
    for (int i = 0; i < words; i++, high += 4, low += 4) {
        i32x16 b[2];
        __builtin_prefetch(from + i * (FOUR ? 64 : 128) + AHEAD);
        if constexpr (!FOUR) __builtin_prefetch(from + i * 128 + AHEAD + 64);
        if constexpr (FOUR) {
            const u8x64 both = load<u8x64>(from + i * 64);
            b[0] = (i32x16)(both & 15);
            b[1] = (i32x16)((u8x64)((u32x16)both >> 4) & 15);
        } else {
            b[0] = load<i32x16>(from + i * 128), b[1] = load<i32x16>(from + i * 128 + 64);
        }
#pragma GCC unroll 4
        for (int r = 0; r < M; r++) {
            uint32_t x1, x0;
            std::memcpy(&x1, high + (size_t)r * stride, 4);
            std::memcpy(&x0, low + (size_t)r * stride, 4);
#pragma GCC unroll 2
            for (int v = 0; v < 2; v++) {
                coarse[r][v] = dot4(coarse[r][v], x1, b[v]);
                fine[r][v] = dot4(fine[r][v], x0, b[v]);
            }
        }
    }
#endif
}

// A panel for M rows, its codes as they are stored.
template <int M, bool FOUR>
static void few_tile(const Rows& rows, int m, const Linear& w, int p, const Target& out) {
    constexpr int ZERO = FOUR ? 8 : 128;
    f32x16 y[M][2] = {};
    const uint8_t* from = w.panel(p);
    const int words = w.group / 4;
    const int8_t* high = rows.high.get() + area(m, rows.stride);
    const int8_t* low = rows.low.get() + area(m, rows.stride);
    for (int g = 0; g < w.groups; g++) {
        i32x16 coarse[M][2] = {}, fine[M][2] = {};
        dots_of_group<M, FOUR>(from, words, (size_t)rows.stride, high, low, coarse, fine);
        from += w.group_bytes();
        for (int v = 0; v < 2; v++) {
            const f32x16 scale = from_half((const uint16_t*)(from - 64) + v * 16);
            for (int r = 0; r < M; r++) {
                const size_t at = area(m + r, w.groups) + g;
                const i32x16 dots = coarse[r][v] * FINE + fine[r][v] - ZERO * rows.sums.get()[at];
                y[r][v] += to_float(dots) * (scale * rows.scales.get()[at]);
            }
        }
    }
    for (int v = 0; v < 2; v++) {
        const int n = p * PANEL + v * 16;
        const f32x16 unit = load<f32x16>(w.units.get() + n);
        const f32x16 bias = w.biased ? load<f32x16>(w.bias.get() + n) : f32x16{};
        for (int r = 0; r < M; r++) out.put(m + r, n, y[r][v] * unit + bias);
    }
}

template <bool FOUR>
static void few_rows_of(const Rows& rows, const Linear& w, int p, const Target& out) {
    int m = 0;
    constexpr int MOST = TILE_ROWS > 4 ? 4 : 1;
    for (; m + MOST <= rows.m; m += MOST) few_tile<MOST, FOUR>(rows, m, w, p, out);
    if (MOST > 2 && m + 2 <= rows.m) few_tile<2, FOUR>(rows, m, w, p, out), m += 2;
    for (; m < rows.m; m++) few_tile<1, FOUR>(rows, m, w, p, out);
}

static void few_rows(const Rows& rows, const Linear& w, const Target& out, Pool& pool, const Panels* only) {
    const int panels = only ? (int)only->size() : w.count();
    const int together = std::max(1, std::min(16, panels / (4 * pool.threads())));
    pool.each((panels + together - 1) / together, [&](int task, int) {
        for (int i = task * together; i < std::min(panels, (task + 1) * together); i++) {
            const int p = only ? (*only)[(size_t)i] : i;
            w.kind == GROUPS4 ? few_rows_of<true>(rows, w, p, out) : few_rows_of<false>(rows, w, p, out);
        }
    });
}

// All of a layer's outputs, or those of some panels.
static void multiply(const Rows& rows, const Linear& w, const Target& out, Pool& pool, Buffer<uint8_t>* scratch,
                     const Panels* only = nullptr) {
    rows.few ? few_rows(rows, w, out, pool, only) : many_rows(rows, w, out, pool, scratch, only);
}
