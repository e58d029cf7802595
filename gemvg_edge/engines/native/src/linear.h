// Linear layers: how weights lie in memory, how activations are rounded, and both products.
//
// Weights lie in panels of 32 outputs. A step of a panel is 4 bytes of the inputs for each output: 4 of 8 bits, in 4 bits
// 4 too (a byte holds outputs n and n + 16), or 1 float.
//
// Few rows (decoding) are bound by reading weights: 4- and 8-bit codes are multiplied with their group's own scale, and
// activations have 15 bits, one scale a group. Many rows (prefill, vision) are bound by arithmetic: a panel's codes
// become 8-bit codes with one scale an output, and activations have 8 bits with one scale a row. A row's outliers, which
// would take those bits from all others, carry a second digit: x = scale * (127 * high + low).
#pragma once

constexpr int PANEL = 32;       // outputs
constexpr int FEW_ROWS = 16;    // up to here the weights' own groups are multiplied
constexpr float OUTLIER = 16;   // times a row's mean magnitude: past it a row has any
constexpr float REACH = 9;      // times the magnitude of a row's bulk that 7 bits are for then, some 6 deviations
constexpr int RARE = 128;       // inputs an outlier: a row with more has a long tail, and its high digits would cost more
constexpr int HIGH = 127, FINE = 254;
constexpr size_t IN_CACHE = 512 << 10;  // bytes of panels that stay in a core's second cache beside some rows
constexpr int AHEAD = 8192;     // bytes: weights are asked for so early, since a processor's own guess stops at each page
constexpr int MOST_GROUP = 128;  // inputs: the sum of more products of 8 and 15 bits may not fit 32

enum Kind { FLOATS, CHANNELS8, GROUPS8, GROUPS4 };
enum Then { STORE, ADD, QUICK_GELU, GELU, SILU, TIMES };  // what a product does with what is there

static inline int rounded(int n, int to) { return (n + to - 1) / to * to; }
static inline size_t area(int a, int b) { return (size_t)a * (size_t)b; }

struct Linear {
    Kind kind = FLOATS;
    int n = 0, k = 0;        // outputs, inputs
    int steps = 0;           // of a panel
    int group = 0, groups = 0;  // inputs that share a scale, and how many such groups
    size_t panel_bytes = 0;
    Buffer<uint8_t> panels;
    Buffer<float> scales;    // (n), of 8-bit codes with one scale an output
    Buffer<float> units;     // (n), powers of two that a group's scale of 16 bits is in
    Buffer<float> bias;      // (n)
    Buffer<int64_t> order;   // (k) which input each column stands for
    bool biased = false, ordered = false;

    int count() const { return rounded(n, PANEL) / PANEL; }
    const uint8_t* panel(int p) const { return panels.get() + (size_t)p * panel_bytes; }
    // A group of a panel: its codes, and behind them 32 scales in 16 bits.
    size_t group_bytes() const { return (size_t)group / 4 * (kind == GROUPS4 ? 64 : 128) + 64; }
    size_t bytes() const {
        return panels.bytes() + scales.bytes() + units.bytes() + bias.bytes() + order.bytes();
    }
};

// What a bundle holds of a layer (api.cpp has it as C).
struct Stored {
    int bits;  // 0: floats
    int n, k, group;
    const uint8_t* codes;  // (n, ceil(k / group), group * bits / 8), two of 4 bits a byte, the low one first
    const float* scales;   // (n, ceil(k / group))
    const float* floats;   // (n, k)
    const float* bias;     // (n) or null
    const int64_t* order;  // (k) or null
};

static void keep_vector(Buffer<float>& to, const float* from, int n) {
    std::memcpy(to.zeros((size_t)rounded(n, PANEL)), from, (size_t)n * 4);
}

static inline int stored_code(const Stored& s, size_t row, int at) {
    const uint8_t* codes = s.codes + row * (size_t)s.group * s.bits / 8;
    return s.bits == 8 ? codes[at] - 128 : (codes[at / 2] >> (at % 2 * 4) & 15) - 8;
}

static void pack_floats(const Stored& s, Linear& w, int p) {
    float* to = (float*)(w.panels.get() + (size_t)p * w.panel_bytes);
    for (int c = 0; c < PANEL; c++) {
        const int n = p * PANEL + c;
        for (int k = 0; k < s.k; k++) to[(size_t)k * PANEL + c] = n < s.n ? s.floats[area(n, s.k) + k] : 0;
    }
}

// Codes of groups -> codes with one scale an output. Exact where the groups of an output share their scale.
static void pack_channels(const Stored& s, Linear& w, int p) {
    uint8_t* to = w.panels.get() + (size_t)p * w.panel_bytes;
    std::memset(to, 128, w.panel_bytes);
    for (int c = 0; c < PANEL && p * PANEL + c < s.n; c++) {
        const int n = p * PANEL + c, groups = w.groups;
        const float* scales = s.scales + area(n, groups);
        float most = 0, same = scales[0];
        for (int g = 0; g < groups; g++) {
            same = scales[g] == same ? same : 0;
            int far = 0;
            for (int i = 0; i < s.group; i++) {
                const int code = std::abs(stored_code(s, area(n, groups) + g, i));
                far = code > far ? code : far;
            }
            most = std::max(most, std::fabs(scales[g]) * (float)far);
        }
        const float scale = same != 0 ? same : most > 0 ? most / 127 : 1;
        w.scales.get()[n] = scale;
        for (int k = 0; k < s.k; k++) {
            const int code = stored_code(s, area(n, groups) + k / s.group, k % s.group);
            const float value = same != 0 ? (float)code : std::nearbyint((float)code * scales[k / s.group] / scale);
            to[(size_t)(k / 4) * 128 + c * 4 + k % 4] = (uint8_t)((int)value + 128);
        }
    }
}

static void pack_groups(const Stored& s, Linear& w, int p) {
    uint8_t* to = w.panels.get() + (size_t)p * w.panel_bytes;
    const int words = w.group / 4, stored_groups = rounded(s.k, s.group) / s.group;
    const size_t group_bytes = w.group_bytes();
    const bool four = w.kind == GROUPS4;
    for (int g = 0; g < w.groups; g++) std::memset(to + g * group_bytes, four ? 0x88 : 0x80, group_bytes - 64);
    for (int g = 0; g < w.groups; g++) std::memset(to + (g + 1) * group_bytes - 64, 0, 64);
    for (int c = 0; c < PANEL && p * PANEL + c < s.n; c++) {
        const int n = p * PANEL + c;
        float most = 0;
        for (int g = 0; g < stored_groups; g++) most = std::max(most, std::fabs(s.scales[area(n, stored_groups) + g]));
        const float unit = most > 0 ? std::exp2(std::floor(std::log2(most))) : 1;
        w.units.get()[n] = unit;
        for (int g = 0; g < w.groups; g++) {
            uint8_t* at = to + g * group_bytes;
            const uint8_t* codes = s.codes + area(n, stored_groups) * (size_t)s.group * s.bits / 8 +
                                   (size_t)g * (size_t)w.group * s.bits / 8;
            if (four) {
                const int shift = c < 16 ? 0 : 4;
                const uint32_t kept = c < 16 ? 0xf0f0f0f0u : 0x0f0f0f0fu;
                for (int i = 0; i < words; i++) {
                    const uint32_t x = codes[2 * i] | (uint32_t)codes[2 * i + 1] << 8;
                    const uint32_t spread = (x & 15) | (x & 0xf0) << 4 | (x & 0xf00) << 8 | (x & 0xf000) << 12;
                    uint32_t word;
                    uint8_t* place = at + i * 64 + (c & 15) * 4;
                    std::memcpy(&word, place, 4);
                    word = (word & kept) | spread << shift;
                    std::memcpy(place, &word, 4);
                }
            } else {
                for (int i = 0; i < words; i++) std::memcpy(at + i * 128 + c * 4, codes + 4 * i, 4);
            }
            uint16_t half[16];
            to_half(half, all(s.scales[area(n, stored_groups) + g * w.group / s.group] / unit));
            std::memcpy(at + group_bytes - 64 + c * 2, half, 2);
        }
    }
    // One scale an output for the product of many rows: the largest that a code of the output can stand for.
    for (int c = 0; c < PANEL && p * PANEL + c < s.n; c++) {
        const int n = p * PANEL + c;
        float most = 0;
        for (int g = 0; g < stored_groups; g++) most = std::max(most, std::fabs(s.scales[area(n, stored_groups) + g]));
        w.scales.get()[n] = most > 0 ? most * (four ? 8.0f : 128.0f) / 127 : 1;
    }
}

static void pack(const Stored& s, Linear& w, bool many_rows_only, Pool& pool) {
    w.n = s.n, w.k = s.k, w.group = s.group;
    w.kind = s.bits == 0 ? FLOATS : s.bits == 4 ? GROUPS4 : many_rows_only ? CHANNELS8 : GROUPS8;
    const int wide = rounded(s.n, PANEL);
    if (w.kind == FLOATS) {
        w.steps = s.k;
        w.panel_bytes = (size_t)s.k * 128;
    } else {
        if (w.kind != CHANNELS8) w.group = std::min(s.group, MOST_GROUP);
        w.groups = rounded(s.k, s.group) / w.group;
        w.steps = w.kind == CHANNELS8 ? rounded(s.k, 4) / 4 : w.groups * s.group / 4;
        w.panel_bytes = w.kind == CHANNELS8 ? (size_t)w.steps * 128 : (size_t)w.groups * w.group_bytes();
        w.scales.zeros((size_t)wide), w.units.zeros((size_t)wide);
    }
    w.panels.need(w.panel_bytes * (size_t)w.count());
    if ((w.biased = s.bias)) keep_vector(w.bias, s.bias, s.n);
    if ((w.ordered = s.order)) std::memcpy(w.order.need((size_t)s.k), s.order, (size_t)s.k * 8);
    pool.each(w.count(), [&](int p, int) {
        w.kind == FLOATS ? pack_floats(s, w, p) : w.kind == CHANNELS8 ? pack_channels(s, w, p) : pack_groups(s, w, p);
    });
}

// Activations, rounded for one layer or for several that read them alike.
struct Rows {
    int m = 0, k = 0;
    bool few = false, floats = false;
    int stride = 0;            // bytes of a row
    int group = 0, groups = 0;
    Buffer<int8_t> low, high;  // (m, stride): with few rows `high` is the coarse digit of all, else that of `words`
    Buffer<float> scales;      // (m), or (m, groups)
    Buffer<int32_t> sums;      // (m), or (m, groups): of the codes, for what weights count from
    Buffer<float> values;      // (m, k) where weights are floats
    std::vector<int> words;    // which steps of 4 inputs have outliers
    int high_stride = 0;

    struct Outlier {
        int row, at, high;
    };
    std::vector<std::vector<Outlier>> found;  // by thread
};

static void begin_rows(Rows& rows, int m, const Linear& w, Pool& pool) {
    rows.m = m, rows.k = w.k;
    rows.floats = w.kind == FLOATS;
    rows.few = m <= FEW_ROWS && (w.kind == GROUPS4 || w.kind == GROUPS8);
    rows.words.clear();
    rows.high_stride = 0;
    if (rows.floats) {
        rows.stride = w.k * 4;
        rows.values.need(area(m, w.k));
        return;
    }
    rows.group = w.group, rows.groups = w.groups;
    rows.stride = w.steps * 4 + 64;  // not a power of two, or all rows would share a few sets of the cache
    rows.low.need(area(m, rows.stride));
    if (rows.few) rows.high.need(area(m, rows.stride));
    rows.scales.need(area(m, rows.few ? rows.groups : 1));
    rows.sums.need(area(m, rows.few ? rows.groups : 1));
    rows.found.resize((size_t)pool.threads());
    for (auto& one : rows.found) one.clear();
}

// One row, x (k) with zeros up to a whole vector past it.
static void round_row(Rows& rows, int m, const float* x, int thread) {
    const int k = rows.k, whole = rounded(k, 16);
    if (rows.floats) {
        std::memcpy(rows.values.get() + area(m, k), x, (size_t)k * 4);
        return;
    }
    int8_t* low = rows.low.get() + area(m, rows.stride);
    if (rows.few) {
        int8_t* high = rows.high.get() + area(m, rows.stride);
        for (int g = 0; g < rows.groups; g++) {
            f32x16 most{};
            for (int i = g * rows.group; i < (g + 1) * rows.group && i < whole; i += 16)
                most = larger(most, absolute(load<f32x16>(x + i)));
            const float far = largest(most), scale = far / 127;
            const float inverse = far > 0 ? 127 / far : 0;
            i32x16 total{};
            for (int i = g * rows.group; i < (g + 1) * rows.group; i += 16) {
                const f32x16 v = i < whole ? load<f32x16>(x + i) * inverse : f32x16{};
                const i32x16 coarse = nearest(v), fine = nearest((v - to_float(coarse)) * (float)FINE);
                to_bytes(high + i, coarse), to_bytes(low + i, fine);
                total += coarse * FINE + fine;
            }
            int32_t all_of_it = 0;
            for (int i = 0; i < 16; i++) all_of_it += total[i];
            rows.scales.get()[area(m, rows.groups) + g] = scale / FINE;
            rows.sums.get()[area(m, rows.groups) + g] = all_of_it;
        }
        return;
    }
    f32x16 most{}, magnitude{};
    for (int i = 0; i < whole; i += 16) {
        const f32x16 v = absolute(load<f32x16>(x + i));
        most = larger(most, v), magnitude += v;
    }
    const float far = largest(most);
    float limit = far;
    if (far > OUTLIER * sum(magnitude) / (float)k && far < INFINITY) {
        f32x16 roots{};  // their mean hardly knows the outliers
        for (int i = 0; i < whole; i += 16) roots += square_root(absolute(load<f32x16>(x + i)));
        const float root = sum(roots) / (float)k;
        const float reach = std::max(REACH * root * root, far / 120);
        i32x16 past{};
        for (int i = 0; i < whole; i += 16) past -= absolute(load<f32x16>(x + i)) > reach;
        int count = 0;
        for (int i = 0; i < 16; i++) count += past[i];
        if (count <= std::max(4, k / RARE)) limit = std::min(far, reach);
    }
    const float scale = limit != 0 ? limit / 127 : 1;  // NaN stays NaN
    const f32x16 inverse = all(1 / scale);
    i32x16 total{};
    for (int i = 0; i < whole; i += 16) {
        const i32x16 codes = nearest(load<f32x16>(x + i) * inverse);
        to_bytes(low + i, codes);
        total += codes;
    }
    std::memset(low + whole, 0, (size_t)(rows.stride - whole));
    int32_t all_of_it = 0;
    for (int i = 0; i < 16; i++) all_of_it += total[i];
    if (far > limit)  // rare: its codes were too large for a byte, and are put right one by one
        for (int i = 0; i < k; i++)
            if (std::fabs(x[i]) > limit) {
                const int code = (int)std::nearbyint(x[i] / scale), high = (int)std::nearbyint((float)code / HIGH);
                low[i] = (int8_t)(code - HIGH * high);
                rows.found[(size_t)thread].push_back({m, i, high});
            }
    rows.scales.get()[m] = scale;
    rows.sums.get()[m] = all_of_it;
}

// After all rows: the outliers' second digits, side by side for the steps that have any.
static void end_rows(Rows& rows) {
    if (rows.floats || rows.few) return;
    for (auto& found : rows.found)
        for (auto& one : found) rows.words.push_back(one.at / 4);
    if (rows.words.empty()) return;
    std::sort(rows.words.begin(), rows.words.end());
    rows.words.erase(std::unique(rows.words.begin(), rows.words.end()), rows.words.end());
    rows.high_stride = (int)rows.words.size() * 4;
    int8_t* high = rows.high.zeros(area(rows.m, rows.high_stride));
    for (auto& found : rows.found)
        for (auto& one : found) {
            const auto word = std::lower_bound(rows.words.begin(), rows.words.end(), one.at / 4);
            high[area(one.row, rows.high_stride) + (word - rows.words.begin()) * 4 + one.at % 4] = (int8_t)one.high;
        }
}

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
                std::memcpy(&x1, high + (size_t)r * (size_t)rows.stride, 4);
                std::memcpy(&x0, low + (size_t)r * (size_t)rows.stride, 4);
#pragma GCC unroll 2
                for (int v = 0; v < 2; v++) {
                    coarse[r][v] = dot4(coarse[r][v], x1, b[v]);
                    fine[r][v] = dot4(fine[r][v], x0, b[v]);
                }
            }
        }
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
