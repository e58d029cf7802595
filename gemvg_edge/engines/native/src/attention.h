// Attention: whole rows of scores at a time, since a row of a scene's keys fits a core's cache.
#pragma once

// Words of 4 bytes that a row of `n` numbers takes in a product.
static inline int words_of(int n) { return rounded(n, Attended::DEPTH) / Attended::DEPTH; }

// Queries, keys and values of one head as the products want them.
struct Head {
    const uint32_t* queries;  // (rows, words_of(head_dim)), times LOG2_E / sqrt(head_dim)
    const uint32_t* keys;     // panels of 32 keys: (keys / 32, words_of(head_dim), 32)
    const uint32_t* values;   // pairs of vectors: (head_dim / 32, words of the keys, 32), a last single one without its pair
    int keys_count;
    int head_dim;
};
static inline size_t key_words(int keys, int head_dim) { return area(rounded(keys, PANEL), words_of(head_dim)); }
static inline size_t value_words(int keys, int head_dim) {
    return area(rounded(head_dim, 16), rounded(keys, PANEL) / Attended::DEPTH);
}

// A row of numbers -> words of a query.
static inline void put_query(uint32_t* to, const float* from, int head_dim) {
    for (int i = 0; i < words_of(head_dim); i++) to[i] = Attended::word(from + i * Attended::DEPTH, 1);
}
// Key j into its panel.
static inline void put_key(uint32_t* keys, int j, const float* from, int head_dim) {
    uint32_t* to = keys + area(j / PANEL, words_of(head_dim) * PANEL) + j % PANEL;
    for (int i = 0; i < words_of(head_dim); i++) to[i * PANEL] = Attended::word(from + i * Attended::DEPTH, 1);
}
// Values of keys j .. j + DEPTH - 1, which lie `apart` floats from each other.
static inline void put_values(uint32_t* values, int j, const float* from, int apart, int keys, int head_dim) {
    const int steps = rounded(keys, PANEL) / Attended::DEPTH, step = j / Attended::DEPTH;
    for (int d = 0; d < head_dim; d += 16) {
        const int pair = d / 32, width = pair * 32 + 32 <= rounded(head_dim, 16) ? 32 : 16;
        uint32_t* to = values + area(pair * 32, steps) + area(step, width) + d % 32;
        for (int i = 0; i < 16 && d + i < head_dim; i++) to[i] = Attended::word(from + d + i, apart);
    }
}

constexpr float UNSEEN = -1e30f;  // the score of a key that a row does not see; e to the power of one is 2 to that of ours

struct Scores {
    Buffer<float> rows;      // (TILE_ROWS, keys)
    Buffer<uint32_t> words;  // the same as the second product wants it
};

// M rows from `row` on; row r sees the first `sees + r` keys, or all where `sees` is negative.
template <int M>
static void attend_tile(const Head& head, int row, int sees, float* out, int out_stride, Scores& scratch) {
    using Sums = Attended::Sums;
    const int depth = words_of(head.head_dim);
    const int most = sees < 0 ? head.keys_count : std::min(head.keys_count, sees + row + M - 1);
    const int wide = rounded(most, PANEL), steps = wide / Attended::DEPTH;
    const int all_steps = rounded(head.keys_count, PANEL) / Attended::DEPTH;
    float* scores = scratch.rows.need(area(TILE_ROWS, wide));
    uint32_t* words = scratch.words.need(area(TILE_ROWS, steps));
    const char* queries = (const char*)(head.queries + area(row, depth));
    for (int j = 0; j < wide; j += PANEL) {
        Sums acc[M][2] = {};
        tile<Attended, M, 2>(queries, (size_t)depth * 4, (const i32x16*)(head.keys + area(j, depth)), 2, depth, acc);
        for (int m = 0; m < M; m++)
            for (int v = 0; v < 2; v++) store(scores + area(m, wide) + j + v * 16, acc[m][v]);
    }
    float totals[M];
    for (int m = 0; m < M; m++) {
        float* s = scores + area(m, wide);
        const int seen = sees < 0 ? most : std::min(most, sees + row + m);
        for (int j = seen; j < wide; j++) s[j] = UNSEEN;
        f32x16 far = load<f32x16>(s);
        for (int j = 16; j < wide; j += 16) far = larger(far, load<f32x16>(s + j));
        const f32x16 top = all(largest(far));
        f32x16 total{}, more{};
        uint32_t* to = words + area(m, steps);
        for (int j = 0; j < wide; j += PANEL) {
            const f32x16 low = power_of_two(load<f32x16>(s + j) - top), high = power_of_two(load<f32x16>(s + j + 16) - top);
            Attended::words(to + j / Attended::DEPTH, low, high);
            total += low, more += high;
        }
        totals[m] = sum(total + more);
    }
    for (int d = 0; d < head.head_dim; d += 32) {
        const bool pair = d + 32 <= rounded(head.head_dim, 16);
        const i32x16* b = (const i32x16*)(head.values + area(d, all_steps));
        Sums acc[M][2] = {};
        if (pair) {
            tile<Attended, M, 2>((const char*)words, (size_t)steps * 4, b, 2, steps, acc);
        } else {
            Sums one[M][1] = {};
            tile<Attended, M, 1>((const char*)words, (size_t)steps * 4, b, 1, steps, one);
            for (int m = 0; m < M; m++) acc[m][0] = one[m][0];
        }
        for (int m = 0; m < M; m++)
            for (int v = 0; v < (pair ? 2 : 1); v++) {
                const f32x16 y = acc[m][v] * (1 / totals[m]);
                float* to = out + area(row + m, out_stride) + d + v * 16;
                const int left = head.head_dim - d - v * 16;
                if (left >= 16) store(to, y);
                else for (int i = 0; i < left; i++) to[i] = y[i];
            }
    }
}

template <int M = TILE_ROWS>
static void attend_some(const Head& head, int row, int count, int sees, float* out, int out_stride, Scores& scratch) {
    if constexpr (M > 1)
        if (count < M) return attend_some<M - 1>(head, row, count, sees, out, out_stride, scratch);
    attend_tile<M>(head, row, sees, out, out_stride, scratch);
}
static void attend_rows(const Head& head, int row, int end, int sees, float* out, int out_stride, Scores& scratch) {
    for (int count; row < end; row += count) {
        count = tile_of(end - row);
        attend_some(head, row, count, sees, out, out_stride, scratch);
    }
}

// Keys and values of a scene, in 16 bits: keys in blocks of 16 (layers, heads, blocks, head_dim, 16), values by key.
struct Cache {
    int capacity, layers, heads, head_dim;
    Buffer<uint16_t> keys, values;

    Cache(int capacity, int layers, int heads, int head_dim)
        : capacity(rounded(capacity, 16)), layers(layers), heads(heads), head_dim(head_dim) {
        // Not cleared: nothing past a scene's tokens is read but to be masked.
        keys.need(area(layers * heads, head_dim) * (size_t)this->capacity);
        values.need(area(layers * heads, head_dim) * (size_t)this->capacity);
    }
    size_t plane(int layer, int head) const { return area(layer * heads + head, head_dim) * (size_t)capacity; }
    void put(int layer, int head, int at, const float* key, const float* value) {
        uint16_t* k = keys.get() + plane(layer, head) + area(at / 16 * 16, head_dim) + at % 16;
        uint16_t* v = values.get() + plane(layer, head) + area(at, head_dim);
        for (int d = 0; d < head_dim; d += 16) {
            uint16_t half[16];
            to_half(half, load<f32x16>(key + d));
            for (int i = 0; i < 16; i++) k[(d + i) * 16] = half[i];
            to_half(v + d, load<f32x16>(value + d));
        }
    }
};

// One new token's heads that share keys: (count, head_dim) each of queries and out, over the first `seen` keys.
static void attend_few(const Cache& cache, int layer, int kv_head, const float* queries, int count, int seen, float* out,
                       Scores& scratch) {
    const int dim = cache.head_dim, wide = rounded(seen, 16);
    const uint16_t* keys = cache.keys.get() + cache.plane(layer, kv_head);
    const uint16_t* values = cache.values.get() + cache.plane(layer, kv_head);
    float* scores = scratch.rows.need(area(count, wide));
    for (int first = 0; first < count; first += 8) {
        const int some = std::min(8, count - first);
        for (int j = 0; j < wide; j += 16) {
            f32x16 acc[8] = {};
            const uint16_t* k = keys + area(j, dim);
            const float* q = queries + area(first, dim);
            for (int d = 0; d < dim; d++) {
                const f32x16 key = from_half(k + d * 16);
                for (int r = 0; r < some; r++) acc[r] += q[r * dim + d] * key;
            }
            for (int r = 0; r < some; r++) store(scores + area(first + r, wide) + j, acc[r]);
        }
    }
    for (int r = 0; r < count; r++) {
        float* s = scores + area(r, wide);
        for (int j = seen; j < wide; j++) s[j] = UNSEEN;
        f32x16 far = load<f32x16>(s);
        for (int j = 16; j < wide; j += 16) far = larger(far, load<f32x16>(s + j));
        const f32x16 top = all(largest(far));
        f32x16 total{};
        for (int j = 0; j < wide; j += 16) {
            const f32x16 e = power_of_two(load<f32x16>(s + j) - top);
            store(s + j, e), total += e;
        }
        const float part = 1 / sum(total);
        for (int d = 0; d < dim; d += 128) {
            const int vectors = std::min(8, (dim - d) / 16);
            f32x16 acc[8] = {};
            for (int j = 0; j < seen; j++) {
                const uint16_t* v = values + area(j, dim) + d;
                for (int i = 0; i < vectors; i++) acc[i] += s[j] * from_half(v + i * 16);
            }
            for (int i = 0; i < vectors; i++) store(out + r * dim + d + i * 16, acc[i] * part);
        }
    }
}
