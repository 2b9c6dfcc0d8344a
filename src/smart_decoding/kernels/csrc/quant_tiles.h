// Quants by tiles of AMX. Here the weights are the left factor, y^T = W x^T: a row of a tile is 32
// of k of a weight's row, which have a scale in common. So all that its quants of four or five bits
// can be lies in a register, and each is looked up there. A block of a strip is one tile.
//
// Word w of a plane of n bits holds quants of 16 / n rows at the same k, the first one in its
// lowest bits; a plane's vectors are of rows one after another. Bytes, and bf16, lie row after row.
//
// Tiles are multiplied a chunk later than they are widened: a tile that has just been stored is
// loaded slowly, and products take place while vectors are busy with the next ones.

#pragma once
#include "packed_rows.h"
#include "tiles.h"

namespace [[gnu::visibility("hidden")]] smart {

typedef Vector<uint16_t, QUANT_BLOCK> vw;  // of a row of a tile

constexpr int TILE_QUANTS = TILE * QUANT_BLOCK;  // of a block of a strip
constexpr int WIDENED = 4 * QUANT_BLOCK;         // k that are widened, and then multiplied, at once

// k within a block of word w: where they become floats, even and odd words are those of a vector.
template <int F>
constexpr int k_of_word(int w) {
    return F == Q6_K ? w % 2 * VW + w / 2 : w;
}

// A block of a strip on its way to a tile.
template <int F>
struct TileBlock {
    static constexpr Format format = FORMATS[F];
    // Words of Q6_K are 128 + q in bf16, which is exact in any order, as in quants.h.
    static constexpr int MAGIC = 0x4300, MAGIC_ZERO = 128 + 32;
    alignas(64) float scale[2][TILE], least[2][TILE];
    const uint8_t* quants;

    __attribute__((always_inline)) TileBlock(const uint8_t* at, const vf (&shared)[2])
        : quants(at + format.scales() * VW) {
        if constexpr (F == BF16_ROWS) return;
        const RowScales rows = row_scales<F>(at, shared);
        for (int group = 0; group < QUANT_BLOCK / format.group; group++) {
            storeu(scale[group], rows.scale[group]);
            if constexpr (F == Q6_K) storeu(least[group], rows.scale[group] * -float(MAGIC_ZERO));
        }
        if constexpr (format.has_least) storeu(least[0], rows.least[0]);
        // Else GCC takes lanes out of registers, by the one unit that lookups need.
        asm("" : "+m"(scale), "+m"(least));
    }

    // Rows `row` to `row` + STEP.
    static constexpr int STEP = format.bits < 8 ? 4 : 1;
    template <int row>
    __attribute__((always_inline)) void put_rows(bf16* to) const {
        if constexpr (format.bits == 16) {
            memcpy(to, quants + row * sizeof(vw), sizeof(vw));
        } else if constexpr (format.bits == 8) {
            const uint8_t* bytes = quants + row * QUANT_BLOCK;
            storeu(to, two_to_bf16(scaled<row>(bytes_to_float<int8_t>(bytes)),
                                   scaled<row>(bytes_to_float<int8_t>(bytes + VW))));
        } else {
            vw low = loadu<vw>(quants + row / 4 * sizeof(vw));
            keep_in_register(low);
            if constexpr (format.bits == 4) {
                put_two<row>(low & 15, low >> 4 & 15, to);
                put_two<row + 2>(low >> 8 & 15, low >> 12, to + 2 * QUANT_BLOCK);
            } else {
                put_one<row>(low & 15, to);
                put_one<row + 1>(low >> 4 & 15, to + QUANT_BLOCK);
                put_one<row + 2>(low >> 8 & 15, to + 2 * QUANT_BLOCK);
                put_one<row + 3>(low >> 12, to + 3 * QUANT_BLOCK);
            }
        }
    }

private:
    template <int row>
    __attribute__((always_inline)) vf scaled(const vf& v, int group = 0) const {
        const vf by = (vf)broadcast4(&scale[group][row]);
        if constexpr (format.has_least || F == Q6_K)
            return fused(v, by, (vf)broadcast4(&least[group][row]));
        return v * by;
    }

    // All that 16 quants of a row can be.
    template <int row>
    __attribute__((always_inline)) vf levels(int first) const {
        return scaled<row>(loadu<vf>(FLOAT_LEVELS<F>.of + first));
    }

    // Two rows of four bits: what they can be lies in one table.
    template <int row>
    __attribute__((always_inline)) void put_two(const vw& first, const vw& second, bf16* to) const {
        const vu table = weights_to_bf16<F>(levels<row>(0), levels<row + 1>(0));
        storeu(to, lookup_words(table, (vu)first));
        storeu(to + QUANT_BLOCK, lookup_words(table, (vu)(second | 16)));
    }

    // A row of five or six bits.
    template <int row>
    __attribute__((always_inline)) void put_one(const vw& nibbles, bf16* to) const {
        if constexpr (format.bits == 5) {
            const vu table = two_to_bf16(levels<row>(0), levels<row>(VW));
            storeu(to, lookup_words(table, (vu)(nibbles | (high<row>() & 0x10))));
        } else {
            const vu words = (vu)(nibbles | (high<row>() & 0x30) | MAGIC);
            storeu(to, two_to_bf16(scaled<row>((vf)(words << 16), 0),
                                   scaled<row>((vf)(words & 0xffff0000u), 1)));
        }
    }

    // A row's bits above its nibbles, in their place; others beside them are anything.
    template <int row>
    __attribute__((always_inline)) vw high() const {
        constexpr int BITS = format.bits - 4, ROWS = 16 / BITS, from = row % ROWS * BITS;
        const vw plane = loadu<vw>(quants + (4 + row / ROWS) * sizeof(vw));
        return to_bit_four<from>(plane);
    }
};

// Widens `depth` of k of a strip to tiles one after another; all of it lies in one super-block.
// `beside` is called after each of them, with its number.
template <int F, class Beside>
__attribute__((noinline)) static void widen_tiles(StripReader<F> strip, int64_t depth, bf16* to,
                                                  const Beside& beside) {
    for (int64_t i = 0; i < depth; i += QUANT_BLOCK, to += TILE_QUANTS) {
        const TileBlock<F> block(strip.template step<true>(), strip.shared);
        each<TileBlock<F>::STEP>(
            [&](auto row) __attribute__((always_inline)) {
                block.template put_rows<row>(to + row * QUANT_BLOCK);
            },
            std::make_integer_sequence<int, TILE / TileBlock<F>::STEP>());
        beside(int(i / QUANT_BLOCK));
    }
}

// Row `row` of a strip, [k].
template <class Out>
static void unpack_tiles(const Strip& strip, int64_t k, int row, Out* out) {
    alignas(64) bf16 tile[TILE_QUANTS];
    for (int64_t first = 0; first < k; first += QUANT_BLOCK) {
        with_format(strip.format, [&](auto format) {
            widen_tiles<format>({strip.data, first}, QUANT_BLOCK, tile, [](int) {});
        });
        for (int i = 0; i < QUANT_BLOCK; i++) out[first + i] = to_f32(tile[row * QUANT_BLOCK + i]);
    }
}

// Sums of a panel's halves for a group of inputs: [rows of weights, rows of inputs].
struct TileSums {
    alignas(64) float of[2][TILE * TILE];
};

// Products of a panel with the inputs of a group, or of two (BOTH). Tiles 0 and 1 are the sums of
// the panel's halves for the first one, 2 and 3 those for the second one.
template <class X, bool BOTH>
struct TileProducts {
    const PackedRows<X>& x;
    int group;

    void shape() const {
        TileShapes shapes;
        shapes.set({0, 1, 6}, TILE, 4 * x.columns(group));
        shapes.set({2, 3, 7}, TILE, BOTH ? 4 * x.columns(group + 1) : 4);
        shapes.set({4, 5}, TILE, TILE_WIDTH);
        tile_configure(shapes);
    }

    // A tile of half HALF at k = i; the inputs of half 0 stay in their tiles for half 1.
    template <int HALF>
    __attribute__((always_inline)) void add(const bf16* tile, int64_t i) const {
        tile_load<4 + HALF>(tile, TILE_WIDTH);
        if constexpr (HALF == 0) tile_load<6>(x.at(group, i), 4 * x.columns(group));
        tile_dot_bf16<HALF, 4 + HALF, 6>();
        if constexpr (BOTH) {
            if constexpr (HALF == 0) tile_load<7>(x.at(group + 1, i), 4 * x.columns(group + 1));
            tile_dot_bf16<2 + HALF, 4 + HALF, 7>();
        }
    }

    // The tiles of both halves, which share the inputs.
    void add_both(const bf16* low, const bf16* high, int64_t i) const {
        tile_load<6>(x.at(group, i), 4 * x.columns(group));
        tile_load<4>(low, TILE_WIDTH);
        tile_dot_bf16<0, 4, 6>();
        tile_load<5>(high, TILE_WIDTH);
        tile_dot_bf16<1, 5, 6>();
        if constexpr (BOTH) {
            tile_load<7>(x.at(group + 1, i), 4 * x.columns(group + 1));
            tile_dot_bf16<2, 4, 7>();
            tile_dot_bf16<3, 5, 7>();
        }
    }

    void load(const TileSums* sums) const {
        tile_load<0>(sums[group].of[0], 4 * TILE);
        tile_load<1>(sums[group].of[1], 4 * TILE);
        if constexpr (BOTH) {
            tile_load<2>(sums[group + 1].of[0], 4 * TILE);
            tile_load<3>(sums[group + 1].of[1], 4 * TILE);
        }
    }

    void store(TileSums* sums) const {
        tile_store<0>(sums[group].of[0], 4 * TILE);
        tile_store<1>(sums[group].of[1], 4 * TILE);
        if constexpr (BOTH) {
            tile_store<2>(sums[group + 1].of[0], 4 * TILE);
            tile_store<3>(sums[group + 1].of[1], 4 * TILE);
        }
    }
};

// A chunk of a panel, widened: blocks of each half.
struct alignas(64) TileChunk {
    bf16 half[2][WIDENED * TILE];
    int64_t first;
    int blocks = 0;

    // then: the strips that come after. beside: called with the half and the number of a block
    // after each of them.
    template <class Beside>
    void widen(const Strip* strips, const Strip* then, int64_t from, int64_t k,
               const Beside& beside) {
        const int64_t depth = std::min<int64_t>(WIDENED, k - from);
        first = from;
        blocks = int(depth / QUANT_BLOCK);
        if (!blocks) return;
        widen_half<0>(strips, then, k, depth, beside);
        widen_half<1>(strips, then, k, depth, beside);
    }

    // Adds the products of a block. turn: 0 for the first one of half 0, 1 for that of half 1, and
    // so on: a product waits for the one before it in the same sums as long as a block is widened.
    template <class X, bool BOTH>
    __attribute__((always_inline)) void multiply(const TileProducts<X, BOTH>& to, int turn) const {
        const int b = turn / 2;
        if (turn % 2)
            to.template add<1>(half[1] + b * TILE_QUANTS, first + b * QUANT_BLOCK);
        else
            to.template add<0>(half[0] + b * TILE_QUANTS, first + b * QUANT_BLOCK);
    }

    template <class X, bool BOTH>
    void multiply_from(const TileProducts<X, BOTH>& to, int b) const {
        for (; b < blocks; b++)
            to.add_both(half[0] + b * TILE_QUANTS, half[1] + b * TILE_QUANTS,
                        first + b * QUANT_BLOCK);
    }

private:
    template <int HALF, class Beside>
    void widen_half(const Strip* strips, const Strip* then, int64_t k, int64_t depth,
                    const Beside& beside) {
        const auto after = [&](int b) __attribute__((always_inline)) {
            beside(std::integral_constant<int, HALF>(), b);
        };
        with_format(strips[HALF].format, [&](auto format) {
            const StripReader<format> strip(strips[HALF].data, first, k, then[HALF].data);
            widen_tiles<format>(strip, depth, half[HALF], after);
        });
    }
};

// The sums of up to 32 rows: they stay in tiles, and a chunk is multiplied while the next one is
// widened.
template <class X, bool BOTH>
static void tile_panel(const TileProducts<X, BOTH>& products, const Strip* strips,
                       const Strip* then, TileChunk* chunks, TileSums* sums) {
    clear_sums();
    chunks[1].blocks = 0;
    for (int64_t i = 0, number = 0; i < products.x.k; i += WIDENED, number++) {
        TileChunk &next = chunks[number % 2], &last = chunks[(number + 1) % 2];
        const int left = last.blocks;
        const auto beside = [&](auto half, int b) __attribute__((always_inline)) {
            if (left) last.multiply(products, half * next.blocks + b);
        };
        next.widen(strips, then, i, products.x.k, beside);
        if (next.blocks < left) last.multiply_from(products, next.blocks);
        if (i + WIDENED >= products.x.k) next.multiply_from(products, 0);
    }
    products.store(sums);
}

// The same of any number of rows: sums stay in memory, and two chunks are widened for all of them.
template <class X>
static void tile_panel_of_many(const PackedRows<X>& x, const Strip* strips, const Strip* then,
                               TileChunk* chunks, TileSums* sums) {
    const auto nothing = [](int, int) {};
    int shaped = 0;  // for so many rows
    const auto pass = [&](const auto& products, bool begin) {
        const int left = std::min(x.rows - x.first(products.group), 2 * x.columns(0));
        if (left != shaped) products.shape();
        shaped = left;
        if (begin)
            clear_sums();
        else
            products.load(sums);
        chunks[0].multiply_from(products, 0);
        chunks[1].multiply_from(products, 0);
        products.store(sums);
    };
    for (int64_t i = 0; i < x.k; i += 2 * WIDENED) {
        chunks[0].widen(strips, then, i, x.k, nothing);
        chunks[1].widen(strips, then, std::min(i + WIDENED, x.k), x.k, nothing);
        for (int group = 0; group < x.groups; group += 2)
            if (group + 1 < x.groups)
                pass(TileProducts<X, true>{x, group}, !i);
            else
                pass(TileProducts<X, false>{x, group}, !i);
    }
}

// `gemm` of quants by tiles.
template <class Epilogue>
static void tile_quant_gemm(const float* rows, int count, const Strip* strips, int64_t k,
                            Panels& panels, Epilogue&& done) {
    static thread_local TileChunk chunks[2];
    static thread_local std::vector<TileSums> sums;
    const PackedRows<Wide> x(rows, count, k, TILE, panels.alone);
    if (int(sums.size()) < x.groups) sums.resize(x.groups);
    const TileProducts<Wide, false> one{x, 0};
    const TileProducts<Wide, true> two{x, 0};
    if (count <= TILE)
        one.shape();
    else if (count <= 2 * TILE)
        two.shape();
    for (int64_t p; (p = panels.next()) < panels.count;) {
        const Strip *now = strips + 2 * p, *then = p + 1 < panels.count ? now + 2 : now;
        if (count <= TILE)
            tile_panel(one, now, then, chunks, sums.data());
        else if (count <= 2 * TILE)
            tile_panel(two, now, then, chunks, sums.data());
        else
            tile_panel_of_many(x, now, then, chunks, sums.data());
        for (int group = 0; group < x.groups; group++) {
            vf low[VW], high[VW];
            memcpy(low, sums[group].of[0], sizeof low);
            memcpy(high, sums[group].of[1], sizeof high);
            transpose(low);
            transpose(high);
            for (int r = 0; r < x.columns(group); r++)
                done(x.first(group) + r, p * PANEL, low[r], high[r]);
        }
    }
    tile_release();
}

}  // namespace smart
