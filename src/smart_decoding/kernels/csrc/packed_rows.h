// Rows of inputs as products in floats and in bf16 read them.

#pragma once
#include "packing.h"

namespace [[gnu::visibility("hidden")]] smart {

// Rows [rows, k] as panels of W are multiplied with them, by a whole team or one thread alone.
template <class W>
static const Input<W>* rounded_rows(const float* x, int rows, int64_t k, bool alone) {
    if constexpr (std::is_same_v<Input<W>, float>) return x;
    const Packing packing(rows, k, rows * k * sizeof(Input<W>), alone);
    Input<W>* out = (Input<W>*)packing.memory;
    for (int64_t at = packing.first; at < rows * k; at += k)
        put_all(x + at, packing.last - packing.first, out + at);
    packing.finish();
    return out;
}

// VW words of k, each of X.
template <class X>
static inline vf words_of(const float* x) {
    if constexpr (sizeof(X) == 4) return loadu<vf>(x);
    return (vf)two_to_bf16(loadu<vf>(x), loadu<vf>(x + VW));
}

// Rows as right factors of panels of quants, in groups that share a pass. In a group, what all rows
// have at the same k lies side by side, in words of four bytes: pairs of bf16, or a float.
template <class X>
struct PackedRows {
    static constexpr int MOST = VW == 16 ? 16 : 8;  // rows of a group
    static constexpr int WORD = 4 / sizeof(X);      // k of a word
    const int rows, groups;
    const int64_t k;

    // By a whole team or one thread alone. most: rows of a group, up to MOST; k: a multiple of
    // QUANT_BLOCK.
    PackedRows(const float* x, int count, int64_t k_, int most, bool alone)
        : rows(count),
          groups((rows + most - 1) / most),
          k(k_),
          together((rows + groups - 1) / groups) {
        const Packing packing(rows, k, rows * k * sizeof(X), alone);
        packed = (X*)packing.memory;
        for (int group = 0; group < groups; group++)
            read_group(x + first(group) * k, columns(group), packing.first, packing.last,
                       packed + first(group) * k);
        packing.finish();
    }

    int first(int group) const { return group * together; }
    int columns(int group) const { return std::min(together, rows - first(group)); }
    const X* at(int group, int64_t i) const {
        return packed + first(group) * k + i * columns(group);
    }

private:
    const int together;
    X* packed;

    // What `count` rows have from k = i to `end`; to: of k = 0.
    void read_group(const float* x, int count, int64_t i, int64_t end, X* to) const {
        if (count == 1) return put_all(x + i, end - i, to + i);
        for (to += i * count; i < end; i += VW * WORD) {
            vf words[MOST / VW][VW] = {};
            for (int row = 0; row < count; row++)
                words[row / VW][row % VW] = words_of<X>(x + row * k + i);
            for (auto& square : words) transpose(square);
            const bool ends = i + VW * WORD >= end;  // what comes then may be another thread's
            for (int word = 0; word < VW; word++, to += WORD * count)
                for (int row = 0; row < count; row += VW) {
                    const vf& of_rows = words[row / VW][word];
                    if (ends)
                        memcpy(to + WORD * row, &of_rows, 4 * std::min(VW, count - row));
                    else  // covers what those before have too much
                        storeu(to + WORD * row, of_rows);
                }
        }
    }
};

}  // namespace smart
