// Products of quants with inputs in 8 bits: for draft models, and for targets where that is asked
// for. Quants are not widened; four of them are multiplied with four bytes and added, in one
// instruction where there is one. Inputs of a block share a scale. A row's sums have the same bits
// in any company, but not those of quants.h.

#pragma once
#include "packing.h"

namespace [[gnu::visibility("hidden")]] smart {

// Rows that share a pass. With AVX2 their sums are in memory, which costs less than to unpack
// quants again; on Arm nothing was timed.
constexpr int BYTE_ROWS = VW == 4 ? 4 : 8;
constexpr int BYTE_GROUP = 16;  // inputs whose sum is kept: the fewest that share a scale

// Rows of inputs in 8 bits, pass by pass: what is at the same k of its rows lies side by side.
struct ByteRows {
    const int64_t k;
    const int rows, passes;
    float* scale;    // [k / 32, rows] of each pass
    float* sums;     // [k / 32, rows] of rounded inputs
    int32_t* minus;  // [k / 16, rows] of bytes, negative
    int8_t* bytes;   // [k / 4, rows, 4]

    // By a whole team. k: a multiple of QUANT_BLOCK.
    template <class X>
    ByteRows(const X* x, int64_t ld, int count, int64_t k_)
        : k(k_), rows(count), passes((rows + BYTE_ROWS - 1) / BYTE_ROWS) {
        const int64_t blocks = rows * k / QUANT_BLOCK, groups = rows * k / BYTE_GROUP;
        const Packing packing(rows, k, 4 * (2 * blocks + groups) + rows * k);
        scale = (float*)packing.memory;
        sums = scale + blocks;
        minus = (int32_t*)(sums + blocks);
        bytes = (int8_t*)(minus + groups);
        for (int pass = 0; pass < passes; pass++)
            for (int row = first_of(pass); row < first_of(pass + 1); row++)
                for (int64_t i = packing.first; i < packing.last; i += QUANT_BLOCK)
                    read_block(x + row * ld + i, pass, row, i);
        packing.finish();
    }

    int first_of(int pass) const { return int(int64_t(rows) * pass / passes); }

private:
    template <class X>
    void read_block(const X* x, int pass, int row, int64_t first) {
        const int start = first_of(pass), together = first_of(pass + 1) - start;
        vf largest = vf{} + 1e-30f, unknown = vf{};  // NaN where an input is not finite
        for (int i = 0; i < QUANT_BLOCK; i += VW) {
            const vf v = widen<vf>(x + i), size = v < 0 ? -v : v;
            largest = size > largest ? size : largest;
            unknown += v - v;
        }
        const float step = max_of(largest) / 127 + sum_of(unknown), factor = 1 / step;
        int8_t block[QUANT_BLOCK] = {};
        int32_t totals[QUANT_BLOCK / BYTE_GROUP] = {};
        for (int i = 0; !std::isnan(step) && i < QUANT_BLOCK; i += VW)
            totals[i / BYTE_GROUP] += to_bytes(widen<vf>(x + i) * factor, block + i);
        const int64_t from = start * k + first * together, at = row - start;
        for (int i = 0; i < QUANT_BLOCK; i += 4)
            memcpy(&bytes[from + i * together + 4 * at], block + i, 4);
        for (int g = 0; g < QUANT_BLOCK / BYTE_GROUP; g++)
            minus[from / BYTE_GROUP + g * together + at] = -totals[g];
        scale[from / QUANT_BLOCK + at] = step;
        sums[from / QUANT_BLOCK + at] = step * float(totals[0] + totals[1]);
    }
};

// The values of IQ4_NL with 128 added.
alignas(16) constexpr uint8_t IQ4_NL_BYTES[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                                  129, 141, 153, 166, 181, 197, 217, 241};

// What quants are in bytes more than their weights are scales.
template <int F>
constexpr int BYTE_ZERO = F == Q8_0 || F == IQ4_NL ? 128 : FORMATS[F].zero;

// BITS of each byte of vector v of a plane, moved to bit TO.
template <int BITS, int TO>
__attribute__((always_inline)) static inline vu field(const uint8_t* plane, int v) {
    const int from = BITS * (v % (8 / BITS)), left = TO > from ? TO - from : 0;
    const vu word = loadu<vu>(plane + v / (8 / BITS) * sizeof(vu));
    return (word << left >> (from - TO + left)) & ((1u << BITS) - 1) * 0x01010101u << TO;
}

// Quants of a block at k = 4 v to 4 v + 3, unsigned.
template <int F>
__attribute__((always_inline)) static inline vu quant_bytes(const uint8_t* quants, int v) {
    constexpr int HIGH = FORMATS[F].bits - 4;
    if constexpr (HIGH == 4) return loadu<vu>(quants + v * sizeof(vu));
    const vu low = field<4, 0>(quants, v);
    if constexpr (F == IQ4_NL) return lookup_bytes(IQ4_NL_BYTES, low);
    if constexpr (HIGH == 1 || HIGH == 2) return low | field<HIGH, 4>(quants + 4 * sizeof(vu), v);
    return low;
}

// What a pass reads: its rows' inputs from some k on.
struct PassInputs {
    const int8_t* bytes;
    const float *scale, *sums;
    const int32_t* minus;
};

// A group's sums of integers.
template <int F>
using GroupSums =
    ByteSums<BYTE_ZERO<F> == 128 ? 255 : (1 << FORMATS[F].bits) - 1, FORMATS[F].group / 4>;

// What a group's sums of integers begin with: the inputs' own, times what bytes are too large by.
template <int F, int R>
__attribute__((always_inline)) static inline void begin_group(const int32_t* minus,
                                                              GroupSums<F> (&sums)[R]) {
    for (int r = 0; r < R; r++) {
        vi& total = sums[r].total;
        total = vi{};
        if constexpr (BYTE_ZERO<F> != 0) {
            total = (vi)broadcast4(minus + r);
            if (FORMATS[F].group > BYTE_GROUP) total += (vi)broadcast4(minus + R + r);
            total *= BYTE_ZERO<F>;
        }
    }
}

// Adds the products of R rows with a block of a strip.
template <int F, int R>
__attribute__((always_inline)) static inline void byte_block(const uint8_t* at,
                                                             const vf (&shared)[2],
                                                             const PassInputs& in, vf (&sums)[R]) {
    constexpr Format format = FORMATS[F];
    const RowScales scales = row_scales<F>(at, shared);
    const uint8_t* quants = at + format.scales() * VW;
    GroupSums<F> integers[R];
    vf scaled[R];
    for_block<4>([&](auto i) __attribute__((always_inline)) {
        constexpr int group = i / format.group;
        if constexpr (i % format.group == 0) begin_group<F, R>(in.minus + group * R, integers);
        const vi bytes = (vi)quant_bytes<F>(quants, i / 4);
        for (int r = 0; r < R; r++)
            integers[r].template add<i % format.group / 4>(bytes, in.bytes + i * R + 4 * r);
        if constexpr (i % format.group != format.group - 4) return;
        for (int r = 0; r < R; r++) {
            const vf products = __builtin_convertvector(integers[r].total, vf);
            const vf& scale = scales.scale[group];
            scaled[r] = group ? fused(products, scale, scaled[r]) : products * scale;
        }
    });
    for (int r = 0; r < R; r++) {
        sums[r] = fused(scaled[r], (vf)broadcast4(in.scale + r), sums[r]);
        if constexpr (format.has_least || format.has_zero)
            sums[r] = fused(scales.least[0], (vf)broadcast4(in.sums + r), sums[r]);
    }
}

// Adds to sums [R, PANEL] what `depth` of a strip from k = first on yields for a pass of R rows;
// all of it lies in one super-block. FRESH: it is read from memory.
template <int F, int R, bool FRESH>
__attribute__((noinline)) static void byte_pass(PassInputs in, const uint8_t* data, int64_t first,
                                                int64_t depth, float* sums) {
    StripReader<F> strip(data, first);
    vf kept[R];
    for (int r = 0; r < R; r++) kept[r] = loadu<vf>(sums + r * PANEL);
    for (int64_t i = 0; i < depth; i += QUANT_BLOCK) {
        byte_block<F, R>(strip.template step<FRESH>(), strip.shared, in, kept);
        in.bytes += QUANT_BLOCK * R;
        in.scale += R;
        in.sums += R;
        in.minus += QUANT_BLOCK / BYTE_GROUP * R;
    }
    for (int r = 0; r < R; r++) storeu(sums + r * PANEL, kept[r]);
}

// sums [rows, PANEL] of the columns of a strip; the others stay as they are.
template <int F>
static void byte_strip(const ByteRows& in, const uint8_t* data, float* sums) {
    for (int r = 0; r < in.rows; r++) storeu(sums + r * PANEL, vf{});
    for (int64_t first = 0; first < in.k; first += SUPER_BLOCK) {
        const int64_t depth = std::min<int64_t>(SUPER_BLOCK, in.k - first);
        for (int pass = 0; pass < in.passes; pass++) {
            const int row = in.first_of(pass), count = in.first_of(pass + 1) - row;
            const int64_t from = row * in.k + first * count;
            const PassInputs inputs = {&in.bytes[from], &in.scale[from / QUANT_BLOCK],
                                       &in.sums[from / QUANT_BLOCK], &in.minus[from / BYTE_GROUP]};
            with_count<BYTE_ROWS>(count, [&](auto r) {
                const auto run = pass ? byte_pass<F, r, false> : byte_pass<F, r, true>;
                run(inputs, data, first, depth, sums + row * PANEL);
            });
        }
    }
}

// sums [rows, PANEL] of a panel.
static inline void byte_panel(const ByteRows& in, const Strip* strips, float* sums) {
    for (int half = 0; half < 2; half++)
        with_format(strips[half].format, [&](auto format) {
            if constexpr (format != BF16_ROWS)
                byte_strip<format>(in, strips[half].data, sums + half * VW);
        });
}

// The weights at one k, byte j of the quants' lanes, before they are rounded. group: that of k.
template <int F>
__attribute__((always_inline)) static inline vf byte_weights(const vu& bytes, int j,
                                                             const RowScales& scales, int group) {
    constexpr Format format = FORMATS[F];
    const vi quants = (vi)(bytes >> 8 * j & 255) - BYTE_ZERO<F>;
    const vf scaled = __builtin_convertvector(quants, vf) * scales.scale[group];
    if constexpr (format.has_least || format.has_zero) return scaled + scales.least[0];
    return scaled;
}

// Widens a strip, its rows' lanes in turn, to its half of a panel of pairs.
template <int F>
static void widen_bytes(const uint8_t* data, int64_t k, bf16* to) {
    constexpr Format format = FORMATS[F];
    vu in_turn;
    for (int j = 0; j < VW; j++) in_turn[j] = uint32_t(j | (j + VW) << 16);
    StripReader<F> strip(data, 0);
    for (int64_t i = 0; i < k; i += QUANT_BLOCK) {
        strip.enter(i);
        const uint8_t* at = strip.template step<true>();
        const RowScales scales = row_scales<F>(at, strip.shared);
        for_block<4>([&](auto first) __attribute__((always_inline)) {
            constexpr int group = first / format.group;
            const vu bytes = quant_bytes<F>(at + format.scales() * VW, first / 4);
            for (int j = 0; j < 4; j += 2, to += 2 * PANEL) {
                const vf even = byte_weights<F>(bytes, j, scales, group);
                const vf odd = byte_weights<F>(bytes, j + 1, scales, group);
                storeu(to, lookup_words(two_to_bf16(even, odd), in_turn));
            }
        });
    }
}

// Row `row` of a strip, [k], as it would be widened.
template <int F>
static void unpack_bytes(const uint8_t* data, int64_t k, int row, float* out) {
    constexpr Format format = FORMATS[F];
    StripReader<F> strip(data, 0);
    for (int64_t i = 0; i < k; i += QUANT_BLOCK) {
        strip.enter(i);
        const uint8_t* at = strip.template step<true>();
        const RowScales scales = row_scales<F>(at, strip.shared);
        for (int j = 0; j < QUANT_BLOCK; j++) {
            const vu bytes = quant_bytes<F>(at + format.scales() * VW, j / 4);
            bf16 narrow;
            from_f32(byte_weights<F>(bytes, j % 4, scales, j / format.group)[row], &narrow);
            out[i + j] = to_f32(narrow);
        }
    }
}

}  // namespace smart
