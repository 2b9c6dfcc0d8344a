// Attention by products of pairs of bf16, in the tiles of AMX or in vectors: up to 16 queries at a time read pages of keys and
// values where these lie in the cache.

#pragma once
#include "pages.h"

#if defined(__AVX512BF16__)
#if defined(__AMX_BF16__)
// Tiles 0 and 1 hold sums, 4 keys of a page, 5 its values, 6 queries, 7 their weights of a page.
static void shape_attention(int queries) {
    TileShapes shapes;
    shapes.set({0, 1, 6}, queries, 64);
    shapes.set({4}, TILE, 64);
    shapes.set({5}, PAGE / 2, 64);
    shapes.set({7}, queries, 2 * PAGE);
    shapes.load();
}
#endif

// The pages of a chunk, `count` of which hold what a row may see.
template <int HD> struct Chunk {
    static constexpr int PAGES = CHUNK / PAGE;
    const bf16 *k[PAGES], *v[PAGES];
    int count = PAGES;
    Chunk(const Item<bf16>& item, int start) {  // where the block table ends, its last page
        for (int p = 0; p < PAGES; p++) {
            int position = std::min(start + p * PAGE, item.block.context_len - 1);
            int64_t at = int64_t(item.table[std::max(position, 0) / PAGE]) * HD * PAGE;
            k[p] = item.k + at, v[p] = item.v + at;
        }
    }
};

// Line `i` of two runs: what the next chunk needs into the first cache, and the first of what is needed after it into the second
// (of a run that has begun, hardware fetches the others).
static inline void prefetch_line(int i, const bf16* next, const bf16* later) {
    if (i % 16 < 6) __builtin_prefetch(later + 32 * i, 0, INTO_L2);
    __builtin_prefetch(next + 32 * i, 0, INTO_CACHES);
}

static inline vf add_pairs(vf sum, const bf16* pairs, const bf16* pair) {
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)loadu<vu>(pairs), (__m512bh)_mm512_set1_epi32(loadu<int32_t>(pair)));
}

template <int HD> struct alignas(64) PairAttention {
    static constexpr int PAGES = CHUNK / PAGE;
    bf16 q[32][HD], weights[TILE][CHUNK], own_k[PAGES][HD * PAGE], own_v[PAGES][HD * PAGE];
    float scores[TILE][CHUNK], acc[32][HD], best[32], sum[32];
    int valid[32];    // positions of the chunk that a query may see
    int laid[PAGES];  // where the block table ends in pages of `own_k` and `own_v`, -1: they are of another chunk
    int shaped;

    void begin(const Block& block, int heads, const float* from, int64_t ld) {
        for (int i = 0; i < block.count * heads; i++) {
            const float* src = from + (block.row + i / heads) * ld + i % heads * HD;
            for (int d = 0; d < HD; d += VW) put(q[i] + d, loadu<vf>(src + d));
            memset(acc[i], 0, sizeof acc[i]);
            best[i] = -INFINITY;
            sum[i] = 0;
        }
        shaped = 0;
    }
    template <class O> void finish(const Block& block, int heads, O* out, int64_t ld) {
#if defined(__AMX_BF16__)
        if (shaped) _tile_release();
#endif
        for (int i = 0; i < block.count * heads; i++) {
            O* dst = out + (block.row + i / heads) * ld + i % heads * HD;
            for (int d = 0; d < HD; d += VW) put(dst + d, loadu<vf>(acc[i] + d) * (1.0f / sum[i]));
        }
    }

    // Copies those pages that the block table's positions, below `end` of the chunk, do not fill. What else is in memory gets no
    // weight, but values must be finite.
    void complete(Chunk<HD>& chunk, int end) {
        for (int p = std::max(0, end) / PAGE; p < chunk.count; p++) {
            if (laid[p] != end) {
                memcpy(own_k[p], chunk.k[p], sizeof own_k[p]);
                for (int j = 0; j < PAGE; j += 2) {
                    int left = end - p * PAGE - j;
                    vu keep = vu{} + (left > 1 ? ~0u : left > 0 ? 0xffffu : 0u);
                    for (int c = j * HD; c < (j + 2) * HD; c += 2 * VW) storeu(own_v[p] + c, loadu<vu>(chunk.v[p] + c) & keep);
                }
                laid[p] = end;
            }
            chunk.k[p] = own_k[p], chunk.v[p] = own_v[p];
        }
    }
    // Adds the ancestors of a row to those pages, from position `at` of the chunk on.
    void add_ancestors(const Item<bf16>& item, const int32_t* slots, int count, int at) {
        const Order order(sizeof(bf16), HD);
        for (int i = std::max(0, -at); i < std::min(count, CHUNK - at); i++) {
            int p = (at + i) / PAGE, j = (at + i) % PAGE;
            order.copy_key(own_k[p], j, item.k, slots[i]);
            order.copy_value(own_v[p], j, item.v, slots[i]);
        }
    }

    // Softmax of query `i`, row `r` of the tiles, over the chunk's scores.
    void weigh(int i, int r) {
        const float scale = 1.0f / std::sqrt(float(HD));
        pf lane, s[PAGES], top = pf{} - INFINITY, sums = {};
        for (int j = 0; j < PAGE; j++) lane[j] = j;
        for (int p = 0; p < PAGES; p++) {
            s[p] = lane + float(p * PAGE) < float(valid[i]) ? loadu<pf>(scores[r] + p * PAGE) * scale : pf{} - INFINITY;
            top = s[p] > top ? s[p] : top;
        }
        float now = std::max(best[i], _mm512_reduce_max_ps((__m512)top));
        for (int p = 0; p < PAGES; p++) {
            s[p] = vexp<pf, pi>(s[p] - now);
            sums += s[p];
            storeu(weights[r] + p * PAGE, _mm512_cvtneps_pbh((__m512)s[p]));
        }
        float rescale = 1;
        if (now != best[i]) {
            rescale = best[i] == -INFINITY ? 0.0f : std::exp(best[i] - now);
            for (int d = 0; d < HD; d += VW) storeu(acc[i] + d, loadu<vf>(acc[i] + d) * rescale);
        }
        sum[i] = sum[i] * rescale + _mm512_reduce_add_ps((__m512)sums);
        best[i] = now;
    }

#if defined(__AMX_BF16__)
    void tile_scores(int first, const Chunk<HD>& chunk, const Chunk<HD>& next, const Chunk<HD>& later) {
        written();
        for (int p = 0; p < chunk.count; p++) {
            _tile_zero(0);
            for (int d = 0; d < HD; d += 32) {
                for (int i = d / 2; i < d / 2 + 16; i++) prefetch_line(i, next.k[p], later.k[p]);
                _tile_loadd(6, q[first] + d, 2 * HD);
                _tile_loadd(4, chunk.k[p] + d * PAGE, 4 * PAGE);
                _tile_dpbf16ps(0, 6, 4);
            }
            _tile_stored(0, scores[0] + p * PAGE, 4 * CHUNK);
        }
    }
    void tile_values(int first, const Chunk<HD>& chunk, const Chunk<HD>& next, const Chunk<HD>& later) {
        written();
        for (int c = 0; c < HD; c += 32) {
            _tile_loadd(0, acc[first] + c, 4 * HD);
            _tile_loadd(1, acc[first] + c + 16, 4 * HD);
            for (int p = 0; p < chunk.count; p++) {
                for (int i = c / 2; i < c / 2 + 16; i++) prefetch_line(i, next.v[p], later.v[p]);
                _tile_loadd(7, weights[0] + p * PAGE, 2 * CHUNK);
                _tile_loadd(5, chunk.v[p] + 2 * c, 4 * HD);
                _tile_dpbf16ps(0, 7, 5);
                _tile_loadd(5, chunk.v[p] + 2 * c + 32, 4 * HD);
                _tile_dpbf16ps(1, 7, 5);
            }
            _tile_stored(0, acc[first] + c, 4 * HD);
            _tile_stored(1, acc[first] + c + 16, 4 * HD);
        }
    }
#endif

    // Scores of N queries, from row `r` on, with P pages, from `page` on: sums over pairs of dimensions in order.
    template <int N, int P>
    void scores_of(int first, int r, int page, const Chunk<HD>& chunk, const Chunk<HD>& next, const Chunk<HD>& later) {
        vf s[N][P] = {};
        for (int d = 0; d < HD; d += 2)
            for (int p = 0; p < P; p++) {
                if (!r) prefetch_line(d / 2, next.k[page + p], later.k[page + p]);
                for (int i = 0; i < N; i++) s[i][p] = add_pairs(s[i][p], chunk.k[page + p] + d * PAGE, q[first + r + i] + d);
            }
        for (int i = 0; i < N; i++)
            for (int p = 0; p < P; p++) storeu(scores[r + i] + (page + p) * PAGE, s[i][p]);
    }
    // Adds the chunk's values to the sums of N queries, by pairs of positions in order.
    template <int N> void values_of(int first, int r, const Chunk<HD>& chunk, const Chunk<HD>& next, const Chunk<HD>& later) {
        constexpr int V = HD % 64 ? 2 : 4;  // vectors of a query at a time
        for (int c = 0; c < HD; c += V * VW) {
            vf s[N][V];
            for (int i = 0; i < N; i++) for (int v = 0; v < V; v++) s[i][v] = loadu<vf>(acc[first + r + i] + c + v * VW);
            for (int p = 0; p < chunk.count; p++)
                for (int j = 0; j < PAGE; j += 2)
                    for (int v = 0; v < V; v++) {
                        const int at = j * HD + 2 * (c + v * VW);
                        if (!r) prefetch_line(at / 32, next.v[p], later.v[p]);
                        for (int i = 0; i < N; i++) s[i][v] = add_pairs(s[i][v], chunk.v[p] + at, weights[r + i] + p * PAGE + j);
                    }
            for (int i = 0; i < N; i++) for (int v = 0; v < V; v++) storeu(acc[first + r + i] + c + v * VW, s[i][v]);
        }
    }
    // Runs both for groups of queries that leave room in registers.
    template <class F> static void in_groups(int count, F&& run) {
        for (int groups = (count + 4) / 5, g = 0; g < groups; g++) {
            int r = count * g / groups;
            switch (count * (g + 1) / groups - r) {
#define CASE(N) case N: run(std::integral_constant<int, N>(), r); break;
                CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#undef CASE
            }
        }
    }

    // Folds a chunk into the running softmax of queries [first, first + count).
    void fold(int first, int count, const Chunk<HD>& chunk, const Chunk<HD>& next, const Chunk<HD>& later) {
#if defined(__AMX_BF16__)
        if (TILES) {
            if (count != shaped) shape_attention(shaped = count);
            tile_scores(first, chunk, next, later);
            for (int r = 0; r < count; r++) weigh(first + r, r);
            return tile_values(first, chunk, next, later);
        }
#endif
        in_groups(count, [&](auto n, int r) {
            if (chunk.count == PAGES) scores_of<n, PAGES>(first, r, 0, chunk, next, later);
            else for (int p = 0; p < chunk.count; p++) scores_of<n, 1>(first, r, p, chunk, next, later);
        });
        for (int r = 0; r < count; r++) weigh(first + r, r);
        in_groups(count, [&](auto n, int r) { values_of<n>(first, r, chunk, next, later); });
    }

    // Positions from `start` on of all rows. Those that see the same pages share them; a row of a tree completes its own.
    void run(const Rows& in, const Item<bf16>& item, const Item<bf16>& after, int heads, int start) {
        const Block& block = item.block;
        const int row = block.row, ends = (block.context_len + CHUNK - 1) / CHUNK * CHUNK;
        auto ancestor_count = [&](int r) { return in.ancestors_start[row + r + 1] - in.ancestors_start[row + r]; };
        auto shares = [&](int r) { return !ancestor_count(r) || in.context_len[row + r] >= start + CHUNK; };
        auto ahead = [&](int at) { return at < ends ? Chunk<HD>(item, at) : Chunk<HD>(after, at - ends); };
        const Chunk<HD> next = ahead(start + CHUNK), later = ahead(start + 2 * CHUNK);
        std::fill_n(laid, PAGES, -1);
        for (int r = 0, to; r < block.count; r = to) {
            to = r + 1;
            if (shares(r)) while (to < block.count && shares(to)) to++;
            int end = 0, most = 0;
            for (int i = r; i < to; i++) {
                int context_len = in.context_len[row + i], sees = std::max(0, std::min(CHUNK, context_len + ancestor_count(i) - start));
                end = std::max(end, std::min(context_len - start, CHUNK));
                most = std::max(most, sees);
                std::fill_n(valid + i * heads, heads, sees);
            }
            if (!most) continue;
            Chunk<HD> chunk(item, start);
            chunk.count = (most + PAGE - 1) / PAGE;
            complete(chunk, end);
            if (!shares(r)) add_ancestors(item, in.ancestors + in.ancestors_start[row + r], ancestor_count(r), in.context_len[row + r] - start);
            for (int i = r * heads; i < to * heads; i += TILE) fold(i, std::min(TILE, to * heads - i), chunk, next, later);
        }
    }
};

// `attend` by pairs; at the end of an item the first pages of `after`, which the thread is likely to take next, are prefetched.
template <int HD, class O>
static void attend_pairs(const Rows& in, const Item<bf16>& item, const Item<bf16>& after, int heads, const float* q, int64_t ldq, O* out,
                         int64_t ldo) {
    static thread_local PairAttention<HD> kept;
    PairAttention<HD>& t = kept;  // found once: looking a thread's own up takes a call
    t.begin(item.block, heads, q + item.column, ldq);
    for (int start = 0; start < item.block.longest; start += CHUNK) t.run(in, item, after, heads, start);
    t.finish(item.block, heads, out + item.column, ldo);
}
#else
template <int HD, class O>
static void attend_pairs(const Rows&, const Item<bf16>&, const Item<bf16>&, int, const float*, int64_t, O*, int64_t) {}
#endif
