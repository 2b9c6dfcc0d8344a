// Attention over pages of keys and values: positions in order, then a row's ancestors in its tree.
// Templates are instantiated in attention.cpp for bf16 and float.

#pragma once
#include <vector>

#include "abi.h"
#include "pages.h"
#include "panels.h"

namespace [[gnu::visibility("hidden")]] smart {

constexpr int MAX_QUERIES = 32;  // of the rows of a block together

// Positions of a split. A softmax is summed over each split of the context, from position 0 on, and
// the sums are combined in order: threads may share the splits of a long context, and no result
// tells.
constexpr int SPLIT = 8 * CHUNK;

// Rows of one request that share passes over its pages.
struct QueryBlock {
    int32_t request, row, count;
    int32_t context_len = 0;       // the most positions that a row reads through the block table
    int32_t longest = 0;           // the same with its ancestors
    int32_t shortest = INT32_MAX;  // and of the row that sees least
};

template <class T>
std::vector<QueryBlock> query_blocks(const Rows& in, const Layer& l);

// Attention of all rows over the keys and values of one layer, by a whole team, which may read the
// result at once. q: [rows, ldq]; out: [rows, heads * head_dim].
template <class T>
void attend(const Layer& l, const Rows& in, const std::vector<QueryBlock>& blocks, const float* q,
            int64_t ldq, const KvCache<T>& cache, float* out);

// Norms and rotates the queries and keys of a row, and stores its keys and values. projected:
// queries of `heads`, then keys and values of `kv_heads`.
template <class T>
void rope_and_store(const Layer& l, const Rows& in, int row, float* projected, int heads,
                    int kv_heads, const KvCache<T>& cache);

// Calls `run` with the head dimension as a constant of the compiler; false if the kernels do not
// serve it.
template <class F>
static inline bool dispatch_head_dim(int head_dim, F&& run) {
    switch (head_dim) {
        case 16:
            run(std::integral_constant<int, 16>());
            return true;
        case 32:
            run(std::integral_constant<int, 32>());
            return true;
        case 64:
            run(std::integral_constant<int, 64>());
            return true;
        case 96:
            run(std::integral_constant<int, 96>());
            return true;
        case 128:
            run(std::integral_constant<int, 128>());
            return true;
        case 256:
            run(std::integral_constant<int, 256>());
            return true;
        default:
            return false;
    }
}

// Calls `run` with a null pointer to the type of weights, keys and values. Otherwise returns why
// that cannot be, as smart_forward and the others return it: 1 for the head dimension, 2 for two
// types, 3 for more query heads to a key head than a block of rows has room for.
template <class F>
static inline int32_t dispatch_types(const Layer& layer, bool w_bf16, bool kv_bf16, F&& run) {
    if (!dispatch_head_dim(layer.head_dim, [](auto) {})) return 1;
    if (w_bf16 != kv_bf16) return 2;
    if (layer.heads > MAX_QUERIES * layer.kv_heads) return 3;
    if (w_bf16)
        run((bf16*)nullptr);
    else
        run((float*)nullptr);
    return 0;
}

// A block of rows over a split of one head's keys and values.
template <class T>
struct AttentionItem {
    QueryBlock block;
    const T *keys, *values;
    const int32_t* block_table;
    int64_t column;  // of its queries
    int32_t window;  // positions that a row sees
    int32_t split;   // counted from the first one of which a row sees anything

    // The first position of a row, which sees `all` with its own, that is within its window.
    int first(int all) const { return std::max(0, all - window); }
    int splits() const { return (block.longest - 1) / SPLIT - first(block.shortest) / SPLIT + 1; }
    int start() const { return (first(block.shortest) / SPLIT + split) * SPLIT; }
    // The first position of the first chunk of which a row sees anything.
    int begin() const { return std::max(start(), first(block.shortest) / CHUNK * CHUNK); }
    int end() const { return std::min(start() + SPLIT, block.longest); }
    int64_t positions() const { return end() - begin(); }
};

// Running softmaxes of some queries, in memory of others: the highest score, the sum of weights,
// and that of weighed values, each by the highest score so far.
template <int HD>
struct Softmaxes {
    int count;
    float *values, *best, *sum;

    Softmaxes(float* memory, int count_)
        : count(count_), values(memory), best(memory + count * HD), sum(best + count) {}

    static constexpr int64_t floats(int count) {
        return (int64_t(count) * (HD + 2) + 15) / 16 * 16;
    }

    float* value(int i) const { return values + int64_t(i) * HD; }

    void clear() const {
        std::fill_n(values, count * HD, 0.0f);
        std::fill_n(best, count, -INFINITY);
        std::fill_n(sum, count, 0.0f);
    }

    // Adds query `i` of the split that follows. Not inlined, as `run` is not: compilers may round
    // sums of products differently in each place.
    [[gnu::noinline]] void combine(int i, const Softmaxes& next) const {
        const bool first = sum[i] == 0;  // nothing is seen of those before
        const float now = first ? next.best[i] : std::max(best[i], next.best[i]);
        const float scale = std::exp(best[i] - now), next_scale = std::exp(next.best[i] - now);
        for (int d = 0; d < HD; d += VW) {
            const vf added = loadu<vf>(next.value(i) + d);
            storeu(value(i) + d,
                   first ? added : loadu<vf>(value(i) + d) * scale + added * next_scale);
        }
        sum[i] = first ? next.sum[i] : sum[i] * scale + next.sum[i] * next_scale;
        best[i] = now;
    }

    // sink: null, or one more score, which has no value.
    void put_means(int i, const float* sink, float* out) const {
        const float all = sink ? sum[i] + std::exp(*sink - best[i]) : sum[i];
        const float inverse = 1.0f / all;
        for (int d = 0; d < HD; d += VW) storeu(out + d, loadu<vf>(value(i) + d) * inverse);
    }
};

// How long the busiest of some threads has to do if whoever is done first takes the next piece.
inline int64_t makespan(const std::vector<int64_t>& work, int threads) {
    std::vector<int64_t> busy(threads);
    for (int64_t piece : work) *std::min_element(busy.begin(), busy.end()) += piece;
    return *std::max_element(busy.begin(), busy.end());
}

// Whether threads that share splits are done in eight ninths of the time that the busiest needs for
// `whole` positions, or earlier. Each then has `shared` to do. A barrier takes as long as half a
// split, and each of a thread's `sums` of queries, which go from core to core, as two positions.
inline bool sharing_pays(int64_t whole, int64_t shared, int64_t sums) {
    return 9 * (shared + SPLIT / 2 + 2 * sums) < 8 * whole;
}

// How many ancestors a row of a tree has.
static inline int ancestor_count(const Rows& in, int row) {
    return in.ancestors_start[row + 1] - in.ancestors_start[row];
}

}  // namespace smart
