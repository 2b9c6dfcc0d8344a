// Attention by vectors of floats, on any CPU: a vector holds a dimension of all keys of a page.

#pragma once
#include "attention.h"

namespace [[gnu::visibility("hidden")]] smart {

template <int HD>
struct Query {  // running softmax of one query head
    float q[HD], best, sum;
    vf acc[HD / VW];
};

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
                for (int i = 0; i < N; i++) sums[p][i][v] += key * queries[i].q[d];
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
template <int HD>
static inline float update_softmax(Query<HD>& query, float* weights, int first, int valid) {
    for (int j = 0; j < first; j++) weights[j] = -INFINITY;
    for (int j = valid; j < CHUNK; j++) weights[j] = -INFINITY;
    pf top = loadu<pf>(weights);
    for (int p = 1; p < CHUNK_PAGES; p++) {
        pf x = loadu<pf>(weights + p * PAGE);
        top = x > top ? x : top;
    }
    float best = query.best;
    for (int j = 0; j < PAGE; j++) best = std::max(best, top[j]);
    pf sums = {};
    for (int p = 0; p < CHUNK_PAGES; p++) {
        pf w = vexp(loadu<pf>(weights + p * PAGE) - best);
        storeu(weights + p * PAGE, w);
        sums += w;
    }
    float rescale = query.best == -INFINITY ? 0.0f : std::exp(query.best - best);
    query.sum = query.sum * rescale + sum_in_order(sums);
    query.best = best;
    return rescale;
}

// Folds positions [first, valid) of a chunk into the running softmax of N queries. Sums depend on
// positions only.
template <class T, int HD, int N>
static inline void fold_chunk(Query<HD>* queries, const ChunkScores* scores, const T* const* values,
                              int first, int valid) {
    float weights[N][CHUNK];
    vf acc[N][HD / VW];
    for (int i = 0; i < N; i++) {
        memcpy(weights[i], scores[i], sizeof weights[i]);
        float rescale = update_softmax(queries[i], weights[i], first, valid);
        for (int c = 0; c < HD / VW; c++) acc[i][c] = queries[i].acc[c] * rescale;
    }
    for (int j = first; j < valid; j++) {
        const T* value = values[j / PAGE] + (j % PAGE) * HD;
        for (int c = 0; c < HD / VW; c++) {
            vf x = widen<vf>(value + c * VW);
            for (int i = 0; i < N; i++) acc[i][c] += x * weights[i][j];
        }
    }
    for (int i = 0; i < N; i++)
        for (int c = 0; c < HD / VW; c++) queries[i].acc[c] = acc[i][c];
}

// Scores and softmax of positions [first, valid) of a chunk for `heads` queries of one row, in
// groups that have room in registers.
template <class T, int HD>
static inline void attend_chunk(const ChunkPages<T>& pages, Query<HD>* queries, int heads,
                                ChunkScores* scores, int first, int valid) {
    const int count = (valid + PAGE - 1) / PAGE;
    for (int i = 0, n; i < heads; i += n) {
        n = heads - i == 6 ? 3 : std::min(heads - i, 4);
        with_count<4>(n, [&](auto group) {
            chunk_scores<T, HD, group>(pages.keys, queries + i, scores + i, count);
        });
    }
    constexpr int GROUP = HD / VW <= 4 ? 3 : 2;
    int i = 0;
    for (; i + GROUP <= heads; i += GROUP)
        fold_chunk<T, HD, GROUP>(queries + i, scores + i, pages.values, first, valid);
    for (; i < heads; i++)
        fold_chunk<T, HD, 1>(queries + i, scores + i, pages.values, first, valid);
}

template <class T, int HD>
struct PageAttention {
    Query<HD> queries[MAX_QUERIES];
    T own_keys[CHUNK_PAGES][HD * PAGE], own_values[CHUNK_PAGES][HD * PAGE];

    void begin(const QueryBlock& block, int heads, const float* from, int64_t ld) {
        const float scale = 1.0f / std::sqrt(float(HD));
        for (int i = 0; i < block.count * heads; i++) {
            const float* source = from + (block.row + i / heads) * ld + i % heads * HD;
            for (int d = 0; d < HD; d++) queries[i].q[d] = source[d] * scale;
            queries[i].best = -INFINITY;
            queries[i].sum = 0;
            memset(queries[i].acc, 0, sizeof queries[i].acc);
        }
    }

    template <class O>
    void finish(const QueryBlock& block, int heads, O* out, int64_t ld) const {
        for (int i = 0; i < block.count * heads; i++) {
            O* to = out + (block.row + i / heads) * ld + i % heads * HD;
            const float inverse = 1.0f / queries[i].sum;
            for (int c = 0; c < HD / VW; c++) put(to + c * VW, queries[i].acc[c] * inverse);
        }
    }

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
    void run(const Rows& in, const AttentionItem<T>& item, int heads, int start,
             ChunkScores* scores) {
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
            attend_chunk<T, HD>(pages, queries + r * heads, heads, scores + r * heads, seen, valid);
        }
    }
};

// Attention of an item's rows, which share passes over common pages.
template <class T, int HD, class O>
static void attend_pages(const Rows& in, const AttentionItem<T>& item, int heads, const float* q,
                         int64_t ldq, O* out, int64_t ldo) {
    static thread_local PageAttention<T, HD> kept;
    PageAttention<T, HD>& attention = kept;  // found once: looking a thread's own up takes a call
    ChunkScores scores[MAX_QUERIES];
    attention.begin(item.block, heads, q + item.column, ldq);
    for (int start = item.begin(); start < item.block.longest; start += CHUNK)
        attention.run(in, item, heads, start, scores);
    attention.finish(item.block, heads, out + item.column, ldo);
}

}  // namespace smart
