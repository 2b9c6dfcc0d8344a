// Vectors of one text for AVX-512, AVX2 and NEON (GCC's vector extensions), conversions, and how weights are prefetched.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <omp.h>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
constexpr int VW = 16, MAX_ROWS = 12;  // lanes of a vector; rows that share one pass over a panel of weights
#elif defined(__AVX2__)
constexpr int VW = 8, MAX_ROWS = 6;
#else
constexpr int VW = 4, MAX_ROWS = 8;
#endif
constexpr int PANEL = 2 * VW;  // output columns of a packed panel
constexpr int PAGE = 16;       // positions of a KV page
constexpr int CHUNK = 64;      // positions per step of the online softmax
// Where weights are prefetched to. Past the caches, these still hold a draft head, and the code and data between two
// forwards, when these come next; which of them reads memory fastest depends on the CPU (smart_read).
constexpr int PAST_CACHES = 0, INTO_L2 = 2, INTO_CACHES = 3;
constexpr int AHEAD = 6144;    // bytes of weights to prefetch ahead: hardware prefetch alone leaves a third of the bandwidth
constexpr int64_t BITE = 96 << 10;  // bytes of weights that several passes share: twice that has room in the second cache

// The panels of this thread, of those that n columns make.
struct Panels {
    int64_t first, last;
    explicit Panels(int64_t n) {
        int64_t all = (n + PANEL - 1) / PANEL, threads = omp_get_num_threads(), me = omp_get_thread_num();
        first = all * me / threads, last = all * (me + 1) / threads;
    }
};

// What a pass over weights prefetches: from `at` on, `stride` bytes for each of its steps.
struct Ahead { const char* at; int64_t stride; };
template <class F> static inline void with_hint(int hint, F&& run) {  // as a constant of the compiler
    if (hint == PAST_CACHES) run(std::integral_constant<int, PAST_CACHES>());
    else if (hint == INTO_L2) run(std::integral_constant<int, INTO_L2>());
    else run(std::integral_constant<int, INTO_CACHES>());
}
template <int HINT, int BYTES> static inline void prefetch(Ahead& ahead) {  // BYTES: of weights that a step reads
    __builtin_prefetch(ahead.at, 0, HINT);
    if (BYTES > 64) __builtin_prefetch(ahead.at + ahead.stride / 2, 0, HINT);
    ahead.at += ahead.stride;
}

typedef float vf __attribute__((vector_size(4 * VW)));
typedef uint32_t vu __attribute__((vector_size(4 * VW)));
typedef int32_t vi __attribute__((vector_size(4 * VW)));
typedef float pf __attribute__((vector_size(4 * PAGE)));  // one value for each position of a page
typedef int32_t pi __attribute__((vector_size(4 * PAGE)));
typedef uint32_t pu __attribute__((vector_size(4 * PAGE)));
typedef uint16_t ph __attribute__((vector_size(2 * PAGE)));
typedef uint16_t vh __attribute__((vector_size(2 * VW)));
typedef int8_t vb __attribute__((vector_size(VW)));
typedef uint16_t bf16;

static inline float to_f32(float v) { return v; }
static inline float to_f32(bf16 v) { uint32_t u = uint32_t(v) << 16; float f; memcpy(&f, &u, 4); return f; }
static inline void from_f32(float v, float* out) { *out = v; }
static inline void from_f32(float v, bf16* out) {  // round to nearest even
    uint32_t u; memcpy(&u, &v, 4);
    *out = bf16((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// What a linear layer with weights W reads.
template <class W> struct InputOf { typedef float type; };
#if defined(__AVX512BF16__)
template <> struct InputOf<bf16> { typedef bf16 type; };
#endif
template <class W> using Input = typename InputOf<W>::type;

template <class V> static inline void hold(V& v) {  // in a register: GCC would load it anew for each use
#if defined(__x86_64__)
    asm("" : "+v"(v));
#endif
}

template <class V> static inline V loadu(const void* p) { V v; memcpy(&v, p, sizeof v); return v; }
template <class V> static inline void storeu(void* p, V v) { memcpy(p, &v, sizeof v); }
static inline void put(float* p, vf v) { storeu(p, v); }
#if defined(__AVX512BF16__)
static inline void put(bf16* p, vf v) { storeu(p, _mm512_cvtneps_pbh((__m512)v)); }
#endif

// exp(x) for x < 88, relative error about 1e-7; -inf gives 0.
template <class F, class I> static inline F vexp(F x) {
    const F lo = F{} - 87.0f, hi = F{} + 88.0f;
    I below = x < lo;
    x = below ? lo : x;
    x = x > hi ? hi : x;
    F n = x * 1.44269504f;
    F shifted = n + 12582912.0f;  // rounds to an integer in the low mantissa bits
    F k = shifted - 12582912.0f;
    F r = x - k * 0.693359375f;
    r = r + k * 2.12194440e-4f;
    F p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    I e = (((I)shifted) << 23) + (I)p;  // multiply by 2^k in the exponent; the shifted constant has zero low bits
    F y = (F)e;
    return below ? y - y : y;
}
