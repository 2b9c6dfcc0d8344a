// Linear layers over packed weights: panels of columns, in one fixed order of sums; and the norms in front of them.

#pragma once
#include "maxima.h"
#include "tiles.h"
#include "vectors.h"

// Adds the products of R rows' inputs x[0], x[ld], ... with the two vectors of a panel.
template <int R> __attribute__((always_inline)) static inline void multiply_add(vf (&acc)[R][2], vf a, vf b, const float* x, int64_t ld) {
    for (int r = 0; r < R; r++) {
        float xr = x[r * ld];
        acc[r][0] += a * xr;
        acc[r][1] += b * xr;
    }
}

// A packed weight [n, k]: panels of PANEL columns. bf16: for each pair of k, PANEL columns of (even, odd); fp32: for
// each k, PANEL columns. `run` adds to sums; it takes STEP of k at a time.
template <class W> struct Panel;
#if defined(__AVX512BF16__)
template <> struct Panel<bf16> {
    static constexpr int STEP = 2;
    template <int R, int HINT>
    static inline void run(const bf16* x, int64_t ld, const bf16* w, int64_t k, Ahead ahead, vf (&acc)[R][2]) {
        for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL) {
            prefetch<HINT, 4 * PANEL>(ahead);
            __m512bh a = (__m512bh)loadu<vu>(w), b = (__m512bh)loadu<vu>(w + PANEL);
            for (int r = 0; r < R; r++) {
                __m512bh pair = (__m512bh)_mm512_set1_epi32(loadu<int32_t>(x + r * ld + i));
                acc[r][0] = (vf)_mm512_dpbf16_ps((__m512)acc[r][0], a, pair);
                acc[r][1] = (vf)_mm512_dpbf16_ps((__m512)acc[r][1], b, pair);
            }
        }
    }
};
#else
template <> struct Panel<bf16> {
    static constexpr int STEP = 2;
    template <int R, int HINT>
    static inline void run(const float* x, int64_t ld, const bf16* w, int64_t k, Ahead ahead, vf (&acc)[R][2]) {
        for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL) {
            prefetch<HINT, 4 * PANEL>(ahead);
            vf a = (vf)(loadu<vu>(w) << 16), b = (vf)(loadu<vu>(w + PANEL) << 16);
            multiply_add(acc, a, b, x + i, ld);
            asm volatile("" : "+r"(w));  // keeps GCC from widening the odd ones already, for which sums would lose registers
            vu c = loadu<vu>(w) >> 16, d = loadu<vu>(w + PANEL) >> 16;
            hold(c), hold(d);  // else a mask, which takes a register
            a = (vf)(c << 16), b = (vf)(d << 16);
            multiply_add(acc, a, b, x + i + 1, ld);
        }
    }
};
#endif
template <> struct Panel<float> {
    static constexpr int STEP = 1;
    template <int R, int HINT>
    static inline void run(const float* x, int64_t ld, const float* w, int64_t k, Ahead ahead, vf (&acc)[R][2]) {
        for (int64_t i = 0; i < k; i++, w += PANEL) {
            prefetch<HINT, 4 * PANEL>(ahead);
            vf a = loadu<vf>(w), b = loadu<vf>(w + VW);
            hold(a), hold(b);
            multiply_add(acc, a, b, x + i, ld);
        }
    }
};

// 8-bit weights, for the outputs of a head: for each four of k, PANEL columns of four.
#if defined(__AVX512VNNI__)
// They are read by inputs of 8 bits with 128 added. The sums are integers in the lanes of floats.
template <> struct InputOf<int8_t> { typedef uint8_t type; };
__attribute__((always_inline)) static inline void add_products(__m512i& sum, __m512i x, __m512i w) {
    asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(x), "v"(w));  // around the intrinsic GCC 12 copies every sum
}
template <> struct Panel<int8_t> {
    static constexpr int STEP = 4;
    template <int R, int HINT>
    static inline void run(const uint8_t* x, int64_t ld, const int8_t* w, int64_t k, Ahead ahead, vf (&acc)[R][2]) {
        all<HINT>(x, ld, w, k, ahead, acc, std::make_integer_sequence<int, R>());
    }
    template <int HINT, int R, int... I>
    __attribute__((always_inline)) static inline void all(const uint8_t* x, int64_t ld, const int8_t* w, int64_t k, Ahead ahead,
                                                          vf (&acc)[R][2], std::integer_sequence<int, I...>) {
        __m512i left[R] = {(__m512i)acc[I][0]...}, right[R] = {(__m512i)acc[I][1]...}, four[R];
        for (int64_t i = 0; i < k; i += 4, w += 4 * PANEL) {
            prefetch<HINT, 4 * PANEL>(ahead);
            __m512i a = (__m512i)loadu<vu>(w), b = (__m512i)loadu<vu>(w + 2 * PANEL);
            ((four[I] = _mm512_set1_epi32(loadu<int32_t>(x + I * ld + i)), add_products(left[I], four[I], a),
              add_products(right[I], four[I], b)), ...);
        }
        ((acc[I][0] = (vf)left[I], acc[I][1] = (vf)right[I]), ...);
    }
};
#else
// They are widened, which reads half of what bf16 would.
template <> struct Panel<int8_t> {
    static constexpr int STEP = 4;
    template <int R, int HINT>
    static inline void run(const float* x, int64_t ld, const int8_t* w, int64_t k, Ahead ahead, vf (&acc)[R][2]) {
        for (int64_t i = 0; i < k; i += 4, w += 4 * PANEL) {
            prefetch<HINT, 4 * PANEL>(ahead);
            for (int j = 0; j < 4; j++) {
                vf a = __builtin_convertvector(loadu<vi>(w) << (24 - 8 * j) >> 24, vf);
                vf b = __builtin_convertvector(loadu<vi>(w + 2 * PANEL) << (24 - 8 * j) >> 24, vf);
                multiply_add(acc, a, b, x + i + j, ld);
            }
        }
    }
};
#endif

#if defined(__AVX512F__)
#define INLINED __attribute__((always_inline)) inline  // 5 % faster
#else
#define INLINED __attribute__((noinline))  // with 16 registers GCC 12 keeps sums in them only so
#endif
// Adds the products of R rows with a bite of a panel to `sums` [R, PANEL], or begins them.
template <int R, int HINT, class W>
INLINED static void pass(const Input<W>* x, int64_t ld, const W* w, int64_t k, Ahead ahead, float* sums, bool begin) {
    vf acc[R][2] = {};
    if (!begin) for (int r = 0; r < R; r++) acc[r][0] = loadu<vf>(sums + r * PANEL), acc[r][1] = loadu<vf>(sums + r * PANEL + VW);
    Panel<W>::template run<R, HINT>(x, ld, w, k, ahead, acc);
    for (int r = 0; r < R; r++) storeu(sums + r * PANEL, acc[r][0]), storeu(sums + r * PANEL + VW, acc[r][1]);
}
#undef INLINED

// y = x w^T for the panels of this thread; `done(row, first column, low half, high half)` receives each result.
//
// More rows than have room in registers go over a panel in several passes. Those after the first find it in the second cache
// and would leave memory idle: so each pass prefetches its share of what comes next. A panel too large to stay there is taken
// in bites, which all rows go over.
template <int HINT, class W, class Epilogue>
static void gemm(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t n, int64_t k, Epilogue&& done) {
    if (!rows) return;
    if (tiled<W>(k)) return tile_gemm(x, ld, rows, w, n, k, done);
    const Panels mine(n);
    const int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    if constexpr (HINT != INTO_L2)  // two passes wait for memory still, and what is that far ahead leaves the first cache
        if (blocks == 2) return gemm<INTO_L2>(x, ld, rows, w, n, k, done);
    const int64_t line = Panel<W>::STEP * PANEL * sizeof(W), stride = (line + blocks - 1) / blocks;
    const int64_t bite = blocks > 1 ? std::min(k, BITE / line * Panel<W>::STEP) : k;
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < int64_t(rows) * PANEL) kept.resize(rows * PANEL);
    for (int64_t p = mine.first; p < mine.last; p++)
        for (int64_t i = 0; i < k; i += bite) {
            const W* wp = w + (p * k + i) * PANEL;
            const int64_t depth = std::min(bite, k - i), steps = depth / Panel<W>::STEP;
            Ahead ahead = {(const char*)wp + (blocks > 1 ? steps * line : AHEAD), stride};
            for (int b = 0; b < blocks; b++, ahead.at += steps * stride) {
                int row = int(int64_t(rows) * b / blocks), size = int(int64_t(rows) * (b + 1) / blocks) - row;
                float* sums = kept.data() + row * PANEL;
                switch (size) {
#define CASE(R) case R: if constexpr (R <= MAX_ROWS) pass<R, HINT>(x + row * ld + i, ld, wp, depth, ahead, sums, !i); break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
                }
                if (i + bite < k) continue;
                for (int r = 0; r < size; r++) done(row + r, p * PANEL, loadu<vf>(sums + r * PANEL), loadu<vf>(sums + r * PANEL + VW));
            }
        }
}

template <class T> static void rms_norm_row(const float* x, const float* weight, float eps, int64_t d, T* out) {
    vf sum = {};
    int64_t i = 0;
    for (; i + VW <= d; i += VW) { vf v = loadu<vf>(x + i); sum += v * v; }
    float s = 0;
    for (int j = 0; j < VW; j++) s += sum[j];
    for (; i < d; i++) s += x[i] * x[i];
    float scale = 1.0f / std::sqrt(s / float(d) + eps);
    for (i = 0; i + VW <= d; i += VW) put(out + i, loadu<vf>(x + i) * scale * loadu<vf>(weight + i));
    for (; i < d; i++) from_f32(x[i] * scale * weight[i], out + i);
}

// Rows are shared out among the threads of the running team; the caller places the barrier.
template <class T> static void rms_norm_rows(const float* x, const float* weight, float eps, int rows, int64_t d, T* out) {
    #pragma omp for schedule(static) nowait
    for (int r = 0; r < rows; r++) rms_norm_row(x + r * d, weight, eps, d, out + r * d);
}

// x as a linear layer reads it, in `room` if it must be rounded; the team may read the result at once.
static inline const float* rounded(const float* x, int, int64_t, float*) { return x; }
static inline const bf16* rounded(const float* x, int rows, int64_t d, bf16* room) {
    #pragma omp for schedule(static)
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = r * d; i < (r + 1) * d; i++) from_f32(x[i], room + i);
    return room;
}

static inline void store_columns(float* y, int64_t column, int64_t n, vf low, vf high, bool add) {
    if (column + PANEL <= n) {
        if (add) { low += loadu<vf>(y + column); high += loadu<vf>(y + column + VW); }
        storeu(y + column, low);
        storeu(y + column + VW, high);
        return;
    }
    for (int j = 0; column + j < n; j++) y[column + j] = (j < VW ? low[j] : high[j - VW]) + (add ? y[column + j] : 0.0f);
}

static inline void add_bias(const float* bias, int64_t column, int64_t n, vf& low, vf& high) {
    if (column + PANEL <= n) { low += loadu<vf>(bias + column); high += loadu<vf>(bias + column + VW); }
    else for (int j = 0; column + j < n; j++) (j < VW ? low[j] : high[j - VW]) += bias[column + j];
}

// y (+)= x w^T + bias. maxima: null, or those of each row, to be updated; y may be null then.
template <class W>
__attribute__((noinline)) static void linear_rows(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t n, int64_t k, const float* bias,
                        float* y, int64_t ldy, bool add, int hint = INTO_CACHES, Maxima* maxima = nullptr) {
    auto store = [=](int row, int64_t column, vf low, vf high) {
        if (bias) add_bias(bias, column, n, low, high);
        if (maxima) maxima[row].add(column, n, low, high);
        if (y) store_columns(y + row * ldy, column, n, low, high, add);
    };
    with_hint(hint, [&](auto to) { gemm<to>(x, ld, rows, w, n, k, store); });
}

// out = silu(x gate^T) * (x up^T); gate and up are interleaved by VW columns: one panel yields VW finished values.
template <class W>
__attribute__((noinline)) static void gated_rows(const Input<W>* x, int rows, const W* w, int64_t ffn, int64_t k, Input<W>* out, int hint) {
    auto store = [=](int row, int64_t column, vf gate, vf up) {
        vf value = gate / (1.0f + vexp<vf, vi>(-gate)) * up;
        int64_t first = column / 2;
        Input<W>* dst = out + row * ffn + first;
        if (first + VW <= ffn) put(dst, value);
        else for (int j = 0; first + j < ffn; j++) from_f32(value[j], dst + j);
    };
    int64_t n = 2 * ((ffn + VW - 1) / VW * VW);
    with_hint(hint, [&](auto to) { gemm<to>(x, k, rows, w, n, k, store); });
}

template <class W>
static void pack_panels(const W* w, int64_t n, int64_t k, W* out) {
    constexpr int STEP = sizeof(W) == 2 ? 2 : 1;
    int64_t panels = (n + PANEL - 1) / PANEL;
    #pragma omp parallel for
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < k; i += STEP)
            for (int j = 0; j < PANEL; j++)
                for (int s = 0; s < STEP; s++)
                    out[p * PANEL * k + i * PANEL + j * STEP + s] = p * PANEL + j < n ? w[(p * PANEL + j) * k + i + s] : W(0);
}

// Row `row` of a packed weight of row length k, as fp32.
template <class W> static void unpack_row(const W* w, int64_t k, int64_t row, float* out) {
    constexpr int STEP = sizeof(W) == 2 ? 2 : 1;
    const W* panel = w + row / PANEL * PANEL * k + row % PANEL * STEP;
    for (int64_t i = 0; i < k; i++) out[i] = to_f32(panel[i / STEP * STEP * PANEL + i % STEP]);
}
