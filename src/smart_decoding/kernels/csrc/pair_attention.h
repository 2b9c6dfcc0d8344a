// Attention by products of pairs of bf16, in the tiles of AMX or in vectors: up to 16 queries at a
// time read pages of keys and values where these lie in the cache.

#pragma once
#include "attention.h"

namespace [[gnu::visibility("hidden")]] smart {

// The pages of a chunk, `count` of which hold what a row may see.
template <int HD>
struct PairChunk {
    const bf16 *keys[CHUNK_PAGES], *values[CHUNK_PAGES];
    int count = CHUNK_PAGES;

    PairChunk(const AttentionItem<bf16>& item,
              int start) {  // where the block table ends, its last page
        for (int p = 0; p < CHUNK_PAGES; p++) {
            int position = std::min(start + p * PAGE, item.block.context_len - 1);
            int64_t at = int64_t(item.block_table[std::max(position, 0) / PAGE]) * HD * PAGE;
            keys[p] = item.keys + at;
            values[p] = item.values + at;
        }
    }
};

// Line `i` of two runs: what the next chunk needs into the first cache, and the first of what is
// needed after it into the second (of a run that has begun, hardware fetches the others).
static inline void prefetch_line(int i, const bf16* next, const bf16* later) {
    if (i % 16 < 6) __builtin_prefetch(later + 32 * i, 0, INTO_L2);
    __builtin_prefetch(next + 32 * i, 0, INTO_CACHES);
}

template <int HD>
struct alignas(64) PairAttention {
    typedef PairChunk<HD> Chunk;

    bf16 q[MAX_QUERIES][HD], weights[TILE][CHUNK], own_keys[CHUNK_PAGES][HD * PAGE],
        own_values[CHUNK_PAGES][HD * PAGE];
    float scores[TILE][CHUNK];
    const Softmaxes<HD>* sums;                  // of the split that runs
    int seen[MAX_QUERIES], valid[MAX_QUERIES];  // the first position of the chunk that a query may
                                                // see, and the one behind the last
    int laid[CHUNK_PAGES];  // where the block table ends in the pages of our own, -1: they are
                            // of another chunk
    int shaped;             // queries that the tiles are configured for

    void begin(const QueryBlock& block, int heads, const float* from, int64_t ld) {
        for (int i = 0; i < block.count * heads; i++) {
            const float* source = from + (block.row + i / heads) * ld + i % heads * HD;
            for (int d = 0; d < HD; d += VW) put(q[i] + d, loadu<vf>(source + d));
        }
        shaped = 0;
    }

    // A split; at its end the first pages of `after`, which the thread is likely to take next, are
    // prefetched.
    [[gnu::noinline]] void run(const Rows& in, const AttentionItem<bf16>& item,
                               const AttentionItem<bf16>& after, int heads,
                               const Softmaxes<HD>& into) {
        sums = &into;
        sums->clear();
        for (int start = item.begin(); start < item.end(); start += CHUNK)
            run_chunk(in, item, after, heads, start);
    }

    void end() {
        if constexpr (HAS_TILES)
            if (shaped) tile_release();
    }

    // Copies those pages that the block table's positions, below `end` of the chunk, do not fill.
    // What else is in memory gets no weight, but values must be finite.
    void complete(Chunk& chunk, int end) {
        for (int p = std::max(0, end) / PAGE; p < chunk.count; p++) {
            if (laid[p] != end) copy_page(chunk, p, end - p * PAGE);
            laid[p] = end;
            chunk.keys[p] = own_keys[p];
            chunk.values[p] = own_values[p];
        }
    }

    void copy_page(const Chunk& chunk, int p, int positions) {
        memcpy(own_keys[p], chunk.keys[p], sizeof own_keys[p]);
        for (int j = 0; j < PAGE; j += 2) {
            const int left = positions - j;
            const vu keep = vu{} + (left > 1 ? ~0u : left > 0 ? 0xffffu : 0u);
            for (int c = j * HD; c < (j + 2) * HD; c += 2 * VW)
                storeu(own_values[p] + c, loadu<vu>(chunk.values[p] + c) & keep);
        }
    }

    // Adds the ancestors of a row to those pages, from position `at` of the chunk on.
    void add_ancestors(const AttentionItem<bf16>& item, const int32_t* slots, int count, int at) {
        const PageOrder order(sizeof(bf16), HD);
        for (int i = std::max(0, -at); i < std::min(count, CHUNK - at); i++) {
            const int p = (at + i) / PAGE, j = (at + i) % PAGE;
            order.copy_key(own_keys[p], j, item.keys, slots[i]);
            order.copy_value(own_values[p], j, item.values, slots[i]);
        }
    }

    // Softmax of query `i`, row `r` of the tiles, over the chunk's scores.
    void weigh(int i, int r) {
        const float scale = 1.0f / std::sqrt(float(HD));
        pf lane, s[CHUNK_PAGES], top = pf{} - INFINITY, total = {};
        for (int j = 0; j < PAGE; j++) lane[j] = float(j);
        for (int p = 0; p < CHUNK_PAGES; p++) {
            pf score = loadu<pf>(scores[r] + p * PAGE) * scale;
            const pf at = lane + float(p * PAGE);
            s[p] = at < float(valid[i]) && at >= float(seen[i]) ? score : pf{} - INFINITY;
            top = s[p] > top ? s[p] : top;
        }
        float& best = sums->best[i];
        const float now = std::max(best, max_of(top));
        if (now == -INFINITY) {
            if (seen[i] < valid[i]) sums->sum[i] = NAN;  // of scores that are not finite
            return (void)memset(weights[r], 0, sizeof weights[r]);
        }
        for (int p = 0; p < CHUNK_PAGES; p++) {
            s[p] = vexp(s[p] - now);
            total += s[p];
            put(weights[r] + p * PAGE, s[p]);
        }
        float rescale = 1;
        if (now != best) {
            rescale = best == -INFINITY ? 0.0f : std::exp(best - now);
            float* acc = sums->value(i);
            for (int d = 0; d < HD; d += VW) storeu(acc + d, loadu<vf>(acc + d) * rescale);
        }
        sums->sum[i] = sums->sum[i] * rescale + sum_of(total);
        best = now;
    }

    // Tiles 0 and 1 hold sums, 4 keys of a page, 5 its values, 6 queries, 7 their weights of a
    // page.
    void shape_tiles(int queries) {
        if (queries == shaped) return;
        shaped = queries;
        TileShapes shapes;
        shapes.set({0, 1, 6}, queries, TILE_WIDTH);
        shapes.set({4}, TILE, TILE_WIDTH);
        shapes.set({5}, PAGE / 2, TILE_WIDTH);
        shapes.set({7}, queries, 2 * PAGE);
        tile_configure(shapes);
    }

    void tile_scores(int first, const Chunk& chunk, const Chunk& next, const Chunk& later) {
        for (int p = 0; p < chunk.count; p++) {
            tile_zero<0>();
            for (int d = 0; d < HD; d += 32) {
                for (int i = d / 2; i < d / 2 + 16; i++)
                    prefetch_line(i, next.keys[p], later.keys[p]);
                tile_load<6>(q[first] + d, 2 * HD);
                tile_load<4>(chunk.keys[p] + d * PAGE, 4 * PAGE);
                tile_dot_bf16<0, 6, 4>();
            }
            tile_store<0>(scores[0] + p * PAGE, 4 * CHUNK);
        }
    }

    void tile_values(int first, const Chunk& chunk, const Chunk& next, const Chunk& later) {
        float* acc = sums->value(first);
        for (int c = 0; c < HD; c += 32) {
            tile_load<0>(acc + c, 4 * HD);
            tile_load<1>(acc + c + 16, 4 * HD);
            for (int p = 0; p < chunk.count; p++) {
                for (int i = c / 2; i < c / 2 + 16; i++)
                    prefetch_line(i, next.values[p], later.values[p]);
                tile_load<7>(weights[0] + p * PAGE, 2 * CHUNK);
                tile_load<5>(chunk.values[p] + 2 * c, 4 * HD);
                tile_dot_bf16<0, 7, 5>();
                tile_load<5>(chunk.values[p] + 2 * c + 32, 4 * HD);
                tile_dot_bf16<1, 7, 5>();
            }
            tile_store<0>(acc + c, 4 * HD);
            tile_store<1>(acc + c + 16, 4 * HD);
        }
    }

    // Scores of N queries, from row `r` on, with P pages, from `page` on: sums over pairs of
    // dimensions in order.
    template <int N, int P>
    void vector_scores(int first, int r, int page, const Chunk& chunk, const Chunk& next,
                       const Chunk& later) {
        constexpr int V = PAGE / VW;  // vectors that hold a page's positions
        vf s[N][P][V] = {};
        for (int d = 0; d < HD; d += 2)
            for (int p = 0; p < P; p++) {
                if (!r) prefetch_line(d / 2, next.keys[page + p], later.keys[page + p]);
                const bf16* keys = chunk.keys[page + p] + d * PAGE;
                for (int i = 0; i < N; i++) {
                    vu query = broadcast4(q[first + r + i] + d);
                    for (int v = 0; v < V; v++)
                        s[i][p][v] = dot_bf16(s[i][p][v], loadu<vu>(keys + 2 * v * VW), query);
                }
            }
        for (int i = 0; i < N; i++)
            for (int p = 0; p < P; p++)
                for (int v = 0; v < V; v++)
                    storeu(scores[r + i] + (page + p) * PAGE + v * VW, s[i][p][v]);
    }

    // The same with all pages of the chunk, as many at a time as have room in registers.
    template <int N>
    void chunk_scores(int first, int r, const Chunk& chunk, const Chunk& next, const Chunk& later) {
        constexpr int MOST = VW == PAGE ? CHUNK_PAGES : 1;
        int page = 0;
        for (; page + MOST <= chunk.count; page += MOST)
            vector_scores<N, MOST>(first, r, page, chunk, next, later);
        for (; page < chunk.count; page++) vector_scores<N, 1>(first, r, page, chunk, next, later);
    }

    // Adds the chunk's values to the sums of N queries, by pairs of positions in order.
    template <int N>
    void vector_values(int first, int r, const Chunk& chunk, const Chunk& next,
                       const Chunk& later) {
        constexpr int V = HD % (4 * VW) ? 2 : 4;  // vectors of a query at a time
        float* acc = sums->value(first + r);
        for (int c = 0; c < HD; c += V * VW) {
            vf s[N][V];
            for (int i = 0; i < N; i++)
                for (int v = 0; v < V; v++) s[i][v] = loadu<vf>(acc + i * HD + c + v * VW);
            for (int p = 0; p < chunk.count; p++)
                for (int j = 0; j < PAGE; j += 2)
                    for (int v = 0; v < V; v++) {
                        const int at = j * HD + 2 * (c + v * VW);
                        if (!r && (VW == PAGE || at % 32 == 0))
                            prefetch_line(at / 32, next.values[p], later.values[p]);
                        for (int i = 0; i < N; i++) {
                            vu weight = broadcast4(weights[r + i] + p * PAGE + j);
                            s[i][v] = dot_bf16(s[i][v], loadu<vu>(chunk.values[p] + at), weight);
                        }
                    }
            for (int i = 0; i < N; i++)
                for (int v = 0; v < V; v++) storeu(acc + i * HD + c + v * VW, s[i][v]);
        }
    }

    // Runs both for groups of queries that leave room in registers.
    template <class F>
    static void in_groups(int count, F&& run) {
        for (int groups = (count + 4) / 5, g = 0; g < groups; g++) {
            const int r = count * g / groups;
            with_count<5>(count * (g + 1) / groups - r, [&](auto n) { run(n, r); });
        }
    }

    // Folds a chunk into the softmaxes of queries [first, first + count).
    void fold(int first, int count, const Chunk& chunk, const Chunk& next, const Chunk& later) {
        if constexpr (HAS_TILES) {
            shape_tiles(count);
            tile_scores(first, chunk, next, later);
            for (int r = 0; r < count; r++) weigh(first + r, r);
            tile_values(first, chunk, next, later);
        } else {
            in_groups(count, [&](auto n, int r) { chunk_scores<n>(first, r, chunk, next, later); });
            for (int r = 0; r < count; r++) weigh(first + r, r);
            in_groups(count,
                      [&](auto n, int r) { vector_values<n>(first, r, chunk, next, later); });
        }
    }

    // Positions from `start` on of all rows. Those that see the same pages share them; a row of a
    // tree completes its own.
    void run_chunk(const Rows& in, const AttentionItem<bf16>& item,
                   const AttentionItem<bf16>& after, int heads, int start) {
        const QueryBlock& block = item.block;
        const int row = block.row, filled = (block.context_len + CHUNK - 1) / CHUNK * CHUNK,
                  ends = std::min(filled, item.start() + SPLIT);
        auto shares = [&](int r) {
            return !ancestor_count(in, row + r) || in.context_len[row + r] >= start + CHUNK;
        };
        auto ahead = [&](int at) {
            return at < ends ? Chunk(item, at) : Chunk(after, after.begin() + at - ends);
        };
        const Chunk next = ahead(start + CHUNK), later = ahead(start + 2 * CHUNK);
        std::fill_n(laid, CHUNK_PAGES, -1);
        for (int r = 0, to; r < block.count; r = to) {
            to = r + 1;
            while (shares(r) && to < block.count && shares(to)) to++;
            int end = 0, most = 0;
            for (int i = r; i < to; i++) {
                const int context_len = in.context_len[row + i],
                          all = context_len + ancestor_count(in, row + i);
                const int first = std::max(0, item.first(all) - start),
                          sees = first < CHUNK ? std::max(0, std::min(CHUNK, all - start)) : 0;
                end = std::max(end, std::min(context_len - start, CHUNK));
                most = std::max(most, sees);
                std::fill_n(seen + i * heads, heads, first);
                std::fill_n(valid + i * heads, heads, sees);
            }
            if (!most) continue;
            Chunk chunk(item, start);
            chunk.count = (most + PAGE - 1) / PAGE;
            complete(chunk, end);
            if (!shares(r)) {
                const int32_t* slots = in.ancestors + in.ancestors_start[row + r];
                add_ancestors(item, slots, ancestor_count(in, row + r),
                              in.context_len[row + r] - start);
            }
            for (int i = r * heads; i < to * heads; i += TILE)
                fold(i, std::min(TILE, to * heads - i), chunk, next, later);
        }
    }
};

}  // namespace smart
