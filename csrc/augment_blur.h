// Gaussian blur of planar rows: along x as they come, along y a block of rows at a time.
#pragma once
#include "augment_resize.h"

namespace simclr {
namespace SIMD_NAME {

// Taps that together weigh less are left out: below the rounding of the sum.
constexpr double NEGLIGIBLE = 0x1p-22;

class Blur {
   public:
    Blur(const Scratch& s, std::int64_t size, float sigma, float* memory)
        : size(size),
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

    // Takes the next row in, of so many channels. Rows that are finished go to
    // write(y, row), y counting the rows taken in.
    template <class Write>
    SIMD_INLINE void add(int channels, const Write& write) {
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
            for (int channel = 0; channel < channels; ++channel) along_columns(channel);
            const std::int64_t end = std::min(done + BLUR_BLOCK, size);
            for (std::int64_t y = done; y < end; ++y)
                write(y, Row{blurred + (y - done) * 3 * stride, stride});
            done = end;
        }
    }

   private:
    std::int64_t size, stride, pad, radius;
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
        for (; i + 4 * FLOATS <= stride; i += 4 * FLOATS) along_vectors<4>(in + i, out + i);
        for (; i < stride; i += FLOATS) along_vectors<1>(in + i, out + i);
    }

    template <int N>
    SIMD_INLINE void along_vectors(const float* in, float* out) const {
        Vec x[N];
        for (int n = 0; n < N; ++n) x[n] = taps[0] * load(in + n * FLOATS);
        for (std::int64_t k = 1; k <= radius; ++k) {
            const Vec tap = splat(taps[k]);
            for (int n = 0; n < N; ++n)
                x[n] += tap * (load(in + n * FLOATS - k) + load(in + n * FLOATS + k));
        }
        for (int n = 0; n < N; ++n) store(out + n * FLOATS, x[n]);
    }

    // Blurs the rows from `done` on, four at a time: of neighbours, all but one row are the same.
    void along_columns(int channel) const {
        for (std::int64_t i = 0; i < stride; i += FLOATS)
            for (std::int64_t first = 0, column = channel * stride + i; first < BLUR_BLOCK;
                 first += 4) {
                const std::int64_t y = first + radius;
                const auto at = [&](std::int64_t k) { return load(rows[k] + column); };
                Vec up[4], down[4], x[4];
                for (int n = 0; n < 4; ++n) {
                    up[n] = down[n] = at(y + n);
                    x[n] = taps[0] * up[n];
                }
                for (std::int64_t k = 1; k <= radius; ++k) {
                    const Vec tap = splat(taps[k]);
                    up[3] = up[2], up[2] = up[1], up[1] = up[0], up[0] = at(y - k);
                    down[0] = down[1], down[1] = down[2], down[2] = down[3];
                    down[3] = at(y + 3 + k);
                    for (int n = 0; n < 4; ++n) x[n] += tap * (up[n] + down[n]);
                }
                for (int n = 0; n < 4; ++n)
                    store(blurred + ((first + n) * 3 + channel) * stride + i, x[n]);
            }
    }
};

}  // namespace SIMD_NAME
}  // namespace simclr
