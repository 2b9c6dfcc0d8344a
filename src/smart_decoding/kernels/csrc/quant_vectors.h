// Linear layers with quants by vectors, where there are no tiles: each quant is widened once for
// all rows.
//
// A sum waits for the one before it longer than widening takes. So the fewest rows read both strips
// of a panel at once; some more, and panels of two formats, one after the other. They widen in
// registers only. Many rows go over what was widened to memory, in the first cache, while what
// comes next is widened: the two need different units of the CPU, and one after the other would
// take the sum of their times.

#pragma once
#include "packed_rows.h"

namespace [[gnu::visibility("hidden")]] smart {

// Rows whose sums fit in registers beside what widening needs: by both strips of a panel at once,
// by one, and those of a group that goes over chunks.
constexpr int ROWS_OF_TWO = VW == 16 ? 6 : 4, ROWS_OF_ONE = VW == 16 ? 12 : 8;
constexpr int GROUP_ROWS = VW == 16 ? 8 : 5;
static_assert(GROUP_ROWS <= PackedRows<Wide>::MOST && ROWS_OF_ONE <= PackedRows<Wide>::MOST);

// A strip at two of k, as it is multiplied.
struct WidePair {
    vu pairs;      // of bf16, or
    vf even, odd;  // floats

    template <int f, int F>
    __attribute__((always_inline)) static WidePair of(const Block<F>& block) {
        const vf even = block.template vector<f>(), odd = block.template vector<f + 1>();
        if constexpr (HAS_BF16_PAIRS) return {weights_to_bf16<F>(even, odd), vf{}, vf{}};
        if constexpr (FORMATS[F].has_powers) return {vu{}, even, odd};
        return {vu{}, rounded(even), rounded(odd)};
    }

    __attribute__((always_inline)) static WidePair load(const Wide* from) {
        if constexpr (HAS_BF16_PAIRS) return {loadu<vu>(from), vf{}, vf{}};
        return {vu{}, loadu<vf>(from), loadu<vf>(from + PANEL)};
    }

    __attribute__((always_inline)) void store(Wide* to) const {
        if constexpr (HAS_BF16_PAIRS) return storeu(to, pairs);
        storeu(to, even);
        storeu(to + PANEL, odd);
    }
};

// Calls `run` with 0 to R - 1 as constants: where a loop counts, GCC 12 keeps sums in memory.
template <int R, class Run>
__attribute__((always_inline)) static inline void for_rows(Run&& run) {
    each<1>(run, std::make_integer_sequence<int, R>());
}

// Adds the products of R rows at two of k with H strips there.
template <int R, int H>
__attribute__((always_inline)) static inline void add_products(const Wide* x,
                                                               const WidePair (&strips)[H],
                                                               vf (&sums)[R][H]) {
    for_rows<R>([&](auto r) __attribute__((always_inline)) {
        if constexpr (HAS_BF16_PAIRS) {
            const vu pair = broadcast4(x + 2 * r);
            for (int h = 0; h < H; h++) sums[r][h] = dot_bf16(sums[r][h], strips[h].pairs, pair);
        } else {
            const vf even = every_lane(x[r]), odd = every_lane(x[R + r]);
            for (int h = 0; h < H; h++) sums[r][h] = fused(strips[h].even, even, sums[r][h]);
            for (int h = 0; h < H; h++) sums[r][h] = fused(strips[h].odd, odd, sums[r][h]);
        }
    });
}

// Sums in memory are [rows, PANEL].
template <int R>
__attribute__((always_inline)) static inline void load_sums(const float* from, vf (&sums)[R][2]) {
    for_rows<R>([&](auto r) __attribute__((always_inline)) {
        for (int h = 0; h < 2; h++) sums[r][h] = loadu<vf>(from + r * PANEL + h * VW);
    });
}

template <int R, int H>
__attribute__((always_inline)) static inline void store_sums(const vf (&sums)[R][H], float* to) {
    for_rows<R>([&](auto r) __attribute__((always_inline)) {
        for (int h = 0; h < H; h++) storeu(to + r * PANEL + h * VW, sums[r][h]);
    });
}

// ------------------------------------------------------------------------------------ in registers

// The sums of R rows by a panel whose strips have one format. next: the strips that come after.
template <int F, int R>
__attribute__((noinline)) static void multiply_two(const Wide* x, int64_t k, const Strip* strips,
                                                   const Strip* next, float* out) {
    StripReader<F> low(strips[0].data, 0, k, next[0].data);
    StripReader<F> high(strips[1].data, 0, k, next[1].data);
    vf sums[R][2] = {};
    for (int64_t i = 0; i < k; i += QUANT_BLOCK) {
        low.enter(i);
        high.enter(i);
        const Block<F> left = low.next(), right = high.next();
        for_block<2>([&](auto f) __attribute__((always_inline)) {
            add_products<R, 2>(x, {WidePair::of<f>(left), WidePair::of<f>(right)}, sums);
            x += 2 * R;
        });
    }
    store_sums<R, 2>(sums, out);
}

// The same by one strip.
template <int F, int R>
__attribute__((noinline)) static void multiply_one(const Wide* x, int64_t k, const uint8_t* data,
                                                   float* out) {
    StripReader<F> strip(data, 0);
    vf sums[R][1] = {};
    for (int64_t i = 0; i < k; i += QUANT_BLOCK) {
        strip.enter(i);
        const Block<F> block = strip.next();
        for_block<2>([&](auto f) __attribute__((always_inline)) {
            add_products<R, 1>(x, {WidePair::of<f>(block)}, sums);
            x += 2 * R;
        });
    }
    store_sums<R, 1>(sums, out);
}

// The same for any formats and few rows.
static inline void multiply_few(const PackedRows<Wide>& x, const Strip* strips, const Strip* next,
                                float* sums) {
    const Wide* rows = x.at(0, 0);
    if (x.rows <= ROWS_OF_TWO && strips[0].format == strips[1].format)
        return with_format(strips[0].format, [&](auto format) {
            with_count<ROWS_OF_TWO>(
                x.rows, [&](auto r) { multiply_two<format, r>(rows, x.k, strips, next, sums); });
        });
    for (int half = 0; half < 2; half++)
        with_format(strips[half].format, [&](auto format) {
            with_count<ROWS_OF_ONE>(x.rows, [&](auto r) {
                multiply_one<format, r>(rows, x.k, strips[half].data, sums + half * VW);
            });
        });
}

// --------------------------------------------------------------------------------------- in chunks

// Where the second strip's part of what is widened begins; rows of k lie PANEL apart.
constexpr int HALF_PANEL = HAS_BF16_PAIRS ? PANEL : VW;

// Widens `depth` of k of a strip; all of it lies in one super-block.
template <int F>
static void widen_strip(StripReader<F> strip, int64_t depth, Wide* __restrict to) {
    for (int64_t i = 0; i < depth; i += QUANT_BLOCK, to += QUANT_BLOCK * PANEL) {
        const Block<F> block = strip.next();
        for_block<2>([&](auto f) __attribute__((always_inline)) {
            WidePair::of<f>(block).store(to + f * PANEL);
        });
    }
}

// Some k of a panel, widened; two of these stay in the first cache.
struct WideChunk {
    static constexpr int MOST = std::min<int>(SUPER_BLOCK, 8192 / (PANEL * sizeof(Wide)));
    static_assert(SUPER_BLOCK % MOST == 0 && MOST % QUANT_BLOCK == 0);
    alignas(64) Wide values[MOST * PANEL];
    const Strip* strips;
    int64_t first;
    int depth;  // 0: behind the last panel

    Wide* half(int which) { return values + which * HALF_PANEL; }

    void widen_alone() {
        for (int h = 0; h < 2; h++)
            with_format(strips[h].format, [&](auto format) {
                widen_strip<format>({strips[h].data, first}, depth, half(h));
            });
    }
};

// Adds the products of a group of R rows with `depth` of k.
template <int R>
__attribute__((noinline)) static void multiply_chunk(const Wide* x, const Wide* values, int depth,
                                                     float* kept) {
    vf sums[R][2];
    load_sums<R>(kept, sums);
    for (int i = 0; i < depth; i += 2, x += 2 * R, values += 2 * PANEL)
        add_products<R, 2>(x, {WidePair::load(values), WidePair::load(values + HALF_PANEL)}, sums);
    store_sums<R, 2>(sums, kept);
}

// The same with half as many of k as are widened beside it, of a strip of the next chunk. `to` is
// said to be no other's memory: else quants that two vectors share would be looked up twice.
template <int F, int R>
__attribute__((noinline)) static void multiply_beside(const Wide* x, const Wide* values,
                                                      StripReader<F> strip, int widened,
                                                      Wide* __restrict to, float* kept) {
    vf sums[R][2];
    load_sums<R>(kept, sums);
    for (int i = 0; i < widened; i += QUANT_BLOCK, to += QUANT_BLOCK * PANEL) {
        const Block<F> block = strip.next();
        for_block<4>([&](auto f) __attribute__((always_inline)) {
            WidePair::of<f>(block).store(to + f * PANEL);
            add_products<R, 2>(x, {WidePair::load(values), WidePair::load(values + HALF_PANEL)},
                               sums);
            WidePair::of<f + 2>(block).store(to + (f + 2) * PANEL);
            x += 2 * R;
            values += 2 * PANEL;
        });
    }
    store_sums<R, 2>(sums, kept);
}

// The sums of a thread's panels, chunk by chunk.
struct ChunkedPanels {
    const PackedRows<Wide>& x;
    const Strip* strips;  // of the first panel
    Panels& panels;
    float* sums;  // [rows, PANEL] of the panel in work

    // done: called after each panel, with its number.
    template <class Done>
    void run(WideChunk (&chunks)[2], Done&& done) const {
        int64_t p = panels.next();
        if (p == panels.count) return;
        go_to(chunks[0], p, 0);
        chunks[0].widen_alone();
        for (int number = 0;; number++) {
            const WideChunk& now = chunks[number % 2];
            WideChunk& next = chunks[(number + 1) % 2];
            const bool ends = now.first + now.depth == x.k;
            if (!now.first) memset(sums, 0, x.rows * PANEL * sizeof(float));
            const int64_t then = ends ? panels.next() : p;
            go_to(next, then, ends ? 0 : now.first + now.depth);
            multiply(now, next);
            if (!ends) continue;
            done(p);
            p = then;
            if (p == panels.count) return;
        }
    }

private:
    void go_to(WideChunk& chunk, int64_t p, int64_t first) const {
        chunk.strips = strips + 2 * p;
        chunk.first = first;
        chunk.depth = p == panels.count ? 0 : int(std::min<int64_t>(WideChunk::MOST, x.k - first));
    }

    // All groups go over a chunk, the first one while the next chunk is widened.
    void multiply(const WideChunk& now, WideChunk& next) const {
        const bool fits = next.depth <= now.depth;
        if (!fits) next.widen_alone();
        const int beside = fits ? next.depth : 0;
        for (int half = 0; half < 2 && beside; half++) widen_beside(now, next, half);
        multiply_group(now, 0, beside);
        for (int group = 1; group < x.groups; group++) multiply_group(now, group, 0);
    }

    void widen_beside(const WideChunk& now, WideChunk& next, int half) const {
        const Strip *from = next.strips + half, *end = strips + 2 * panels.count;
        const Strip* after = from + 2 < end ? from + 2 : from;
        const int first = half * next.depth / 2;
        with_format(from->format, [&](auto format) {
            const StripReader<format> strip(from->data, next.first, x.k, after->data);
            with_count<GROUP_ROWS>(x.columns(0), [&](auto r) {
                if constexpr (r > GROUP_ROWS / 2)  // as all first groups of several have
                    multiply_beside<format, r>(x.at(0, now.first + first),
                                               now.values + first * PANEL, strip, next.depth,
                                               next.half(half), sums);
            });
        });
    }

    // Adds the products of a group with a chunk from its k = `from` on.
    void multiply_group(const WideChunk& now, int group, int from) const {
        if (from == now.depth) return;
        with_count<GROUP_ROWS>(x.columns(group), [&](auto r) {
            multiply_chunk<r>(x.at(group, now.first + from), now.values + from * PANEL,
                              now.depth - from, sums + x.first(group) * PANEL);
        });
    }
};

// `gemm` of quants by vectors.
template <class Epilogue>
static void vector_quant_gemm(const float* rows, int count, const Strip* strips, int64_t k,
                              Panels& panels, Epilogue&& done) {
    static thread_local WideChunk chunks[2];
    static thread_local std::vector<float> kept;
    const bool few = count <= ROWS_OF_ONE;
    const PackedRows<Wide> x(rows, count, k, few ? ROWS_OF_ONE : GROUP_ROWS, panels.alone);
    if (int64_t(kept.size()) < int64_t(count) * PANEL) kept.resize(int64_t(count) * PANEL);
    float* sums = kept.data();
    const auto finish = [&](int64_t p) {
        for (int r = 0; r < count; r++)
            done(r, p * PANEL, loadu<vf>(sums + r * PANEL), loadu<vf>(sums + r * PANEL + VW));
    };
    if (!few) return ChunkedPanels{x, strips, panels, sums}.run(chunks, finish);
    for (int64_t p; (p = panels.next()) < panels.count;) {
        const Strip* now = strips + 2 * p;
        multiply_few(x, now, p + 1 < panels.count ? now + 2 : now, sums);
        finish(p);
    }
}

}  // namespace smart
