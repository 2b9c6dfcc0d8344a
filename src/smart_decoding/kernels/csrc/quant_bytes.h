// Products of quants with inputs in 8 bits. Quants are not widened; four of them are multiplied
// with four bytes and added, in one instruction where there is one. Inputs are rounded once, from
// fp32, and those of a block share a scale.
//
// A block of the quants is unpacked into registers, and all rows of a pass go over it, one after
// another in a loop at run time: so a row's sums have the same bits in any company, but not those
// of quants.h. With AVX-512 a row takes 22 operations for 32 k of two strips in the two units that
// multiply: 16 products of four bytes, and three for the scales of each strip.

#pragma once
#include "packing.h"

namespace [[gnu::visibility("hidden")]] smart {

// Rows that go over a super-block one after another: each of its blocks is unpacked once for all of
// them, and their inputs and sums stay in the first cache.
constexpr int BYTE_ROWS = 32;
constexpr int BYTE_GROUP = 16;  // inputs whose sum is kept: the fewest that share a scale

// A block of a row's inputs in 8 bits, and all else that its products need.
struct ByteBlock {
    int8_t bytes[QUANT_BLOCK];
    float scale, sum;                         // sum: of the rounded inputs
    int32_t minus[QUANT_BLOCK / BYTE_GROUP];  // the sums of bytes, negative
};

// Rows of inputs in 8 bits, pass by pass: [k / 32, rows of the pass].
struct ByteRows {
    const int64_t k;
    const int rows, passes;

    // By a whole team or one thread alone. k: a multiple of QUANT_BLOCK.
    ByteRows(const float* x, int count, int64_t k_, bool alone)
        : k(k_), rows(count), passes((rows + BYTE_ROWS - 1) / BYTE_ROWS) {
        const Packing packing(rows, k, rows * k / QUANT_BLOCK * sizeof(ByteBlock), alone);
        blocks = (ByteBlock*)packing.memory;
        for (int pass = 0; pass < passes; pass++) {
            const int first = first_of(pass), together = first_of(pass + 1) - first;
            for (int row = 0; row < together; row++) {
                ByteBlock* to = at(pass, packing.first) + row;
                for (int64_t i = packing.first; i < packing.last; i += QUANT_BLOCK, to += together)
                    read_block(x + (first + row) * k + i, *to);
            }
        }
        packing.finish();
    }

    int first_of(int pass) const { return int(int64_t(rows) * pass / passes); }

    // The blocks of a pass at k = i.
    ByteBlock* at(int pass, int64_t i) const {
        const int row = first_of(pass), count = first_of(pass + 1) - row;
        return blocks + (row * k + i * count) / QUANT_BLOCK;
    }

private:
    ByteBlock* blocks;

    // How many steps the largest input is: the first, or the second where it errs less. Of normal
    // inputs that leaves 92 % of the squared error.
    static constexpr float STEPS[] = {127, 125};

    static void read_block(const float* x, ByteBlock& to) {
        vf sizes = vf{} + 1e-30f;
        for (int i = 0; i < QUANT_BLOCK; i += VW) {
            const vf v = loadu<vf>(x + i), size = v < 0 ? -v : v;
            sizes = size > sizes ? size : sizes;
        }
        const float largest = max_of(sizes), factors[] = {STEPS[0] / largest, STEPS[1] / largest};
        constexpr float RATIO = STEPS[0] / STEPS[1];  // of the second's step to the first's
        // Squared errors of the second less those of the first; NaN where an input is not finite.
        vf worse{};
        for (int i = 0; i < QUANT_BLOCK; i += VW) {
            const vf v = loadu<vf>(x + i), first = error_of(v * factors[0]),
                     second = error_of(v * factors[1]) * RATIO;
            worse += second * second - first * first;
        }
        to = {};
        to.scale = to.sum = NAN;
        if (any_nan(worse)) return;
        const bool which = sum_of(worse) < 0;
        const float step = largest / STEPS[which], factor = factors[which];
        int32_t totals[QUANT_BLOCK / BYTE_GROUP] = {};
        for (int i = 0; i < QUANT_BLOCK; i += VW)
            totals[i / BYTE_GROUP] += to_bytes(loadu<vf>(x + i) * factor, to.bytes + i);
        for (int g = 0; g < QUANT_BLOCK / BYTE_GROUP; g++) to.minus[g] = -totals[g];
        to.scale = step;
        to.sum = step * float(totals[0] + totals[1]);
    }

    // What rounding to the nearest integer changes.
    static vf error_of(const vf& v) { return v - ((v + INTEGERS) - INTEGERS); }
};

// What quants are in bytes more than their weights are scales.
template <int F>
constexpr int BYTE_ZERO = F == Q8_0 ? 128 : FORMATS[F].zero;

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
    if constexpr (FORMATS[F].has_table()) return lookup_bytes(FORMATS[F].table, low);
    if constexpr (HIGH == 1 || HIGH == 2) return low | field<HIGH, 4>(quants + 4 * sizeof(vu), v);
    return low;
}

// Blocks of S strips, unpacked, and the products of rows with them.
template <int F, int S>
struct ByteWeights {
    static constexpr Format format = FORMATS[F];
    static constexpr int GROUPS = QUANT_BLOCK / format.group;
    typedef ByteSums<format.most(), format.group / 4> Sums;
    vi bytes[S][QUANT_BLOCK / 4];
    RowScales scales[S];

    template <int s>
    __attribute__((always_inline)) void unpack(const uint8_t* at, const vf (&shared)[2]) {
        scales[s] = row_scales<F>(at, shared);
        for_block<4>([&](auto i) __attribute__((always_inline)) {
            bytes[s][i / 4] = (vi)quant_bytes<F>(at + format.scales() * VW, i / 4);
            keep_in_register(bytes[s][i / 4]);
        });
    }

    // Adds the products of a row to its sums.
    __attribute__((always_inline)) void multiply(const ByteBlock& x, float* sums) const {
        Sums integers[S][GROUPS];
        for_block<4>([&](auto i) __attribute__((always_inline)) {
            constexpr int group = i / format.group, step = i % format.group / 4;
            if constexpr (step == 0) {
                const vi first = first_of(x, group);
                for (int s = 0; s < S; s++) integers[s][group].begin(first);
            }
            const int8_t* inputs = x.bytes + group * format.group;
            for (int s = 0; s < S; s++)
                integers[s][group].template add<step>(bytes[s][i / 4], inputs);
        });
        for (int s = 0; s < S; s++) add_scaled(integers[s], scales[s], x, sums + s * VW);
    }

    // What a group's sums begin with: the inputs' own, times what bytes are too large by.
    __attribute__((always_inline)) static vi first_of(const ByteBlock& x, int group) {
        constexpr int ZERO = BYTE_ZERO<F> - Sums::LESS;
        if constexpr (ZERO == 0) return vi{};
        vi first = (vi)broadcast4(x.minus + group);
        if constexpr (GROUPS == 1) first += (vi)broadcast4(x.minus + 1);
        return first * ZERO;
    }

    // Adds a strip's sums of integers, scaled.
    __attribute__((always_inline)) static void add_scaled(const Sums (&integers)[GROUPS],
                                                          const RowScales& of, const ByteBlock& x,
                                                          float* sums) {
        vf scaled;
        for (int g = 0; g < GROUPS; g++) {
            const vf products = __builtin_convertvector(integers[g].sum(), vf);
            scaled = g ? fused(products, of.scale[g], scaled) : products * of.scale[g];
        }
        vf sum = fused(scaled, every_lane(x.scale), loadu<vf>(sums));
        if constexpr (format.has_least) sum = fused(of.least[0], every_lane(x.sum), sum);
        storeu(sums, sum);
    }
};

// Where the super-blocks of a strip lie: those of two strips of one format take turns, so that a
// panel is one stream of memory.
struct ByteStrip {
    const uint8_t* data;
    int64_t gap;  // from the end of one to the next

    // Strip `half` of a panel.
    template <int F>
    static ByteStrip of(const Strip* panel, int half) {
        constexpr int64_t SIZE = FORMATS[F].super_bytes() * VW;
        if (panel[0].format != panel[1].format) return {panel[half].data, 0};
        return {panel[0].data + half * SIZE, SIZE};
    }

    // The second strip of a panel whose first one this is.
    template <int F>
    ByteStrip beside() const {
        return {data + FORMATS[F].super_bytes() * VW, gap};
    }

    template <int F>
    StripReader<F> from(int64_t first) const {
        return {data, first, gap};
    }
};

// Bytes ahead that the first pass prefetches.
constexpr int BYTE_PREFETCH = 6144;

// Prefetches the start of the panels that a thread will read, which no pass does.
static inline void prefetch_start(const Strip* panel) {
    for (int line = 0; line < BYTE_PREFETCH; line += 64)
        __builtin_prefetch(panel->data + line, 0, INTO_CACHES);
}

// Adds to sums [rows, PANEL] what `depth` of S strips, from k = first on, yields; all of it lies in
// one super-block. FRESH: it is read from memory. Tiles of AMX were no faster for any number of
// rows where each product was awaited before it was scaled (LOG.md).
template <int F, int S, bool FRESH>
__attribute__((always_inline)) static inline void byte_pass(const ByteBlock* x, int rows,
                                                            const ByteStrip& strip, int64_t first,
                                                            int64_t depth, float* sums) {
    constexpr Format format = FORMATS[F];
    // Two strips are one stream.
    constexpr int BLOCK = S * format.super_bytes() * VW * QUANT_BLOCK / format.super;
    constexpr int LINES = ((S == 1 ? format.block() * VW : BLOCK) + 63) / 64 * 64;
    StripReader<F> left = strip.from<F>(first);
    StripReader<F> right = S == 1 ? left : strip.beside<F>().template from<F>(first);
    const uint8_t* ahead = left.at + BYTE_PREFETCH;
    for (int64_t i = 0; i < depth; i += QUANT_BLOCK, x += rows, ahead += LINES) {
        ByteWeights<F, S> weights;
        left.enter(i);
        if (S == 1) ahead = left.at + BYTE_PREFETCH;
        weights.template unpack<0>(left.template step<false>(), left.shared);
        if constexpr (S == 2) {
            right.enter(i);
            weights.template unpack<1>(right.template step<false>(), right.shared);
        }
        for (int line = 0; FRESH && line < LINES; line += 64)
            __builtin_prefetch(ahead + line, 0, INTO_CACHES);
        for (int row = 0; row < rows; row++) weights.multiply(x[row], sums + row * PANEL);
    }
}

// Adds the products of all rows with what S strips have at k = first and after in a super-block.
template <int F, int S>
__attribute__((always_inline)) static inline void byte_passes(const ByteRows& in,
                                                              const ByteStrip& strip, int64_t first,
                                                              float* sums) {
    const int64_t depth = std::min<int64_t>(SUPER_BLOCK, in.k - first);
    for (int pass = 0; pass < in.passes; pass++) {
        const int row = in.first_of(pass), count = in.first_of(pass + 1) - row;
        const ByteBlock* x = in.at(pass, first);
        float* to = sums + row * PANEL;
        if (pass)
            byte_pass<F, S, false>(x, count, strip, first, depth, to);
        else
            byte_pass<F, S, true>(x, count, strip, first, depth, to);
    }
}

// The same of all of k: of a panel whose strips have one format, or of one strip. sums: of the
// first of its columns.
template <int F, bool BOTH>
__attribute__((noinline)) static void byte_strips(const ByteRows& in, ByteStrip strip,
                                                  float* sums) {
    constexpr int STRIPS = BOTH ? BYTE_STRIPS : 1;
    for (int64_t first = 0; first < in.k; first += SUPER_BLOCK) {
        byte_passes<F, STRIPS>(in, strip, first, sums);
        if constexpr (BOTH && STRIPS == 1)
            byte_passes<F, 1>(in, strip.beside<F>(), first, sums + VW);
    }
}

// sums [rows, PANEL] of a panel.
static inline void byte_panel(const ByteRows& in, const Strip* panel, float* sums) {
    memset(sums, 0, in.rows * PANEL * sizeof(float));
    const bool both = panel[0].format == panel[1].format;
    for (int half = 0; half < (both ? 1 : 2); half++)
        with_format(panel[half].format, [&](auto format) {
            if constexpr (format != BF16_ROWS) {
                const auto run = both ? byte_strips<format, true> : byte_strips<format, false>;
                run(in, ByteStrip::of<format>(panel, half), sums + half * VW);
            }
        });
}

// The weights at one k, byte j of the quants' lanes, before they are rounded. group: that of k.
template <int F>
__attribute__((always_inline)) static inline vf byte_weights(const vu& bytes, int j,
                                                             const RowScales& scales, int group) {
    constexpr Format format = FORMATS[F];
    const vi quants = (vi)(bytes >> 8 * j & 255) - BYTE_ZERO<F>;
    const vf scaled = __builtin_convertvector(quants, vf) * scales.scale[group];
    if constexpr (format.has_least) return scaled + scales.least[0];
    return scaled;
}

// Widens a strip, its rows' lanes in turn, to its half of a panel of pairs.
template <int F>
static void widen_bytes(const ByteStrip& from, int64_t k, bf16* to) {
    constexpr Format format = FORMATS[F];
    vu in_turn;
    for (int j = 0; j < VW; j++) in_turn[j] = uint32_t(j | (j + VW) << 16);
    StripReader<F> strip = from.from<F>(0);
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
                storeu(to, lookup_words(weights_to_bf16<F>(even, odd), in_turn));
            }
        });
    }
}

// Row `row` of a strip, [k], as it would be widened.
template <int F>
static void unpack_bytes(const ByteStrip& from, int64_t k, int row, float* out) {
    constexpr Format format = FORMATS[F];
    StripReader<F> strip = from.from<F>(0);
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
