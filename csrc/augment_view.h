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
          memory(memory),
          steps(format, params),
          resized(crop, size, params.flip, s, memory),
          writer(format, params, out) {
        // float32 planes of whole vectors are worked on where they are going to be
        if (format.dtype == Dtype::FLOAT32 && !format.channels_last && size % FLOATS == 0) {
            staged = {static_cast<float*>(out), size * size};
            staged_step = size;
        } else {
            staged = {memory + s.staged(), size * s.stride};
            staged_step = s.stride;
        }
    }

    void make() {
        if (params.sigma_px > 0 && s.radius > 0)
            return make_blurred();
        const Row work{memory + s.work(), s.stride};
        const auto where = [&](std::int64_t y) { return writer.direct() ? writer.row(y) : work; };
        // the last pass over a row clips it
        const bool done = writer.direct() && writer.plain && !params.grayscale;
        if (done && steps.count) steps.at[steps.count - 1].clip = true;
        make_rows(where, [&](std::int64_t y, const Row& row) {
            if (params.grayscale) to_gray(row);
            if (!done) writer.write(y, row, params.grayscale);
        });
    }

   private:
    const ViewFormat& format;
    const ViewParams& params;
    const std::int64_t size;
    const Scratch s;
    float* const memory;
    Steps steps;
    ResizedRows resized;
    Writer writer;
    Row staged;
    std::int64_t staged_step;

    void make_blurred() {
        Blur blur(s, params.sigma_px, memory);
        const bool done = writer.direct() && writer.plain && !params.grayscale;
        const auto input = [&](std::int64_t) { return blur.input(); };
        // with contrast, from the last row to the first
        const auto number = [&](std::int64_t taken) {
            return steps.contrast < 0 ? taken : size - 1 - taken;
        };
        make_rows(input, [&](std::int64_t, const Row& row) {
            if (params.grayscale) to_gray(row);
            blur.add(
                params.grayscale ? 1 : 3,
                [&](std::int64_t y, const Row& spare) {
                    return done ? writer.row(number(y)) : spare;
                },
                [&](std::int64_t y, const Row& blurred) {
                    if (!done) writer.write(number(y), blurred, params.grayscale);
                });
        });
    }

    // take(y, row) gets every row after all colour operations but grayscale, in where(y).
    template <class Where, class Take>
    SIMD_INLINE void make_rows(const Where& where, const Take& take) {
        const int contrast = steps.contrast;
        if (contrast < 0) {
            // gray is made of what is not clipped yet
            const bool clipped = steps.count == 0 && !params.grayscale;
            for (std::int64_t y = 0; y < size; ++y) {
                const Row row = where(y);
                apply_steps(0, steps.count, FromCrop{resized.row(y), clipped}, row);
                take(y, row);
            }
            return;
        }
        const auto staged_row = [&](std::int64_t y) {
            return Row{staged.at + y * staged_step, staged.plane};
        };
        double sums[3] = {};
        for (std::int64_t y = 0; y < size; ++y) {
            apply_steps(0, contrast, FromCrop{resized.row(y), false}, staged_row(y));
            add_sums(staged_row(y), size, sums);
        }
        float mean[3];
        for (int channel = 0; channel < 3; ++channel)
            mean[channel] = float(sums[channel] / double(size * size));
        for (std::int64_t y = size - 1; y >= 0; --y) {
            const Row row = where(y);
            const FromContrast from(staged_row(y), steps.at[contrast].value, mean);
            apply_steps(contrast + 1, steps.count, from, row);
            take(y, row);
        }
    }

    template <class From>
    SIMD_INLINE void apply_steps(int first, int end, const From& from, const Row& row) const {
        const std::int64_t width = s.width(FLOATS);
        if (first == end)
            return map_row(false, from, row, width, [](const Pixels& p) { return p; });
        apply(steps.at[first], format.add_brightness, from, row, width);
        for (int k = first + 1; k < end; ++k)
            apply(steps.at[k], format.add_brightness, FromRow(row), row, width);
    }

    void to_gray(const Row& row) const {
        const float *r = row.at, *g = r + row.plane, *b = g + row.plane;
        for (std::int64_t i = 0, end = s.width(FLOATS); i < end; i += FLOATS)
            store(row.at + i,
                  clip(0.2989f * load(r + i) + 0.5870f * load(g + i) + 0.1140f * load(b + i)));
    }
};

void make_view(const ViewFormat& format, const Crop& crop, const ViewParams& params, float* memory,
               void* out) {
    View(format, crop, params, memory, out).make();
}

}  // namespace SIMD_NAME

extern const ViewKernels SIMD_TABLE(augment_) = {SIMD_NAME::make_view};

}  // namespace simclr
