// The first maximum of a row whose columns come panel by panel.

#pragma once
#include "vectors.h"

struct Maxima {  // of each lane of a panel: the largest entry that is no NaN, and the first panel that has it
    vf low = vf{} - INFINITY, high = vf{} - INFINITY;
    vi low_at = {}, high_at = {};

    void add(int64_t column, int64_t n, vf a, vf b) {  // a panel's entries, those from n on left out
        for (int j = 0; column + PANEL > n && j < PANEL; j++)
            if (column + j >= n) (j < VW ? a[j] : b[j - VW]) = -INFINITY;
        vi above = a > low, over = b > high, here = vi{} + int32_t(column);
        low = above ? a : low, low_at = above ? here : low_at;
        high = over ? b : high, high_at = over ? here : high_at;
    }
};

// The first column of the largest entry, over `parts` of its columns, `stride` apart; -1 if there is none or it is infinite.
static int64_t first_of(const Maxima* row, int parts, int64_t stride) {
    float best = -INFINITY;
    int64_t first = -1;
    for (int p = 0; p < parts; p++, row += stride)
        for (int j = 0; j < PANEL; j++) {
            float value = j < VW ? row->low[j] : row->high[j - VW];
            int64_t at = j < VW ? row->low_at[j] + j : row->high_at[j - VW] + j;
            if (value > best || (value == best && at < first)) best = value, first = at;
        }
    return std::isfinite(best) ? first : -1;
}

// The first index of the largest entry of a row of n that is no NaN; -1 if there is none or it is infinite.
static int64_t first_maximum(const float* row, int64_t n) {
    Maxima found;
    float tail[PANEL];
    for (int64_t i = 0; i < n; i += PANEL, row += PANEL) {
        const float* at = i + PANEL <= n ? row : (const float*)memcpy(tail, row, (n - i) * sizeof(float));
        found.add(i, n, loadu<vf>(at), loadu<vf>(at + VW));
    }
    return first_of(&found, 1, 1);
}
