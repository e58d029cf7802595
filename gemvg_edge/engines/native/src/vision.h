// Qwen2-VL's vision tower, as export/vision.py writes it op by op.
#pragma once

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
