// Attention by vectors of floats, on any CPU: a vector holds a dimension of all keys of a page.

#pragma once
#include "attention.h"

namespace [[gnu::visibility("hidden")]] smart {

template <int HD>
using Query = float[HD];  // one query head

// The pages of a chunk as a row sees them.
template <class T>
struct ChunkPages {
    const T *keys[CHUNK_PAGES], *values[CHUNK_PAGES];
};

typedef float ChunkScores[CHUNK];

// Scores of P pages, from `page` on, for N queries. Each score is summed over the dimensions in
// order.
template <class T, int HD, int N, int P>
static inline void page_scores(const T* const* keys, const Query<HD>* queries, ChunkScores* scores,
                               int page) {
    constexpr int V = PAGE / VW;  // vectors that hold a page's positions
    vf sums[P][N][V] = {};
    for (int d = 0; d < HD; d++)
        for (int p = 0; p < P; p++)
            for (int v = 0; v < V; v++) {
                vf key = widen<vf>(keys[page + p] + d * PAGE + v * VW);
                for (int i = 0; i < N; i++) sums[p][i][v] += key * queries[i][d];
            }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < N; i++)
            for (int v = 0; v < V; v++)
                storeu(scores[i] + (page + p) * PAGE + v * VW, sums[p][i][v]);
}

// The same of the first `count` pages, as many at a time as have room in registers.
template <class T, int HD, int N>
static inline void chunk_scores(const T* const* keys, const Query<HD>* queries, ChunkScores* scores,
                                int count) {
    constexpr int P = std::clamp(2 * PASS_ROWS * VW / (N * PAGE), 1, CHUNK_PAGES);
    int page = 0;
    for (; page + P <= count; page += P) page_scores<T, HD, N, P>(keys, queries, scores, page);
    for (; page < count; page++) page_scores<T, HD, N, 1>(keys, queries, scores, page);
}

// Scores become weights of a softmax whose maximum and sum are the query's from now on. Returns
// what its earlier sums are to be multiplied with. `weights` [CHUNK] holds the scores first, of
// which [first, valid) are seen.
static inline float update_softmax(float& highest, float& sum, float* weights, int first,
                                   int valid) {
    for (int j = 0; j < first; j++) weights[j] = -INFINITY;
    for (int j = valid; j < CHUNK; j++) weights[j] = -INFINITY;
    pf top = loadu<pf>(weights);
    for (int p = 1; p < CHUNK_PAGES; p++) {
        pf x = loadu<pf>(weights + p * PAGE);
        top = x > top ? x : top;
    }
    float best = highest;
    for (int j = 0; j < PAGE; j++) best = std::max(best, top[j]);
    pf sums = {};
    for (int p = 0; p < CHUNK_PAGES; p++) {
        pf w = vexp(loadu<pf>(weights + p * PAGE) - best);
        storeu(weights + p * PAGE, w);
        sums += w;
    }
    float rescale = highest == -INFINITY ? 0.0f : std::exp(highest - best);
    sum = sum * rescale + sum_in_order(sums);
    highest = best;
    return rescale;
}

// Folds positions [first, valid) of a chunk into the softmaxes of N queries, from `query` on. Sums
// depend on positions only.
template <class T, int HD, int N>
static inline void fold_chunk(const Softmaxes<HD>& sums, int query, const ChunkScores* scores,
                              const T* const* values, int first, int valid) {
    float weights[N][CHUNK];
    vf acc[N][HD / VW];
    for (int i = 0; i < N; i++) {
        memcpy(weights[i], scores[i], sizeof weights[i]);
        const int at = query + i;
        float rescale = update_softmax(sums.best[at], sums.sum[at], weights[i], first, valid);
        for (int c = 0; c < HD / VW; c++) acc[i][c] = loadu<vf>(sums.value(at) + c * VW) * rescale;
    }
    for (int j = first; j < valid; j++) {
        const T* value = values[j / PAGE] + (j % PAGE) * HD;
        for (int c = 0; c < HD / VW; c++) {
            vf x = widen<vf>(value + c * VW);
            for (int i = 0; i < N; i++) acc[i][c] += x * weights[i][j];
        }
    }
    for (int i = 0; i < N; i++)
        for (int c = 0; c < HD / VW; c++) storeu(sums.value(query + i) + c * VW, acc[i][c]);
}

// Scores and softmax of positions [first, valid) of a chunk for `heads` queries of one row, from
// `query` on, in groups that have room in registers.
template <class T, int HD>
static inline void attend_chunk(const ChunkPages<T>& pages, const Query<HD>* queries, int heads,
                                const Softmaxes<HD>& sums, int query, int first, int valid) {
    ChunkScores scores[MAX_QUERIES];
    const int count = (valid + PAGE - 1) / PAGE;
    for (int i = 0, n; i < heads; i += n) {
        n = heads - i == 6 ? 3 : std::min(heads - i, 4);
        with_count<4>(n, [&](auto group) {
            chunk_scores<T, HD, group>(pages.keys, queries + query + i, scores + i, count);
        });
    }
    constexpr int GROUP = HD / VW <= 4 ? 3 : 2;
    int i = 0;
    for (; i + GROUP <= heads; i += GROUP)
        fold_chunk<T, HD, GROUP>(sums, query + i, scores + i, pages.values, first, valid);
    for (; i < heads; i++)
        fold_chunk<T, HD, 1>(sums, query + i, scores + i, pages.values, first, valid);
}

// Attention of a block's rows, which share passes over common pages.
template <class T, int HD>
struct alignas(64) PageAttention {
    Query<HD> queries[MAX_QUERIES];
    T own_keys[CHUNK_PAGES][HD * PAGE], own_values[CHUNK_PAGES][HD * PAGE];

    void begin(const QueryBlock& block, int heads, const float* from, int64_t ld) {
        const float scale = 1.0f / std::sqrt(float(HD));
        for (int i = 0; i < block.count * heads; i++) {
            const float* source = from + (block.row + i / heads) * ld + i % heads * HD;
            for (int d = 0; d < HD; d++) queries[i][d] = source[d] * scale;
        }
    }

    // A split. Nothing is prefetched of the next one.
    [[gnu::noinline]] void run(const Rows& in, const AttentionItem<T>& item,
                               const AttentionItem<T>&, int heads, const Softmaxes<HD>& sums) {
        sums.clear();
        for (int start = item.begin(); start < item.end(); start += CHUNK)
            run_chunk(in, item, heads, start, sums);
    }

    void end() {}

    // How many pages of the chunk from `start` on every row may read in place.
    static int shared_pages(const Rows& in, const QueryBlock& block, int start) {
        int shared = CHUNK_PAGES;
        for (int row = block.row; row < block.row + block.count; row++) {
            int filled = ancestor_count(in, row) ? in.context_len[row] / PAGE
                                                 : (in.context_len[row] + PAGE - 1) / PAGE;
            shared = std::min(shared, std::max(0, filled * PAGE - start) / PAGE);
        }
        return shared;
    }

    static void in_place(const AttentionItem<T>& item, ChunkPages<T>& pages, int p, int first) {
        const int64_t at = int64_t(item.block_table[first / PAGE]) * HD * PAGE;
        pages.keys[p] = item.keys + at;
        pages.values[p] = item.values + at;
    }

    // A page that mixes committed positions and tree nodes, copied from wherever they lie. Values
    // beyond those are not read, keys are, but their scores are not.
    void gather(const Rows& in, const AttentionItem<T>& item, int row, ChunkPages<T>& pages, int p,
                int first) {
        const int context_len = in.context_len[row], end = context_len + ancestor_count(in, row);
        const int32_t* ancestors = in.ancestors + in.ancestors_start[row];
        for (int j = 0; j < PAGE; j++) {
            const int position = first + j;
            T* keys = own_keys[p] + j;
            if (position >= end) {
                for (int d = 0; d < HD; d++) keys[d * PAGE] = T(0);
                continue;
            }
            const int64_t slot =
                position < context_len
                    ? int64_t(item.block_table[position / PAGE]) * PAGE + position % PAGE
                    : ancestors[position - context_len];
            const T* from = item.keys + slot / PAGE * HD * PAGE + slot % PAGE;
            for (int d = 0; d < HD; d++) keys[d * PAGE] = from[d * PAGE];
            memcpy(own_values[p] + j * HD, item.values + slot * HD, HD * sizeof(T));
        }
        pages.keys[p] = own_keys[p];
        pages.values[p] = own_values[p];
    }

    // Positions from `start` on of all rows.
    void run_chunk(const Rows& in, const AttentionItem<T>& item, int heads, int start,
                   const Softmaxes<HD>& sums) {
        const QueryBlock& block = item.block;
        const int shared = shared_pages(in, block, start);
        ChunkPages<T> pages;
        for (int p = 0; p < shared; p++) in_place(item, pages, p, start + p * PAGE);
        for (int r = 0; r < block.count; r++) {
            const int row = block.row + r, context_len = in.context_len[row],
                      ancestors = ancestor_count(in, row), all = context_len + ancestors;
            const int valid = std::min(CHUNK, all - start),
                      seen = std::max(0, item.first(all) - start);
            if (seen >= valid) continue;
            for (int p = shared; p * PAGE < valid; p++) {
                const int first = start + p * PAGE;
                if (first + PAGE <= context_len || (!ancestors && first < context_len))
                    in_place(item, pages, p, first);
                else
                    gather(in, item, row, pages, p, first);
            }
            attend_chunk<T, HD>(pages, queries, heads, sums, r * heads, seen, valid);
        }
    }
};

}  // namespace smart
