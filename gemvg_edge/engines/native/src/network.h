// Qwen2-VL's vision tower and its language model, as export/vision.py and export/decoder.py write them op by op.
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

struct Vision {
    static constexpr int PIECE = 384;  // rows
    int depth, width, heads, head_dim, merged, hidden;  // merged: patches a token
    Then activation;
    std::vector<Linear> linears;  // patch embedding; qkv, proj, fc1, fc2 of each block; the merger's two
    std::vector<Norm> norms;      // two of each block, the merger's

    // (pictures, n, patch) and rotary rows (n, head_dim / 2) -> (pictures, n / merged, hidden).
    void run(Work& work, const float* patches, int pictures, int n, const float* cos, const float* sin, float* out) {
        const int together = std::max(1, 1024 / n), patch = linears[0].k;
        for (int first = 0; first < pictures; first += together) {
            const int some = std::min(together, pictures - first);
            encode(work, patches + area(first, n) * (size_t)patch, some, n, cos, sin,
                   out + area(first, n / merged) * (size_t)hidden);
        }
    }

    void encode(Work& work, const float* patches, int pictures, int n, const float* cos, const float* sin, float* out) {
        const int m = pictures * n, wide = rounded(width, PANEL);
        float* x = work.x.need(area(m, wide));
        // What is widest is made for some rows at a time, so that it stays in the cache that all cores share.
        const int pieces = (m + PIECE - 1) / PIECE, piece = rounded((m + pieces - 1) / pieces, 2 * TILE_ROWS);
        work.multiply(work.round(m, linears[0], patches, linears[0].k), linears[0], x, wide, STORE);
        for (int layer = 0; layer < depth; layer++) {
            const Linear *qkv = &linears[(size_t)(1 + 4 * layer)], *proj = qkv + 1, *fc1 = qkv + 2, *fc2 = qkv + 3;
            const Norm *before = &norms[(size_t)(2 * layer)], *between = before + 1;
            const int qkv_wide = rounded(qkv->n, PANEL), mid_wide = rounded(fc1->n, PANEL);
            float* mixed = work.mixed.need(area(m, wide));
            begin_attention(work, pictures, n);
            for (int at = 0; at < m; at += piece) {
                const int some = std::min(piece, m - at);
                float* together = work.qkv.need(area(piece, qkv_wide));
                work.multiply(normed(work, some, *qkv, x + area(at, wide), wide, *before), *qkv, together, qkv_wide, STORE);
                take_heads(work, together, qkv_wide, at, some, n, cos, sin);
            }
            attend(work, pictures, n, mixed, wide);
            work.multiply(work.round(m, *proj, mixed, wide), *proj, x, wide, ADD);
            for (int at = 0; at < m; at += piece) {
                const int some = std::min(piece, m - at);
                float *here = x + area(at, wide), *mid = work.mid.need(area(piece, mid_wide));
                work.multiply(normed(work, some, *fc1, here, wide, *between), *fc1, mid, mid_wide, activation);
                work.multiply(work.round(some, *fc2, mid, mid_wide), *fc2, here, wide, ADD);
            }
        }
        const Linear &first = linears[linears.size() - 2], &second = linears.back();
        const int tokens = m / merged, mid_wide = rounded(first.n, PANEL), out_wide = rounded(hidden, PANEL);
        float* mid = work.mid.need(area(tokens, mid_wide));
        const Rows& rows = work.round(tokens, first, [&](int i, float* to) {
            for (int j = 0; j < merged; j++) norms.back()(x + area(i * merged + j, wide), width, to + j * width);
            return to;
        });
        work.multiply(rows, first, mid, mid_wide, GELU);
        float* last = work.last.need(area(tokens, out_wide));
        work.multiply(work.round(tokens, second, mid, mid_wide), second, last, out_wide, STORE);
        for (int i = 0; i < tokens; i++) std::memcpy(out + area(i, hidden), last + area(i, out_wide), (size_t)hidden * 4);
    }

    const Rows& normed(Work& work, int m, const Linear& w, const float* x, int stride, const Norm& norm) {
        return work.round(m, w, [&](int i, float* to) { return norm(x + area(i, stride), width, to); });
    }

    // Words of a picture's head, and where they begin.
    struct Sizes {
        size_t queries, keys, values;
    };
    Sizes sizes(int n) const { return {area(n, words_of(head_dim)), key_words(n, head_dim), value_words(n, head_dim)}; }

    void begin_attention(Work& work, int pictures, int n) {
        const Sizes one = sizes(n);
        const size_t count = (size_t)pictures * (size_t)heads;
        work.queries.need(one.queries * count);
        // What no patch fills must be zeros: the ends of the last panels.
        work.keys.zeros(one.keys * count);
        work.values.zeros(one.values * count);
    }

    // Rows `first` and on of all pictures, queries, keys and values side by side, as words of each head.
    void take_heads(Work& work, const float* qkv, int stride, int first, int some, int n, const float* cos, const float* sin) {
        const Sizes one = sizes(n);
        const float scale = LOG2_E / std::sqrt((float)head_dim);
        work.pool.each(heads, [&](int head, int) {
            alignas(64) float turned[1024] = {};
            for (int i = 0; i < some; i++) {
                const int patch = (first + i) % n;
                const size_t which = area((first + i) / n, heads) + (size_t)head;
                const float* row = qkv + area(i, stride) + head * head_dim;
                const float *c = cos + area(patch, head_dim / 2), *s = sin + area(patch, head_dim / 2);
                turn(row, turned, c, s, head_dim / 2, scale);
                put_query(work.queries.get() + which * one.queries + area(patch, words_of(head_dim)), turned, head_dim);
                turn(row + width, turned, c, s, head_dim / 2, 1);
                put_key(work.keys.get() + which * one.keys, patch, turned, head_dim);
                if (patch % Attended::DEPTH) continue;  // a picture has whole blocks of patches, and a piece whole pairs
                put_values(work.values.get() + which * one.values, patch, row + 2 * width, stride, n, head_dim);
            }
        });
    }

    // Attention within each picture -> (rows, width).
    void attend(Work& work, int pictures, int n, float* out, int out_stride) {
        const Sizes size = sizes(n);
        const int count = pictures * heads;
        const int piece = std::max(TILE_ROWS, rounded(n / 8, TILE_ROWS)), pieces = (n + piece - 1) / piece;
        work.pool.each(count * pieces, [&](int task, int thread) {
            const int which = task / pieces, picture = which / heads, head = which % heads;
            const Head one{work.queries.get() + (size_t)which * size.queries, work.keys.get() + (size_t)which * size.keys,
                           work.values.get() + (size_t)which * size.values, n, head_dim};
            float* to = out + area(picture * n, out_stride) + head * head_dim;
            const int row = task % pieces * piece;
            attend_rows(one, row, std::min(n, row + piece), -1, to, out_stride, work.scratch[(size_t)thread].scores);
        });
    }
};

// Tokens of one sequence (api.cpp has it as C).
struct Tokens {
    const float* embeddings;  // (count, hidden)
    const float *cos, *sin;   // (count, head_dim / 2)
    Cache* cache;
    int count, past;
    int rows;              // of how many of the last tokens logits are wanted
    const int64_t* legal;  // (legal_count) ids whose logits are wanted, or null for all
    int legal_count;
    float* logits;         // (rows, legal_count or vocab)
};

struct Language {
    int layers, hidden, heads, kv_heads, head_dim, vocab;
    std::vector<Linear> linears;  // qkv, o, gate, up, down of each layer; the head
    std::vector<Norm> norms;      // two of each layer, the last

    void run(Work& work, const Tokens* steps, int count) {
        int m = 0, wanted = 0;
        for (int i = 0; i < count; i++) m += steps[i].count, wanted += steps[i].rows;
        const int wide = rounded(hidden, PANEL);
        float* x = work.x.need(area(m, wide));
        for (int i = 0, row = 0; i < count; row += steps[i++].count)
            for (int t = 0; t < steps[i].count; t++)
                std::memcpy(x + area(row + t, wide), steps[i].embeddings + area(t, hidden), (size_t)hidden * 4);
        for (int layer = 0; layer < layers; layer++) {
            const Linear* own = &linears[(size_t)(5 * layer)];
            const int qkv_wide = rounded(own[0].n, PANEL);
            float* qkv = work.qkv.need(area(m, qkv_wide));
            work.multiply(normed(work, m, own[0], x, norms[(size_t)(2 * layer)]), own[0], qkv, qkv_wide, STORE);
            const int mixed_wide = rounded(heads * head_dim, PANEL);
            float* mixed = work.mixed.need(area(m, mixed_wide));
            for (int i = 0, row = 0; i < count; row += steps[i++].count)
                attend(work, layer, steps[i], qkv + area(row, qkv_wide), qkv_wide, mixed + area(row, mixed_wide), mixed_wide);
            if (layer == layers - 1) {  // past the last attention only the rows that are asked for count
                x = work.wanted.need(area(wanted, wide));
                for (int i = 0, row = 0, to = 0; i < count; row += steps[i++].count)
                    for (int t = steps[i].count - steps[i].rows; t < steps[i].count; t++, to++) {
                        std::memcpy(x + area(to, wide), work.x.get() + area(row + t, wide), (size_t)wide * 4);
                        std::memmove(mixed + area(to, mixed_wide), mixed + area(row + t, mixed_wide), (size_t)mixed_wide * 4);
                    }
                m = wanted;
            }
            work.multiply(work.round(m, own[1], mixed, mixed_wide), own[1], x, wide, ADD);
            const int mid_wide = rounded(own[2].n, PANEL);
            float* mid = work.mid.need(area(m, mid_wide));
            const Norm& between = norms[(size_t)(2 * layer + 1)];
            const Rows& rows = normed(work, m, own[2], x, between);
            work.multiply(rows, own[2], mid, mid_wide, SILU);
            const bool alike = !own[2].ordered && !own[3].ordered && own[2].kind == own[3].kind && own[2].group == own[3].group;
            work.multiply(alike ? rows : normed(work, m, own[3], x, between), own[3], mid, mid_wide, TIMES);
            work.multiply(work.round(m, own[4], mid, mid_wide), own[4], x, wide, ADD);
        }
        score(work, steps, count, x, m);
    }

    const Rows& normed(Work& work, int m, const Linear& w, const float* x, const Norm& norm) {
        return work.round(m, w, [&](int i, float* to) { return norm(x + area(i, rounded(hidden, PANEL)), hidden, to); });
    }

    // Logits of the wanted rows, x (m, hidden); where few ids are legal, only the panels that hold any.
    void score(Work& work, const Tokens* steps, int count, const float* x, int m) {
        const Linear& head = linears.back();
        Panels some;
        bool all_of_them = false;
        for (int i = 0; i < count; i++) {
            all_of_them |= !steps[i].legal;
            for (int j = 0; steps[i].legal && j < steps[i].legal_count; j++) some.push_back((int)(steps[i].legal[j] / PANEL));
        }
        std::sort(some.begin(), some.end());
        some.erase(std::unique(some.begin(), some.end()), some.end());
        const int wide = rounded(vocab, PANEL);
        float* logits = work.last.need(area(m, wide));
        const Rows& rows = normed(work, m, head, x, norms.back());
        ::multiply(rows, head, Target{logits, wide, STORE}, work.pool, work.wide.data(), all_of_them ? nullptr : &some);
        for (int i = 0, row = 0; i < count; i++)
            for (int r = 0; r < steps[i].rows; r++, row++) {
                const float* from = logits + area(row, wide);
                if (!steps[i].legal) std::memcpy(steps[i].logits + area(r, vocab), from, (size_t)vocab * 4);
                for (int j = 0; steps[i].legal && j < steps[i].legal_count; j++)
                    steps[i].logits[area(r, steps[i].legal_count) + j] = from[steps[i].legal[j]];
            }
    }

    // New tokens into the cache, and their attention over it: qkv (count, stride) -> out (count, heads * head_dim).
    void attend(Work& work, int layer, const Tokens& step, float* qkv, int stride, float* out, int out_stride) {
        const int share = heads / kv_heads, half = head_dim / 2;
        const float scale = LOG2_E / std::sqrt((float)head_dim);
        work.pool.each((step.count + 3) / 4, [&](int piece, int) {
            for (int t = piece * 4; t < std::min(step.count, piece * 4 + 4); t++) {
                float* row = qkv + area(t, stride);
                const float *c = step.cos + area(t, half), *s = step.sin + area(t, half);
                for (int h = 0; h < heads + kv_heads; h++) {
                    float* head = row + h * head_dim;
                    turn(head, head, c, s, half, h < heads ? scale : 1);
                }
            }
        });
        work.pool.each(kv_heads, [&](int h, int) {
            for (int t = 0; t < step.count; t++) {
                const float* key = qkv + area(t, stride) + (heads + h) * head_dim;
                step.cache->put(layer, h, step.past + t, key, key + kv_heads * head_dim);
            }
        });
        if (step.count <= FEW_ROWS) {
            work.pool.each(step.count * kv_heads, [&](int task, int thread) {
                const int t = task / kv_heads, h = task % kv_heads;
                attend_few(*step.cache, layer, h, qkv + area(t, stride) + h * share * head_dim, share, step.past + t + 1,
                           out + area(t, out_stride) + h * share * head_dim, work.scratch[(size_t)thread].scores);
            });
            return;
        }
        const int total = step.past + step.count, words = words_of(head_dim);
        const size_t k_size = key_words(total, head_dim), v_size = value_words(total, head_dim);
        uint32_t* keys = work.keys.zeros(k_size * (size_t)kv_heads);
        uint32_t* values = work.values.zeros(v_size * (size_t)kv_heads);
        uint32_t* queries = work.queries.need(area(step.count, words) * (size_t)heads);
        const int blocks = (total + 15) / 16;
        work.pool.each(kv_heads * blocks, [&](int task, int thread) {
            const int h = task / blocks, first = task % blocks * 16;
            float* part = work.scratch[(size_t)thread].row.need(area(17, head_dim));
            const uint16_t* k = step.cache->keys.get() + step.cache->plane(layer, h) + area(first, head_dim);
            const uint16_t* v = step.cache->values.get() + step.cache->plane(layer, h) + area(first, head_dim);
            for (int d = 0; d < head_dim; d++) {
                const f32x16 here = from_half(k + d * 16);
                for (int i = 0; i < 16; i++) part[i * head_dim + d] = here[i];
            }
            for (int i = 0; i < 16 && first + i < total; i++) put_key(keys + (size_t)h * k_size, first + i, part + i * head_dim, head_dim);
            for (int i = 0; i < 16; i++)
                for (int d = 0; d < head_dim; d += 16) store(part + i * head_dim + d, first + i < total ? from_half(v + i * head_dim + d) : f32x16{});
            for (int i = 0; i < 16; i += Attended::DEPTH)
                put_values(values + (size_t)h * v_size, first + i, part + i * head_dim, head_dim, total, head_dim);
        });
        work.pool.each(heads, [&](int h, int) {
            for (int t = 0; t < step.count; t++)
                put_query(queries + area(h * step.count + t, words), qkv + area(t, stride) + h * head_dim, head_dim);
        });
        const int piece = rounded(std::max(1, step.count / 8), TILE_ROWS), pieces = (step.count + piece - 1) / piece;
        work.pool.each(heads * pieces, [&](int task, int thread) {
            const int h = task / pieces;
            const Head one{queries + area(h * step.count, words), keys + (size_t)(h / share) * k_size,
                           values + (size_t)(h / share) * v_size, total, head_dim};
            const int row = task % pieces * piece, end = std::min(step.count, row + piece);
            attend_rows(one, row, end, step.past + 1, out + h * head_dim, out_stride, work.scratch[(size_t)thread].scores);
        });
    }
};
