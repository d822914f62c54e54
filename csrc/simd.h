// Vectors of float for one instruction set.
//
// Included by the one translation unit of each instruction set, after the standard headers and
// after the pragma that selects it, with SIMD_FLOATS (floats in a vector) defined. The namespace
// SIMD_NAME keeps the instruction sets apart, so that the process can pick one at run time.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>

#if SIMD_FLOATS > 4
#include <immintrin.h>
#endif

#define SIMD_INLINE inline __attribute__((always_inline))
#define SIMD_JOIN(a, b) a##b
#define SIMD_JOINED(a, b) SIMD_JOIN(a, b)
// the table of kernels of this instruction set, of an operation named by its prefix
#define SIMD_TABLE(prefix) SIMD_JOINED(prefix, SIMD_NAME)

namespace simclr {
namespace SIMD_NAME {

constexpr int FLOATS = SIMD_FLOATS;

typedef float Vec __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef std::uint32_t BitsVec __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef float UnalignedVec __attribute__((vector_size(4 * SIMD_FLOATS), aligned(4), may_alias));
typedef std::int32_t UnalignedIntVec
    __attribute__((vector_size(4 * SIMD_FLOATS), aligned(4), may_alias));

SIMD_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SIMD_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
SIMD_INLINE Vec splat(float x) { return x - Vec{}; }
SIMD_INLINE BitsVec splat_bits(std::uint32_t x) { return x - BitsVec{}; }
SIMD_INLINE Vec to_float(IntVec v) { return __builtin_convertvector(v, Vec); }
SIMD_INLINE Vec absolute(Vec v) { return (Vec)((BitsVec)v & 0x7fffffffu); }

// a > b ? a : b, and a < b ? a : b: b where one of them is NaN. GCC takes two instructions for
// either where b is a constant.
#if SIMD_FLOATS == 16
SIMD_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm512_max_ps((__m512)a, (__m512)b); }
SIMD_INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm512_min_ps((__m512)a, (__m512)b); }
#elif SIMD_FLOATS == 8
SIMD_INLINE Vec larger(Vec a, Vec b) { return (Vec)_mm256_max_ps((__m256)a, (__m256)b); }
SIMD_INLINE Vec smaller(Vec a, Vec b) { return (Vec)_mm256_min_ps((__m256)a, (__m256)b); }
#else
SIMD_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }
SIMD_INLINE Vec smaller(Vec a, Vec b) { return a < b ? a : b; }
#endif

// The first `count` floats, zeros behind them; all of a vector if there are as many.
SIMD_INLINE Vec load_some(const float* p, std::int64_t count) {
    if (count >= FLOATS) return load(p);
    float part[FLOATS] = {};
    for (std::int64_t k = 0; k < count; ++k) part[k] = p[k];
    return load(part);
}

SIMD_INLINE void store_some(float* p, Vec v, std::int64_t count) {
    if (count >= FLOATS) return store(p, v);
    float part[FLOATS];
    store(part, v);
    for (std::int64_t k = 0; k < count; ++k) p[k] = part[k];
}

// Adds, or takes the larger of, lanes half a vector apart, then a quarter, and so on.
template <int STEP, int... K>
SIMD_INLINE Vec lanes_apart(Vec v, std::integer_sequence<int, K...>) {
    const IntVec order = {(K ^ STEP)...};
    return __builtin_shuffle(v, order);
}

template <int STEP = FLOATS / 2>
SIMD_INLINE float sum(Vec v) {
    v += lanes_apart<STEP>(v, std::make_integer_sequence<int, FLOATS>{});
    if constexpr (STEP > 1) return sum<STEP / 2>(v);
    return v[0];
}

template <int STEP = FLOATS / 2>
SIMD_INLINE float largest(Vec v) {
    v = larger(lanes_apart<STEP>(v, std::make_integer_sequence<int, FLOATS>{}), v);
    if constexpr (STEP > 1) return largest<STEP / 2>(v);
    return v[0];
}

// Swaps the blocks off the diagonal of the 2 x 2 blocks of STEP lanes in two rows STEP apart.
template <int STEP, int... K>
SIMD_INLINE void swap_blocks(Vec& a, Vec& b, std::integer_sequence<int, K...>) {
    const IntVec low = {(K & STEP ? FLOATS + K - STEP : K)...};
    const IntVec high = {(K & STEP ? FLOATS + K : K + STEP)...};
    const Vec first = __builtin_shuffle(a, b, low);
    b = __builtin_shuffle(a, b, high);
    a = first;
}

template <int STEP = 1>
SIMD_INLINE void transpose(Vec (&rows)[FLOATS]) {
#pragma GCC unroll 16
    for (int i = 0; i < FLOATS; ++i)
        if (!(i & STEP))
            swap_blocks<STEP>(rows[i], rows[i + STEP], std::make_integer_sequence<int, FLOATS>{});
    if constexpr (2 * STEP < FLOATS) transpose<2 * STEP>(rows);
}

// By the sign of x; of 0 either.
SIMD_INLINE Vec by_sign(Vec x, Vec negative, Vec positive) {
#if SIMD_FLOATS == 8
    return (Vec)_mm256_blendv_ps((__m256)positive, (__m256)negative, (__m256)x);
#else
    return x < Vec{} ? negative : positive;
#endif
}

// 16 bytes from each of FLOATS / 4 places: bytes + offsets[0], offsets[step], offsets[2 step], ..
SIMD_INLINE BitsVec load_quads(const std::uint8_t* bytes, const std::int32_t* offsets, int step) {
    typedef std::uint32_t Quad __attribute__((vector_size(16), aligned(1), may_alias));
    const auto quad = [&](int k) {
        return *reinterpret_cast<const Quad*>(bytes + offsets[k * step]);
    };
#if SIMD_FLOATS == 4
    return quad(0);
#else
    const auto pair = [&](int k) {
        return _mm256_inserti128_si256(_mm256_castsi128_si256((__m128i)quad(k)),
                                       (__m128i)quad(k + 1), 1);
    };
#if SIMD_FLOATS == 8
    return (BitsVec)pair(0);
#else
    return (BitsVec)_mm512_inserti64x4(_mm512_castsi256_si512(pair(0)), pair(2), 1);
#endif
#endif
}

// The four 32-bit columns of 4 x 4 blocks: out[k] holds number k of each quad, of a, b, c and d of
// its first quad, then of the second.
template <int... K>
SIMD_INLINE void columns_of_quads(BitsVec a, BitsVec b, BitsVec c, BitsVec d, BitsVec (&out)[3],
                                  std::integer_sequence<int, K...>) {
    // in each quad: 0 of the one, 0 of the other, 1, 1; then 2, 2, 3, 3
    const IntVec low = {((K & ~3) + (K & 2) / 2 + (K & 1) * FLOATS)...};
    const IntVec high = {((K & ~3) + 2 + (K & 2) / 2 + (K & 1) * FLOATS)...};
    // in each quad: the first half of the one and of the other; then the second halves
    const IntVec low_half = {((K & ~3) + (K & 1) + (K & 2) / 2 * FLOATS)...};
    const IntVec high_half = {((K & ~3) + 2 + (K & 1) + (K & 2) / 2 * FLOATS)...};
    const BitsVec ab = __builtin_shuffle(a, b, low), cd = __builtin_shuffle(c, d, low);
    out[0] = __builtin_shuffle(ab, cd, low_half);
    out[1] = __builtin_shuffle(ab, cd, high_half);
    out[2] = __builtin_shuffle(__builtin_shuffle(a, b, high), __builtin_shuffle(c, d, high),
                               low_half);
}

// 2^x for -126 <= x < 127.5 with relative error 1.5e-7, NaN for NaN.
SIMD_INLINE Vec exp2_in_range(Vec x) {
    // adding 1.5 * 2^23 rounds to an integer and leaves it in the low bits
    const Vec magic = splat(12582912.0f);
    const Vec rounded = x + magic;
    const Vec f = x - (rounded - magic);
    // minimax in relative error on [-1/2, 1/2]
    Vec y = splat(0.0013276472f);
    y = y * f + 0.00967554133f;
    y = y * f + 0.0555071327f;
    y = y * f + 0.240221197f;
    y = y * f + 0.693146967f;
    y = y * f + 1.00000007f;
    // a product, not a sum of bits, keeps NaN
    return y * (Vec)(((BitsVec)rounded << 23) + (127u << 23));
}

// The same, and 0 below -126.
SIMD_INLINE Vec exp2(Vec x) {
    const Vec y = exp2_in_range(x);
    return x < -126.0f ? Vec{} : y;
}

}  // namespace SIMD_NAME
}  // namespace simclr
