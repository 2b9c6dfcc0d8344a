// Weights in the quants of GGUF files, and how they are widened to what linear layers multiply.
//
// A quantised weight is strips of VW rows, each in a format of its own. A strip is super-blocks
// along k, one after another: what its blocks share, then blocks of 32 k, each with its scales and
// then its quants in planes. Vector f of a block, of 32, holds quants in the order that a panel is
// multiplied in: where that is by pairs of bf16, lane 2 j + s of vector 2 p + half is row
// half VW / 2 + j at k = 2 p + s; else lane j is row j at k = f. Nibble n of the words w of the
// first plane is of vector 8 w + n. Planes of one and of two bits go on likewise, but that n = 0 to
// 3 of all w come before n = 4 to 7: where words are looked up, both halves of a lane are shifted
// at once. Bytes lie vector after vector.
//
// Quants that are multiplied by tiles lie as quant_tiles.h says.
//
// Quants that are multiplied in 8 bits (quant_bytes.h) lie otherwise: lane j is row j, and its four
// bytes hold quants at four of k in a row. A plane of n bits has 8 / n such vectors in a word, the
// first one in the lowest bits of each byte. Bytes lie vector after vector, with 128 added. The two
// strips of a panel lie one after the other in memory; if they have one format, their super-blocks
// take turns there.
//
// A weight is scale * (q - zero) or scale * q + least, in fp32, rounded to bf16; some formats have
// a table of q. The products are exact (11 bits of a half, up to 7 of a scale, up to 6 of q): in
// whatever order, this is what dequantising the file in fp32 and rounding gives.

#pragma once
#include <utility>

#include "abi.h"
#include "panels.h"

namespace [[gnu::visibility("hidden")]] smart {

constexpr int QUANT_BLOCK = 32;   // k of a block
constexpr int SUPER_BLOCK = 256;  // k of a super-block whose blocks share a scale

// What four bits stand for where that is not their number, with the format's zero added. A scale of
// MXFP4 is of 4-bit floats (E2M1); halved, it is of integers.
constexpr uint8_t NON_LINEAR[16] = {1,   24,  45,  63,  79,  93,  106, 118,
                                    129, 141, 153, 166, 181, 197, 217, 241};
constexpr uint8_t TWICE_E2M1[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

struct Format {
    int bits, zero;
    int group;       // k that share a scale
    int super;       // k that share a half; a scale is that half times a byte if these are more
    bool has_least;  // else q - zero is scaled
    const uint8_t* table = nullptr;
    bool has_powers = false;  // a scale is a power of two, whose exponent is a byte

    constexpr bool has_table() const { return table; }
    constexpr bool has_bytes() const { return has_powers || super > QUANT_BLOCK; }
    // Bytes of a row: what a super-block's blocks share, a block's scales, and its quants.
    constexpr int shared() const { return super > QUANT_BLOCK ? 2 + 2 * has_least : 0; }
    constexpr int scales() const {
        if (bits == 16) return 0;
        return has_bytes() ? QUANT_BLOCK / group + has_least : 2 + 2 * has_least;
    }
    constexpr int block() const { return scales() + bits * QUANT_BLOCK / 8; }
    constexpr int super_bytes() const { return shared() + super / QUANT_BLOCK * block(); }
    // The largest byte that stands for a quant.
    constexpr int most() const {
        int most = table ? 0 : (1 << bits) - 1;
        for (int q = 0; table && q < 16; q++) most = table[q] > most ? table[q] : most;
        return most;
    }
};

constexpr Format FORMATS[] = {
    // in the order of abi.h
    {16, 0, 32, 32, false},                    // BF16_ROWS
    {4, 8, 32, 32, false},                     // Q4_0
    {4, 0, 32, 32, true},                      // Q4_1
    {5, 16, 32, 32, false},                    // Q5_0
    {5, 0, 32, 32, true},                      // Q5_1
    {8, 0, 32, 32, false},                     // Q8_0
    {4, 0, 32, SUPER_BLOCK, true},             // Q4_K
    {5, 0, 32, SUPER_BLOCK, true},             // Q5_K
    {6, 32, 16, SUPER_BLOCK, false},           // Q6_K
    {4, 128, 32, 32, false, NON_LINEAR},       // IQ4_NL
    {4, 12, 32, 32, false, TWICE_E2M1, true},  // MXFP4
};
constexpr int FORMAT_COUNT = sizeof FORMATS / sizeof *FORMATS;

// What a linear layer with quants multiplies: bf16, or floats with their values.
typedef Input<bf16> Wide;

// Row and k within a block of lane `lane` of vector `f`.
constexpr int row_of_lane(int f, int lane) {
    if (HAS_TILES) return (f * VW + lane) / QUANT_BLOCK;
    return HAS_BF16_PAIRS ? f % 2 * (VW / 2) + lane / 2 : lane;
}
constexpr int k_of_lane(int f, int lane) {
    if (HAS_TILES) return (f * VW + lane) % QUANT_BLOCK;
    return HAS_BF16_PAIRS ? f / 2 * 2 + lane % 2 : f;
}

// The scales of a block and its least values, of its groups along k; a lane is a row.
struct RowScales {
    vf scale[2], least[2];
};

// shared: the halves of the super-block.
template <int F>
__attribute__((always_inline)) static inline RowScales row_scales(const uint8_t* at,
                                                                  const vf (&shared)[2]) {
    constexpr Format format = FORMATS[F];
    RowScales out;
    for (int group = 0; group < QUANT_BLOCK / format.group; group++) {
        vf& scale = out.scale[group];
        if constexpr (!format.has_bytes())
            scale = halves_to_float(at);
        else if constexpr (format.has_powers)
            scale = half_powers_of_two(at);
        else if constexpr (format.has_least)
            scale = shared[0] * bytes_to_float<uint8_t>(at);
        else
            scale = shared[0] * bytes_to_float<int8_t>(at);
        at += format.has_bytes() ? VW : 2 * VW;
        if constexpr (format.zero != 0) out.least[group] = scale * -float(format.zero);
    }
    if constexpr (format.has_least && format.has_bytes())
        out.least[0] = -(shared[1] * bytes_to_float<uint8_t>(at));
    else if constexpr (format.has_least)
        out.least[0] = halves_to_float(at);
    return out;
}

// The same for the two kinds of vectors that pairs have.
struct BlockScales {
    vf scale[2][2], least[2][2];
};

static inline void spread(const vf& rows, vf (&out)[2]) {
    if constexpr (HAS_BF16_PAIRS) {
        out[0] = twice<0>(rows);
        out[1] = twice<1>(rows);
    } else {
        out[0] = rows;
        // Else GCC multiplies what a least value is the product of anew for every vector.
        keep_in_register(out[0]);
    }
}

template <int F>
__attribute__((always_inline)) static inline void read_scales(const uint8_t* at,
                                                              const vf (&shared)[2],
                                                              BlockScales& out) {
    constexpr Format format = FORMATS[F];
    const RowScales rows = row_scales<F>(at, shared);
    for (int group = 0; group < QUANT_BLOCK / format.group; group++) {
        spread(rows.scale[group], out.scale[group]);
        if constexpr (format.zero != 0) spread(rows.least[group], out.least[group]);
    }
    if constexpr (format.has_least) spread(rows.least[0], out.least[0]);
}

// Bit FROM of every lane moved to bit 4.
template <int FROM, class V>
static inline V to_bit_four(const V& plane) {
    if constexpr (FROM < 4) return plane << (4 - FROM);
    return plane >> (FROM < 4 ? 0 : FROM - 4);
}

// What a quant of up to six bits is before it is scaled.
template <int F>
constexpr float level(int q) {
    constexpr Format format = FORMATS[F];
    return float((format.has_table() ? format.table[q % 16] : q) - format.zero);
}

// The same of up to five bits in floats, twice if there are sixteen.
template <int F>
struct FloatLevels {
    alignas(64) float of[32];

    constexpr FloatLevels() : of() {
        for (int q = 0; q < 32; q++) of[q] = level<F>(q % (1 << FORMATS[F].bits));
    }
};
template <int F>
constexpr FloatLevels<F> FLOAT_LEVELS;

// The values of a format's quants in bf16, twice if there are sixteen.
template <int F>
struct Levels {
    static constexpr int ENTRIES = FORMATS[F].bits <= 5 ? 32 : 64;
    alignas(64) uint16_t values[ENTRIES];

    constexpr Levels() : values() {
        for (int i = 0; i < ENTRIES; i++) {
            const int q = i % (1 << FORMATS[F].bits);
            values[i] = uint16_t(__builtin_bit_cast(uint32_t, level<F>(q)) >> 16);
        }
    }
};
template <int F>
constexpr Levels<F> LEVELS;

// A block of a strip: its scales are read, its quants are widened vector by vector.
template <int F>
struct Block {
    static constexpr Format format = FORMATS[F];
    BlockScales scales;
    const uint8_t* quants;

    // shared: the halves of the super-block.
    __attribute__((always_inline)) Block(const uint8_t* at, const vf (&shared)[2])
        : quants(at + format.scales() * VW) {
        if constexpr (F != BF16_ROWS) read_scales<F>(at, shared, scales);
    }

    // Vector f as floats.
    template <int f>
    __attribute__((always_inline)) vf vector() const {
        constexpr int group = k_of_lane(f, 0) / format.group, kind = HAS_BF16_PAIRS ? f % 2 : 0;
        if constexpr (F == BF16_ROWS) {
            return widen<vf>((const bf16*)quants + f * VW);
        } else if constexpr (!LOOKS_UP && !format.has_table() && format.zero != 0) {
            return quants_of<f>() * scales.scale[group][kind] + scales.least[group][kind];
        } else if constexpr (format.has_least) {
            return quants_of<f>() * scales.scale[group][kind] + scales.least[0][kind];
        } else {
            return quants_of<f>() * scales.scale[group][kind];
        }
    }

private:
    static constexpr bool LOOKS_UP = HAS_WORD_LOOKUP && format.bits < 8;

    template <int f>
    __attribute__((always_inline)) vf quants_of() const {
        if constexpr (format.bits == 8) {
            return bytes_to_float<int8_t>(quants + f * VW);
        } else if constexpr (LOOKS_UP) {
            const vu both = lookup_words<Levels<F>::ENTRIES>(LEVELS<F>.values, indices<f & ~4>());
            return (vf)(f & 4 ? both & 0xffff0000u : both << 16);
        } else {
            const vu index = indices<f>() & ((1 << format.bits) - 1);
            if constexpr (format.has_table()) return lookup(FLOAT_LEVELS<F>.of, index);
            return __builtin_convertvector((vi)index, vf);
        }
    }

    // Quants of vector f in the low bits of lanes, and in the low bits of their upper halves those
    // of vector f + 4; bits above them are anything.
    template <int f>
    __attribute__((always_inline)) vu indices() const {
        constexpr int word = f / 8, n = f % 8;
        const vu low = loadu<vu>(quants + word * sizeof(vu)) >> (4 * n);
        if constexpr (format.bits == 4) return low;
        constexpr int BITS = format.bits > 4 ? format.bits - 4 : 1, WORDS = 4 / BITS;
        constexpr int FROM = n / 4 * 16 + BITS * (word % WORDS * 4 + n % 4);
        const vu plane = loadu<vu>(quants + (4 + word / WORDS) * sizeof(vu));
        return (low & 0x000f000f) | (to_bit_four<FROM>(plane) & 0xfff0fff0);
    }
};

// Calls `take` with 0, STEP, 2 STEP, ... below QUANT_BLOCK, as constants of the compiler.
template <int STEP, class Take, int... I>
__attribute__((always_inline)) static inline void each(Take&& take,
                                                       std::integer_sequence<int, I...>) {
    (take(std::integral_constant<int, STEP * I>()), ...);
}
template <int STEP, class Take>
__attribute__((always_inline)) static inline void for_block(Take&& take) {
    each<STEP>(take, std::make_integer_sequence<int, QUANT_BLOCK / STEP>());
}

// Rounds to bf16, ties to even, and keeps floats: what is added and taken away again leaves eight
// bits (Veltkamp's splitting; Dekker 1971), which takes two operations less than integers do. For
// finite values below 2^111.
static inline vf rounded(const vf& v) {
    vf large = v * 65537.0f;
    finish_product(large);
    return large - (large - v);
}

// Weights of two vectors in bf16, one after the other.
template <int F>
__attribute__((always_inline)) static inline vu weights_to_bf16(const vf& first, const vf& second) {
    return FORMATS[F].has_powers ? two_as_bf16(first, second) : two_to_bf16(first, second);
}

// Bytes ahead that a strip is prefetched; it is multiplied so slowly that the first cache holds
// them.
constexpr int QUANT_PREFETCH = 4096;

// A strip from some k on, a multiple of a block: within a super-block, and from block to block.
template <int F>
struct StripReader {
    static constexpr Format format = FORMATS[F];
    const uint8_t* at;
    vf shared[2] = {};

    // gap: bytes between its super-blocks.
    StripReader(const uint8_t* data, int64_t first, int64_t gap_ = 0) : gap(gap_) {
        at = data + first / format.super * (format.super_bytes() * VW + gap);
        read_shared();
        at += first % format.super / QUANT_BLOCK * format.block() * VW;
    }

    // The same of a strip of length k that is read beside another one: what lies behind it in
    // memory is that one, already read; `next` comes after it.
    StripReader(const uint8_t* data, int64_t first, int64_t k, const uint8_t* next)
        : StripReader(data, first) {
        const uint8_t* end = data + k / format.super * format.super_bytes() * VW;
        last_ahead = end - QUANT_PREFETCH;
        jump = next - end;
    }

    // Before the block at k = i of a strip that is read from its start on: a super-block may begin.
    void enter(int64_t i) {
        if (!i || i % format.super) return;
        at += gap;
        read_shared();
    }

    __attribute__((always_inline)) Block<F> next() { return Block<F>(step<true>(), shared); }

    // The next block as it lies.
    template <bool PREFETCH>
    __attribute__((always_inline)) const uint8_t* step() {
        const uint8_t* ahead = at + QUANT_PREFETCH + (at >= last_ahead ? jump : 0);
        for (int line = 0; PREFETCH && line < format.block() * VW; line += 64)
            __builtin_prefetch(ahead + line, 0, INTO_CACHES);
        const uint8_t* block = at;
        at += format.block() * VW;
        return block;
    }

private:
    int64_t gap;
    const uint8_t* last_ahead = nullptr;  // from here on, prefetches go to the next strip
    int64_t jump = 0;

    void read_shared() {
        if constexpr (format.shared() >= 2) shared[0] = halves_to_float(at);
        if constexpr (format.shared() == 4) shared[1] = halves_to_float(at + 2 * VW);
        at += format.shared() * VW;
    }
};

// Calls `run` with the format as a constant of the compiler.
template <class R>
__attribute__((always_inline)) static inline void with_format(int64_t format, R&& run) {
    switch (format) {
        case BF16_ROWS:
            return run(std::integral_constant<int, BF16_ROWS>());
        case Q4_0:
            return run(std::integral_constant<int, Q4_0>());
        case Q4_1:
            return run(std::integral_constant<int, Q4_1>());
        case Q5_0:
            return run(std::integral_constant<int, Q5_0>());
        case Q5_1:
            return run(std::integral_constant<int, Q5_1>());
        case Q8_0:
            return run(std::integral_constant<int, Q8_0>());
        case Q4_K:
            return run(std::integral_constant<int, Q4_K>());
        case Q5_K:
            return run(std::integral_constant<int, Q5_K>());
        case Q6_K:
            return run(std::integral_constant<int, Q6_K>());
        case IQ4_NL:
            return run(std::integral_constant<int, IQ4_NL>());
        case MXFP4:
            return run(std::integral_constant<int, MXFP4>());
    }
}

}  // namespace smart
