// What differs between CPUs, and nothing else does: the other files are one text for every
// instruction set.
//
// To add an instruction set, edit this file only. Every primitive has a plain version, so that all
// code compiles everywhere. A HAS_... constant says that the CPU has an instruction for it; only
// then do callers choose the data layout and the loops that need it.
//
// SMART_EMULATE_TILES makes a build for tests: tiles, and what they imply, in plain loops. So the
// code above them runs on CPUs without AMX. It is slow and must never be shipped.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <initializer_list>
#include <type_traits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__aarch64__)
#include <arm_neon.h>
#endif
#if defined(__AMX_BF16__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

// GCC warns that wide vectors are passed in other ways with other flags. Here they never leave a
// source file.
#pragma GCC diagnostic ignored "-Wpsabi"

// Hidden: several variants may be loaded into one process, and none may call into another.
namespace [[gnu::visibility("hidden")]] smart {

typedef uint16_t bf16;

// ----------------------------------------------------------------------------------------- waiting

// A short rest of a thread that looks at memory again and again.
static inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// ----------------------------------------------------------------------------------------- vectors

// Lanes of a vector of float, and the rows whose sums stay in registers while they share a pass
// over weights.
#if defined(__AVX512F__)
constexpr int VW = 16, PASS_ROWS = 12;
#elif defined(SMART_EMULATE_TILES)
constexpr int VW = 16, PASS_ROWS = 4;  // tiles are laid out for 16 lanes
#elif defined(__AVX2__)
constexpr int VW = 8, PASS_ROWS = 6;
#else
constexpr int VW = 4, PASS_ROWS = 8;
#endif

// GCC's vectors of any number of lanes: the compiler splits those that are wider than registers.
template <class T, int LANES>
struct VectorOf {
    typedef T type __attribute__((vector_size(LANES * sizeof(T))));
};
template <class T, int LANES>
using Vector = typename VectorOf<T, LANES>::type;
template <class V>
constexpr int LANES_OF = sizeof(V) / 4;

typedef Vector<float, VW> vf;
typedef Vector<int32_t, VW> vi;
typedef Vector<uint32_t, VW> vu;

template <class V>
static inline V loadu(const void* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}

template <class V>
static inline void storeu(void* p, const V& v) {
    memcpy(p, &v, sizeof v);
}

// Four bytes in every lane: a number, a pair of bf16, or four inputs of 8 bits.
static inline vu broadcast4(const void* p) {
#if defined(__AVX512F__)  // of the plain sum GCC 12 makes a load and a broadcast
    return (vu)_mm512_set1_epi32(loadu<int32_t>(p));
#else
    return vu{} + loadu<uint32_t>(p);
#endif
}

// A float in every lane; unlike words, GCC 12 reads it where it is multiplied.
static inline vf every_lane(float x) {
#if defined(__AVX512F__)
    return (vf)_mm512_set1_ps(x);
#elif defined(__AVX2__) && !defined(SMART_EMULATE_TILES)
    return (vf)_mm256_set1_ps(x);
#elif defined(__aarch64__) && !defined(SMART_EMULATE_TILES)
    return (vf)vdupq_n_f32(x);
#else
    vf out;
    for (int j = 0; j < VW; j++) out[j] = x;
    return out;
#endif
}

// Strips of quants of which a block stays in registers, for products in 8 bits.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(SMART_EMULATE_TILES)
constexpr int BYTE_STRIPS = 1;
#else
constexpr int BYTE_STRIPS = 2;
#endif

// Keeps a vector in a register: GCC would load it anew for each use.
template <class V>
static inline void keep_in_register([[maybe_unused]] V& v) {
#if defined(__AVX512F__) || (defined(__AVX2__) && !defined(SMART_EMULATE_TILES))
    asm("" : "+v"(v));
#endif
}

// Has a product rounded before it is used: compilers fuse it with a sum.
static inline void finish_product([[maybe_unused]] vf& v) {
#if defined(__aarch64__) && !defined(SMART_EMULATE_TILES)
    asm("" : "+w"(v));
#else
    keep_in_register(v);
#endif
}

// Hides where `p` comes from, so that what is read through it next is not read, and widened,
// before.
template <class T>
static inline void hide_origin(T*& p) {
    asm volatile("" : "+r"(p));
}

// How the loop of one pass is compiled. Inlined it is 5 % faster on AVX-512; with 16 registers GCC
// 12 keeps the sums in them only in a function of its own.
#if defined(__AVX512F__)
#define SMART_PASS __attribute__((always_inline)) static inline
#else
#define SMART_PASS __attribute__((noinline)) static
#endif

// ------------------------------------------------------------------------------------- conversions

// bf16 to float, as many as F has lanes.
template <class F>
static inline F widen(const bf16* p) {
#if defined(__AVX512F__)  // GCC 12 splits the generic conversion in two
    static_assert(sizeof(F) == sizeof(__m512));
    return (F)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif defined(__AVX2__) && !defined(SMART_EMULATE_TILES)
    static_assert(sizeof(F) == sizeof(__m256));
    return (F)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
    typedef Vector<uint16_t, LANES_OF<F>> Halves;
    typedef Vector<uint32_t, LANES_OF<F>> Words;
    return (F)(__builtin_convertvector(loadu<Halves>(p), Words) << 16);
#endif
}

template <class F>
static inline F widen(const float* p) {
    return loadu<F>(p);
}

// float to bf16, rounded to the nearest, ties to even.
template <class F>
static inline void put(bf16* p, F v) {
#if defined(__AVX512BF16__)
    static_assert(sizeof(F) == sizeof(__m512));
    storeu(p, _mm512_cvtneps_pbh((__m512)v));
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
    for (int i = 0; i < LANES_OF<F>; i += 4) {
        float32x4_t four = {v[i], v[i + 1], v[i + 2], v[i + 3]};
        storeu(p + i, vcvt_bf16_f32(four));
    }
#else
    typedef Vector<uint16_t, LANES_OF<F>> Halves;
    typedef Vector<uint32_t, LANES_OF<F>> Words;
    Words bits = (Words)v;
    storeu(p, __builtin_convertvector((bits + 0x7fff + ((bits >> 16) & 1)) >> 16, Halves));
#endif
}

template <class F>
static inline void put(float* p, const F& v) {
    storeu(p, v);
}

// Halves (of IEEE) to float.
static inline vf halves_to_float(const uint8_t* p) {
#if defined(__AVX512F__)
    return (vf)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__) && !defined(SMART_EMULATE_TILES)
    return (vf)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#elif defined(__aarch64__) && !defined(SMART_EMULATE_TILES)
    return (vf)vcvt_f32_f16(loadu<float16x4_t>(p));
#else
    // The exponent's range is moved by a product, which makes subnormals normal, too. The largest
    // exponent is that of infinities and of what is no number, here as there.
    typedef Vector<uint16_t, VW> Halves;
    const vu bits = __builtin_convertvector(loadu<Halves>(p), vu);
    const vf size = (vf)((bits & 0x7fff) << 13) * 0x1p112f;
    const vu special = (vu)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
    return (vf)((vu)size | special | (bits & 0x8000) << 16);
#endif
}

// Whether any lane is no number.
static inline bool any_nan(const vf& v) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)v, (__m512)v, _CMP_UNORD_Q);
#elif defined(__AVX2__) && !defined(SMART_EMULATE_TILES)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)v, _CMP_UNORD_Q));
#else
    bool any = false;
    for (int j = 0; j < VW; j++) any |= v[j] != v[j];
    return any;
#endif
}

// 1.5 * 2^23: a float of less than 2^22 is rounded to the nearest integer where this is added to it
// and then taken away. A call of lrint would be one for each.
constexpr float INTEGERS = 12582912.0f;

// Floats to bytes, rounded to the nearest; returns their sum.
static inline int32_t to_bytes(const vf& v, int8_t* to) {
#if defined(__AVX512F__)
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)v));
    storeu(to, bytes);
    // instructions add unsigned bytes only
    const __m128i sums = _mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), __m128i{});
    return _mm_cvtsi128_si32(sums) + _mm_extract_epi32(sums, 2) - 16 * 128;
#elif defined(__AVX2__) && !defined(SMART_EMULATE_TILES)
    const __m256i words = _mm256_cvtps_epi32((__m256)v), halves = _mm256_packs_epi32(words, words);
    const __m256i fours = _mm256_packs_epi16(halves, halves);  // in both of its halves
    const __m128i bytes =
        _mm_unpacklo_epi32(_mm256_castsi256_si128(fours), _mm256_extracti128_si256(fours, 1));
    _mm_storel_epi64((__m128i*)to, bytes);
    return _mm_cvtsi128_si32(_mm_sad_epu8(_mm_xor_si128(bytes, _mm_set1_epi8(-128)), __m128i{}))
           - 8 * 128;
#else
    int32_t sum = 0;
    for (int j = 0; j < VW; j++) {
        const int32_t value = int32_t((v[j] + INTEGERS) - INTEGERS);
        to[j] = int8_t(value);
        sum += value;
    }
    return sum;
#endif
}

// Bytes to integers. T: int8_t or uint8_t.
template <class T>
static inline vi bytes_to_integers(const uint8_t* p) {
    [[maybe_unused]] constexpr bool SIGNED = std::is_signed_v<T>;
#if defined(__AVX512F__)  // of the generic conversion GCC 12 makes one for each lane
    const __m128i bytes = _mm_loadu_si128((const __m128i*)p);
    return (vi)(SIGNED ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
#elif defined(__AVX2__) && !defined(SMART_EMULATE_TILES)
    const __m128i bytes = _mm_loadl_epi64((const __m128i*)p);
    return (vi)(SIGNED ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
#elif defined(__aarch64__) && !defined(SMART_EMULATE_TILES)
    const uint32x2_t bytes = vdup_n_u32(loadu<uint32_t>(p));
    if (SIGNED) return (vi)vmovl_s16(vget_low_s16(vmovl_s8((int8x8_t)bytes)));
    return (vi)vmovl_u16(vget_low_u16(vmovl_u8((uint8x8_t)bytes)));
#else
    return __builtin_convertvector(loadu<Vector<T, VW>>(p), vi);
#endif
}

template <class T>
static inline vf bytes_to_float(const uint8_t* p) {
    return __builtin_convertvector(bytes_to_integers<T>(p), vf);
}

// 2^(byte - 128); 255 is no number. A byte is a float's exponent, but that 0 and 255 need the
// mantissa's first bit, too.
static inline vf half_powers_of_two(const uint8_t* p) {
    const vi byte = bytes_to_integers<uint8_t>(p);
    return (vf)(byte << 23 | (((byte == 0) | (byte == 255)) & 1 << 22)) * 0.5f;
}

// table[the low bits] of each half of a lane. ENTRIES: 32 or 64.
#if defined(__AVX512BW__)
constexpr bool HAS_WORD_LOOKUP = true;

template <int ENTRIES>
static inline vu lookup_words(const uint16_t* table, const vu& index) {
    const __m512i first = _mm512_load_si512(table);
    if constexpr (ENTRIES == 32) return (vu)_mm512_permutexvar_epi16((__m512i)index, first);
    return (vu)_mm512_permutex2var_epi16(first, (__m512i)index, _mm512_load_si512(table + 32));
}
#else
constexpr bool HAS_WORD_LOOKUP = false;

template <int ENTRIES>
static inline vu lookup_words(const uint16_t*, const vu& index);
#endif

// The same where the table is a vector of 32.
static inline vu lookup_words(const vu& table, const vu& index) {
#if defined(__AVX512BW__)
    return (vu)_mm512_permutexvar_epi16((__m512i)index, (__m512i)table);
#else
    uint16_t entries[2 * VW], words[2 * VW];
    storeu(entries, table);
    storeu(words, index);
    for (uint16_t& word : words) word = entries[word % (2 * VW)];
    return loadu<vu>(words);
#endif
}

// table[the low four bits] of each lane.
static inline vf lookup(const float* table, vu index) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(SMART_EMULATE_TILES)
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
    return (vf)_mm256_blendv_ps(low, high, (__m256)(index << 28));
#else
    vf values;
    for (int j = 0; j < VW; j++) values[j] = table[index[j] & 15];
    return values;
#endif
}

// table[the low four bits] of each byte, all other bits of which are 0.
static inline vu lookup_bytes(const uint8_t* table, const vu& index) {
#if defined(__AVX512BW__)
    const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table));
    return (vu)_mm512_shuffle_epi8(four, (__m512i)index);
#elif defined(__AVX2__) && !defined(__AVX512F__) && !defined(SMART_EMULATE_TILES)
    const __m256i two = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return (vu)_mm256_shuffle_epi8(two, (__m256i)index);
#elif defined(__aarch64__) && !defined(SMART_EMULATE_TILES)
    return (vu)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)index);
#else
    uint8_t bytes[sizeof(vu)];
    storeu(bytes, index);
    for (uint8_t& byte : bytes) byte = table[byte];
    return loadu<vu>(bytes);
#endif
}

// Each lane of the lower, or of the higher, half twice.
template <int HALF>
static inline vf twice(const vf& v) {
#if defined(__AVX512F__)
    const __m512i low = _mm512_setr_epi32(0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7);
    const __m512i lanes = _mm512_add_epi32(low, _mm512_set1_epi32(HALF * 8));
    return (vf)_mm512_permutexvar_ps(lanes, (__m512)v);
#else
    vf out = v;
    for (int j = 0; j < VW; j++) out[j] = v[HALF * (VW / 2) + j / 2];
    return out;
#endif
}

// Two vectors of floats to bf16, rounded to the nearest, one after the other.
static inline vu two_to_bf16(const vf& first, const vf& second) {
#if defined(__AVX512BF16__)
    return (vu)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    bf16 both[2 * VW];
    put(both, first);
    put(both + VW, second);
    return loadu<vu>(both);
#endif
}

// The same of floats that bf16 holds. Instructions that round take subnormal ones for zeros.
static inline vu two_as_bf16(const vf& first, const vf& second) {
#if defined(__AVX512BW__)
    vu upper;
    for (int j = 0; j < VW; j++) upper[j] = uint32_t(4 * j + 1) | uint32_t(4 * j + 3) << 16;
    return (vu)_mm512_permutex2var_epi16((__m512i)first, (__m512i)upper, (__m512i)second);
#else
    typedef Vector<uint16_t, VW> Halves;
    bf16 both[2 * VW];
    storeu(both, __builtin_convertvector((vu)first >> 16, Halves));
    storeu(both + VW, __builtin_convertvector((vu)second >> 16, Halves));
    return loadu<vu>(both);
#endif
}

// -------------------------------------------------------------------------------- across the lanes

template <class F>
static inline float max_of(const F& lanes) {
#if defined(__AVX512F__)
    static_assert(sizeof(F) == sizeof(__m512));
    return _mm512_reduce_max_ps((__m512)lanes);
#elif defined(__AVX2__) && !defined(SMART_EMULATE_TILES)
    __m128 four =
        _mm_max_ps(_mm256_castps256_ps128((__m256)lanes), _mm256_extractf128_ps((__m256)lanes, 1));
    four = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
    F v = lanes;
    for (int half = LANES_OF<F> / 2; half; half /= 2)
        for (int j = 0; j < half; j++) v[j] = v[j] > v[j + half] ? v[j] : v[j + half];
    return v[0];
#endif
}

// The sum of all lanes by halves, in the order of AVX-512's reduction. See also sum_in_order.
template <class F>
static inline float sum_of(const F& lanes) {
#if defined(__AVX512F__)
    static_assert(sizeof(F) == sizeof(__m512));
    return _mm512_reduce_add_ps((__m512)lanes);
#else
    F v = lanes;
    for (int half = LANES_OF<F> / 2; half; half /= 2)
        for (int j = 0; j < half; j++) v[j] += v[j + half];
    return v[0];
#endif
}

// ---------------------------------------------------------------------------------------- products

// Products of pairs of bf16, which are added to floats. Inputs are rounded to bf16 for them.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) \
    || defined(SMART_EMULATE_TILES)
constexpr bool HAS_BF16_PAIRS = true;
#else
constexpr bool HAS_BF16_PAIRS = false;
#endif

static inline vf dot_bf16(vf sum, vu a, vu b) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#elif defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC) && !defined(SMART_EMULATE_TILES)
    return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b);
#else
    sum += (vf)(a & 0xffff0000u) * (vf)(b & 0xffff0000u);
    return sum + (vf)(a << 16) * (vf)(b << 16);
#endif
}

// a * b + c, rounded once: written out where a sum must not depend on how a loop is compiled.
static inline vf fused(const vf& a, const vf& b, const vf& c) {
#if defined(__AVX512F__)
    return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && !defined(SMART_EMULATE_TILES)
    return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__) && !defined(SMART_EMULATE_TILES)
    return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
    vf out;
    for (int j = 0; j < VW; j++) out[j] = std::fma(a[j], b[j], c[j]);
    return out;
#endif
}

// Products of four unsigned bytes x with four signed ones w, which are added to integers.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8) \
    || defined(SMART_EMULATE_TILES)
constexpr bool HAS_BYTE_DOT = true;
#else
constexpr bool HAS_BYTE_DOT = false;
#endif

__attribute__((always_inline)) static inline void dot_u8s8(vi& sum, vi x, vi w) {
#if defined(__AVX512VNNI__)
    asm("vpdpbusd %2, %1, %0"
        : "+v"(sum)
        : "v"(x), "v"(w));  // around the intrinsic GCC 12 copies every sum
#elif defined(__AVXVNNI__) && !defined(SMART_EMULATE_TILES)
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(x), "x"(w));
#elif defined(__ARM_FEATURE_MATMUL_INT8) && !defined(SMART_EMULATE_TILES)
    sum = (vi)vusdotq_s32((int32x4_t)sum, (uint8x16_t)x, (int8x16_t)w);
#else
    for (int shift = 0; shift < 32; shift += 8)
        sum += (x >> shift & 255) * (w << (24 - shift) >> 24);
#endif
}

// The same with the four of `inputs` from I on, for all lanes. Those 16 of them are read that these
// are among, as Arm's instruction names four of a register.
template <int I>
__attribute__((always_inline)) static inline void dot_u8s8(vi& sum, const vi& x,
                                                           const int8_t* inputs) {
#if defined(__ARM_FEATURE_MATMUL_INT8) && !defined(SMART_EMULATE_TILES)
    const int8x16_t sixteen = vld1q_s8(inputs + I / 16 * 16);
    sum = (vi)vusdotq_laneq_s32((int32x4_t)sum, (uint8x16_t)x, sixteen, I % 16 / 4);
#else
    dot_u8s8(sum, x, (vi)broadcast4(inputs + I));
#endif
}

// Whether such a product waits for the one whose sum it adds to; Arm's cores hand sums over at
// once.
#if defined(__aarch64__)
constexpr bool DOTS_WAIT = false;
#else
constexpr bool DOTS_WAIT = true;
#endif

// Whether that is faster than with floats, if one factor is the same in every lane.
#if defined(__AVX2__) && !defined(__AVX512F__)
constexpr bool HAS_BYTE_PRODUCTS = true;
#else
constexpr bool HAS_BYTE_PRODUCTS = HAS_BYTE_DOT;
#endif

// Whether products of two bytes are added in 16 bits first, as there is no instruction for four.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(__AVXVNNI__) \
    && !defined(SMART_EMULATE_TILES)
constexpr bool ADDS_BYTE_PAIRS = true;
#else
constexpr bool ADDS_BYTE_PAIRS = false;
#endif

// Sums of products of unsigned bytes, of which none is above MOST, with inputs, the same in every
// lane. Four bytes are added one step after the other: STEP of STEPS.
template <int MOST, int STEPS>
class ByteSums {
    static constexpr int FIT = 32767 / (2 * 127 * MOST);  // sums of pairs that 16 bits hold
    static constexpr bool APART = DOTS_WAIT && STEPS > 4;
    vi total;
    vi other;  // every second product of four if these are APART, or pairs

public:
    // What is taken from unsigned bytes before they are multiplied.
    static constexpr int LESS = ADDS_BYTE_PAIRS && !FIT ? 128 : 0;

    __attribute__((always_inline)) void begin(const vi& with) {
        total = with;
        other = vi{};
    }

    template <int STEP>
    __attribute__((always_inline)) void add(const vi& x, const int8_t* inputs) {
        if constexpr (ADDS_BYTE_PAIRS)
            add_pairs<STEP>(x, (vi)broadcast4(inputs + 4 * STEP));
        else
            dot_u8s8<4 * STEP>(APART && STEP % 2 ? other : total, x, inputs);
    }

    __attribute__((always_inline)) vi sum() const {
        return !ADDS_BYTE_PAIRS && APART ? total + other : total;
    }

private:
    template <int STEP>
    __attribute__((always_inline)) void add_pairs([[maybe_unused]] const vi& x,
                                                  [[maybe_unused]] const vi& four) {
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(SMART_EMULATE_TILES)
        if constexpr (FIT > 0) {
            const __m256i two = _mm256_maddubs_epi16((__m256i)x, (__m256i)four);
            other = STEP % FIT ? (vi)_mm256_add_epi16((__m256i)other, two) : (vi)two;
            keep_in_register(other);  // of a sum of eight GCC makes a tree, for which scales spill
            if constexpr (STEP % FIT < FIT - 1 && STEP < STEPS - 1) return;
            total += (vi)_mm256_madd_epi16((__m256i)other, _mm256_set1_epi16(1));
        } else {
            const __m256i bytes = _mm256_xor_si256((__m256i)x, _mm256_set1_epi8(-128));
            const __m256i two = _mm256_maddubs_epi16(_mm256_abs_epi8(bytes),
                                                     _mm256_sign_epi8((__m256i)four, bytes));
            total += (vi)_mm256_madd_epi16(two, _mm256_set1_epi16(1));
        }
#endif
    }
};

// ------------------------------------------------------------------------------------ tiles of AMX

constexpr int TILE = 16;        // rows of a tile
constexpr int TILE_WIDTH = 64;  // bytes of a row

#if defined(__AMX_BF16__) || defined(SMART_EMULATE_TILES)
constexpr bool HAS_TILES = true;
#else
constexpr bool HAS_TILES = false;
#endif
static_assert(!HAS_TILES || (HAS_BF16_PAIRS && HAS_BYTE_DOT && VW == 16),
              "tiles replace vectors for some shapes only");

struct TileShapes {  // as the instruction reads them
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(std::initializer_list<int> tiles, int row_count, int bytes) {
        for (int tile : tiles) {
            rows[tile] = uint8_t(row_count);
            row_bytes[tile] = uint16_t(bytes);
        }
    }
};
static_assert(sizeof(TileShapes) == 64);

#if defined(__AMX_BF16__) && !defined(SMART_EMULATE_TILES)

// Linux must be asked for the registers: ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA.
static inline bool enable_tiles() { return !syscall(SYS_arch_prctl, 0x1023, 18); }

static inline void tile_configure(const TileShapes& shapes) {
    asm volatile("ldtilecfg %0" : : "m"(shapes));
}
static inline void tile_release() { asm volatile("tilerelease"); }

template <int T>
static inline void tile_zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(T));
}

// Assembly and not GCC's intrinsics: these are macros that take no template arguments, and do not
// say that they read memory. `stride`: bytes between rows.
template <int T>
static inline void tile_load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(from), "r"(stride), "i"(T), "m"(*(const char(*)[])from));
}

template <int T>
static inline void tile_store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T) : "memory");
}

template <int SUM, int X, int W>
static inline void tile_dot_bf16() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

template <int SUM, int X, int W>
static inline void tile_dot_u8s8() {
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUM), "i"(X), "i"(W));
}

#else

// The same in plain loops, as Intel's manual describes it, but for denormals. What the CPU refuses
// ends the process.
struct TileFile {
    TileShapes shapes;
    bool configured = false;
    uint8_t data[8][TILE][TILE_WIDTH];

    int words(int tile) const { return shapes.row_bytes[tile] / 4; }
    void clear(int tile) { memset(data[tile], 0, sizeof data[tile]); }
    void demand(bool allowed) const {
        if (!configured || !allowed) abort();
    }
    void demand_product(int sum, int x, int w) const {
        demand(sum != x && sum != w && x != w && shapes.rows[sum] == shapes.rows[x]
               && words(sum) == words(w));
        demand(words(x) == shapes.rows[w]);
    }
};

static inline TileFile& tile_file() {
    static thread_local TileFile file;
    return file;
}

static inline bool enable_tiles() { return true; }

static inline void tile_configure(const TileShapes& shapes) {
    TileFile& file = tile_file();
    file.shapes = shapes;
    file.configured = true;
    for (int tile = 0; tile < 8; tile++) {
        file.demand(shapes.rows[tile] <= TILE && shapes.row_bytes[tile] <= TILE_WIDTH);
        file.demand(!shapes.rows[tile] == !shapes.row_bytes[tile]);
        file.clear(tile);
    }
}

static inline void tile_release() { tile_file().configured = false; }

template <int T>
static inline void tile_zero() {
    tile_file().demand(tile_file().shapes.rows[T]);
    tile_file().clear(T);
}

template <int T>
static inline void tile_load(const void* from, int64_t stride) {
    TileFile& file = tile_file();
    file.demand(file.shapes.rows[T]);
    file.clear(T);
    for (int r = 0; r < file.shapes.rows[T]; r++)
        memcpy(file.data[T][r], (const char*)from + r * stride, file.shapes.row_bytes[T]);
}

template <int T>
static inline void tile_store(void* to, int64_t stride) {
    TileFile& file = tile_file();
    file.demand(file.shapes.rows[T]);
    for (int r = 0; r < file.shapes.rows[T]; r++)
        memcpy((char*)to + r * stride, file.data[T][r], file.shapes.row_bytes[T]);
}

// sum [rows, columns] += x [rows, pairs] by w [pairs, columns]; the even and the odd products are
// summed apart.
template <int SUM, int X, int W>
static inline void tile_dot_bf16() {
    TileFile& file = tile_file();
    file.demand_product(SUM, X, W);
    auto element = [&](int tile, int row, int i) {
        uint32_t bits = uint32_t(loadu<bf16>(file.data[tile][row] + 2 * i)) << 16;
        return loadu<float>(&bits);
    };
    for (int r = 0; r < file.shapes.rows[SUM]; r++)
        for (int c = 0; c < file.words(SUM); c++) {
            float even = 0, odd = 0;
            for (int k = 0; k < file.words(X); k++) {
                even = std::fma(element(X, r, 2 * k), element(W, k, 2 * c), even);
                odd = std::fma(element(X, r, 2 * k + 1), element(W, k, 2 * c + 1), odd);
            }
            uint8_t* sum = file.data[SUM][r] + 4 * c;
            storeu(sum, loadu<float>(sum) + (even + odd));
        }
}

// The same of four unsigned bytes of x and four bytes of w, in integers.
template <int SUM, int X, int W>
static inline void tile_dot_u8s8() {
    TileFile& file = tile_file();
    file.demand_product(SUM, X, W);
    for (int r = 0; r < file.shapes.rows[SUM]; r++)
        for (int c = 0; c < file.words(SUM); c++) {
            uint8_t* sum = file.data[SUM][r] + 4 * c;
            int32_t total = loadu<int32_t>(sum);
            for (int k = 0; k < 4 * file.words(X); k++)
                total += file.data[X][r][k] * int8_t(file.data[W][k / 4][4 * c + k % 4]);
            storeu(sum, total);
        }
}

#endif

}  // namespace smart
