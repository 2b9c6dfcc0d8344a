// Mixtures of experts.

#pragma once
#include "linear.h"

namespace [[gnu::visibility("hidden")]] smart {

// Floats of a row in Workspace's `ffn` and `mixture`.
static inline int64_t ffn_floats(const Layer& l) {
    return l.experts ? int64_t(l.per_token + l.shared) * l.ffn : l.ffn;
}
static inline int64_t mixture_floats(const Layer& l) {
    if (!l.experts) return 0;
    return l.experts + l.shared + (l.per_token + l.shared) * (int64_t(l.hidden) + 2);
}

// x += what its experts make of each row of `normed`, by a whole team.
template <class W>
void add_experts(const Layer& l, int rows, const Workspace& workspace, float* x);

}  // namespace smart
