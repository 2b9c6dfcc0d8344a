// Linear layers by the tiles of AMX: 16 rows of inputs by 32 columns of a panel, 64 bytes deep, in two instructions. What is
// computed by tiles is so for any number of rows, so that results do not depend on how many there are.

#pragma once
#include "vectors.h"
#include <initializer_list>

constexpr int TILE = 16, PASS = 2 * TILE;  // rows of a tile, and of those that share a pass over a panel of weights
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

constexpr bool TILES = true;
// Linux must be asked for the registers: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
static bool enable_tiles() { return !syscall(SYS_arch_prctl, 0x1023, 18); }
constexpr int TILE_DEPTH = 64, TILE_BYTES = TILE * 4 * PANEL;  // bytes of an input, and of a panel, for one step
constexpr int LATER_TILES = 8192, NEXT_TILES = 2048;  // bytes of weights ahead that are prefetched into the second cache and into the first

template <class W> static bool tiled(int64_t k) {
    return TILES && sizeof(W) < 4 && k * sizeof(Input<W>) % TILE_DEPTH == 0;
}

struct TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row
    uint8_t rows[16] = {};
    void set(std::initializer_list<int> tiles, int rows_, int bytes_) { for (int t : tiles) rows[t] = rows_, bytes[t] = bytes_; }
    void load() const { _tile_loadconfig(this); }
};

// Tiles 4 and 5 hold weights. The others hold sums or inputs: 0, 1 and 6 of the first rows, 2, 3 and 7 of those after them.
static void shape_tiles(int first, int second) {
    TileShapes shapes;
    shapes.set({0, 1, 6}, first, 64);
    shapes.set({2, 3, 7}, second, 64);
    shapes.set({4, 5}, TILE, 64);
    shapes.load();
}

// The intrinsics that load tiles do not tell the compiler that they read memory.
static inline void written() { asm volatile("" ::: "memory"); }

// sums [rows, PANEL] of up to 32 rows (`both`: of more than 16). ld: bytes between rows.
template <class W, bool both>
static inline void tile_pass(const char* x, int64_t ld, const char* w, int64_t depth, Ahead ahead, float* sums) {
#define MULTIPLY(SUM, X, W_) if constexpr (sizeof(W) == 2) _tile_dpbf16ps(SUM, X, W_); else _tile_dpbusd(SUM, X, W_)
    written();
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t i = 0; i < depth; i += TILE_DEPTH, w += TILE_BYTES, ahead.at += ahead.stride) {
        for (int64_t b = 0; b < ahead.stride; b += 64) {  // in turn: in two runs they gain half as much
            __builtin_prefetch(ahead.at + b, 0, INTO_L2);
            __builtin_prefetch(w + NEXT_TILES + b, 0, INTO_CACHES);
        }
        _tile_loadd(6, x + i, ld);
        _tile_loadd(4, w, 4 * PANEL);
        MULTIPLY(0, 6, 4);
        _tile_loadd(5, w + 64, 4 * PANEL);
        MULTIPLY(1, 6, 5);
        if (!both) continue;
        _tile_loadd(7, x + TILE * ld + i, ld);
        MULTIPLY(2, 7, 4);
        MULTIPLY(3, 7, 5);
    }
#undef MULTIPLY
    _tile_stored(0, sums, 4 * PANEL);
    _tile_stored(1, sums + TILE, 4 * PANEL);
    if (!both) return;
    _tile_stored(2, sums + TILE * PANEL, 4 * PANEL);
    _tile_stored(3, sums + TILE * PANEL + TILE, 4 * PANEL);
}

// `gemm` by tiles, 32 rows at a time; each pass over a panel prefetches its share of the next.
template <class W, class Epilogue>
static void tile_gemm(const Input<W>* x, int64_t ld, int rows, const W* w, int64_t n, int64_t k, Epilogue&& done) {
    const Panels mine(n);
    int64_t depth = k * sizeof(Input<W>), size = k * PANEL * sizeof(W);
    int passes = (rows + PASS - 1) / PASS, shaped = 0;
    int64_t stride = (TILE_BYTES / passes + 63) / 64 * 64;
    alignas(64) float sums[PASS * PANEL];
    for (int64_t p = mine.first; p < mine.last; p++) {
        const char* panel = (const char*)w + p * size;
        Ahead ahead = {panel + (passes > 1 ? size : LATER_TILES), stride};
        for (int row = 0; row < rows; row += PASS, ahead.at += depth / TILE_DEPTH * stride) {
            int count = std::min(PASS, rows - row);
            const char* from = (const char*)(x + row * ld);
            if (count != shaped) shape_tiles(std::min(shaped = count, TILE), std::max(count - TILE, 1));
            if (count > TILE) tile_pass<W, true>(from, ld * sizeof(*x), panel, depth, ahead, sums);
            else tile_pass<W, false>(from, ld * sizeof(*x), panel, depth, ahead, sums);
            for (int r = 0; r < count; r++) done(row + r, p * PANEL, loadu<vf>(sums + r * PANEL), loadu<vf>(sums + r * PANEL + VW));
        }
    }
    if (shaped) _tile_release();
}
#else
constexpr bool TILES = false;
static bool enable_tiles() { return true; }
template <class W> static bool tiled(int64_t) { return false; }
template <class W, class Epilogue>
static void tile_gemm(const Input<W>*, int64_t, int, const W*, int64_t, int64_t, Epilogue&&) {}
#endif
