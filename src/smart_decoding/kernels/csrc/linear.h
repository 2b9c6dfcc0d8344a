// Linear layers over packed weights, in one fixed order of sums.

#pragma once
#include <vector>

#include "maxima.h"
#include "norm.h"
#include "quant_bytes.h"
#include "quant_tiles.h"
#include "quant_vectors.h"

namespace [[gnu::visibility("hidden")]] smart {

// Bytes of weights that several passes share: twice that has room in the second cache.
constexpr int64_t K_BLOCK_BYTES = 96 << 10;

// Adds the products of R rows' inputs x[0], x[ld], ... with the two vectors of a panel.
template <int R>
__attribute__((always_inline)) static inline void multiply_add(vf (&sums)[R][2], vf a, vf b,
                                                               const float* x, int64_t ld) {
    for (int r = 0; r < R; r++) {
        float xr = x[r * ld];
        sums[r][0] += a * xr;
        sums[r][1] += b * xr;
    }
}

// How a panel of weights W is multiplied with inputs X. `run` adds to sums; it takes STEP of k at a
// time.
template <class W, class X>
struct Panel;

template <>
struct Panel<float, float> {
    static constexpr int STEP = 1;

    template <int R, int HINT>
    static inline void run(const float* x, int64_t ld, const float* w, int64_t k, Prefetch ahead,
                           vf (&sums)[R][2]) {
        for (int64_t i = 0; i < k; i++, w += PANEL) {
            ahead.step<HINT, 4 * PANEL>();
            vf a = loadu<vf>(w), b = loadu<vf>(w + VW);
            keep_in_register(a);
            keep_in_register(b);
            multiply_add(sums, a, b, x + i, ld);
        }
    }
};

template <>
struct Panel<bf16, bf16> {
    static constexpr int STEP = 2;

    template <int R, int HINT>
    static inline void run(const bf16* x, int64_t ld, const bf16* w, int64_t k, Prefetch ahead,
                           vf (&sums)[R][2]) {
        for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL) {
            ahead.step<HINT, 4 * PANEL>();
            vu a = loadu<vu>(w), b = loadu<vu>(w + PANEL);
            for (int r = 0; r < R; r++) {
                vu pair = broadcast4(x + r * ld + i);
                sums[r][0] = dot_bf16(sums[r][0], a, pair);
                sums[r][1] = dot_bf16(sums[r][1], b, pair);
            }
        }
    }
};

template <>
struct Panel<bf16, float> {
    static constexpr int STEP = 2;

    template <int R, int HINT>
    static inline void run(const float* x, int64_t ld, const bf16* w, int64_t k, Prefetch ahead,
                           vf (&sums)[R][2]) {
        for (int64_t i = 0; i < k; i += 2, w += 2 * PANEL) {
            ahead.step<HINT, 4 * PANEL>();
            vf a = (vf)(loadu<vu>(w) << 16), b = (vf)(loadu<vu>(w + PANEL) << 16);
            multiply_add(sums, a, b, x + i, ld);
            hide_origin(
                w);  // else GCC widens the odd ones before, for which sums would lose registers
            vu c = loadu<vu>(w) >> 16, d = loadu<vu>(w + PANEL) >> 16;
            keep_in_register(c);  // else GCC makes a mask of both shifts, which takes a register
            keep_in_register(d);
            multiply_add(sums, (vf)(c << 16), (vf)(d << 16), x + i + 1, ld);
        }
    }
};

// The sums are integers in the lanes of floats.
template <>
struct Panel<int8_t, uint8_t> {
    static constexpr int STEP = 4;

    template <int R, int HINT>
    static inline void run(const uint8_t* x, int64_t ld, const int8_t* w, int64_t k, Prefetch ahead,
                           vf (&sums)[R][2]) {
        rows_of<HINT>(x, ld, w, k, ahead, sums, std::make_integer_sequence<int, R>());
    }

    // Folds over I and not loops: these GCC 12 keeps in registers.
    template <int HINT, int R, int... I>
    __attribute__((always_inline)) static inline void rows_of(const uint8_t* x, int64_t ld,
                                                              const int8_t* w, int64_t k,
                                                              Prefetch ahead, vf (&sums)[R][2],
                                                              std::integer_sequence<int, I...>) {
        vi left[R] = {(vi)sums[I][0]...}, right[R] = {(vi)sums[I][1]...}, four[R];
        for (int64_t i = 0; i < k; i += 4, w += 4 * PANEL) {
            ahead.step<HINT, 4 * PANEL>();
            vi a = loadu<vi>(w), b = loadu<vi>(w + 2 * PANEL);
            ((four[I] = (vi)broadcast4(x + I * ld + i), dot_u8s8(left[I], four[I], a),
              dot_u8s8(right[I], four[I], b)),
             ...);
        }
        ((sums[I][0] = (vf)left[I], sums[I][1] = (vf)right[I]), ...);
    }
};

// Widened, which reads half of what bf16 would.
template <>
struct Panel<int8_t, float> {
    static constexpr int STEP = 4;

    template <int R, int HINT>
    static inline void run(const float* x, int64_t ld, const int8_t* w, int64_t k, Prefetch ahead,
                           vf (&sums)[R][2]) {
        for (int64_t i = 0; i < k; i += 4, w += 4 * PANEL) {
            ahead.step<HINT, 4 * PANEL>();
            for (int j = 0; j < 4; j++) {
                vf a = __builtin_convertvector(loadu<vi>(w) << (24 - 8 * j) >> 24, vf);
                vf b = __builtin_convertvector(loadu<vi>(w + 2 * PANEL) << (24 - 8 * j) >> 24, vf);
                multiply_add(sums, a, b, x + i + j, ld);
            }
        }
    }
};

// Adds the products of R rows with k of a panel to `sums` [R, PANEL], or begins them.
template <int R, int HINT, class W>
SMART_PASS void panel_pass(const Input<W>* x, int64_t ld, const W* w, int64_t k, Prefetch ahead,
                           float* sums, bool begin) {
    vf registers[R][2] = {};
    for (int r = 0; !begin && r < R; r++) {
        registers[r][0] = loadu<vf>(sums + r * PANEL);
        registers[r][1] = loadu<vf>(sums + r * PANEL + VW);
    }
    Panel<W, Input<W>>::template run<R, HINT>(x, ld, w, k, ahead, registers);
    for (int r = 0; r < R; r++) {
        storeu(sums + r * PANEL, registers[r][0]);
        storeu(sums + r * PANEL + VW, registers[r][1]);
    }
}

// y = x w^T, by those who take its panels; `done(row, first column, low half, high half)` receives
// each result.
//
// More rows than have room in registers go over a panel in several passes. Those after the first
// find it in the second cache and would leave memory idle: so each pass prefetches its share of
// what comes next. A panel too large to stay there is taken in blocks of k, which all rows go over.
template <int HINT, class W, class Epilogue>
static void gemm(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t k, Panels& panels,
                 Epilogue&& done) {
    typedef Panel<W, Input<W>> Kind;
    if (!rows) return;
    if constexpr (HAS_TILES)
        if (fits_tiles<W>(k)) return tile_gemm(x, ld, rows, w, k, panels, done);
    const int passes = (rows + PASS_ROWS - 1) / PASS_ROWS;
    if constexpr (HINT != INTO_L2)  // two passes wait for memory still, and what is that far
                                    // ahead leaves the first cache
        if (passes == 2) return gemm<INTO_L2>(x, ld, rows, w, k, panels, done);
    const int64_t step_bytes = Kind::STEP * PANEL * sizeof(W),
                  stride = (step_bytes + passes - 1) / passes;
    const int64_t k_block = passes > 1 ? std::min(k, K_BLOCK_BYTES / step_bytes * Kind::STEP) : k;
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < int64_t(rows) * PANEL) kept.resize(int64_t(rows) * PANEL);
    for (int64_t p; (p = panels.next()) < panels.count;)
        for (int64_t i = 0; i < k; i += k_block) {
            const W* block = w + (p * k + i) * PANEL;
            const int64_t depth = std::min(k_block, k - i), steps = depth / Kind::STEP;
            Prefetch ahead = {
                (const char*)block + (passes > 1 ? steps * step_bytes : PREFETCH_DISTANCE), stride};
            for (int pass = 0; pass < passes; pass++, ahead.at += steps * stride) {
                const int row = int(int64_t(rows) * pass / passes);
                const int count = int(int64_t(rows) * (pass + 1) / passes) - row;
                float* sums = kept.data() + row * PANEL;
                with_count<PASS_ROWS>(count, [&](auto r) {
                    panel_pass<r, HINT>(x + row * ld + i, ld, block, depth, ahead, sums, !i);
                });
                if (i + k_block < k) continue;
                for (int r = 0; r < count; r++)
                    done(row + r, p * PANEL, loadu<vf>(sums + r * PANEL),
                         loadu<vf>(sums + r * PANEL + VW));
            }
        }
}

// Rows for which inputs in 8 bits are faster than tiles.
constexpr int FEW_ROWS = 16;

// `gemm` by tiles of quants that are packed for inputs in 8 bits: each panel is widened once.
template <class Epilogue>
static void widened_gemm(const float* x, int rows, const Strip* strips, int64_t k, Panels& panels,
                         Epilogue&& done) {
    const Wide* read = rounded_rows<bf16>(x, rows, k, panels.alone);
    static thread_local std::vector<vu> memory;  // aligned
    const int64_t depth = k * sizeof(bf16);
    if (int64_t(memory.size() * sizeof(vu)) < depth * PANEL)
        memory.resize(depth * PANEL / sizeof(vu));
    bf16* panel = (bf16*)memory.data();
    int shaped = 0;
    for (int64_t p; (p = panels.next()) < panels.count;) {
        for (int half = 0; half < 2; half++) {
            const Strip& strip = strips[2 * p + half];
            with_format(strip.format, [&](auto format) {
                if constexpr (format != BF16_ROWS)
                    widen_bytes<format>(ByteStrip::of<format>(strips + 2 * p, half), k,
                                        panel + half * PANEL);
            });
        }
        tile_rows<bf16>(read, k, rows, (const char*)panel, depth, Prefetch{nullptr, 0}, shaped,
                        [&](int row, vf low, vf high) { done(row, p * PANEL, low, high); });
    }
    if (shaped) tile_release();
}

// `gemm` of quants. in_bytes: as of Weight.
template <class Epilogue>
static void quant_gemm(const float* x, int rows, const Strip* strips, int64_t k, int64_t in_bytes,
                       Panels& panels, Epilogue&& done) {
    if (!rows) return;
    if constexpr (HAS_TILES) {
        if (in_bytes == NEVER) return tile_quant_gemm(x, rows, strips, k, panels, done);
        if (in_bytes == IF_FASTER && rows > FEW_ROWS)
            return widened_gemm(x, rows, strips, k, panels, done);
    } else if (in_bytes == NEVER) {
        return vector_quant_gemm(x, rows, strips, k, panels, done);
    }
    prefetch_start(strips + 2 * panels.start());  // while inputs are rounded
    const ByteRows bytes(x, rows, k, panels.alone);
    static thread_local std::vector<float> kept;
    if (int64_t(kept.size()) < int64_t(rows) * PANEL) kept.resize(int64_t(rows) * PANEL);
    float* sums = kept.data();
    for (int64_t p; (p = panels.next()) < panels.count;) {
        byte_panel(bytes, strips + 2 * p, sums);
        for (int r = 0; r < rows; r++)
            done(r, p * PANEL, loadu<vf>(sums + r * PANEL), loadu<vf>(sums + r * PANEL + VW));
    }
}

static inline void store_columns(float* y, int64_t column, int64_t n, vf low, vf high, bool add) {
    if (column + PANEL <= n) {
        if (add) {
            low += loadu<vf>(y + column);
            high += loadu<vf>(y + column + VW);
        }
        storeu(y + column, low);
        storeu(y + column + VW, high);
        return;
    }
    for (int j = 0; column + j < n; j++)
        y[column + j] = (j < VW ? low[j] : high[j - VW]) + (add ? y[column + j] : 0.0f);
}

// y (+)= x w^T + bias, by those who take its panels. x: [rows, k]; maxima: null, or those of each
// row, to be updated; y may be null then.
template <class W>
void linear_panels(const float* x, int rows, const Weight& w, int64_t n, int64_t k,
                   const float* bias, float* y, int64_t ldy, bool add, int hint, Maxima* maxima,
                   Panels& panels);

// The same by a whole team; a barrier comes before the next linear layer.
template <class W>
static inline void linear_rows(const float* x, int rows, const Weight& w, int64_t n, int64_t k,
                               const float* bias, float* y, int64_t ldy, bool add,
                               int hint = INTO_CACHES, Maxima* maxima = nullptr) {
    Items items(panels_of(n));
    Panels panels(items);
    linear_panels<W>(x, rows, w, n, k, bias, y, ldy, add, hint, maxima, panels);
}

// Panels of gate and up, which are interleaved by VW columns.
static inline int64_t gated_panels_of(int64_t ffn) { return (ffn + VW - 1) / VW; }

constexpr float CLAMP = 7.0f, CLAMPED_SLOPE = 1.702f;

// out [rows, ffn] = act(gate) up of gate = x gate^T and up = x up^T, with SiLU or GELU as act, by
// those who take the panels of `gate_up`: of a layer's network (expert 0), or of an expert.
// Clamped: gate is at most CLAMP, up at most that either way; then gate sigmoid(CLAMPED_SLOPE gate)
// (up + 1).
template <class W>
void gated_panels(const Layer& l, int64_t expert, const Weight& gate_up, const float* x, int rows,
                  float* out, Panels& panels);

// Row `row` of a packed weight of row length k, as fp32.
template <class W>
void unpack_row(const Weight& w, int64_t k, int64_t row, float* out);

// The columns of a weight from `first` on, a panel's first one.
template <class W>
static inline Weight columns_from(const Weight& w, int64_t first, int64_t k) {
    if (w.strips) return {nullptr, w.strips + first / VW, w.in_bytes};
    return {(const W*)w.panels + first * k, nullptr, 0};
}

}  // namespace smart
