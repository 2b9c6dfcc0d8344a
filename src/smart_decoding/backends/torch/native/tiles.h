// Linear layers and attention by the tiles of AMX: 16 rows of inputs by 32 columns of a panel, 64 bytes deep, in two
// instructions. What is computed by tiles is so for any number of rows, so that results do not depend on how many there are.

#pragma once
#include "forward.h"
#include "vectors.h"

constexpr int TILE = 16, PASS = 2 * TILE;  // rows of a tile, and of those that share a pass over a panel of weights
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>

static const bool TILES = !syscall(SYS_arch_prctl, 0x1023, 18);  // Linux must be asked for the registers: ARCH_REQ_XCOMP_PERM
constexpr int TILE_DEPTH = 64, TILE_BYTES = TILE * 4 * PANEL;  // bytes of an input, and of a panel, for one step
constexpr int FAR = 8192, NEAR = 2048;  // bytes of weights ahead that are prefetched into the second cache and into the first

template <class W> static bool tiled(int64_t k) {
    return TILES && sizeof(W) < 4 && k * sizeof(Input<W>) % TILE_DEPTH == 0;
}

// Tiles 4 and 5 hold weights. The others hold sums or inputs: 0, 1 and 6 of the first rows, 2, 3 and 7 of those after them.
static void shape_tiles(int first, int second) {
    struct { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t bytes[16] = {}; uint8_t rows[16] = {}; } config;
    const int rows[8] = {first, first, second, second, TILE, TILE, first, second};
    for (int t = 0; t < 8; t++) config.bytes[t] = 64, config.rows[t] = rows[t];
    _tile_loadconfig(&config);
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
            __builtin_prefetch(w + NEAR + b, 0, INTO_CACHES);
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
        Ahead ahead = {panel + (passes > 1 ? size : FAR), stride};
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

template <class T, int HD> constexpr bool TILED_HEADS = sizeof(T) == 2 && HD % 32 == 0;

// Attention by tiles, for up to 16 queries at a time. Keys of a chunk lie in pairs of dimensions, values in pairs of positions.
template <int HD> struct alignas(64) TileQueries {
    static constexpr int PAGES = CHUNK / PAGE;
    bf16 k[PAGES][HD / 2][PAGE][2], v[CHUNK / 2][HD][2], weights[TILE][CHUNK], q[32][HD];
    float scores[TILE][CHUNK], acc[32][HD], best[32], sum[32];
    int valid[32];  // positions of the chunk that a query may see

    static __m512i interleave(__m512i halves) {
        const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                               20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return _mm512_permutexvar_epi16(order, halves);
    }
    // Lays out the first `count` positions of a page, and prefetches another. Those after them get no weight: they must be finite.
    void lay_out(int page, const bf16* keys, const bf16* values, const bf16* next_keys, const bf16* next_values, int count) {
        for (int d = 0; d < HD; d += 2) {
            __builtin_prefetch(next_keys + d * PAGE);
            __builtin_prefetch(next_values + d * PAGE);
            storeu(k[page][d / 2], interleave(loadu<__m512i>(keys + d * PAGE)));
        }
        bf16(*pairs)[HD][2] = v + page * PAGE / 2;
        if (count < PAGE) memset(pairs, 0, PAGE / 2 * sizeof *pairs);
        for (int j = 0; j < std::min(PAGE, count); j += 2)
            for (int c = 0; c < HD; c += 16) {
                __m256i even = loadu<__m256i>(values + j * HD + c), odd = {};
                if (j + 1 < count) odd = loadu<__m256i>(values + (j + 1) * HD + c);
                storeu(pairs[j / 2][c], interleave(_mm512_inserti64x4(_mm512_castsi256_si512(even), odd, 1)));
            }
    }
    // Puts one key, `stride` apart, and value at a position of the chunk.
    void put_one(int at, const bf16* key, const bf16* value) {
        for (int d = 0; d < HD; d++) k[at / PAGE][d / 2][at % PAGE][d % 2] = key[d * PAGE];
        for (int d = 0; d < HD; d++) v[at / 2][d][at % 2] = value[d];
    }

    // Softmax of query `i`, row `r` of the tiles, over the chunk's scores.
    void weigh(int i, int r, float scale) {
        pf lane, s[PAGES], top = pf{} - INFINITY, sums = {};
        for (int j = 0; j < PAGE; j++) lane[j] = j;
        for (int p = 0; p < PAGES; p++) {
            s[p] = lane + float(p * PAGE) < float(valid[i]) ? loadu<pf>(scores[r] + p * PAGE) * scale : pf{} - INFINITY;
            top = s[p] > top ? s[p] : top;
        }
        float now = std::max(best[i], _mm512_reduce_max_ps((__m512)top));
        for (int p = 0; p < PAGES; p++) {
            s[p] = vexp<pf, pi>(s[p] - now);
            sums += s[p];
            storeu(weights[r] + p * PAGE, _mm512_cvtneps_pbh((__m512)s[p]));
        }
        float rescale = 1;
        if (now != best[i]) {
            rescale = best[i] == -INFINITY ? 0.0f : std::exp(best[i] - now);
            for (int d = 0; d < HD; d += VW) storeu(acc[i] + d, loadu<vf>(acc[i] + d) * rescale);
        }
        sum[i] = sum[i] * rescale + _mm512_reduce_add_ps((__m512)sums);
        best[i] = now;
    }

    // Folds the chunk into the running softmax of queries [first, first + count).
    void fold(int first, int count, float scale) {
        written();
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (int d = 0; d < HD; d += 32) {
#define SCORE(P, KEYS) _tile_loadd(KEYS, k[P][d / 2], 4 * PAGE); _tile_dpbf16ps(P, 6, KEYS)
            _tile_loadd(6, q[first] + d, 2 * HD);
            SCORE(0, 4); SCORE(1, 5); SCORE(2, 4); SCORE(3, 5);
#undef SCORE
        }
        _tile_stored(0, scores[0], 4 * CHUNK);
        _tile_stored(1, scores[0] + PAGE, 4 * CHUNK);
        _tile_stored(2, scores[0] + 2 * PAGE, 4 * CHUNK);
        _tile_stored(3, scores[0] + 3 * PAGE, 4 * CHUNK);
        for (int r = 0; r < count; r++) weigh(first + r, r, scale);
        written();
        _tile_loadd(6, weights[0], 2 * CHUNK);
        _tile_loadd(7, weights[0] + 32, 2 * CHUNK);
        for (int c = 0; c < HD; c += 32) {
#define ADD(SUM, WEIGHTS, VALUES, POSITION, COLUMN) _tile_loadd(VALUES, v[POSITION / 2][COLUMN], 4 * HD); _tile_dpbf16ps(SUM, WEIGHTS, VALUES)
            _tile_loadd(0, acc[first] + c, 4 * HD);
            _tile_loadd(1, acc[first] + c + 16, 4 * HD);
            ADD(0, 6, 4, 0, c); ADD(1, 6, 5, 0, c + 16); ADD(0, 7, 4, 32, c); ADD(1, 7, 5, 32, c + 16);
#undef ADD
            _tile_stored(0, acc[first] + c, 4 * HD);
            _tile_stored(1, acc[first] + c + 16, 4 * HD);
        }
    }
};

// `attend` by tiles: where rows see the same positions in place they share them; a row of a tree sees copies of its own.
template <class T, int HD, class O>
static void attend_tiles(const Rows& in, const T* kc, const T* vc, const int32_t* table, int row, int count, int heads,
                         const float* q, int64_t ldq, int64_t column, O* out, int64_t ldo) {
    static thread_local TileQueries<HD> kept;
    TileQueries<HD>& t = kept;  // found once: looking a thread's own up takes a call
    const float scale = 1.0f / std::sqrt(float(HD));
    int longest = 0, shaped = 0;
    auto extras = [&](int r) { return in.extra_at[row + r + 1] - in.extra_at[row + r]; };
    auto in_place = [&](int r, int start) { return !extras(r) || in.direct[row + r] >= start + CHUNK; };
    auto lay_out = [&](int start, int end) {  // positions start .. end - 1 of the block table
        for (int p = 0; p < CHUNK / PAGE; p++) {
            int first = start + p * PAGE;
            int64_t page = table[std::min(first, std::max(end - 1, 0)) / PAGE] * HD * PAGE;
            int64_t next = table[std::min(first + CHUNK, longest - 1) / PAGE] * HD * PAGE;  // hardware does not see it coming
            t.lay_out(p, kc + page, vc + page, kc + next, vc + next, std::max(0, end - first));
        }
    };
    auto fold = [&](int first, int queries) {
        for (int i = first; i < first + queries; i += TILE) {
            int size = std::min(TILE, first + queries - i);
            if (size != shaped) shape_tiles(shaped = size, size);
            t.fold(i, size, scale);
        }
    };
    for (int r = 0; r < count; r++) {
        for (int h = 0; h < heads; h++) {
            int i = r * heads + h;
            const float* src = q + (row + r) * ldq + column + h * HD;
            for (int d = 0; d < HD; d += VW) put(t.q[i] + d, loadu<vf>(src + d));
            memset(t.acc[i], 0, sizeof t.acc[i]);
            t.best[i] = -INFINITY;
            t.sum[i] = 0;
        }
        longest = std::max(longest, in.direct[row + r] + extras(r));
    }
    for (int start = 0; start < longest; start += CHUNK) {
        int laid = -1;  // positions that `t` holds of the block table
        for (int r = 0, next; r < count; r = next) {
            next = r + 1;
            bool shared = in_place(r, start);
            if (shared) while (next < count && in_place(next, start)) next++;
            int end = 0, most = 0;
            for (int i = r; i < next; i++) {
                int direct = in.direct[row + i], valid = std::max(0, std::min(CHUNK, direct + extras(i) - start));
                end = std::max(end, std::min(direct, start + CHUNK));
                most = std::max(most, valid);
                for (int h = 0; h < heads; h++) t.valid[i * heads + h] = valid;
            }
            if (!most) continue;
            if (end != laid) lay_out(start, laid = end);
            for (int e = 0; !shared && e < extras(r); e++) {
                int at = in.direct[row + r] + e - start;
                if (at < 0 || at >= CHUNK) continue;
                int64_t slot = in.extra[in.extra_at[row + r] + e];
                t.put_one(at, kc + (slot / PAGE) * HD * PAGE + slot % PAGE, vc + slot * HD);
            }
            fold(r * heads, (next - r) * heads);
        }
    }
    _tile_release();
    for (int r = 0; r < count; r++)
        for (int h = 0; h < heads; h++) {
            int i = r * heads + h;
            O* dst = out + (row + r) * ldo + column + h * HD;
            for (int d = 0; d < HD; d += VW) put(dst + d, loadu<vf>(t.acc[i] + d) * (1.0f / t.sum[i]));
        }
}
#else
constexpr bool TILES = false;
template <class W> static bool tiled(int64_t) { return false; }
template <class W, class Epilogue>
static void tile_gemm(const Input<W>*, int64_t, int, const W*, int64_t, int64_t, Epilogue&&) {}
template <class T, int HD> constexpr bool TILED_HEADS = false;
template <class T, int HD, class O>
static void attend_tiles(const Rows&, const T*, const T*, const int32_t*, int, int, int, const float*, int64_t, int64_t, O*, int64_t) {}
#endif
