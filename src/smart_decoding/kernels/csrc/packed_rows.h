// Rows of inputs as right factors of panels of quants.

#pragma once
#include <vector>

#include "quants.h"

namespace [[gnu::visibility("hidden")]] smart {

// Groups of rows that share a pass. In a group, what all rows have at the same k lies side by side,
// in words of four bytes: pairs of bf16, or a float.
template <class X>
struct PackedRows {
    static constexpr int MOST = VW == 16 ? 16 : 8;  // rows of a group
    static constexpr int WORD = 4 / sizeof(X);      // k of a word
    std::vector<X> packed;
    int rows = 0, groups = 0;
    int64_t k = 0;

    // most: rows of a group, up to MOST; length: a multiple of QUANT_BLOCK.
    void read(const X* x, int64_t ld, int count, int64_t length, int most) {
        rows = count;
        groups = (rows + most - 1) / most;
        together = (rows + groups - 1) / groups;
        k = length;
        const size_t need = rows * k + sizeof(vf);  // a last vector goes beyond the end
        if (packed.size() < need) packed.resize(need);
        for (int group = 0; group < groups; group++)
            read_group(x + first(group) * ld, ld, columns(group), &packed[first(group) * k]);
    }

    int first(int group) const { return group * together; }
    int columns(int group) const { return std::min(together, rows - first(group)); }
    const X* at(int group, int64_t i) const {
        return &packed[first(group) * k + i * columns(group)];
    }

private:
    int together = 0;

    void read_group(const X* x, int64_t ld, int count, X* to) const {
        if (count == 1) return (void)memcpy(to, x, k * sizeof(X));
        for (int64_t i = 0; i < k; i += VW * WORD) {
            vf words[MOST / VW][VW] = {};
            for (int row = 0; row < count; row++)
                words[row / VW][row % VW] = loadu<vf>(x + row * ld + i);
            for (auto& square : words) transpose(square);
            for (int word = 0; word < VW; word++, to += WORD * count)
                for (int row = 0; row < count; row += VW)  // covers what those before have too much
                    storeu(to + WORD * row, words[row / VW][word]);
        }
    }
};

}  // namespace smart
