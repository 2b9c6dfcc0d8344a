// The largest entries of rows of logits, with sampling noise where asked.

#pragma once
#include <cstdint>

namespace [[gnu::visibility("hidden")]] smart {

// smart_top_k of one row; a key of 0 adds no noise.
void top_k_row(const float* row, int64_t n, int k, float scale, uint64_t key, const int64_t* tokens,
               int64_t* ids, float* probs);

}  // namespace smart
