// The first maximum of a row whose columns come panel by panel, in any order.

#pragma once
#include "panels.h"

namespace [[gnu::visibility("hidden")]] smart {

// Of each lane of a panel: the largest entry that is no NaN, and the first panel that has it.
struct Maxima {
    vf low = vf{} - INFINITY, high = vf{} - INFINITY;
    vi low_at = {}, high_at = {};

    // A panel's entries, those from column n on left out.
    void add(int64_t column, int64_t n, vf a, vf b) {
        for (int j = 0; column + PANEL > n && j < PANEL; j++)
            if (column + j >= n) (j < VW ? a[j] : b[j - VW]) = -INFINITY;
        const vi here = vi{} + int32_t(column);
        const vi low_above = (a > low) | ((a == low) & (here < low_at));
        const vi high_above = (b > high) | ((b == high) & (here < high_at));
        low = low_above ? a : low;
        low_at = low_above ? here : low_at;
        high = high_above ? b : high;
        high_at = high_above ? here : high_at;
    }
};

// The first column of the largest entry, over `parts` of its columns, `stride` apart; -1 if there
// is none or it is infinite.
int64_t first_of(const Maxima* row, int parts, int64_t stride);

// The first index of the largest entry of a row of n that is no NaN; -1 if there is none or it is
// infinite.
int64_t first_maximum(const float* row, int64_t n);

}  // namespace smart
