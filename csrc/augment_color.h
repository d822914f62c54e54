// Colour operations on planar rows, in place. Formulas and clips: color_jitter in reference.py.
#pragma once
#include "augment_resize.h"

namespace simclr {
namespace SIMD_NAME {

SIMD_INLINE Vec clip(Vec x) { return smaller(larger(x, Vec{}), splat(1.0f)); }

// Three channels of FLOATS pixels.
struct Pixels {
    Vec r, g, b;

    template <class Change>
    SIMD_INLINE Pixels each(const Change& change) const {
        return {change(r), change(g), change(b)};
    }
};

template <class Change>
SIMD_INLINE void map_row(const Row& from, const Row& to, std::int64_t width, const Change& change) {
    for (std::int64_t i = 0; i < width; i += FLOATS) {
        const Pixels in{load(from.at + i), load(from.at + from.plane + i),
                        load(from.at + 2 * from.plane + i)};
        const Pixels out = change(in);
        store(to.at + i, out.r);
        store(to.at + to.plane + i, out.g);
        store(to.at + 2 * to.plane + i, out.b);
    }
}

// With channels in [0, 1] and a factor of 0 or more, what the clip would change is rounding.
SIMD_INLINE Pixels saturated(const Pixels& p, Vec factor) {
    const Vec high = larger(larger(p.r, p.g), p.b);
    const Vec span = high - smaller(smaller(p.r, p.g), p.b);
    const Vec shrink = smaller(larger(high, Vec{}) / larger(span, splat(1e-12f)), factor);
    return p.each([&](Vec x) { return (x - high) * shrink + high; });
}

// The hue in sixths of a turn, times the span of channels so that nothing is divided, and plus one
// span so that it starts at 0. Channels are min + clip of |hue - 4| - 1, 2 - |hue - 3| and
// |hue - 2| - 1, times the span. Largest and smallest channel stay: nothing leaves [0, 1].
SIMD_INLINE Pixels rotated(const Pixels& p, Vec sixths) {
    const Vec high = larger(larger(p.r, p.g), p.b), low = smaller(smaller(p.r, p.g), p.b);
    const Vec span = high - low, turn = 6.0f * span;
    const Vec if_red = (p.g - p.b) + span, if_green = (p.b - p.r) + 3.0f * span,
              if_blue = (p.r - p.g) + 5.0f * span;
    const Vec hue = (p.r == high ? if_red : p.g == high ? if_green : if_blue) + sixths * span;
    const Vec less = hue - turn, wrapped = less >= 0.0f ? less : hue;
    const Vec below = low - span, above = high + span;
    const auto ramp = [&](Vec x) { return smaller(larger(x, low), high); };
    return {ramp(absolute(wrapped - 4.0f * span) + below),
            ramp(above - absolute(wrapped - 3.0f * span)),
            ramp(absolute(wrapped - 2.0f * span) + below)};
}

// An operation that is not neutral.
struct Step {
    int code;     // 0 brightness, 1 contrast, 2 saturation, 3 hue
    float value;  // as in ViewParams
    bool clip;    // whether the result may leave [0, 1]
};

// The operations of one view, split at contrast, which needs the mean of what comes before.
struct Steps {
    Step at[4];
    int count = 0, contrast = -1;

    Steps(const ViewFormat& format, const ViewParams& params) {
        const float off = format.add_brightness ? 0.0f : 1.0f;
        const float value[] = {params.brightness, params.contrast, params.saturation,
                               params.hue_turns};
        const float neutral[] = {off, 1.0f, 1.0f, 0.0f};
        bool inside = false;
        for (int code : params.order) {
            if (code < 0 || code > 3 || value[code] == neutral[code]) continue;
            if (code == 1) contrast = count;
            const float v = value[code];
            const bool keeps = code == 3 || (code == 2 && v >= 0) ||
                               (v >= 0 && v <= 1 && !(code == 0 && format.add_brightness));
            at[count++] = {code, v, !(inside && keeps)};
            inside = true;
        }
    }
};

template <class Change>
SIMD_INLINE void apply(const Row& row, std::int64_t width, bool clipped, const Change& change) {
    if (clipped)
        map_row(row, row, width, [&](const Pixels& p) { return change(p).each(clip); });
    else
        map_row(row, row, width, change);
}

// Every operation but contrast.
SIMD_INLINE void apply(const Step& step, bool add_brightness, const Row& row, std::int64_t width) {
    const Vec v = splat(step.value);
    if (step.code == 0 && add_brightness)
        apply(row, width, step.clip,
              [&](const Pixels& p) { return p.each([&](Vec x) { return x + v; }); });
    if (step.code == 0 && !add_brightness)
        apply(row, width, step.clip,
              [&](const Pixels& p) { return p.each([&](Vec x) { return x * v; }); });
    if (step.code == 2)
        apply(row, width, step.clip, [&](const Pixels& p) { return saturated(p, v); });
    if (step.code == 3) {
        const Vec sixths = splat(6.0f * (step.value - std::floor(step.value)));
        apply(row, width, step.clip, [&](const Pixels& p) { return rotated(p, sixths); });
    }
}

SIMD_INLINE void add_contrast(const Step& step, const float (&mean)[3], const Row& from,
                              const Row& to, std::int64_t width) {
    const Vec m[3] = {splat(mean[0]), splat(mean[1]), splat(mean[2])};
    const auto change = [&](const Pixels& p) -> Pixels {
        return {(p.r - m[0]) * step.value + m[0], (p.g - m[1]) * step.value + m[1],
                (p.b - m[2]) * step.value + m[2]};
    };
    if (step.clip)
        map_row(from, to, width, [&](const Pixels& p) { return change(p).each(clip); });
    else
        map_row(from, to, width, change);
}

// Adds the `size` pixels of a row to the sums of its channels.
SIMD_INLINE void add_sums(const Row& row, std::int64_t size, double (&sums)[3]) {
    for (int channel = 0; channel < 3; ++channel) {
        const float* x = row.at + channel * row.plane;
        Vec total[2] = {};
        std::int64_t i = 0;
        for (; i + 2 * FLOATS <= size; i += 2 * FLOATS) {
            total[0] += load(x + i);
            total[1] += load(x + i + FLOATS);
        }
        for (; i < size; i += FLOATS) total[0] += load_some(x + i, size - i);
        sums[channel] += sum(total[0] + total[1]);
    }
}

}  // namespace SIMD_NAME
}  // namespace simclr
