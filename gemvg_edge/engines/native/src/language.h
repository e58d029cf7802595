// The language model, as export/decoder.py writes it op by op.
#pragma once

// Tokens of one sequence (library.py has it for Python).
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
