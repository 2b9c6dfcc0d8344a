// Attention over pages of keys and values: positions in order, then a row's ancestors in its tree.
// Templates are instantiated in attention.cpp for bf16 and float.

#pragma once
#include <vector>

#include "abi.h"
#include "pages.h"
#include "panels.h"

namespace [[gnu::visibility("hidden")]] smart {

constexpr int MAX_QUERIES = 32;  // of the rows of a block together

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
            int64_t ldq, const KvCache<T>& cache, Input<T>* out);

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

// What a thread does at a time: a block of rows, over one head's keys and values.
template <class T>
struct AttentionItem {
    QueryBlock block;
    const T *keys, *values;
    const int32_t* block_table;
    int64_t column;  // of its queries, and of what comes out
    int32_t window;  // positions that a row sees

    // The first position of a row, which sees `all` with its own, that is within its window.
    int first(int all) const { return std::max(0, all - window); }
    // The first chunk that holds one of any row's.
    int begin() const { return first(block.shortest) / CHUNK * CHUNK; }
};

// How many ancestors a row of a tree has.
static inline int ancestor_count(const Rows& in, int row) {
    return in.ancestors_start[row + 1] - in.ancestors_start[row];
}

}  // namespace smart
