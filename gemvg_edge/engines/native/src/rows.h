// Activations: rows of numbers, rounded as weights.h says.
#pragma once

constexpr float OUTLIER = 16;   // times a row's mean magnitude: past it a row has any
constexpr float REACH = 9;      // times the magnitude of a row's bulk that 7 bits are for then, some 6 deviations
constexpr int RARE = 128;       // inputs an outlier: a row with more has a long tail, and its high digits would cost more
constexpr int HIGH = 127, FINE = 254;

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
