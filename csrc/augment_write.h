// The end of a view: clip, solarize, mean and std, and the element type and layout of the result.
#pragma once
#include "augment_color.h"

namespace simclr {
namespace SIMD_NAME {

typedef std::uint16_t ShortVec __attribute__((vector_size(2 * SIMD_FLOATS)));

// To the nearest, ties to even; of NaN some NaN.
SIMD_INLINE ShortVec to_bfloat16(Vec x) {
    const BitsVec bits = (BitsVec)x, rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return __builtin_convertvector((x == x ? rounded : bits | 0x400000u) >> 16, ShortVec);
}

SIMD_INLINE ShortVec to_float16(Vec x) {
#if SIMD_FLOATS == 16
    return (ShortVec)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT);
#elif SIMD_FLOATS == 8
    return (ShortVec)_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT);
#else
    const BitsVec sign = (BitsVec)x & 0x80000000u;
    const Vec size = absolute(x);
    // the last bit of 1/2 is that of the subnormal halves
    const BitsVec small = (BitsVec)(size + 0.5f) - 0x3f000000u;
    const BitsVec bits = (BitsVec)size;
    const BitsVec normal = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
    BitsVec half = size < 0x1p-14f ? small : normal;
    half = size < 65520.0f ? half : splat_bits(0x7c00u);
    half = x == x ? half : splat_bits(0x7e00u);
    return __builtin_convertvector(sign >> 16 | half, ShortVec);
#endif
}

// Elements i .. of an array; only `count` of them where they are fewer than a vector.
template <Dtype DTYPE>
SIMD_INLINE void store_as(void* array, std::int64_t i, Vec x, std::int64_t count) {
    if constexpr (DTYPE == Dtype::FLOAT32) {
        store_some(static_cast<float*>(array) + i, x, count);
    } else {
        const ShortVec bits = DTYPE == Dtype::FLOAT16 ? to_float16(x) : to_bfloat16(x);
        const std::int64_t bytes = 2 * (count < FLOATS ? count : FLOATS);
        if (bytes == 2 * FLOATS)
            std::memcpy(static_cast<std::uint16_t*>(array) + i, &bits, 2 * FLOATS);
        else
            std::memcpy(static_cast<std::uint16_t*>(array) + i, &bits, bytes);
    }
}

// What is done to a channel last of all.
struct Finish {
    float solarize, mean, inv_std;

    template <bool PLAIN>
    SIMD_INLINE Vec apply(Vec x) const {
        x = clip(x);
        if (PLAIN) return x;
        x = x >= solarize ? 1.0f - x : x;
        return (x - mean) * inv_std;
    }
};

// Lanes FLOATS * PART + k of r0 g0 b0 r1 g1 b1 ..
template <int PART, int... K>
SIMD_INLINE Vec interleaved(const Pixels& p, std::integer_sequence<int, K...>) {
    const IntVec red_green = {((FLOATS * PART + K) / 3 + ((FLOATS * PART + K) % 3 == 1) * FLOATS)...};
    const IntVec all = {
        ((FLOATS * PART + K) % 3 == 2 ? FLOATS + (FLOATS * PART + K) / 3 : K)...};
    return __builtin_shuffle(__builtin_shuffle(p.r, p.g, red_green), p.b, all);
}

class Writer {
   public:
    bool plain;  // nothing but the clip is left to do

    Writer(const ViewFormat& format, const ViewParams& params, void* out)
        : format(format), out(out) {
        // above everything: off
        const float solarize = params.solarize < 1 ? params.solarize : 2.0f;
        for (int channel = 0; channel < 3; ++channel)
            finish[channel] = {solarize, format.normalize ? format.mean[channel] : 0.0f,
                               format.normalize ? 1.0f / format.std[channel] : 1.0f};
        plain = !(params.solarize < 1) && !format.normalize;
    }

    // Whether row(y) is in float32 and in place for whole vectors.
    bool direct() const {
        return format.dtype == Dtype::FLOAT32 && !format.channels_last &&
               format.size % FLOATS == 0;
    }

    Row row(std::int64_t y) const {
        return {static_cast<float*>(out) + y * format.size, format.size * format.size};
    }

    // Row y of the view, from planes, or one of them if gray. May be in place.
    void write(std::int64_t y, const Row& from, bool gray) const {
        const Row planes{from.at, gray ? 0 : from.plane};
        if (plain)
            write<true>(y, planes);
        else
            write<false>(y, planes);
    }

   private:
    const ViewFormat& format;
    void* out;
    Finish finish[3];

    template <bool PLAIN>
    void write(std::int64_t y, const Row& row) const {
        switch (format.dtype) {
            case Dtype::FLOAT32: return write<PLAIN, Dtype::FLOAT32>(y, row);
            case Dtype::FLOAT16: return write<PLAIN, Dtype::FLOAT16>(y, row);
            case Dtype::BFLOAT16: return write<PLAIN, Dtype::BFLOAT16>(y, row);
        }
    }

    template <bool PLAIN, Dtype DTYPE>
    void write(std::int64_t y, const Row& row) const {
        const std::int64_t size = format.size;
        if (!format.channels_last) {
            // the first one last: where all are gray it is also what the others are made of
            for (int channel = 2; channel >= 0; --channel) {
                const float* in = row.at + channel * row.plane;
                const Finish last = finish[channel];
                void* const array = out;
                const std::int64_t first = (channel * size + y) * size;
                std::int64_t i = 0;
                for (; i + FLOATS <= size; i += FLOATS)
                    store_as<DTYPE>(array, first + i, last.apply<PLAIN>(load(in + i)), FLOATS);
                if (i < size)
                    store_as<DTYPE>(array, first + i, last.apply<PLAIN>(load(in + i)), size - i);
            }
            return;
        }
        for (std::int64_t i = 0; i < size; i += FLOATS) {
            const Pixels p{finish[0].apply<PLAIN>(load(row.at + i)),
                           finish[1].apply<PLAIN>(load(row.at + row.plane + i)),
                           finish[2].apply<PLAIN>(load(row.at + 2 * row.plane + i))};
            const auto lanes = std::make_integer_sequence<int, FLOATS>{};
            const std::int64_t first = 3 * (y * size + i), count = 3 * (size - i);
            store_as<DTYPE>(out, first, interleaved<0>(p, lanes), count);
            if (count > FLOATS)
                store_as<DTYPE>(out, first + FLOATS, interleaved<1>(p, lanes), count - FLOATS);
            if (count > 2 * FLOATS)
                store_as<DTYPE>(out, first + 2 * FLOATS, interleaved<2>(p, lanes),
                                count - 2 * FLOATS);
        }
    }
};

}  // namespace SIMD_NAME
}  // namespace simclr
