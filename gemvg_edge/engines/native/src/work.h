// What both networks work with: threads, scratch memory, norms, rotary angles.
#pragma once

struct Scratch {  // of one thread
    Buffer<float> row, ordered;
    Scores scores;
};

// Threads and the memory that both networks work in, one request at a time.
struct Work {
    explicit Work(int threads) : pool(threads), scratch((size_t)threads), wide((size_t)threads) {}
    Pool pool;
    std::vector<Scratch> scratch;
    std::vector<Buffer<uint8_t>> wide;
    Rows rows;
    Buffer<float> x, wanted, qkv, mixed, mid, merged, last;
    Buffer<uint32_t> queries, keys, values;

    // Rows rounded for a layer. `make` (i, to) gives row i: where it lies in whole vectors, or `to`, written there.
    template <class Make>
    const Rows& round(int m, const Linear& w, const Make& make) {
        begin_rows(rows, m, w, pool);
        const int pieces = (m + 7) / 8;
        pool.each(pieces, [&](int piece, int thread) {
            Scratch& mine = scratch[(size_t)thread];
            const int k = w.k;
            float* row = mine.row.zeros((size_t)rounded(k, 16));
            for (int i = piece * 8; i < std::min(m, piece * 8 + 8); i++) {
                const float* made = make(i, row);
                if (w.ordered) {
                    float* ordered = mine.ordered.zeros((size_t)rounded(k, 16));
                    for (int j = 0; j < k; j++) ordered[j] = made[w.order.get()[j]];
                    made = ordered;
                }
                round_row(rows, i, made, thread);
            }
        });
        end_rows(rows);
        return rows;
    }
    const Rows& round(int m, const Linear& w, const float* from, int stride) {
        return round(m, w, [&](int i, float* to) -> const float* {
            const float* row = from + area(i, stride);
            if (w.k % 16 == 0) return row;
            std::memcpy(to, row, (size_t)w.k * 4);
            return to;
        });
    }
    void multiply(const Rows& given, const Linear& w, float* to, int stride, Then what) {
        ::multiply(given, w, Target{to, stride, what}, pool, wide.data());
    }
};

struct Norm {
    Buffer<float> weight, bias;  // of whole vectors; no bias: by root mean square
    bool centred = false;
    float epsilon = 0;

    const float* operator()(const float* x, int n, float* to) const {
        float mean = 0, square = 0;
        f32x16 total{};
        const int whole = n / 16 * 16;
        if (centred) {
            for (int i = 0; i < whole; i += 16) total += load<f32x16>(x + i);
            mean = sum(total);
            for (int i = whole; i < n; i++) mean += x[i];
            mean /= (float)n;
        }
        total = f32x16{};
        for (int i = 0; i < whole; i += 16) {
            const f32x16 v = load<f32x16>(x + i) - mean;
            total += v * v;
        }
        square = sum(total);
        for (int i = whole; i < n; i++) square += (x[i] - mean) * (x[i] - mean);
        const float scale = 1 / std::sqrt(square / (float)n + epsilon);
        const float *w = weight.get(), *b = bias.get();
        for (int i = 0; i < n; i++) to[i] = (x[i] - mean) * scale * w[i] + (centred ? b[i] : 0);
        return to;
    }
};

// First and second half of a head turned by a token's angles, and scaled; `to` may be `from`.
static inline void turn(const float* from, float* to, const float* cos, const float* sin, int half, float scale) {
    for (int i = 0; i < half; i++) {
        const float a = from[i] * scale, b = from[i + half] * scale;
        to[i] = a * cos[i] - b * sin[i];
        to[i + half] = b * cos[i] + a * sin[i];
    }
}
