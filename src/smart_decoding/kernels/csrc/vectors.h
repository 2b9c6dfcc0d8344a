// Arithmetic on vectors and single values that is the same text for every CPU.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

namespace [[gnu::visibility("hidden")]] smart {

static inline float to_f32(float v) { return v; }
static inline float to_f32(bf16 v) {
    uint32_t bits = uint32_t(v) << 16;
    return loadu<float>(&bits);
}

static inline void from_f32(float v, float* out) { *out = v; }
static inline void from_f32(float v, bf16* out) {  // rounded to the nearest, ties to even
    uint32_t bits = loadu<uint32_t>(&v);
    *out = bf16((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// `count` floats as T.
template <class T>
static inline void put_all(const float* from, int64_t count, T* to) {
    const int64_t whole = count - count % VW;
    for (int64_t i = 0; i < whole; i += VW) put(to + i, loadu<vf>(from + i));
    for (int64_t i = whole; i < count; i++) from_f32(from[i], to + i);
}

// The sum of all lanes, the first one first.
template <class F>
__attribute__((always_inline)) static inline float sum_in_order(const F& v) {
    float sum = 0;
    for (int j = 0; j < LANES_OF<F>; j++) sum += v[j];
    return sum;
}

// One step of `transpose`: blocks of STEP lanes of rows STEP apart change places.
template <int STEP>
__attribute__((always_inline)) static inline void exchange(vf (&rows)[VW]) {
    vi first, second;  // constants: of both rows' lanes
    for (int j = 0; j < VW; j++) {
        first[j] = j & STEP ? VW + (j ^ STEP) : j;
        second[j] = j & STEP ? VW + j : j ^ STEP;
    }
    for (int r = 0; r < VW; r++) {
        if (r & STEP) continue;
        const vf a = rows[r], b = rows[r + STEP];
        rows[r] = __builtin_shuffle(a, b, first);
        rows[r + STEP] = __builtin_shuffle(a, b, second);
    }
}

// A square of lanes.
__attribute__((always_inline)) static inline void transpose(vf (&rows)[VW]) {
    exchange<1>(rows);
    exchange<2>(rows);
    if constexpr (VW > 4) exchange<4>(rows);
    if constexpr (VW > 8) exchange<8>(rows);
}

// Whether a comparison holds in any lane.
static inline bool any_of(vi mask) {
    int any = 0;
    for (int j = 0; j < VW; j++) any |= mask[j];
    return any != 0;
}

// exp(x) for x < 88, relative error about 1e-7; -inf gives 0.
template <class F>
__attribute__((always_inline)) static inline F vexp(const F& at) {
    F x = at;
    typedef decltype(x < x) I;
    const F lowest = F{} - 87.0f, highest = F{} + 88.0f;
    I below = x < lowest;
    x = below ? lowest : x;
    x = x > highest ? highest : x;
    F n = x * 1.44269504f;
    F shifted = n + INTEGERS;  // an integer in the low mantissa bits
    F k = shifted - INTEGERS;
    F r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    // Multiplies by 2^k in the exponent; the shifted constant has zero low bits.
    F y = (F)((((I)shifted) << 23) + (I)p);
    return below ? y - y : y;
}

}  // namespace smart
