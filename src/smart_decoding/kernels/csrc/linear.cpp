// Linear layers, their weights as they are packed, and what a CPU says of itself.
//
// Weights are bf16, fp32 or quants; sums are fp32. All layers read fp32 and round it once, as they
// multiply it: to 8 bits, to bf16 where the CPU multiplies pairs of bf16 (half the instructions for
// a row), else not at all. Each output is summed in one fixed order that does not depend on how
// many rows there are. So a row's result is bitwise the same alone, in a batch and as a node of a
// draft tree.

#include "linear.h"

#include "abi.h"

namespace [[gnu::visibility("hidden")]] smart {

static inline void add_bias(const float* bias, int64_t column, int64_t n, vf& low, vf& high) {
    if (column + PANEL <= n) {
        low += loadu<vf>(bias + column);
        high += loadu<vf>(bias + column + VW);
        return;
    }
    for (int j = 0; column + j < n; j++) (j < VW ? low[j] : high[j - VW]) += bias[column + j];
}

// x w^T, panel by panel, in whichever way the weight is stored.
template <class W, class Epilogue>
static void product(const float* x, int rows, const Weight& w, int64_t k, int hint, Panels& panels,
                    Epilogue&& done) {
    if constexpr (std::is_same_v<W, bf16>)
        if (w.strips) return quant_gemm(x, rows, w.strips, k, w.in_bytes, panels, done);
    const Input<W>* read = rounded_rows<W>(x, rows, k, panels.alone);
    with_hint(hint, [&](auto to) { gemm<to>(read, k, rows, (const W*)w.panels, k, panels, done); });
}

template <class W>
__attribute__((noinline)) void linear_panels(const float* x, int rows, const Weight& w, int64_t n,
                                             int64_t k, const float* bias, float* y, int64_t ldy,
                                             bool add, int hint, Maxima* maxima, Panels& panels) {
    auto store = [=](int row, int64_t column, vf low, vf high) {
        if (bias) add_bias(bias, column, n, low, high);
        if (maxima) maxima[row].add(column, n, low, high);
        if (y) store_columns(y + row * ldy, column, n, low, high, add);
    };
    product<W>(x, rows, w, k, hint, panels, store);
}

// x / (1 + exp(-s)), where s is x for SiLU; for GELU by tanh it is 2 sqrt(2 / pi) (x + 0.044715
// x^3), as 1 + tanh(u) = 2 / (1 + exp(-2 u)).
static inline vf activated(vf x, bool gelu) {
    const vf s = gelu ? x * (1.5957691216f + 0.0713548163f * x * x) : x;
    return x / (1.0f + vexp(-s));
}

static inline vf clamped(vf gate, vf up) {
    const vf most = vf{} + CLAMP;
    gate = gate > most ? most : gate;
    up = up > most ? most : up;
    up = up < -most ? -most : up;
    return (up + 1.0f) * (gate / (1.0f + vexp(gate * -CLAMPED_SLOPE)));
}

// One panel yields VW finished values.
template <class W>
__attribute__((noinline)) void gated_panels(const Layer& l, int64_t expert, const Weight& gate_up,
                                            const float* x, int rows, float* out, Panels& panels) {
    const int64_t ffn = l.ffn;
    const bool gelu = l.gelu, clamps = l.clamped;
    const float* bias =
        l.gate_up_bias ? l.gate_up_bias + expert * gated_panels_of(ffn) * PANEL : nullptr;
    auto store = [=](int row, int64_t column, vf gate, vf up) {
        if (bias) {
            gate += loadu<vf>(bias + column);
            up += loadu<vf>(bias + column + VW);
        }
        vf value = clamps ? clamped(gate, up) : activated(gate, gelu) * up;
        int64_t first = column / 2;
        float* to = out + row * ffn + first;
        if (first + VW <= ffn)
            storeu(to, value);
        else
            for (int j = 0; first + j < ffn; j++) to[j] = value[j];
    };
    product<W>(x, rows, gate_up, l.hidden, l.hint, panels, store);
}

// How many of k lie next to each other in a packed panel.
template <class W>
constexpr int INTERLEAVED = sizeof(W) == 2 ? 2 : 1;

// Where the weight of column `column` at k = i lies in a panel.
template <class W>
static inline int64_t panel_place(int64_t i, int column) {
    constexpr int STEP = INTERLEAVED<W>;
    return i / STEP * STEP * PANEL + column * STEP + i % STEP;
}

// A row of quants is widened with those beside it, which is rare: for embeddings of few tokens.
template <class Out>
static void unpack_strip(const Strip* panel, int half, bool in_bytes, int64_t k, int row,
                         Out* out) {
    const Strip& strip = panel[half];
    if (in_bytes)
        return with_format(strip.format, [&](auto format) {
            unpack_bytes<format>(ByteStrip::of<format>(panel, half), k, row, out);
        });
    if constexpr (HAS_TILES) return unpack_tiles(strip, k, row, out);
    alignas(64) Wide widened[QUANT_BLOCK * PANEL];
    for (int64_t first = 0; first < k; first += QUANT_BLOCK) {
        with_format(strip.format, [&](auto format) {
            widen_strip<format>({strip.data, first}, QUANT_BLOCK, widened);
        });
        for (int i = 0; i < QUANT_BLOCK; i++)
            out[first + i] = to_f32(widened[panel_place<Wide>(i, row)]);
    }
}

template <class W>
void unpack_row(const Weight& w, int64_t k, int64_t row, float* out) {
    const int half = row / VW % 2;
    if (w.strips)
        return unpack_strip(w.strips + row / PANEL * 2, half, w.in_bytes, k, int(row % VW), out);
    const W* panel = (const W*)w.panels + row / PANEL * PANEL * k;
    for (int64_t i = 0; i < k; i++) out[i] = to_f32(panel[panel_place<W>(i, int(row % PANEL))]);
}

#define SMART_INSTANTIATE(W) \
    template void linear_panels<W>(const float*, int, const Weight&, int64_t, int64_t, \
                                   const float*, float*, int64_t, bool, int, Maxima*, Panels&); \
    template void gated_panels<W>(const Layer&, int64_t, const Weight&, const float*, int, float*, \
                                  Panels&); \
    template void unpack_row<W>(const Weight&, int64_t, int64_t, float*);
SMART_INSTANTIATE(bf16)
SMART_INSTANTIATE(float)

template <class W>
static void pack_panels(const W* w, int64_t n, int64_t k, W* out) {
    constexpr int STEP = INTERLEAVED<W>;
    const int64_t panels = panels_of(n);
#pragma omp parallel for
    for (int64_t p = 0; p < panels; p++)
        for (int64_t i = 0; i < k; i += STEP)
            for (int j = 0; j < PANEL; j++)
                for (int s = 0; s < STEP; s++) {
                    int64_t row = p * PANEL + j;
                    out[p * PANEL * k + i * PANEL + j * STEP + s] =
                        row < n ? w[row * k + i + s] : W(0);
                }
}

template <class W>
static void linear_run(const float* x, int rows, const Weight& w, int64_t n, int64_t k,
                       const float* norm, float eps, const float* bias, float* scratch, float* y,
                       int64_t ldy, bool add, int hint, int64_t* best, int threads) {
    std::vector<Maxima> found(best ? size_t(rows) * threads : 0);
    run_team(threads, [&] {
        if (norm) {
            rms_norm_rows(x, norm, eps, rows, k, scratch);
            barrier();
        }
        Maxima* mine = best ? &found[int64_t(omp_get_thread_num()) * rows] : nullptr;
        linear_rows<W>(norm ? scratch : x, rows, w, n, k, bias, y, ldy, add, hint, mine);
    });
    for (int r = 0; best && r < rows; r++) best[r] = first_of(&found[r], threads, rows);
}

}  // namespace smart

using namespace smart;

extern "C" {

int32_t smart_enable() { return !enable_tiles(); }
int32_t smart_vector_width() { return VW; }
int32_t smart_pass_rows(const Weight* w, int32_t is_bf16) {
    if (w->in_bytes) return BYTE_ROWS;
    if (HAS_TILES && is_bf16) return TILE_PASS;
    return w->strips ? ROWS_OF_ONE : PASS_ROWS;
}
int32_t smart_multiplies_bytes() { return HAS_BYTE_PRODUCTS; }
int32_t smart_rounds_inputs() { return sizeof(Input<bf16>) == 2; }

float smart_read(const float* x, int64_t bytes, int32_t hint, int32_t threads) {
    float total = 0;
#pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        int64_t count = bytes / sizeof(float) / PANEL, team = omp_get_num_threads(),
                me = omp_get_thread_num();
        vf low = {}, high = {};
        with_hint(hint, [&](auto to) {
            for (int64_t i = count * me / team; i < count * (me + 1) / team; i++) {
                Prefetch ahead = {(const char*)(x + i * PANEL) + PREFETCH_DISTANCE, 4 * PANEL};
                ahead.step<to, 4 * PANEL>();
                low += loadu<vf>(x + i * PANEL);
                high += loadu<vf>(x + i * PANEL + VW);
            }
        });
        total += sum_in_order(low + high);
    }
    return total;
}

int64_t smart_packed_rows(int64_t n) { return panels_of(n) * PANEL; }

void smart_pack(const void* w, int64_t n, int64_t k, void* out, int32_t is_bf16) {
    if (is_bf16)
        pack_panels((const bf16*)w, n, k, (bf16*)out);
    else
        pack_panels((const float*)w, n, k, (float*)out);
}

void smart_pack_bytes(const float* w, int64_t n, int64_t k, int8_t* out, float* scale,
                      int32_t* sums) {
#pragma omp parallel for
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

void smart_unpack(const Weight* w, int64_t k, int32_t is_bf16, const int64_t* index, int32_t count,
                  float* out) {
    for (int32_t r = 0; r < count; r++) {
        if (is_bf16)
            unpack_row<bf16>(*w, k, index[r], out + r * k);
        else
            unpack_row<float>(*w, k, index[r], out + r * k);
    }
}

void smart_linear(const float* x, int32_t rows, const Weight* w, int64_t n, int64_t k,
                  int32_t is_bf16, const float* norm, float eps, const float* bias, float* scratch,
                  float* y, int64_t ldy, int32_t add, int32_t hint, int64_t* best,
                  int32_t threads) {
    auto run = is_bf16 ? linear_run<bf16> : linear_run<float>;
    run(x, rows, *w, n, k, norm, eps, bias, scratch, y, ldy, add, hint, best, threads);
}

void smart_rms_norm(const float* x, const float* weight, float eps, int32_t rows, int64_t d,
                    float* out, int64_t ldo) {
    for (int32_t r = 0; r < rows; r++) rms_norm_row(x + r * d, weight, eps, d, out + r * ldo);
}
}
