// How packed weights lie, and how they are prefetched.
//
// A packed weight [n, k] is panels of PANEL columns. fp32: for each of k, PANEL columns. bf16: for
// each pair of k, PANEL columns of (even, odd). 8 bits: for each four of k, PANEL columns of four.

#pragma once
#include <type_traits>

#include "team.h"
#include "vectors.h"

namespace [[gnu::visibility("hidden")]] smart {

constexpr int PANEL = 2 * VW;

// What panels of W are multiplied with. Bytes have 128 added.
template <class W>
struct InputOf {
    typedef float type;
};
template <>
struct InputOf<bf16> {
    typedef std::conditional_t<HAS_BF16_PAIRS, bf16, float> type;
};
template <>
struct InputOf<int8_t> {
    typedef std::conditional_t<HAS_BYTE_DOT, uint8_t, float> type;
};
template <class W>
using Input = typename InputOf<W>::type;

static inline int64_t panels_of(int64_t n) { return (n + PANEL - 1) / PANEL; }

// Where weights are prefetched to. Past the caches, these still hold a draft head, and the code and
// data between two forwards, when these come next; which of them reads memory fastest depends on
// the CPU (smart_read).
constexpr int PAST_CACHES = 0, INTO_L2 = 2, INTO_CACHES = 3;

// Bytes of weights to prefetch ahead: hardware prefetch alone leaves a third of the bandwidth.
constexpr int PREFETCH_DISTANCE = 6144;

// What a pass over weights prefetches: from `at` on, `stride` bytes for each of its steps.
struct Prefetch {
    const char* at;
    int64_t stride;

    template <int HINT, int BYTES>
    void step() {  // BYTES: of weights that a step reads
        __builtin_prefetch(at, 0, HINT);
        if (BYTES > 64) __builtin_prefetch(at + stride / 2, 0, HINT);
        at += stride;
    }
};

// Calls `run` with the hint as a constant of the compiler.
template <class F>
static inline void with_hint(int hint, F&& run) {
    if (hint == PAST_CACHES)
        run(std::integral_constant<int, PAST_CACHES>());
    else if (hint == INTO_L2)
        run(std::integral_constant<int, INTO_L2>());
    else
        run(std::integral_constant<int, INTO_CACHES>());
}

// Calls `run` with `count`, of 1 to MOST, as a constant of the compiler. A switch, and not a
// recursion: for that GCC 12 keeps what the calls have in common on the stack.
template <int MOST, class F>
__attribute__((always_inline)) static inline void with_count(int count, F&& run) {
    static_assert(MOST <= 12);
    auto run_if_served = [&](auto constant) __attribute__((always_inline)) {
        if constexpr (constant <= MOST) run(constant);
    };
    switch (count) {
        case 1:
            return run_if_served(std::integral_constant<int, 1>());
        case 2:
            return run_if_served(std::integral_constant<int, 2>());
        case 3:
            return run_if_served(std::integral_constant<int, 3>());
        case 4:
            return run_if_served(std::integral_constant<int, 4>());
        case 5:
            return run_if_served(std::integral_constant<int, 5>());
        case 6:
            return run_if_served(std::integral_constant<int, 6>());
        case 7:
            return run_if_served(std::integral_constant<int, 7>());
        case 8:
            return run_if_served(std::integral_constant<int, 8>());
        case 9:
            return run_if_served(std::integral_constant<int, 9>());
        case 10:
            return run_if_served(std::integral_constant<int, 10>());
        case 11:
            return run_if_served(std::integral_constant<int, 11>());
        case 12:
            return run_if_served(std::integral_constant<int, 12>());
    }
}

}  // namespace smart
