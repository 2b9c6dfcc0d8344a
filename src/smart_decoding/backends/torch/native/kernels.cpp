// CPU kernels: what a small decoder needs so that one token costs no more than reading its weights once.
//
// Weights are bf16 (or fp32); sums are fp32. What a linear layer reads is fp32, or bf16 where the CPU multiplies pairs of
// bf16 (AVX512-BF16: half the instructions for a row). Each output is summed in one fixed order that depends neither
// on how many rows the forward has nor on where a key lies in memory: a row's result is bitwise the same alone, in a
// batch, in a chunk of a prompt and as a node of a draft tree.
//
// Compiled at first use by native/build.py with -O3 -march=native -fopenmp; plain C interface, called through ctypes.
// GCC vector extensions: AVX-512, AVX2 and NEON from one text.

#include <algorithm>
#include <alloca.h>
#include <cmath>
#include <cstring>
#include <omp.h>
#include <utility>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "forward.h"

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
// How weights are prefetched. What does not fit into the caches anyway goes past them: they then still hold a draft head,
// and the code and data between two forwards, when these come next.
constexpr int PAST_CACHES = 0, INTO_L2 = 2, INTO_CACHES = 3;
constexpr int AHEAD = 6144;    // bytes of weights to prefetch ahead: hardware prefetch alone leaves a third of the bandwidth

// What a pass over weights prefetches: from `at` on, `stride` bytes for each of its steps.
struct Ahead { const char* at; int64_t stride; };
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

static inline void hold(vf& v) {  // in a register: GCC would load it anew for each use
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

// ---------------------------------------------------------------------------------------------------------------- linear

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
            a = (vf)(loadu<vu>(w) & 0xffff0000u), b = (vf)(loadu<vu>(w + PANEL) & 0xffff0000u);
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

// Adds the products of R rows with a bite of a panel to `sums` [R, PANEL], or begins them.
template <int R, int HINT, class W>
static inline void pass(const Input<W>* x, int64_t ld, const W* w, int64_t k, Ahead ahead, float* sums, bool begin) {
    vf acc[R][2] = {};
    if (!begin) for (int r = 0; r < R; r++) acc[r][0] = loadu<vf>(sums + r * PANEL), acc[r][1] = loadu<vf>(sums + r * PANEL + VW);
    Panel<W>::template run<R, HINT>(x, ld, w, k, ahead, acc);
    for (int r = 0; r < R; r++) storeu(sums + r * PANEL, acc[r][0]), storeu(sums + r * PANEL + VW, acc[r][1]);
}

#if defined(__AMX_BF16__)
// Tiles of AMX: 16 rows of inputs by 32 columns of a panel, 64 bytes deep, in two instructions. A weight is read by tiles
// for any number of rows or for none, so that results do not depend on how many there are.
static const bool TILES = !syscall(SYS_arch_prctl, 0x1023, 18);  // Linux must be asked for the registers: ARCH_REQ_XCOMP_PERM
constexpr int TILE = 16, TILE_DEPTH = 64, TILE_BYTES = TILE * 4 * PANEL;  // rows; bytes of an input; of a panel, for one step

template <class W> static bool tiled(int64_t k) {
    return TILES && sizeof(W) < 4 && k * sizeof(Input<W>) % TILE_DEPTH == 0;
}

// Tiles 0 to 3: sums, 4 and 5: weights, 6 and 7: inputs of the first 16 rows and of those after them.
static void shape_tiles(int rows) {
    struct { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
    for (int t = 0; t < 8; t++) {
        bool upper = t == 0 || t == 1 || t == 6;
        config.bytes[t] = 64;
        config.rows[t] = t == 4 || t == 5 ? TILE : upper ? std::min(rows, TILE) : std::max(rows - TILE, 1);
    }
    _tile_loadconfig(&config);
}

// sums [rows, PANEL] of up to 32 rows (`both`: of more than 16). ld: bytes between rows.
template <int HINT, class W, bool both>
static inline void tile_pass(const char* x, int64_t ld, const char* w, int64_t depth, Ahead ahead, float* sums) {
#define MULTIPLY(SUM, X, W_) if constexpr (sizeof(W) == 2) _tile_dpbf16ps(SUM, X, W_); else _tile_dpbusd(SUM, X, W_)
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < depth; i += TILE_DEPTH, w += TILE_BYTES, ahead.at += ahead.stride) {
        for (int64_t b = 0; b < ahead.stride; b += 64) __builtin_prefetch(ahead.at + b, 0, HINT);
        _tile_loadd(6, x + i, ld);
        _tile_loadd(4, w, 4 * PANEL);
        MULTIPLY(0, 6, 4);
        _tile_loadd(5, w + 64, 4 * PANEL);
        MULTIPLY(1, 6, 5);
        if (!both) continue;
        _tile_loadd(7, x + TILE * ld + i, ld);
        MULTIPLY(2, 7, 4);
        MULTIPLY(3, 7, 5);
    }
#undef MULTIPLY
    _tile_stored(0, sums, 4 * PANEL);
    _tile_stored(1, sums + TILE, 4 * PANEL);
    if (!both) return;
    _tile_stored(2, sums + TILE * PANEL, 4 * PANEL);
    _tile_stored(3, sums + TILE * PANEL + TILE, 4 * PANEL);
}

// `gemm` by tiles, 32 rows at a time; each pass over a panel prefetches its share of the next.
template <int HINT, class W, class Epilogue>
static void tile_gemm(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t n, int64_t k, Epilogue&& done) {
    constexpr int PASS = 2 * TILE;
    int64_t panels = (n + PANEL - 1) / PANEL, depth = k * sizeof(Input<W>), size = k * PANEL * sizeof(W);
    int threads = omp_get_num_threads(), me = omp_get_thread_num(), shaped = 0;
    int64_t first = panels * me / threads, last = panels * (me + 1) / threads;
    int passes = (rows + PASS - 1) / PASS;
    int64_t stride = (TILE_BYTES / passes + 63) / 64 * 64;
    alignas(64) float sums[PASS * PANEL];
    for (int64_t p = first; p < last; p++) {
        const char* panel = (const char*)w + p * size;
        Ahead ahead = {panel + (passes > 1 ? size : AHEAD), stride};
        for (int row = 0; row < rows; row += PASS, ahead.at += depth / TILE_DEPTH * stride) {
            int count = std::min(PASS, rows - row);
            const char* from = (const char*)(x + row * ld);
            if (count != shaped) shape_tiles(shaped = count);
            auto* run = passes > 1 ? count > TILE ? tile_pass<INTO_L2, W, true> : tile_pass<INTO_L2, W, false>
                                   : count > TILE ? tile_pass<HINT, W, true> : tile_pass<HINT, W, false>;
            run(from, ld * sizeof(*x), panel, depth, ahead, sums);
            for (int r = 0; r < count; r++) done(row + r, p * PANEL, loadu<vf>(sums + r * PANEL), loadu<vf>(sums + r * PANEL + VW));
        }
    }
    if (shaped) _tile_release();
}
#else
template <class W> static bool tiled(int64_t) { return false; }
template <int HINT, class W, class Epilogue>
static void tile_gemm(const Input<W>*, int64_t, int, const W*, int64_t, int64_t, Epilogue&&) {}
#endif

// y = x w^T for the panels of this thread; `done(row, first column, low half, high half)` receives each result.
//
// More rows than have room in registers go over a panel in several passes. Those after the first would find it in the caches
// and leave memory idle: so a panel is taken in bites, which all rows go over, and each pass prefetches its share of the next.
template <int HINT, class W, class Epilogue>
static void gemm(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t n, int64_t k, Epilogue&& done) {
    if (!rows) return;
    if (tiled<W>(k)) return tile_gemm<HINT>(x, ld, rows, w, n, k, done);
    int64_t panels = (n + PANEL - 1) / PANEL;
    int threads = omp_get_num_threads(), me = omp_get_thread_num();
    int64_t first = panels * me / threads, last = panels * (me + 1) / threads;
    int blocks = (rows + MAX_ROWS - 1) / MAX_ROWS;
    int64_t bite = blocks > 1 ? AHEAD / (PANEL * sizeof(W)) : k;
    int64_t stride = (Panel<W>::STEP * PANEL * sizeof(W) + blocks - 1) / blocks;
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < int64_t(rows) * PANEL) kept.resize(rows * PANEL);
    float* sums = kept.data();
    for (int64_t p = first; p < last; p++) {
        for (int64_t i = 0; i < k; i += bite) {
            const W* wp = w + (p * k + i) * PANEL;
            Ahead ahead = {(const char*)wp + AHEAD, stride};
            int64_t depth = std::min(bite, k - i);
            for (int b = 0; b < blocks; b++, ahead.at += depth / Panel<W>::STEP * stride) {
                int row = int(int64_t(rows) * b / blocks), size = int(int64_t(rows) * (b + 1) / blocks) - row;
                switch (size) {
#define CASE(R) case R: if constexpr (R <= MAX_ROWS) pass<R, HINT>(x + row * ld + i, ld, wp, depth, ahead, sums + row * PANEL, !i); break;
                    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
                }
            }
        }
        for (int r = 0; r < rows; r++) done(r, p * PANEL, loadu<vf>(sums + r * PANEL), loadu<vf>(sums + r * PANEL + VW));
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

static inline void store_columns(float* y, const float* bias, int64_t column, int64_t n, vf low, vf high, bool add) {
    if (column + PANEL <= n) {
        if (bias) { low += loadu<vf>(bias + column); high += loadu<vf>(bias + column + VW); }
        if (add) { low += loadu<vf>(y + column); high += loadu<vf>(y + column + VW); }
        storeu(y + column, low);
        storeu(y + column + VW, high);
        return;
    }
    for (int j = 0; j < PANEL && column + j < n; j++) {
        float v = j < VW ? low[j] : high[j - VW];
        if (bias) v += bias[column + j];
        y[column + j] = add ? y[column + j] + v : v;
    }
}

template <class W>
__attribute__((noinline)) static void linear_rows(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t n, int64_t k, const float* bias,
                        float* y, int64_t ldy, bool add, bool streamed = false) {
    auto store = [=](int row, int64_t column, vf low, vf high) {
        store_columns(y + row * ldy, bias, column, n, low, high, add);
    };
    if (streamed) gemm<PAST_CACHES>(x, ld, rows, w, n, k, store);
    else gemm<INTO_CACHES>(x, ld, rows, w, n, k, store);
}

// out = silu(x gate^T) * (x up^T); gate and up are interleaved by VW columns: one panel yields VW finished values.
template <class W>
__attribute__((noinline)) static void gated_rows(const Input<W>* x, int rows, const W* w, int64_t ffn, int64_t k, Input<W>* out, bool streamed) {
    auto store = [=](int row, int64_t column, vf gate, vf up) {
        vf value = gate / (1.0f + vexp<vf, vi>(-gate)) * up;
        int64_t first = column / 2;
        Input<W>* dst = out + row * ffn + first;
        if (first + VW <= ffn) put(dst, value);
        else for (int j = 0; first + j < ffn; j++) from_f32(value[j], dst + j);
    };
    int64_t n = 2 * ((ffn + VW - 1) / VW * VW);
    if (streamed) gemm<PAST_CACHES>(x, k, rows, w, n, k, store);
    else gemm<INTO_CACHES>(x, k, rows, w, n, k, store);
}

// ------------------------------------------------------------------------------------------------------------- attention

// One layer's KV cache. k: [kv_heads, pages, head_dim, PAGE], so that a page's 16 keys are one vector per dimension;
// v: [kv_heads, pages, PAGE, head_dim].

struct Block { int32_t group, row, count; };  // rows of one group that attention works on at a time

static std::vector<Block> blocks_of(const Rows& in, int heads_per_key) {
    int size = std::max(1, std::min(4, 32 / heads_per_key));
    std::vector<Block> blocks;
    for (int g = 0; g < in.groups; g++)
        for (int row = in.group_row[g]; row < in.group_row[g + 1]; row += size)
            blocks.push_back({g, row, std::min(size, in.group_row[g + 1] - row)});
    return blocks;
}

template <int HD> struct Query {  // running softmax of one query head
    float q[HD], best, sum;
    vf acc[HD / VW];
};

template <class F> static inline F load_f32(const float* p) { return loadu<F>(p); }
template <class F> static inline F load_f32(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 splits the generic conversion in two
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#else
    if constexpr (sizeof(F) == sizeof(pf)) return (F)(__builtin_convertvector(loadu<ph>(p), pu) << 16);
    else return (F)(__builtin_convertvector(loadu<vh>(p), vu) << 16);
#endif
}

// Scores of P pages of 16 keys for N queries. Each score is summed over the dimensions in order.
template <class T, int HD, int N, int P>
static inline void page_scores(const T* const* k, const Query<HD>* queries, pf (*scores)[CHUNK / PAGE], int page) {
    pf s[P][N] = {};
    for (int d = 0; d < HD; d++)
        for (int p = 0; p < P; p++) {
            pf key = load_f32<pf>(k[page + p] + d * PAGE);
            for (int i = 0; i < N; i++) s[p][i] += key * queries[i].q[d];
        }
    for (int p = 0; p < P; p++)
        for (int i = 0; i < N; i++) scores[i][page + p] = s[p][i];
}

// Folds one chunk of `valid` positions into the running softmax of N queries. Sums depend on positions only.
template <class T, int HD, int N>
static inline void fold(Query<HD>* queries, const pf (*scores)[CHUNK / PAGE], const T* const* v, int valid) {
    float weights[N][CHUNK];
    vf acc[N][HD / VW];
    for (int i = 0; i < N; i++) {
        Query<HD>& query = queries[i];
        float* s = weights[i];
        memcpy(s, scores[i], sizeof weights[i]);
        for (int j = valid; j < CHUNK; j++) s[j] = -INFINITY;
        pf top = loadu<pf>(s);
        for (int p = 1; p < CHUNK / PAGE; p++) { pf x = loadu<pf>(s + p * PAGE); top = x > top ? x : top; }
        float best = query.best, total = 0;
        for (int j = 0; j < PAGE; j++) best = std::max(best, top[j]);
        pf sums = {};
        for (int p = 0; p < CHUNK / PAGE; p++) {
            pf w = vexp<pf, pi>(loadu<pf>(s + p * PAGE) - best);
            storeu(s + p * PAGE, w);
            sums += w;
        }
        for (int j = 0; j < PAGE; j++) total += sums[j];
        float rescale = query.best == -INFINITY ? 0.0f : std::exp(query.best - best);
        query.sum = query.sum * rescale + total;
        query.best = best;
        for (int c = 0; c < HD / VW; c++) acc[i][c] = query.acc[c] * rescale;
    }
    for (int j = 0; j < valid; j++) {
        const T* value = v[j / PAGE] + (j % PAGE) * HD;
        for (int c = 0; c < HD / VW; c++) {
            vf x = load_f32<vf>(value + c * VW);
            for (int i = 0; i < N; i++) acc[i][c] += x * weights[i][j];
        }
    }
    for (int i = 0; i < N; i++)
        for (int c = 0; c < HD / VW; c++) queries[i].acc[c] = acc[i][c];
}

// The above for `heads` queries of one row, in register-sized groups.
template <class T, int HD>
static inline void row_scores(const T* const* k, const Query<HD>* queries, int heads, pf (*scores)[CHUNK / PAGE], int first,
                              int last) {
    for (int i = 0; i < heads;) {
        int n = heads - i >= 4 ? (heads - i == 6 ? 3 : 4) : heads - i, page = first;
#define GO(N) case N: for (; page + 4 <= last; page += 4) page_scores<T, HD, N, 4>(k, queries + i, scores + i, page); \
                      for (; page < last; page++) page_scores<T, HD, N, 1>(k, queries + i, scores + i, page); break;
        switch (n) { GO(1) GO(2) GO(3) GO(4) }
#undef GO
        i += n;
    }
}
template <class T, int HD>
static inline void row_fold(Query<HD>* queries, int heads, const pf (*scores)[CHUNK / PAGE], const T* const* v, int valid) {
    constexpr int GROUP = HD / VW <= 4 ? 3 : 2;
    int i = 0;
    for (; i + GROUP <= heads; i += GROUP) fold<T, HD, GROUP>(queries + i, scores + i, v, valid);
    for (; i < heads; i++) fold<T, HD, 1>(queries + i, scores + i, v, valid);
}

// Attention of the rows [row, row + count) of one request for one KV head; they share passes over common pages.
template <class T, int HD, class O>
static void attend(const Rows& in, const T* kc, const T* vc, const int32_t* table, int row, int count, int heads,
                   const float* q, int64_t ldq, int64_t column, O* out, int64_t ldo) {
    constexpr int MAX_QUERIES = 32;
    static thread_local Query<HD> queries[MAX_QUERIES];
    static thread_local T copy_k[CHUNK / PAGE][HD * PAGE], copy_v[CHUNK / PAGE][HD * PAGE];
    pf scores[MAX_QUERIES][CHUNK / PAGE];
    float scale = 1.0f / std::sqrt(float(HD));
    int longest = 0;
    for (int r = 0; r < count; r++) {
        for (int h = 0; h < heads; h++) {
            Query<HD>& query = queries[r * heads + h];
            const float* src = q + (row + r) * ldq + column + h * HD;
            for (int d = 0; d < HD; d++) query.q[d] = src[d] * scale;
            query.best = -INFINITY;
            query.sum = 0;
            memset(query.acc, 0, sizeof query.acc);
        }
        int extra = in.extra_at[row + r + 1] - in.extra_at[row + r];
        longest = std::max(longest, in.direct[row + r] + extra);
    }
    for (int start = 0; start < longest; start += CHUNK) {
        int shared = CHUNK / PAGE;  // pages of this chunk that every row may read in place
        for (int r = 0; r < count; r++) {
            int i = row + r, extra = in.extra_at[i + 1] - in.extra_at[i];
            int end = extra ? (in.direct[i] / PAGE) * PAGE : ((in.direct[i] + PAGE - 1) / PAGE) * PAGE;
            shared = std::min(shared, std::max(0, (end - start)) / PAGE);
        }
        const T *kp[CHUNK / PAGE], *vp[CHUNK / PAGE];
        for (int p = 0; p < shared; p++) {
            int64_t page = table[(start / PAGE) + p];
            kp[p] = kc + page * HD * PAGE;
            vp[p] = vc + page * HD * PAGE;
        }
        for (int r = 0; r < count; r++) {
            int i = row + r, direct = in.direct[i], extra = in.extra_at[i + 1] - in.extra_at[i];
            int valid = std::min(CHUNK, direct + extra - start);
            if (valid <= 0) continue;
            for (int p = shared; p * PAGE < valid; p++) {
                int first = start + p * PAGE;
                if (first + PAGE <= direct || (!extra && first < direct)) {  // whole page in place
                    int64_t page = table[first / PAGE];
                    kp[p] = kc + page * HD * PAGE;
                    vp[p] = vc + page * HD * PAGE;
                } else {  // gather: the page mixes committed positions and tree nodes
                    for (int j = 0; j < PAGE; j++) {
                        int position = first + j;
                        if (position >= direct + extra) {
                            for (int d = 0; d < HD; d++) copy_k[p][d * PAGE + j] = T(0);
                            continue;
                        }
                        int64_t slot = position < direct ? int64_t(table[position / PAGE]) * PAGE + position % PAGE
                                                         : in.extra[in.extra_at[i] + position - direct];
                        const T* ks = kc + (slot / PAGE) * HD * PAGE + slot % PAGE;
                        for (int d = 0; d < HD; d++) copy_k[p][d * PAGE + j] = ks[d * PAGE];
                        memcpy(&copy_v[p][j * HD], vc + slot * HD, HD * sizeof(T));
                    }
                    kp[p] = copy_k[p];
                    vp[p] = copy_v[p];
                }
            }
            row_scores<T, HD>(kp, queries + r * heads, heads, scores + r * heads, 0, (valid + PAGE - 1) / PAGE);
            row_fold<T, HD>(queries + r * heads, heads, scores + r * heads, vp, valid);
        }
    }
    for (int r = 0; r < count; r++)
        for (int h = 0; h < heads; h++) {
            const Query<HD>& query = queries[r * heads + h];
            O* dst = out + (row + r) * ldo + column + h * HD;
            float inverse = 1.0f / query.sum;
            for (int i = 0; i < HD / VW; i++) put(dst + i * VW, query.acc[i] * inverse);
        }
}

template <class T, int HD>
static void rope_and_store(const Rows& in, int row, float* qkv, int heads, int kv_heads, const float* q_norm,
                           const float* k_norm, float eps, T* kc, T* vc, int64_t pages) {
    const float *cs = in.cosine + in.position[row] * (HD / 2), *sn = in.sine + in.position[row] * (HD / 2);
    for (int h = 0; h < heads + kv_heads; h++) {
        float* x = qkv + h * HD;
        const float* norm = h < heads ? q_norm : k_norm;
        if (norm) rms_norm_row(x, norm, eps, HD, x);
        for (int d = 0; d < HD / 2; d++) {
            float a = x[d], b = x[d + HD / 2];
            x[d] = a * cs[d] - b * sn[d];
            x[d + HD / 2] = b * cs[d] + a * sn[d];
        }
    }
    int64_t slot = in.slot[row];
    for (int h = 0; h < kv_heads; h++) {
        const float *k = qkv + (heads + h) * HD, *v = qkv + (heads + kv_heads + h) * HD;
        T* kd = kc + (h * pages + slot / PAGE) * HD * PAGE + slot % PAGE;
        T* vd = vc + (h * pages * PAGE + slot) * HD;
        for (int d = 0; d < HD; d++) { from_f32(k[d], kd + d * PAGE); from_f32(v[d], vd + d); }
    }
}

// ----------------------------------------------------------------------------------------------------------------- layer

struct Layer {
    int32_t hidden, input, heads, kv_heads, head_dim, ffn;  // input: width that q, k and v read (2 hidden in EAGLE-3)
    int32_t streamed;  // are the weights read past the caches?
    float eps;
    const float *input_norm, *q_norm, *k_norm, *qkv_bias, *output_bias, *post_norm;  // those but post_norm may be null
    const void *qkv, *output, *gate_up, *down;  // packed
};
struct Scratch { float *normed, *qkv, *attention, *ffn; };  // [rows, max(hidden, input)], [rows, (h + 2 kv) hd], [rows, h hd], [rows, ffn]

// Attention of all rows over the keys and values of one layer, by a whole team. q: [rows, ldq].
template <class T, int HD, class O>
static void attend_blocks(const Layer& l, const Rows& in, const std::vector<Block>& blocks, const float* q, int64_t ldq, const T* kc,
                          const T* vc, int64_t pages, O* out) {
    int kv = l.kv_heads, per = l.heads / kv;
    #pragma omp for schedule(dynamic, 1) collapse(2)
    for (size_t b = 0; b < blocks.size(); b++)
        for (int h = 0; h < kv; h++) {
            const Block& block = blocks[b];
            attend<T, HD, O>(in, kc + h * pages * HD * PAGE, vc + h * pages * HD * PAGE, in.pages + in.group_pages[block.group],
                             block.row, block.count, per, q, ldq, int64_t(h) * per * HD, out, int64_t(l.heads) * HD);
        }
}

// What follows attention in a layer: x += attention w^T, then the gated part. `room` and `ffn` are scratch.
template <class W>
static void finish_layer(const Layer& l, int rows, const Input<W>* attention, float* x, Input<W>* room, Input<W>* ffn) {
    int64_t d = l.hidden, width = int64_t(l.heads) * l.head_dim;
    linear_rows(attention, width, rows, (const W*)l.output, d, width, l.output_bias, x, d, true, l.streamed);
    #pragma omp barrier
    rms_norm_rows(x, l.post_norm, l.eps, rows, d, room);
    #pragma omp barrier
    gated_rows(room, rows, (const W*)l.gate_up, l.ffn, d, ffn, l.streamed);
    #pragma omp barrier
    linear_rows(ffn, l.ffn, rows, (const W*)l.down, d, l.ffn, nullptr, x, d, true, l.streamed);
    #pragma omp barrier
}

// One layer, run by a whole team.
template <class W, class T, int HD>
static void layer_run(const Layer& l, const Rows& in, const std::vector<Block>& blocks, const float* input, float* x, T* kc, T* vc,
                      int64_t pages, const Scratch& s) {
    int rows = in.rows, heads = l.heads, kv = l.kv_heads;
    int64_t d = l.hidden, qkv_width = int64_t(heads + 2 * kv) * HD;
    Input<W> *room = (Input<W>*)s.normed, *attention = (Input<W>*)s.attention, *ffn = (Input<W>*)s.ffn;
    const Input<W>* normed = room;
    if (input) normed = rounded(input, rows, l.input, room);
    else {
        rms_norm_rows(x, l.input_norm, l.eps, rows, d, room);
        #pragma omp barrier
    }
    linear_rows(normed, l.input, rows, (const W*)l.qkv, qkv_width, l.input, l.qkv_bias, s.qkv, qkv_width, false, l.streamed);
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int r = 0; r < rows; r++)
        rope_and_store<T, HD>(in, r, s.qkv + r * qkv_width, heads, kv, l.q_norm, l.k_norm, l.eps, kc, vc, pages);
    attend_blocks<T, HD>(l, in, blocks, s.qkv, qkv_width, kc, vc, pages, attention);
    finish_layer<W>(l, rows, attention, x, room, ffn);
}

// `count` layers one after another; after taps[0], taps[1], ... of them, x is copied next to each other into `tapped`.
template <class W, class T, int HD>
static void layers_run(const Layer* layers, int count, const Rows& in, const float* input, float* x, T* kc, T* vc, int64_t pages,
                       const Scratch& s, const int32_t* taps, int tap_count, float* tapped, int threads) {
    int64_t plane = layers[0].kv_heads * pages * HD * PAGE, d = layers[0].hidden;
    const std::vector<Block> blocks = blocks_of(in, layers[0].heads / layers[0].kv_heads);
    #pragma omp parallel num_threads(threads)
    for (int i = 0, tap = 0; i < count; i++) {
        layer_run<W, T, HD>(layers[i], in, blocks, i ? nullptr : input, x, kc + i * plane, vc + i * plane, pages, s);
        if (tap == tap_count || taps[tap] != i + 1) continue;
        #pragma omp for schedule(static) nowait
        for (int r = 0; r < in.rows; r++) memcpy(tapped + (int64_t(r) * tap_count + tap) * d, x + r * d, d * sizeof(float));
        tap++;
    }
}

// First index in [first, last) of the largest entry that is no NaN, or -1.
static int64_t first_maximum(const float* row, int64_t first, int64_t last) {
    vf best = vf{} - INFINITY;
    int64_t i = first;
    for (; i + VW <= last; i += VW) { vf v = loadu<vf>(row + i); best = v > best ? v : best; }
    float top = best[0];
    for (int j = 1; j < VW; j++) top = std::max(top, best[j]);
    for (; i < last; i++) top = row[i] > top ? row[i] : top;
    for (i = first; i + VW <= last; i += VW) {
        vi same = loadu<vf>(row + i) == top;
        int any = 0;
        for (int j = 0; j < VW; j++) any |= same[j];
        if (any) break;
    }
    while (i < last && row[i] != top) i++;
    return i < last ? i : -1;
}

// First index of the maximum of each of `rows` rows of n, -1 where there is none or it is infinite; by a whole team.
// Each thread scans the columns that it has written as output layer: they are in its own cache. which: null for all rows;
// found: [rows, threads].
static void maxima(const float* x, const int64_t* which, int rows, int64_t n, int64_t* found, int64_t* out) {
    int me = omp_get_thread_num(), team = omp_get_num_threads();
    int64_t panels = (n + PANEL - 1) / PANEL;
    int64_t first = std::min(n, panels * me / team * PANEL), last = std::min(n, panels * (me + 1) / team * PANEL);
    for (int r = 0; r < rows; r++) found[r * team + me] = first_maximum(x + (which ? which[r] : r) * n, first, last);
    #pragma omp barrier
    #pragma omp single
    for (int r = 0; r < rows; r++) {
        const float* row = x + (which ? which[r] : r) * n;
        int64_t best = n;
        for (int t = 0; t < team; t++) {
            int64_t at = found[r * team + t];
            if (at >= 0 && (best == n || row[at] > row[best])) best = at;
        }
        out[r] = best < n && std::isfinite(row[best]) ? best : -1;
    }
}

template <class W>
static void linear_run(const float* x, int rows, const W* w, int64_t n, int64_t k, const float* norm, float eps,
                       const float* bias, float* scratch, float* y, int64_t ldy, int add, int streamed, int64_t* best, int threads) {
    Input<W>* room = (Input<W>*)scratch;
    std::vector<int64_t> found(best ? size_t(rows) * threads : 0);
    #pragma omp parallel num_threads(threads)
    {
        const Input<W>* input = room;
        if (norm) {
            rms_norm_rows(x, norm, eps, rows, k, room);
            #pragma omp barrier
        } else input = rounded(x, rows, k, room);
        linear_rows(input, k, rows, w, n, k, bias, y, ldy, add, streamed);
        if (best) maxima(y, nullptr, rows, n, found.data(), best);
    }
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

// The best entries found so far, best first.
struct Top {
    int64_t* id;
    float* score;
    int k, found;
    void add(float value, int64_t index) {
        if (found == k && !(value > score[k - 1])) return;
        int at = found < k ? found++ : k - 1;
        for (; at > 0 && value > score[at - 1]; at--) { score[at] = score[at - 1]; id[at] = id[at - 1]; }
        score[at] = value;
        id[at] = index;
    }
};

static void largest(const float* row, int64_t n, Top& top) {
    for (int64_t i = 0; i < n; i += VW) {
        if (top.found == top.k && i + VW <= n) {
            vi above = loadu<vf>(row + i) > top.score[top.k - 1];
            int any = 0;
            for (int j = 0; j < VW; j++) any |= above[j];
            if (!any) continue;
        }
        for (int64_t j = i; j < std::min(n, i + VW); j++) top.add(row[j], j);
    }
}

// Scores become probabilities of softmax(row * scale).
static void softmax_of(const float* row, int64_t n, float scale, Top& top) {
    float best = top.score[0], sum = 0;
    vf sums = {};
    int64_t i = 0;
    for (; i + VW <= n; i += VW) sums += vexp<vf, vi>((loadu<vf>(row + i) - best) * scale);
    for (int j = 0; j < VW; j++) sum += sums[j];
    for (; i < n; i++) sum += std::exp((row[i] - best) * scale);
    for (int j = 0; j < top.k; j++) top.score[j] = std::exp((top.score[j] - best) * scale) / sum;
}

// The random bits of backends/torch/noise.py for one key and token.
static inline uint32_t noise_bits(uint64_t key, uint64_t token) {
    constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;
    uint64_t z = token * STEP + key + STEP;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
    return z >> 32;
}
static inline double uniform(uint64_t key, uint64_t token) { return (double(noise_bits(key, token)) + 0.5) * 0x1p-32; }
static inline float uniform_tail(uint64_t key, uint64_t token) {  // 1 - uniform, rounded
    return (float(~noise_bits(key, token)) + 0.5f) * 0x1p-32f;
}

// Replaces the largest entries by the largest of row * scale + noise. A token can only be among them if
// 1 - uniform < exp(its score - the last one's), which spares the others their logarithms.
static void noisy_largest(const float* row, int64_t n, float scale, uint64_t key, const int64_t* tokens, Top& top) {
    float best = top.score[0];
    Top noisy{(int64_t*)alloca(top.k * sizeof(int64_t)), (float*)alloca(top.k * sizeof(float)), top.k, 0};
    auto consider = [&](int64_t i, double u) {
        noisy.add(float((row[i] - best) * scale - std::log(-std::log(u))), i);
    };
    for (int j = 0; j < top.k; j++) consider(top.id[j], uniform(key, tokens[top.id[j]]));
    double last = std::exp(double(noisy.score[top.k - 1]));
    constexpr float FAR = -16.0f;  // beyond it a token wins once in ten million times
    for (int64_t i = 0; i < n; i += VW) {
        int64_t end = std::min(n, i + VW);
        float weight[VW] = {};
        if (end == i + VW) {
            vf score = (loadu<vf>(row + i) - best) * scale;
            vi near = score > FAR;
            int any = 0;
            for (int j = 0; j < VW; j++) any |= near[j];
            if (!any) continue;
            storeu(weight, vexp<vf, vi>(score));
        } else for (int64_t j = i; j < end; j++) weight[j - i] = std::exp((row[j] - best) * scale);
        for (int64_t j = i; j < end; j++) {
            double u = uniform(key, tokens[j]);
            if ((1.0 - u) * last > 1.0001 * weight[j - i]) continue;
            bool known = false;  // it is one of those that were considered first
            for (int t = 0; t < top.k; t++) known |= top.id[t] == j;
            if (known) continue;
            consider(j, u);
            last = std::exp(double(noisy.score[top.k - 1]));
        }
    }
    float sum = 0;
    for (int j = 0; j < top.k; j++) sum += std::exp(noisy.score[j] - noisy.score[0]);
    for (int j = 0; j < top.k; j++) {
        top.id[j] = noisy.id[j];
        top.score[j] = std::exp(noisy.score[j] - noisy.score[0]) / sum;
    }
}

static void top_row(const float* row, int64_t n, int k, float scale, uint64_t key, const int64_t* tokens, int64_t* ids,
                    float* probs) {
    Top top{ids, probs, k, 0};
    largest(row, n, top);
    if (key) noisy_largest(row, n, scale, key, tokens, top);
    else softmax_of(row, n, scale, top);
}

// ------------------------------------------------------------------------------------------------------------ draft head

// An EAGLE-3 head of one layer, which reads [norm(embedding) ; norm(features)], and what it borrows of its target.
struct Head {
    Layer layer;
    const float *tap_norm, *fc_bias, *input_norm, *hidden_norm, *final_norm;  // the first two may be null
    const void *fc, *embedding, *table;  // fc packed; embeddings either packed or as a plain table, the other is null
    const void* outputs;                 // [outputs_count, hidden] packed: bytes where `scale` is not null
    const float* scale;                  // of smart_pack_bytes
    const int32_t* sums;
    const int64_t* tokens;  // [outputs_count]
    int64_t outputs_count;
    int32_t taps;  // states that fc reads
    int32_t norm_before_residual;
};

// Scratch memory that is kept, since large blocks are costly to allocate anew.
struct Pool {
    std::vector<float> block;
    size_t used = 0;
    explicit Pool(size_t floats) : block(floats) {}
    template <class V> V* take(int64_t count) {
        V* p = (V*)(block.data() + used);
        used += (count * sizeof(V) + 63) / 64 * 16;
        return p;
    }
};

#if defined(__AVX512VNNI__)
// y = x w^T for pairs of rows, the high and the low halves of 16 bits with 32768 added, times `step` of each pair and `scale`.
__attribute__((noinline)) static void byte_rows(const uint8_t* x, int rows, const int8_t* w, int64_t n, int64_t k, const float* scale,
                        const int32_t* sums, const float* step, float* y) {
    gemm<INTO_CACHES>(x, k, rows, w, n, k, [=](int row, int64_t column, vf left, vf right) {
        vi a = (vi)left, b = (vi)right;
        bool low = row & 1;  // comes after the high half
        if (!low) { a -= 128 * loadu<vi>(sums + column); b -= 128 * loadu<vi>(sums + column + VW); }
        float factor = low ? step[row / 2] : 256 * step[row / 2];
        vf first = __builtin_convertvector(a, vf) * loadu<vf>(scale + column) * factor;
        vf second = __builtin_convertvector(b, vf) * loadu<vf>(scale + column + VW) * factor;
        store_columns(y + row / 2 * n, nullptr, column, n, first, second, low);
    });
}

// [wanted, count] logits of x [wanted, hidden] with 8-bit weights. x is rounded to 16 bits, whose halves are two rows of
// 8 bits. normed [hidden] is this thread's.
static void byte_outputs(const Head& h, const float* x, int wanted, float* normed, void* room, float* step, float* logits) {
    int64_t d = h.layer.hidden, n = h.outputs_count;
    #pragma omp for schedule(static)
    for (int r = 0; r < wanted; r++) {
        rms_norm_row(x + r * d, h.final_norm, h.layer.eps, d, normed);
        float top = 1e-30f;
        for (int64_t i = 0; i < d; i++) top = std::max(top, std::fabs(normed[i]));
        step[r] = top / 32767;
        uint8_t *high = (uint8_t*)room + 2 * r * d, *low = high + d;
        for (int64_t i = 0; i < d; i++) {
            int32_t value = int32_t(normed[i] * (32767 / top) + 32768.5f);
            high[i] = value >> 8;
            low[i] = value;
        }
    }
    byte_rows((const uint8_t*)room, 2 * wanted, (const int8_t*)h.outputs, n, d, h.scale, h.sums, step, logits);
}
#else
// [wanted, count] logits of x [wanted, hidden] with 8-bit weights.
static void byte_outputs(const Head& h, const float* x, int wanted, float*, void* room, float*, float* logits) {
    int64_t d = h.layer.hidden, n = h.outputs_count;
    float* normed = (float*)room;
    rms_norm_rows(x, h.final_norm, h.layer.eps, wanted, d, normed);
    #pragma omp barrier
    gemm<INTO_CACHES>(normed, d, wanted, (const int8_t*)h.outputs, n, d, [=, &h](int row, int64_t column, vf left, vf right) {
        left *= loadu<vf>(h.scale + column);
        right *= loadu<vf>(h.scale + column + VW);
        store_columns(logits + row * n, nullptr, column, n, left, right, false);
    });
}
#endif

template <class W, class T, int HD>
static void draft_run(const Head& h, const Rows& in, const Level& v, T* kc, T* vc, int64_t pages, int threads) {
    const Layer& l = h.layer;
    int rows = in.rows, wanted = v.first ? in.groups : rows;
    int64_t d = l.hidden, q_width = int64_t(l.heads) * HD, qkv_width = q_width + 2 * l.kv_heads * HD, n = h.outputs_count;
    int64_t read = v.first ? h.taps * d : 0, wide = std::max(read, 2 * d);
    static thread_local Pool kept(0);
    size_t needed = size_t(rows) * (wide + d + qkv_width) + size_t(wanted) * (2 * q_width + l.ffn + n + d + 1) + 256;
    if (kept.block.size() < needed) kept = Pool(needed + needed / 4);
    Pool& pool = kept;
    pool.used = 0;
    Input<W>* room = pool.take<Input<W>>(rows * wide);
    float *g = pool.take<float>(rows * d), *qkv = pool.take<float>(rows * qkv_width), *q = pool.take<float>(wanted * q_width);
    Input<W>*attention = pool.take<Input<W>>(wanted * q_width), *ffn = pool.take<Input<W>>(int64_t(wanted) * l.ffn);
    float *logits = pool.take<float>(wanted * n), *step = pool.take<float>(wanted);
    float* normed = pool.take<float>(wanted * d);
    // What attends: the wanted rows only.
    std::vector<int32_t> place(rows), group_row(in.groups + 1), direct(wanted), extra_at(in.groups + 1);
    Rows asking = in;
    for (int r = 0; r < rows; r++) place[r] = v.first ? -1 : r;
    if (v.first) {
        for (int i = 0; i < in.groups; i++) {
            int last = in.group_row[i + 1] - 1;
            place[last] = group_row[i] = i;
            direct[i] = in.direct[last];
        }
        group_row[in.groups] = asking.rows = in.groups;
        asking.group_row = group_row.data();
        asking.direct = direct.data();
        asking.extra_at = extra_at.data();
    }
    const std::vector<Block> blocks = blocks_of(asking, l.heads / l.kv_heads);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> line(std::max<int64_t>(d, v.k));
        if (v.first) {
            #pragma omp for schedule(static)
            for (int r = 0; r < rows; r++)
                for (int t = 0; t < h.taps; t++) {
                    const float* tap = v.features[r] + t * d;
                    Input<W>* to = room + r * read + t * d;
                    if (h.tap_norm) rms_norm_row(tap, h.tap_norm, l.eps, d, to);
                    else for (int64_t i = 0; i < d; i++) from_f32(tap[i], to + i);
                }
            linear_rows(room, read, rows, (const W*)h.fc, d, read, h.fc_bias, g, d, false);
            #pragma omp barrier
        }
        #pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            const float* features = v.first ? g + r * d : v.features[r];
            const float* embedding = line.data();
            if (v.inserts && v.inserts[r]) embedding = v.inserts[r];
            else if (h.embedding) unpack_row((const W*)h.embedding, d, v.token[r], line.data());
            else for (int64_t i = 0; i < d; i++) line[i] = to_f32(((const W*)h.table)[v.token[r] * d + i]);
            rms_norm_row(embedding, h.input_norm, l.eps, d, room + r * 2 * d);
            rms_norm_row(features, h.hidden_norm, l.eps, d, room + r * 2 * d + d);
            if (place[r] < 0) continue;
            float* x = v.out + place[r] * d;
            if (h.norm_before_residual) rms_norm_row(features, h.hidden_norm, l.eps, d, x);
            else memcpy(x, features, d * sizeof(float));
        }
        linear_rows(room, 2 * d, rows, (const W*)l.qkv, qkv_width, 2 * d, l.qkv_bias, qkv, qkv_width, false);
        #pragma omp barrier
        #pragma omp for schedule(static)
        for (int r = 0; r < rows; r++) {
            rope_and_store<T, HD>(in, r, qkv + r * qkv_width, l.heads, l.kv_heads, l.q_norm, l.k_norm, l.eps, kc, vc, pages);
            if (place[r] >= 0) memcpy(q + place[r] * q_width, qkv + r * qkv_width, q_width * sizeof(float));
        }
        attend_blocks<T, HD>(l, asking, blocks, q, q_width, kc, vc, pages, attention);
        finish_layer<W>(l, wanted, attention, v.out, room, ffn);
        if (h.scale) byte_outputs(h, v.out, wanted, line.data(), normed, step, logits);
        else {
            rms_norm_rows(v.out, h.final_norm, l.eps, wanted, d, room);
            #pragma omp barrier
            linear_rows(room, d, wanted, (const W*)h.outputs, n, d, nullptr, logits, n, false);
        }
        #pragma omp barrier
        #pragma omp for schedule(static)
        for (int r = 0; r < wanted; r++) {
            int64_t* ids = v.tokens + int64_t(r) * v.k;
            top_row(logits + r * n, n, v.k, v.scale ? v.scale[r] : 1.0f, v.keys ? v.keys[r] : 0, h.tokens, ids, line.data());
            for (int j = 0; j < v.k; j++) {
                ids[j] = h.tokens[ids[j]];
                v.probs[int64_t(r) * v.k + j] = line[j];
            }
        }
    }
}

extern "C" {

int smart_vector_width() { return VW; }
int smart_page() { return PAGE; }

// Reads memory as weights are read, past the caches or into them.
float smart_read(const float* x, int64_t bytes, int past, int threads) {
    float total = 0;
    #pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        int64_t count = bytes / sizeof(float) / PANEL, team = omp_get_num_threads(), me = omp_get_thread_num();
        vf low = {}, high = {};
        for (int64_t i = count * me / team; i < count * (me + 1) / team; i++) {
            Ahead ahead = {(const char*)(x + i * PANEL) + AHEAD, 4 * PANEL};
            if (past) prefetch<PAST_CACHES, 4 * PANEL>(ahead);
            else prefetch<INTO_CACHES, 4 * PANEL>(ahead);
            low += loadu<vf>(x + i * PANEL);
            high += loadu<vf>(x + i * PANEL + VW);
        }
        low += high;
        for (int j = 0; j < VW; j++) total += low[j];
    }
    return total;
}

int smart_rounds_inputs() { return sizeof(Input<bf16>) == 2; }  // does bf16 mean bf16 inputs of linear layers, too?
int64_t smart_packed_rows(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

void smart_pack(const void* w, int64_t n, int64_t k, void* out, int is_bf16) {
    if (is_bf16) pack_panels((const bf16*)w, n, k, (bf16*)out);
    else pack_panels((const float*)w, n, k, (float*)out);
}

// w [n, k] in 8 bits, k a multiple of 4: w[i] is about scale[i] * its integers, whose sum is sums[i]. All three have
// packed_rows(n) rows.
void smart_pack_bytes(const float* w, int64_t n, int64_t k, int8_t* out, float* scale, int32_t* sums) {
    for (int64_t p = 0; p < smart_packed_rows(n); p++) {
        float top = 0;
        for (int64_t i = 0; p < n && i < k; i++) top = std::max(top, std::fabs(w[p * k + i]));
        scale[p] = top / 127;
        sums[p] = 0;
        int8_t* panel = out + p / PANEL * PANEL * k + p % PANEL * 4;
        for (int64_t i = 0; i < k; i++) {
            int value = top > 0 ? int(std::lrint(w[p * k + i] / top * 127)) : 0;
            sums[p] += value;
            panel[i / 4 * 4 * PANEL + i % 4] = int8_t(value);
        }
    }
}

// y[rows, n] (+)= rms_norm(x) w^T + bias; norm and bias may be null; scratch: [rows, k]; best [rows], if not null: the first
// index of each row's maximum, as in smart_argmax (then ldy is n).
void smart_linear(const float* x, int rows, const void* w, int64_t n, int64_t k, int is_bf16, const float* norm, float eps,
                  const float* bias, float* scratch, float* y, int64_t ldy, int add, int streamed, int64_t* best, int threads) {
    if (is_bf16) linear_run(x, rows, (const bf16*)w, n, k, norm, eps, bias, scratch, y, ldy, add, streamed, best, threads);
    else linear_run(x, rows, (const float*)w, n, k, norm, eps, bias, scratch, y, ldy, add, streamed, best, threads);
}

// Rows `index` of a packed weight [n, k] as fp32 [count, k].
void smart_unpack(const void* w, int64_t k, int is_bf16, const int64_t* index, int count, float* out) {
    for (int r = 0; r < count; r++) {
        if (is_bf16) unpack_row((const bf16*)w, k, index[r], out + r * k);
        else unpack_row((const float*)w, k, index[r], out + r * k);
    }
}

// Layers in place on x [rows, hidden]. q, k and v read rms_norm(x), the first one's `input` [rows, input] if given.
int smart_layers(const Layer* l, int count, const Rows* in, const float* input, float* x, void* kc, void* vc, int64_t pages,
                 const Scratch* s, const int32_t* taps, int tap_count, float* tapped, int w_bf16, int kv_bf16, int threads) {
#define RUN(HD)                                                                                                     \
    case HD:                                                                                                        \
        if (w_bf16 && kv_bf16)                                                                                      \
            layers_run<bf16, bf16, HD>(l, count, *in, input, x, (bf16*)kc, (bf16*)vc, pages, *s, taps, tap_count, tapped, threads);     \
        else if (!w_bf16 && !kv_bf16)                                                                               \
            layers_run<float, float, HD>(l, count, *in, input, x, (float*)kc, (float*)vc, pages, *s, taps, tap_count, tapped, threads); \
        else return 2;                                                                                              \
        return 0;
    switch (l->head_dim) { RUN(16) RUN(32) RUN(64) RUN(96) RUN(128) }
#undef RUN
    return 1;
}

// See `draft_run`. Returns nonzero where the kernels do not serve the head.
int smart_draft(const Head* h, const Rows* in, const Level* v, void* kc, void* vc, int64_t pages, int w_bf16, int kv_bf16,
                int threads) {
#define RUN(HD)                                                                                                     \
    case HD:                                                                                                        \
        if (w_bf16 && kv_bf16) draft_run<bf16, bf16, HD>(*h, *in, *v, (bf16*)kc, (bf16*)vc, pages, threads);              \
        else if (!w_bf16 && !kv_bf16) draft_run<float, float, HD>(*h, *in, *v, (float*)kc, (float*)vc, pages, threads);   \
        else return 2;                                                                                              \
        return 0;
    switch (h->layer.head_dim) { RUN(16) RUN(32) RUN(64) RUN(96) RUN(128) }
#undef RUN
    return 1;
}

// Moves committed tree nodes to their final places: for every layer and head, slot from[i] -> to[i], in order.
void smart_move_kv(void* kc, void* vc, int64_t planes, int64_t pages, int head_dim, int bytes, const int32_t* from,
                   const int32_t* to, int count) {
    for (int64_t p = 0; p < planes; p++)
        for (int i = 0; i < count; i++) {
            char* v = (char*)vc + p * pages * PAGE * head_dim * bytes;
            memmove(v + int64_t(to[i]) * head_dim * bytes, v + int64_t(from[i]) * head_dim * bytes, int64_t(head_dim) * bytes);
            char* k = (char*)kc + p * pages * PAGE * head_dim * bytes;
            const char* src = k + (int64_t(from[i]) / PAGE * head_dim * PAGE + from[i] % PAGE) * bytes;
            char* dst = k + (int64_t(to[i]) / PAGE * head_dim * PAGE + to[i] % PAGE) * bytes;
            for (int d = 0; d < head_dim; d++) memcpy(dst + int64_t(d) * PAGE * bytes, src + int64_t(d) * PAGE * bytes, bytes);
        }
}

// The k largest scores x * scale of each row, largest first, ties by index, and what each weighs in the softmax.
// keys (may be null): sampling noise is added to the scores of the rows whose key is not 0, and their probabilities are
// the softmax of the k noisy scores. tokens [n]: token ids, which the noise depends on.
void smart_top_k(const float* x, int rows, int64_t n, int k, const float* scale, const uint64_t* keys, const int64_t* tokens,
                 int64_t* ids, float* probs, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++)
        top_row(x + r * n, n, k, scale[r], keys ? keys[r] : 0, tokens, ids + int64_t(r) * k, probs + int64_t(r) * k);
}

// Tokens that may be the argmax of row * scale + noise among those with row >= floor: all that come within 1e-3 of it.
// Writes at most `room` of them and returns how many there are.
int64_t smart_noisy_candidates(const float* row, int64_t n, float best, float scale, float floor, uint64_t key, int64_t* out,
                               int64_t room) {
    constexpr int64_t BLOCK = 256;
    double bound = -INFINITY;  // the best noisy score so far
    int64_t found = 0;
    float weight[BLOCK], tail[BLOCK], scores[64];
    for (int64_t first = 0; first < n; first += BLOCK) {
        int64_t size = std::min(BLOCK, n - first), i = 0;
        vi above = {};
        for (; i + VW <= size; i += VW) above |= loadu<vf>(row + first + i) >= floor;
        int any = size % VW;
        for (int j = 0; j < VW; j++) any |= above[j];
        if (!any) continue;
        for (i = 0; i + VW <= size; i += VW) storeu(weight + i, vexp<vf, vi>((loadu<vf>(row + first + i) - best) * scale));
        for (; i < size; i++) weight[i] = std::exp((row[first + i] - best) * scale);
        for (i = 0; i < size; i++) tail[i] = uniform_tail(key, first + i);
        float last = bound < -80 ? 0.0f : float(std::exp(bound - 1e-3));
        int32_t hits = 0, hit[BLOCK];
        for (i = 0; i < size; i++) {
            hit[i] = (tail[i] * last <= 1.001f * weight[i]) & (row[first + i] >= floor);
            hits += hit[i];
        }
        if (!hits) continue;
        for (i = 0; i < size; i++) {
            if (!hit[i]) continue;
            double score = double(row[first + i] - best) * scale - std::log(-std::log(uniform(key, first + i)));
            if (score < bound - 1e-3) continue;
            bound = std::max(bound, score);
            if (found == room) {  // full: drop what the bound has overtaken
                int64_t kept = 0;
                for (int64_t j = 0; j < room; j++)
                    if (scores[j] >= bound - 1e-3) { scores[kept] = scores[j]; out[kept++] = out[j]; }
                found = kept;
            }
            if (found < room) { out[found] = first + i; scores[found] = float(score); }
            found++;
        }
    }
    return found;
}

void smart_rms_norm(const float* x, const float* weight, float eps, int rows, int64_t d, float* out, int64_t ldo) {
    for (int r = 0; r < rows; r++) rms_norm_row(x + r * d, weight, eps, d, out + r * ldo);
}

void smart_argmax(const float* x, const int64_t* which, int rows, int64_t n, int64_t* out, int threads) {
    std::vector<int64_t> found(size_t(rows) * threads);
    #pragma omp parallel num_threads(threads)
    maxima(x, which, rows, n, found.data(), out);
}
}
