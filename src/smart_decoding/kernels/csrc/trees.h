// The columns of draft trees (core/tree.py).

#pragma once
#include "abi.h"

namespace [[gnu::visibility("hidden")]] smart {

static inline int64_t& owner(const Trees& t, int64_t i) { return t.ints[i]; }
static inline int64_t& token(const Trees& t, int64_t i) { return t.ints[t.room + i]; }
static inline int64_t& parent(const Trees& t, int64_t i) { return t.ints[2 * t.room + i]; }
static inline int64_t& depth(const Trees& t, int64_t i) { return t.ints[3 * t.room + i]; }
static inline int64_t& source(const Trees& t, int64_t i) { return t.ints[4 * t.room + i]; }
static inline double& draft_prob(const Trees& t, int64_t i) { return t.floats[i]; }
static inline double& path_prob(const Trees& t, int64_t i) { return t.floats[t.room + i]; }
static inline double& accept_prob(const Trees& t, int64_t i) { return t.floats[2 * t.room + i]; }

}  // namespace smart
