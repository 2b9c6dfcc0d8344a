// Where keys and values lie in a layer's cache, and what of it attention works on at a time.
//
// k and v: [kv_heads, pages, head_dim * PAGE]. A page's keys are a matrix [head_dim, PAGE], so that one vector holds a
// dimension of all of them; its values are one [PAGE, head_dim]. Products of pairs of bf16 read pairs of rows,
// interleaved: where CPUs have them, both matrices lie so.

#pragma once
#include "abi.h"
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

    template <class T> void put_key(T* k, int64_t slot, const T* line) const {
        k += key(slot, 0);
        if (pairs) for (int64_t d = 0; d < head_dim; d += 2) memcpy(k + d * PAGE, line + d, 2 * sizeof(T));
        else for (int64_t d = 0; d < head_dim; d++) k[d * PAGE] = line[d];
    }
    // Not word by word as below: another thread may put the value beside it.
    template <class T> void put_value(T* v, int64_t slot, const T* line) const {
        v += value(slot, 0);
        const int64_t step = pairs ? 2 : 1;
        for (int64_t d = 0; d < head_dim; d++) v[d * step] = line[d];
    }
    template <class T> void copy_key(T* to, int64_t at, const T* from, int64_t slot) const {
        to += key(at, 0), from += key(slot, 0);
        if (pairs) for (int64_t d = 0; d < head_dim; d += 2) memcpy(to + d * PAGE, from + d * PAGE, 2 * sizeof(T));
        else for (int64_t d = 0; d < head_dim; d++) to[d * PAGE] = from[d * PAGE];
    }
    template <class T> void copy_value(T* to, int64_t at, const T* from, int64_t slot) const {
        if (!pairs) memcpy(to + value(at, 0), from + value(slot, 0), head_dim * sizeof(T));
        else for (int64_t d = 0; d < 2 * head_dim; d += 2 * VW) {  // words of two positions
            vu word = loadu<vu>(from + value(slot - slot % 2, 0) + d), old = loadu<vu>(to + value(at - at % 2, 0) + d);
            word = slot % 2 ? word >> 16 : word & 0xffffu;
            storeu(to + value(at - at % 2, 0) + d, at % 2 ? (old & 0xffffu) | word << 16 : (old & 0xffff0000u) | word);
        }
    }
};

// Rows of one group that share passes over its pages: `context_len` positions of them by its block table, then, up to `longest`,
// ancestors in a tree.
struct Block { int32_t group, row, count, context_len, longest; };

// What a thread does at a time: a block of rows, over one head's keys and values.
template <class T> struct Item {
    Block block;
    const T *k, *v;
    const int32_t* table;
    int64_t column;  // of its queries, and of what comes out
};
