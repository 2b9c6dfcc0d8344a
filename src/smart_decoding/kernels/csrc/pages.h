// Where keys and values lie in a layer's cache.
//
// keys and values: [kv_heads, pages, head_dim * PAGE]. A page's keys are a matrix [head_dim, PAGE],
// so that one vector holds a dimension of all of them; its values are one [PAGE, head_dim].
// Products of pairs of bf16 read pairs of rows, interleaved: where CPUs have them, both matrices
// lie so.

#pragma once
#include "vectors.h"

namespace [[gnu::visibility("hidden")]] smart {

constexpr int PAGE = 16;   // positions of a KV page
constexpr int CHUNK = 64;  // positions per step of the online softmax
constexpr int CHUNK_PAGES = CHUNK / PAGE;

// One value for each position of a page.
typedef Vector<float, PAGE> pf;

// Whether keys and values of `bytes` each lie in pairs.
constexpr bool lies_in_pairs(int bytes, int head_dim) {
    return HAS_BF16_PAIRS && bytes == 2 && head_dim % 32 == 0;
}

template <class T>
struct KvCache {  // of one layer
    T *keys, *values;
    int64_t pages;
};

// Where a head's keys and values of one slot (page * PAGE + offset) lie.
struct PageOrder {
    int64_t head_dim;
    bool pairs;

    PageOrder(int bytes, int head_dim_)
        : head_dim(head_dim_), pairs(lies_in_pairs(bytes, head_dim_)) {}

    int64_t page(int64_t slot) const { return slot / PAGE * PAGE * head_dim; }
    int64_t key(int64_t slot, int d) const { return page(slot) + element(d, slot % PAGE, PAGE); }
    int64_t value(int64_t slot, int d) const {
        return page(slot) + element(slot % PAGE, d, head_dim);
    }
    int64_t element(int64_t row, int64_t column, int64_t width) const {
        return pairs ? row / 2 * 2 * width + 2 * column + row % 2 : row * width + column;
    }

    template <class T>
    void put_key(T* keys, int64_t slot, const T* from) const {
        T* to = keys + key(slot, 0);
        if (pairs)
            for (int64_t d = 0; d < head_dim; d += 2)
                memcpy(to + d * PAGE, from + d, 2 * sizeof(T));
        else
            for (int64_t d = 0; d < head_dim; d++) to[d * PAGE] = from[d];
    }

    // Not word by word as in copy_value: another thread may put the value beside it.
    template <class T>
    void put_value(T* values, int64_t slot, const T* from) const {
        T* to = values + value(slot, 0);
        const int64_t step = pairs ? 2 : 1;
        for (int64_t d = 0; d < head_dim; d++) to[d * step] = from[d];
    }

    template <class T>
    void copy_key(T* to_keys, int64_t to_slot, const T* from_keys, int64_t from_slot) const {
        T* to = to_keys + key(to_slot, 0);
        const T* from = from_keys + key(from_slot, 0);
        if (pairs)
            for (int64_t d = 0; d < head_dim; d += 2)
                memcpy(to + d * PAGE, from + d * PAGE, 2 * sizeof(T));
        else
            for (int64_t d = 0; d < head_dim; d++) to[d * PAGE] = from[d * PAGE];
    }

    template <class T>
    void copy_value(T* to_values, int64_t to_slot, const T* from_values, int64_t from_slot) const {
        if (!pairs) {
            memcpy(to_values + value(to_slot, 0), from_values + value(from_slot, 0),
                   head_dim * sizeof(T));
            return;
        }
        // Words hold values of two positions, the even one in the low half.
        const T* from = from_values + value(from_slot - from_slot % 2, 0);
        T* to = to_values + value(to_slot - to_slot % 2, 0);
        for (int64_t d = 0; d < 2 * head_dim; d += 2 * VW) {
            vu word = loadu<vu>(from + d), old = loadu<vu>(to + d);
            word = from_slot % 2 ? word >> 16 : word & 0xffffu;
            storeu(to + d, to_slot % 2 ? (old & 0xffffu) | word << 16 : (old & 0xffff0000u) | word);
        }
    }
};

}  // namespace smart
