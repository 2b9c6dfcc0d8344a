// Products of quants with inputs in 8 bits: for draft models, and for targets where that is asked
// for. Quants are not widened; four of them are multiplied with four bytes and added in one
// instruction. A row's sums have the same bits in any company, but not those of quants.h.

#pragma once
#include <vector>

#include "quants.h"

namespace [[gnu::visibility("hidden")]] smart {

// Kinds of vectors of quants that have sums of their own, and rows that share a pass.
constexpr int KINDS = HAS_BF16_PAIRS ? 2 : 1, BYTE_ROWS = 4;

// Rows of inputs in 8 bits. Of each eight of k, the even ones come first.
struct ByteRows {
    int64_t groups = 0;
    std::vector<int8_t> bytes;  // [rows, k]
    std::vector<float> scale;   // [rows, groups of 16]: of the group of 32 that it is in
    std::vector<float> sums;    // [rows, groups of 16, 2] of even and odd inputs

    template <class X>
    void read(const X* x, int64_t ld, int rows, int64_t k) {
        groups = k / 16;
        bytes.resize(rows * k);
        scale.resize(rows * groups);
        sums.resize(2 * rows * groups);
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < k; i += QUANT_BLOCK)
                read_group(x + r * ld + i, &bytes[r * k + i], r * groups + i / 16);
    }

private:
    template <class X>
    void read_group(const X* x, int8_t* to, int64_t group) {
        float largest = 1e-30f;
        for (int i = 0; i < QUANT_BLOCK; i++) largest = std::max(largest, std::fabs(to_f32(x[i])));
        const float step = largest / 127;
        int32_t total[2][2] = {};
        for (int i = 0; i < QUANT_BLOCK; i++) {
            // rounds to an integer, as vexp does; a call of lrint would be one for each input
            const int value = int((to_f32(x[i]) / step + 12582912.0f) - 12582912.0f);
            to[i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = int8_t(value);
            total[i / 16][i % 2] += value;
        }
        for (int half = 0; half < 2; half++) {
            scale[group + half] = step;
            for (int s = 0; s < 2; s++) sums[2 * (group + half) + s] = step * float(total[half][s]);
        }
    }
};

// Bits 4 and on of four bytes from a plane of one bit or of two bits each: two fields of each half
// of its lanes, the first and the third.
template <int BITS>
static inline vu spread_high(const vu& plane) {
    constexpr uint32_t FIELDS = BITS == 1 ? 0x00050005 : 0x00330033;
    constexpr uint32_t BYTES = BITS == 1 ? 0x01010101 : 0x03030303;
    const vu fields = plane & FIELDS;
    return ((fields | fields << (8 - 2 * BITS)) & BYTES) << 4;
}

// Bytes of quants of word `word`: those whose nibbles are low, or high. Unsigned.
template <int F>
__attribute__((always_inline)) static inline void quant_bytes(const uint8_t* quants, int word,
                                                              vu (&bytes)[2]) {
    constexpr int HIGH = FORMATS[F].bits - 4;
    const vu words = loadu<vu>(quants + word * sizeof(vu));
    bytes[0] = words & 0x0f0f0f0f;
    bytes[1] = words >> 4 & 0x0f0f0f0f;
    if constexpr (HIGH > 0) {
        constexpr int WORDS = 4 / HIGH;  // of nibbles that a vector of the plane serves
        const vu plane = loadu<vu>(quants + (4 + word / WORDS) * sizeof(vu));
        for (int h = 0; h < 2; h++)
            bytes[h] |= spread_high<HIGH>(plane >> (HIGH * (word % WORDS * 4 + h)));
    }
}

template <int F>
constexpr bool has_byte_products() {
    return FORMATS[F].bits < 8 && F != IQ4_NL;
}

// Sums of a group's integers, as floats, under the group's scales.
template <int R>
__attribute__((always_inline)) static inline void add_group(
    const vi (&integers)[R][KINDS], const vf (&scale)[2], const vf (&least)[2], const ByteRows& in,
    int row, int64_t group, bool both, vf (&sums)[R][KINDS]) {
    for (int r = 0; r < R; r++) {
        const int64_t at = (row + r) * in.groups + group;
        const float* total = &in.sums[2 * at];
        const float pair[2] = {total[0] + (both ? total[2] : 0), total[1] + (both ? total[3] : 0)};
        const vf inputs = HAS_BF16_PAIRS ? (vf)broadcast8(pair) : vf{} + (pair[0] + pair[1]);
        for (int kind = 0; kind < KINDS; kind++) {
            const vf products = __builtin_convertvector(integers[r][kind], vf);
            const vf step = scale[kind] * in.scale[at];
            sums[r][kind] = fused(least[kind], inputs, fused(products, step, sums[r][kind]));
        }
    }
}

// Adds the products of R rows from `row` on with a block of a strip at k = i.
template <int F, int R>
__attribute__((always_inline)) static inline void byte_block(StripReader<F>& strip,
                                                             const ByteRows& in, int row, int64_t i,
                                                             vf (&sums)[R][KINDS]) {
    constexpr Format format = FORMATS[F];
    constexpr int GROUPS = QUANT_BLOCK / format.group, WORDS = 4 / GROUPS;
    const Block<F> block = strip.next();
    for (int group = 0; group < GROUPS; group++) {
        vi integers[R][KINDS] = {};
        for (int word = group * WORDS; word < (group + 1) * WORDS; word++) {
            vu bytes[2];
            quant_bytes<F>(block.quants, word, bytes);
            for (int r = 0; r < R; r++) {
                const int8_t* x = &in.bytes[(row + r) * in.groups * 16 + i + 8 * word];
                const vi even = (vi)(HAS_BF16_PAIRS ? broadcast8(x) : broadcast4(x));
                const vi odd = HAS_BF16_PAIRS ? even : (vi)broadcast4(x + 4);
                dot_u8s8(integers[r][0], (vi)bytes[0], even);
                dot_u8s8(integers[r][KINDS - 1], (vi)bytes[1], odd);
            }
        }
        add_group<R>(integers, block.scales.scale[group],
                     block.scales.least[format.has_least ? 0 : group], in, row, i / 16 + group,
                     GROUPS == 1, sums);
    }
}

// Adds to sums [R, 2, KINDS] what a super-block of a panel from k = first on yields for R rows.
template <int F, int R>
__attribute__((noinline)) static void byte_pass(const ByteRows& in, int row, const Strip* strips,
                                                int64_t first, int64_t depth, vf* sums) {
    for (int half = 0; half < 2; half++) {
        StripReader<F> strip(strips[half].data, first);
        vf kept[R][KINDS];
        for (int r = 0; r < R; r++)
            for (int kind = 0; kind < KINDS; kind++)
                kept[r][kind] = sums[(2 * r + half) * KINDS + kind];
        for (int64_t i = first; i < first + depth; i += QUANT_BLOCK)
            byte_block<F, R>(strip, in, row, i, kept);
        for (int r = 0; r < R; r++)
            for (int kind = 0; kind < KINDS; kind++)
                sums[(2 * r + half) * KINDS + kind] = kept[r][kind];
    }
}

// The columns of a strip of what its kinds of vectors hold.
static inline vf columns_of(const vf* kinds) {
    if constexpr (KINDS == 1) return kinds[0];
    vf out = kinds[0];
    for (int lane = 0; lane < VW; lane++) {
        const vf& from = kinds[lane / (VW / 2)];
        out[lane] = from[2 * lane % VW] + from[2 * lane % VW + 1];
    }
    return out;
}

template <int F, class Epilogue>
static void byte_panel(const ByteRows& in, int rows, const Strip* strips, int64_t k, vf* sums,
                       Epilogue&& take) {
    std::fill_n(sums, rows * 2 * KINDS, vf{});
    for (int64_t first = 0; first < k; first += SUPER_BLOCK)
        for (int row = 0; row < rows; row += BYTE_ROWS)
            with_count<BYTE_ROWS>(std::min(BYTE_ROWS, rows - row), [&](auto r) {
                byte_pass<F, r>(in, row, strips, first, std::min<int64_t>(SUPER_BLOCK, k - first),
                                sums + row * 2 * KINDS);
            });
    for (int r = 0; r < rows; r++)
        take(r, columns_of(sums + 2 * r * KINDS), columns_of(sums + (2 * r + 1) * KINDS));
}

}  // namespace smart
