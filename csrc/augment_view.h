// One view from the pixels of a crop, a row at a time.
//
// Contrast needs the mean of every channel after the operations before it: with contrast, the rows
// up to there are staged, and come back from the last, which is still in the cache, to the first.
// Otherwise a row goes from the resize to the result, or to the blur, which holds some of them.
#pragma once
#include "augment_blur.h"
#include "augment_color.h"
#include "augment_resize.h"
#include "augment_write.h"

namespace simclr {
namespace SIMD_NAME {

class View {
   public:
    View(const ViewFormat& format, const Crop& crop, const ViewParams& params, float* memory,
         void* out)
        : format(format),
          params(params),
          size(format.size),
          s(format.size),
          steps(format, params),
          resized(crop, size, params.flip, s, memory),
          writer(format, params, out),
          blurs(params.sigma_px > 0 && s.radius > 0),
          work{memory + s.work(), s.stride} {
        // float32 planes of whole vectors: the result is as good a place as any
        if (format.dtype == Dtype::FLOAT32 && !format.channels_last && size % FLOATS == 0)
            staged = {static_cast<float*>(out), size * size};
        else
            staged = {memory + s.staged(), size * s.stride};
    }

    void make(float* memory) {
        if (blurs) {
            Blur blur(s, size, params.sigma_px, memory);
            make_rows([&](std::int64_t y, const Row& row) {
                to_blur(row, blur.input());
                blur.add(params.grayscale ? 1 : 3, [&](std::int64_t taken, const Row& done) {
                    const std::int64_t at = steps.contrast < 0 ? taken : size - 1 - taken;
                    writer.write(at, {done.at, params.grayscale ? 0 : done.plane});
                });
                (void)y;
            });
        } else {
            make_rows([&](std::int64_t y, const Row& row) {
                if (params.grayscale) to_gray(row);
                writer.write(y, {row.at, params.grayscale ? 0 : row.plane});
            });
        }
    }

   private:
    const ViewFormat& format;
    const ViewParams& params;
    const std::int64_t size;
    const Scratch s;
    const Steps steps;
    ResizedRows resized;
    Writer writer;
    bool blurs;
    Row work, staged;

    // take(y, row) gets every row after all colour operations but grayscale, and may change it.
    template <class Take>
    SIMD_INLINE void make_rows(const Take& take) {
        if (steps.contrast < 0) {
            for (std::int64_t y = 0; y < size; ++y) {
                resized.next(y, work, s.stride);
                apply_steps(0, steps.count, work, s.stride);
                take(y, work);
            }
            return;
        }
        const bool in_place = staged.plane == size * size;
        const std::int64_t step = in_place ? size : s.stride;
        double sums[3] = {};
        for (std::int64_t y = 0; y < size; ++y) {
            const Row row{staged.at + y * step, staged.plane};
            resized.next(y, row, step);
            apply_steps(0, steps.contrast, row, step);
            add_sums(row, size, sums);
        }
        float mean[3];
        for (int channel = 0; channel < 3; ++channel)
            mean[channel] = float(sums[channel] / double(size * size));
        for (std::int64_t y = size - 1; y >= 0; --y) {
            add_contrast(steps.at[steps.contrast], mean, {staged.at + y * step, staged.plane}, work,
                         step);
            apply_steps(steps.contrast + 1, steps.count, work, s.stride);
            take(y, work);
        }
    }

    void apply_steps(int first, int end, const Row& row, std::int64_t width) const {
        for (int k = first; k < end; ++k)
            apply(steps.at[k], format.add_brightness, row, width);
    }

    static SIMD_INLINE Vec gray(const Pixels& p) {
        return 0.2989f * p.r + 0.5870f * p.g + 0.1140f * p.b;
    }

    void to_gray(const Row& row) const {
        for (std::int64_t i = 0; i < s.stride; i += FLOATS)
            store(row.at + i, gray({load(row.at + i), load(row.at + row.plane + i),
                                    load(row.at + 2 * row.plane + i)}));
    }

    // Clipped, and gray in the first plane if so.
    void to_blur(const Row& row, const Row& out) const {
        if (params.grayscale) to_gray(row);
        for (int channel = 0; channel < (params.grayscale ? 1 : 3); ++channel)
            for (std::int64_t i = 0; i < s.stride; i += FLOATS)
                store(out.at + channel * out.plane + i,
                      clip(load(row.at + channel * row.plane + i)));
    }
};

void make_view(const ViewFormat& format, const Crop& crop, const ViewParams& params, float* memory,
               void* out) {
    View(format, crop, params, memory, out).make(memory);
}

}  // namespace SIMD_NAME

extern const ViewKernels SIMD_TABLE(augment_) = {SIMD_NAME::make_view};

}  // namespace simclr
