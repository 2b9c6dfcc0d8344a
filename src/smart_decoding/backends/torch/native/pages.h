// Where keys and values lie in a layer's cache, and what of it attention works on at a time.
//
// k and v: [kv_heads, pages, head_dim * PAGE]. A page's keys are a matrix [head_dim, PAGE], so that one vector holds a
// dimension of all of them; its values are one [PAGE, head_dim]. Products of pairs of bf16 read pairs of rows,
// interleaved: where CPUs have them, both matrices lie so.

#pragma once
#include "forward.h"
#include "tiles.h"

#if defined(__AVX512BF16__)
constexpr bool paired(int bytes, int head_dim) { return bytes == 2 && head_dim % 32 == 0; }
#else
constexpr bool paired(int, int) { return false; }
#endif
template <class T, int HD> constexpr bool PAIRED = paired(sizeof(T), HD);

struct Order {
    int64_t head_dim;
    bool pairs;
    Order(int bytes, int head_dim) : head_dim(head_dim), pairs(paired(bytes, head_dim)) {}

    int64_t key(int64_t slot, int d) const { return page(slot) + element(d, slot % PAGE, PAGE); }
    int64_t value(int64_t slot, int d) const { return page(slot) + element(slot % PAGE, d, head_dim); }
    int64_t page(int64_t slot) const { return slot / PAGE * PAGE * head_dim; }
    int64_t element(int64_t row, int64_t column, int64_t width) const {
        return pairs ? row / 2 * 2 * width + 2 * column + row % 2 : row * width + column;
    }
};

// Rows of one group that share passes over its pages: `direct` positions of them by its block table, then, up to `longest`,
// ancestors in a tree.
struct Block { int32_t group, row, count, direct, longest; };

// What a thread does at a time: a block of rows, over one head's keys and values.
template <class T> struct Item {
    Block block;
    const T *k, *v;
    const int32_t* table;
    int64_t column;  // of its queries, and of what comes out
};
