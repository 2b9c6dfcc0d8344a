// Linear layers by the tiles of AMX: 16 rows of inputs by 32 columns of a panel, 64 bytes deep, in
// two instructions. What is computed by tiles is so for any number of rows, so that results do not
// depend on how many there are.

#pragma once
#include "panels.h"

namespace [[gnu::visibility("hidden")]] smart {

constexpr int TILE_PASS = 2 * TILE;                // rows that share a pass over a panel of weights
constexpr int TILE_STEP_BYTES = TILE * 4 * PANEL;  // of a panel, for TILE_WIDTH bytes of an input
// Bytes of weights ahead that are prefetched into the second cache, and into the first.
constexpr int TILE_PREFETCH_L2 = 8192, TILE_PREFETCH_L1 = 2048;

template <class W>
static bool fits_tiles(int64_t k) {
    return sizeof(W) < 4 && k * sizeof(Input<W>) % TILE_WIDTH == 0;
}

// Tiles 4 and 5 hold weights. The others hold sums or inputs: 0, 1 and 6 of the first rows, 2, 3
// and 7 of those after them.
static inline void shape_linear_tiles(int first, int second) {
    TileShapes shapes;
    shapes.set({0, 1, 6}, first, TILE_WIDTH);
    shapes.set({2, 3, 7}, second, TILE_WIDTH);
    shapes.set({4, 5}, TILE, TILE_WIDTH);
    tile_configure(shapes);
}

template <class W, int SUM, int X, int W_TILE>
static inline void tile_multiply() {
    if constexpr (sizeof(W) == 2)
        tile_dot_bf16<SUM, X, W_TILE>();
    else
        tile_dot_u8s8<SUM, X, W_TILE>();
}

static inline void clear_sums() {
    tile_zero<0>();
    tile_zero<1>();
    tile_zero<2>();
    tile_zero<3>();
}

// sums [rows, PANEL] of up to 32 rows (BOTH: of more than 16). depth: bytes of a row; ld: bytes
// between rows.
template <class W, bool BOTH>
static inline void tile_pass(const char* x, int64_t ld, const char* w, int64_t depth,
                             Prefetch prefetch, float* sums) {
    clear_sums();
    for (int64_t i = 0; i < depth;
         i += TILE_WIDTH, w += TILE_STEP_BYTES, prefetch.at += prefetch.stride) {
        for (int64_t b = 0; b < prefetch.stride;
             b += 64) {  // in turn: in two runs they gain half as much
            __builtin_prefetch(prefetch.at + b, 0, INTO_L2);
            __builtin_prefetch(w + TILE_PREFETCH_L1 + b, 0, INTO_CACHES);
        }
        tile_load<6>(x + i, ld);
        tile_load<4>(w, 4 * PANEL);
        tile_multiply<W, 0, 6, 4>();
        tile_load<5>(w + TILE_WIDTH, 4 * PANEL);
        tile_multiply<W, 1, 6, 5>();
        if constexpr (BOTH) {
            tile_load<7>(x + TILE * ld + i, ld);
            tile_multiply<W, 2, 7, 4>();
            tile_multiply<W, 3, 7, 5>();
        }
    }
    tile_store<0>(sums, 4 * PANEL);
    tile_store<1>(sums + TILE, 4 * PANEL);
    if constexpr (BOTH) {
        tile_store<2>(sums + TILE * PANEL, 4 * PANEL);
        tile_store<3>(sums + TILE * PANEL + TILE, 4 * PANEL);
    }
}

// All rows over a panel whose rows have `depth` bytes, 32 at a time; `done(row, low half, high
// half)` receives each result. Each pass prefetches its share of what comes next. shaped: rows that
// the tiles are configured for, or 0; the caller releases them.
template <class W, class Epilogue>
static void tile_rows(const Input<W>* x, int64_t ld, int rows, const char* panel, int64_t depth,
                      Prefetch prefetch, int& shaped, Epilogue&& done) {
    alignas(64) float sums[TILE_PASS * PANEL];
    for (int row = 0; row < rows; row += TILE_PASS) {
        const char* from = (const char*)(x + row * ld);
        const int64_t ld_bytes = ld * sizeof(Input<W>);
        const int count = std::min(TILE_PASS, rows - row);
        if (count != shaped) {
            shape_linear_tiles(std::min(count, TILE), std::max(count - TILE, 1));
            shaped = count;
        }
        if (count > TILE)
            tile_pass<W, true>(from, ld_bytes, panel, depth, prefetch, sums);
        else
            tile_pass<W, false>(from, ld_bytes, panel, depth, prefetch, sums);
        prefetch.at += depth / TILE_WIDTH * prefetch.stride;
        for (int r = 0; r < count; r++)
            done(row + r, loadu<vf>(sums + r * PANEL), loadu<vf>(sums + r * PANEL + VW));
    }
}

// `gemm` by tiles.
template <class W, class Epilogue>
static void tile_gemm(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t k,
                      Panels& panels, Epilogue&& done) {
    const int64_t depth = k * sizeof(Input<W>), panel_bytes = k * PANEL * sizeof(W);
    const int passes = (rows + TILE_PASS - 1) / TILE_PASS;
    const int64_t stride = (TILE_STEP_BYTES / passes + 63) / 64 * 64;
    int shaped = 0;
    for (int64_t p; (p = panels.next()) < panels.count;) {
        const char* panel = (const char*)w + p * panel_bytes;
        const Prefetch ahead = {panel + (passes > 1 ? panel_bytes : TILE_PREFETCH_L2), stride};
        tile_rows<W>(x, ld, rows, panel, depth, ahead, shaped,
                     [&](int row, vf low, vf high) { done(row, p * PANEL, low, high); });
    }
    if (shaped) tile_release();
}

}  // namespace smart
