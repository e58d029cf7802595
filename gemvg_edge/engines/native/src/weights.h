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
constexpr int MOST_GROUP = 128;  // inputs: the sum of more products of 8 and 15 bits may not fit 32

enum Kind { FLOATS, CHANNELS8, GROUPS8, GROUPS4 };

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

// What a bundle holds of a layer (library.py has it for Python).
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
