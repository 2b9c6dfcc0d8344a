// Quants row by row, as GGUF files hold them, into strips (quants.h) and into bf16.

#include "quant_bytes.h"
#include "quant_tiles.h"

#include <vector>

namespace [[gnu::visibility("hidden")]] smart {

// A super-block of a row: its quants, and its scales in the order that a strip has them in.
struct FileBlock {
    uint8_t q[SUPER_BLOCK];                       // signed in Q8_0
    uint16_t shared[2];                           // halves
    uint8_t bytes[SUPER_BLOCK / QUANT_BLOCK][3];  // scales
    uint16_t halves[2];
};

static inline uint16_t half_at(const uint8_t* p) { return loadu<uint16_t>(p); }

// Nibbles of 16 bytes: the low ones first, then the high ones.
static inline void split_nibbles(const uint8_t* bytes, int count, uint8_t* q) {
    for (int j = 0; j < count; j++) {
        q[j] = bytes[j] & 15;
        q[count + j] = bytes[j] >> 4;
    }
}

// Adds bits `shift` to shift + BITS of 32 bytes to quants, above their nibbles.
template <int BITS>
static inline void add_high(const uint8_t* bytes, int shift, uint8_t* q) {
    for (int j = 0; j < 32; j++) q[j] |= (bytes[j] >> shift & ((1 << BITS) - 1)) << 4;
}

// The six bits of scales and least values of Q4_K and Q5_K, in twelve bytes.
static inline void six_bits(const uint8_t* from, uint8_t (&bytes)[8][3]) {
    for (int j = 0; j < 4; j++) {
        const uint8_t a = from[j], b = from[j + 4], both = from[j + 8];
        bytes[j][0] = a & 63;
        bytes[j][1] = b & 63;
        bytes[j + 4][0] = uint8_t((both & 15) | (a >> 6) << 4);
        bytes[j + 4][1] = uint8_t(both >> 4 | (b >> 6) << 4);
    }
}

// Formats of 32 quants under scales of their own.
template <int F>
static void read_small(const uint8_t* at, FileBlock& out) {
    constexpr Format format = FORMATS[F];
    if (format.has_powers) {
        out.bytes[0][0] = *at++;
    } else {
        out.halves[0] = half_at(at);
        at += 2;
    }
    if (format.has_least) {
        out.halves[1] = half_at(at);
        at += 2;
    }
    if (format.bits == 8) {
        memcpy(out.q, at, QUANT_BLOCK);
        return;
    }
    const uint32_t high = format.bits == 5 ? loadu<uint32_t>(at) : 0;
    if (format.bits == 5) at += 4;
    split_nibbles(at, QUANT_BLOCK / 2, out.q);
    for (int j = 0; format.bits == 5 && j < QUANT_BLOCK; j++) out.q[j] |= (high >> j & 1) << 4;
}

template <int F>
static void read_super(const uint8_t* at, FileBlock& out) {
    if constexpr (F == Q6_K) {
        const uint8_t *low = at, *high = at + 128, *scales = at + 192;
        for (int h = 0; h < 2; h++, low += 64, high += 32) {
            uint8_t* q = out.q + 128 * h;
            split_nibbles(low, 64, q);
            for (int part = 0; part < 4; part++) add_high<2>(high, 2 * part, q + 32 * part);
        }
        for (int j = 0; j < 16; j++) out.bytes[j / 2][j % 2] = scales[j];
        out.shared[0] = half_at(at + 208);
    } else {
        out.shared[0] = half_at(at);
        out.shared[1] = half_at(at + 2);
        six_bits(at + 4, out.bytes);
        const uint8_t *high = at + 16, *low = F == Q5_K ? at + 48 : at + 16;
        for (int c = 0; c < 4; c++) split_nibbles(low + 32 * c, 32, out.q + 64 * c);
        for (int part = 0; F == Q5_K && part < 8; part++)
            add_high<1>(high, part, out.q + 32 * part);
    }
}

// Bytes of a super-block in a file.
constexpr int file_bytes(int format) {
    constexpr int OF[FORMAT_COUNT] = {64, 18, 20, 22, 24, 34, 144, 176, 210, 18, 17};
    return OF[format];
}

template <int F>
static void read_file_block(const uint8_t* at, FileBlock& out) {
    if constexpr (FORMATS[F].super > QUANT_BLOCK)
        read_super<F>(at, out);
    else
        read_small<F>(at, out);
}

// Bits `shift` to shift + BITS of eight bytes, side by side.
template <int BITS>
static inline uint64_t gathered(const uint8_t* q, int shift) {
    constexpr uint64_t ONE = (1 << BITS) - 1, TWO = (1 << 2 * BITS) - 1, FOUR = (1 << 4 * BITS) - 1;
    uint64_t x = loadu<uint64_t>(q) >> shift & ONE * 0x0101010101010101;
    x = (x | x >> (8 - BITS)) & TWO * 0x0001000100010001;
    x = (x | x >> (16 - 2 * BITS)) & FOUR * 0x0000000100000001;
    return (x | x >> (32 - 4 * BITS)) & ((uint64_t(1) << 8 * BITS) - 1);
}

// Fields of a plane of BITS, moved to where quants.h has them: of each eight the last four come
// behind the first four of all.
template <int BITS>
static inline uint32_t in_halves(uint32_t fields) {
    if constexpr (BITS == 4) return fields;
    constexpr int FOUR = 4 * BITS;
    constexpr uint32_t MASK = (1u << FOUR) - 1;
    uint32_t out = 0;
    for (int i = 0; i < 32 / FOUR; i++)
        out |= (fields >> FOUR * i & MASK) << (i % 2 * 16 + i / 2 * FOUR);
    return out;
}

// Words of a plane: where pairs are multiplied, two rows take turns, and even and odd k are apart.
template <int BITS>
static inline uint8_t* put_words(const uint32_t (&of_row)[VW], uint8_t* to) {
    if constexpr (!HAS_BF16_PAIRS) {
        for (int j = 0; j < VW; j++, to += 4) storeu(to, in_halves<BITS>(of_row[j]));
        return to;
    }
    constexpr uint32_t EVEN = 0xffffffffu / ((1 << 2 * BITS) - 1) * ((1 << BITS) - 1);
    for (int j = 0; j < VW / 2; j++)
        for (int s = 0; s < 2; s++, to += 4)
            storeu(to, in_halves<BITS>((of_row[j] >> BITS * s & EVEN)
                                       | (of_row[j + VW / 2] >> BITS * s & EVEN) << BITS));
    return to;
}

// A plane for products by tiles.
template <int F, int BITS>
static inline uint8_t* put_tile_plane(const FileBlock* rows, int block, int shift, uint8_t* to) {
    constexpr int ROWS = 16 / BITS;
    for (int first = 0; first < TILE; first += ROWS)
        for (int w = 0; w < QUANT_BLOCK; w++, to += 2) {
            uint32_t word = 0;
            for (int r = 0; r < ROWS; r++) {
                const uint8_t q = rows[first + r].q[block * QUANT_BLOCK + k_of_word<F>(w)];
                word |= (q >> shift & ((1u << BITS) - 1)) << BITS * r;
            }
            storeu(to, uint16_t(word));
        }
    return to;
}

template <int F, int BITS>
static inline uint8_t* put_plane(const FileBlock* rows, int block, int shift, uint8_t* to) {
    if constexpr (HAS_TILES) return put_tile_plane<F, BITS>(rows, block, shift, to);
    for (int first = 0; first < QUANT_BLOCK; first += 32 / BITS) {
        uint32_t of_row[VW];
        for (int r = 0; r < VW; r++) {
            const uint8_t* q = rows[r].q + block * QUANT_BLOCK + first;
            of_row[r] = 0;
            for (int i = 0; i < 32 / BITS; i += 8)
                of_row[r] |= uint32_t(gathered<BITS>(q + i, shift) << BITS * i);
        }
        to = put_words<BITS>(of_row, to);
    }
    return to;
}

// A plane for products in 8 bits.
template <int BITS>
static inline uint8_t* put_byte_plane(const FileBlock* rows, int block, int shift, uint8_t* to) {
    constexpr int VECTORS = 8 / BITS;
    constexpr uint32_t MASK = ((1u << BITS) - 1) * 0x01010101u;
    for (int first = 0; first < QUANT_BLOCK; first += 4 * VECTORS)
        for (int r = 0; r < VW; r++, to += 4) {
            const uint8_t* q = rows[r].q + block * QUANT_BLOCK + first;
            uint32_t word = 0;
            for (int v = 0; v < VECTORS; v++)
                word |= (loadu<uint32_t>(q + 4 * v) >> shift & MASK) << BITS * v;
            storeu(to, BITS == 8 ? word ^ 0x80808080u : word);
        }
    return to;
}

template <int F>
static uint8_t* put_bytes(const FileBlock* rows, int block, uint8_t* to) {
    constexpr int BITS = FORMATS[F].bits;
    if constexpr (BITS == 8) return put_byte_plane<8>(rows, block, 0, to);
    to = put_byte_plane<4>(rows, block, 0, to);
    if constexpr (BITS > 4 && BITS < 8) to = put_byte_plane<BITS - 4>(rows, block, 4, to);
    return to;
}

template <int F>
static uint8_t* put_quants(const FileBlock* rows, int block, uint8_t* to) {
    constexpr int BITS = FORMATS[F].bits, STEP = HAS_BF16_PAIRS ? 2 : 1;
    if constexpr (BITS == 8) {
        for (int f = 0; f < QUANT_BLOCK; f++)
            for (int lane = 0; lane < VW; lane += STEP, to += STEP)
                memcpy(to, &rows[row_of_lane(f, lane)].q[k_of_lane(f, lane)], STEP);
        return to;
    }
    to = put_plane<F, 4>(rows, block, 0, to);
    if constexpr (BITS > 4) to = put_plane<F, BITS - 4>(rows, block, 4, to);
    return to;
}

static uint8_t* put_halves(const FileBlock* rows, uint16_t (FileBlock::*halves)[2], int which,
                           uint8_t* to) {
    for (int r = 0; r < VW; r++, to += 2) storeu(to, (rows[r].*halves)[which]);
    return to;
}

template <int F, bool BYTES>
static uint8_t* put_super_block(const FileBlock* rows, uint8_t* to) {
    constexpr Format format = FORMATS[F];
    for (int i = 0; i < format.shared() / 2; i++) to = put_halves(rows, &FileBlock::shared, i, to);
    for (int block = 0; block < format.super / QUANT_BLOCK; block++) {
        for (int i = 0; !format.has_bytes() && i < format.scales() / 2; i++)
            to = put_halves(rows, &FileBlock::halves, i, to);
        const int bytes = format.has_bytes() ? format.scales() : 0;
        for (int i = 0; i < bytes; i++)
            for (int r = 0; r < VW; r++) *to++ = rows[r].bytes[block][i];
        to = BYTES ? put_bytes<F>(rows, block, to) : put_quants<F>(rows, block, to);
    }
    return to;
}

// rows: [VW] where each row begins in a file, null: a row of zeros. BYTES: for products in 8 bits.
// gap: bytes between super-blocks.
template <int F, bool BYTES>
static void pack_strip(const uint8_t* const* rows, int64_t k, uint8_t* to, int64_t gap) {
    if constexpr (F == BF16_ROWS) {
        for (int64_t i = 0; i < k; i += QUANT_BLOCK)
            for (int f = 0; f < QUANT_BLOCK; f++)
                for (int lane = 0; lane < VW; lane++, to += 2) {
                    const uint8_t* row = rows[row_of_lane(f, lane)];
                    storeu(to, row ? half_at(row + 2 * (i + k_of_lane(f, lane))) : uint16_t(0));
                }
    } else {
        constexpr Format format = FORMATS[F];
        std::vector<FileBlock> blocks(VW);
        for (int64_t i = 0; i < k / format.super; i++) {
            for (int r = 0; r < VW; r++)
                if (rows[r]) read_file_block<F>(rows[r] + i * file_bytes(F), blocks[r]);
            to = put_super_block<F, BYTES>(blocks.data(), to) + gap;
        }
    }
}

}  // namespace smart

using namespace smart;

extern "C" {

int64_t smart_strip_bytes(int64_t format, int64_t k) {
    const Format& f = FORMATS[format];
    return k % f.super ? 0 : k / f.super * f.super_bytes() * VW;
}

void smart_pack_quants(const Strip* strips, int64_t count, const void* const* rows, int64_t k,
                       int32_t in_bytes) {
    run_team(omp_get_max_threads(), [&] {
        for (int64_t i; (i = next_item()) < count;)
            with_format(strips[i].format, [&](auto format) {
                const auto of_strip = (const uint8_t* const*)rows + i * VW;
                if (!in_bytes)
                    return pack_strip<format, false>(of_strip, k, (uint8_t*)strips[i].data, 0);
                const ByteStrip to = ByteStrip::of<format>(strips + i / 2 * 2, int(i % 2));
                pack_strip<format, true>(of_strip, k, (uint8_t*)to.data, to.gap);
            });
    });
}
}
