// Vectors of float for one instruction set.
//
// Included once per instruction set, inside a namespace of its own, with two macros defined:
//   SIMD_FLOATS  floats in a vector
//   SIMD_TARGET  the function attribute that selects the instruction set (empty: the default one)
// Every function that touches a vector carries SIMD_TARGET, so that one file holds several
// instruction sets and the process picks one at run time. No include guard, on purpose.

#define SIMD_INLINE SIMD_TARGET inline __attribute__((always_inline))

typedef float Vec __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * SIMD_FLOATS)));
typedef float UnalignedVec __attribute__((vector_size(4 * SIMD_FLOATS), aligned(4), may_alias));

SIMD_INLINE Vec load(const float* p) { return *reinterpret_cast<const UnalignedVec*>(p); }
SIMD_INLINE void store(float* p, Vec v) { *reinterpret_cast<UnalignedVec*>(p) = v; }
SIMD_INLINE Vec splat(float x) { return x - Vec{}; }
SIMD_INLINE Vec larger(Vec a, Vec b) { return a > b ? a : b; }

SIMD_INLINE float sum(Vec v) {
    float total = 0.0f;
    for (int k = 0; k < SIMD_FLOATS; ++k) total += v[k];
    return total;
}

SIMD_INLINE float largest(Vec v) {
    float m = v[0];
    for (int k = 1; k < SIMD_FLOATS; ++k) m = v[k] > m ? v[k] : m;
    return m;
}

// 2^x for x < 127.5: relative error 1.5e-7, 0 below -126, NaN for NaN.
SIMD_INLINE Vec exp2(Vec x) {
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
    y *= (Vec)(((IntVec)rounded << 23) + (127 << 23));
    return x < -126.0f ? Vec{} : y;
}

// Inner product of n floats, n a multiple of SIMD_FLOATS.
SIMD_INLINE float dot(const float* a, const float* b, std::int64_t n) {
    Vec total = {};
    for (std::int64_t k = 0; k < n; k += SIMD_FLOATS) total += load(a + k) * load(b + k);
    return sum(total);
}
