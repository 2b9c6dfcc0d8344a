// Rows of inputs as right factors of panels of quants.

#pragma once
#include "packing.h"

namespace [[gnu::visibility("hidden")]] smart {

// Groups of rows that share a pass. In a group, what all rows have at the same k lies side by side,
// in words of four bytes: pairs of bf16, or a float.
template <class X>
struct PackedRows {
    static constexpr int MOST = VW == 16 ? 16 : 8;  // rows of a group
    static constexpr int WORD = 4 / sizeof(X);      // k of a word
    const int rows, groups;
    const int64_t k;

    // By a whole team. most: rows of a group, up to MOST; k: a multiple of QUANT_BLOCK.
    PackedRows(const X* x, int64_t ld, int count, int64_t k_, int most)
        : rows(count),
          groups((rows + most - 1) / most),
          k(k_),
          together((rows + groups - 1) / groups) {
        const Packing packing(rows, k, rows * k * sizeof(X));
        packed = (X*)packing.memory;
        for (int group = 0; group < groups; group++)
            read_group(x + first(group) * ld, ld, columns(group), packing.first, packing.last,
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
    static void read_group(const X* x, int64_t ld, int count, int64_t i, int64_t end, X* to) {
        if (count == 1) return (void)memcpy(to + i, x + i, (end - i) * sizeof(X));
        for (to += i * count; i < end; i += VW * WORD) {
            vf words[MOST / VW][VW] = {};
            for (int row = 0; row < count; row++)
                words[row / VW][row % VW] = loadu<vf>(x + row * ld + i);
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
