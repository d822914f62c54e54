// Gaussian blur of planar rows: along x as they come, along y a block of rows at a time.
#pragma once
#include "augment_resize.h"

namespace simclr {
namespace SIMD_NAME {

// Taps that together weigh less are left out: below the rounding of the sum.
constexpr double NEGLIGIBLE = 0x1p-22;

class Blur {
   public:
    Blur(const Scratch& s, float sigma, float* memory)
        : size(s.size),
          width(s.width(FLOATS)),
          stride(s.stride),
          pad(s.pad),
          padded(memory + s.padded()),
          ring(memory + s.ring()),
          blurred(memory + s.blurred()),
          zeros(memory + s.zeros()),
          rows(reinterpret_cast<const float**>(memory + s.pointers())),
          taps(memory + s.taps()) {
        // normalised over the full radius
        double total = 1;
        const auto tap = [&](std::int64_t k) {
            const double x = double(k) / sigma;
            return std::exp(-0.5 * x * x);
        };
        for (std::int64_t k = 1; k <= s.radius; ++k) total += 2 * tap(k);
        radius = s.radius;
        for (double left_out = 2 * tap(radius); radius > 0 && left_out < NEGLIGIBLE * total;)
            left_out += 2 * tap(--radius);
        for (std::int64_t k = 0; k <= radius; ++k) taps[k] = float(tap(k) / total);
        std::fill(zeros, zeros + 3 * stride, 0.0f);
        const Row row = input();
        for (int channel = 0; channel < 3; ++channel) {
            std::fill(row.at + channel * row.plane - pad, row.at + channel * row.plane, 0.0f);
            clear_behind(row, channel);
        }
    }

    // Where the next row is to be put before add(), with whole vectors.
    Row input() const { return {padded + pad, stride + 2 * pad}; }

    // Takes the next row in, of so many channels. Rows that are finished are clipped and put in
    // where(y, row), y counting the rows taken in and row having room, and go to write(y, there).
    template <class Where, class Write>
    SIMD_INLINE void add(int channels, const Where& where, const Write& write) {
        const Row row = input();
        for (int channel = 0; channel < channels; ++channel) {
            clear_behind(row, channel);
            along_row(row.at + channel * row.plane, ring_row(taken) + channel * stride);
        }
        ++taken;
        while (done < size && taken >= std::min(done + BLUR_BLOCK + radius, size)) {
            for (std::int64_t k = 0; k < BLUR_BLOCK + 2 * radius; ++k) {
                const std::int64_t y = done - radius + k;
                rows[k] = y < 0 || y >= size ? zeros : ring_row(y);
            }
            Row out[BLUR_BLOCK];
            const std::int64_t end = std::min(done + BLUR_BLOCK, size);
            for (std::int64_t k = 0; k < BLUR_BLOCK; ++k) {
                out[k] = {blurred + k * 3 * stride, stride};
                if (done + k < end) out[k] = where(done + k, out[k]);
            }
            for (int channel = 0; channel < channels; ++channel) {
                float* planes[BLUR_BLOCK];
                for (std::int64_t k = 0; k < BLUR_BLOCK; ++k)
                    planes[k] = out[k].at + channel * out[k].plane;
                along_columns(channel, planes);
            }
            for (std::int64_t y = done; y < end; ++y) write(y, out[y - done]);
            done = end;
        }
    }

   private:
    std::int64_t size, width, stride, pad, radius;
    float *padded, *ring, *blurred, *zeros;
    const float** rows;  // that a block of finished rows is made of, from done - radius on
    float* taps;
    std::int64_t taken = 0, done = 0;

    float* ring_row(std::int64_t y) const {
        return ring + y % (BLUR_BLOCK + 2 * radius) * 3 * stride;
    }

    void clear_behind(const Row& row, int channel) const {
        float* plane = row.at + channel * row.plane;
        std::fill(plane + size, plane + stride + pad, 0.0f);
    }

    void along_row(const float* in, float* out) const {
        std::int64_t i = 0;
        for (; i + 4 * FLOATS <= width; i += 4 * FLOATS) along_vectors<4>(in + i, out + i);
        for (; i < width; i += FLOATS) along_vectors<1>(in + i, out + i);
    }

    template <int N>
    SIMD_INLINE void along_vectors(const float* in, float* out) const {
        Vec x[N];
        for (int n = 0; n < N; ++n) x[n] = taps[0] * load(in + n * FLOATS);
        for (std::int64_t k = 1; k <= radius; ++k) {
            const Vec tap = splat(taps[k]);
            for (int n = 0; n < N; ++n)
                x[n] += tap * load(in + n * FLOATS - k);
            for (int n = 0; n < N; ++n) x[n] += tap * load(in + n * FLOATS + k);
        }
        for (int n = 0; n < N; ++n) store(out + n * FLOATS, x[n]);
    }

    // Four neighbouring rows of a block, and the rows that are k above and k below each of them. Of
    // these all but one are those of k - 1: they stay in registers, by their number modulo 4.
    struct Quad {
        Vec up[4], down[4], x[4];

        template <int K, class At>
        SIMD_INLINE void step(std::int64_t k, const At& at, const float* taps) {
            const Vec tap = splat(taps[k]);
            up[-K & 3] = at(-k);
            down[(3 + K) & 3] = at(3 + k);
            for (int n = 0; n < 4; ++n) x[n] += tap * (up[(n - K) & 3] + down[(n + K) & 3]);
        }
    };

    // Blurs a plane of the rows from `done` on, four rows at a time.
    void along_columns(int channel, float* const* out) const {
        const std::int64_t reach = radius;
        const float* const weights = taps;
        for (std::int64_t first = 0; first < BLUR_BLOCK; first += 4) {
            const float* const* const from = rows + radius + first;
            for (std::int64_t i = 0; i < width; i += FLOATS) {
                const std::int64_t column = channel * stride + i;
                const auto at = [&](std::int64_t k) { return load(from[k] + column); };
                Quad quad;
                for (int n = 0; n < 4; ++n) {
                    quad.up[n] = quad.down[n] = at(n);
                    quad.x[n] = weights[0] * quad.up[n];
                }
                std::int64_t k = 1;
                for (; k + 3 <= reach; k += 4) {
                    quad.template step<1>(k, at, weights);
                    quad.template step<2>(k + 1, at, weights);
                    quad.template step<3>(k + 2, at, weights);
                    quad.template step<0>(k + 3, at, weights);
                }
                if (k <= reach) quad.template step<1>(k, at, weights);
                if (k + 1 <= reach) quad.template step<2>(k + 1, at, weights);
                if (k + 2 <= reach) quad.template step<3>(k + 2, at, weights);
                for (int n = 0; n < 4; ++n) store(out[first + n] + i, clip(quad.x[n]));
            }
        }
    }
};

}  // namespace SIMD_NAME
}  // namespace simclr
