// Colour operations on planar rows, in place. Formulas and clips: color_jitter in reference.py.
#pragma once
#include "augment_resize.h"

namespace simclr {
namespace SIMD_NAME {

// Three channels of FLOATS pixels.
struct Pixels {
    Vec r, g, b;

    template <class Change>
    SIMD_INLINE Pixels each(const Change& change) const {
        return {change(r), change(g), change(b)};
    }
};

// Where a pass over a row begins: from(i) are the pixels from number i on.
struct FromRow {
    const float *r, *g, *b;

    explicit FromRow(const Row& row) : r(row.at), g(r + row.plane), b(g + row.plane) {}

    SIMD_INLINE Pixels operator()(std::int64_t i) const {
        return {load(r + i), load(g + i), load(b + i)};
    }
};

// Row y of the resized crop, clipped if so.
struct FromCrop {
    const ResizedRows::Blend blend;
    const bool clipped;

    SIMD_INLINE Pixels operator()(std::int64_t i) const {
        const Pixels p{blend(0, i), blend(1, i), blend(2, i)};
        return clipped ? p.each(clip) : p;
    }
};

// A pass, which may end where it began. Red goes to plane `first`, and so on round.
template <bool CLIP, class From, class Change>
SIMD_INLINE void map_row(const From& from, const Row& to, std::int64_t width, const Change& change,
                         int first) {
    float* const to_r = to.at + first % 3 * to.plane;
    float* const to_g = to.at + (first + 1) % 3 * to.plane;
    float* const to_b = to.at + (first + 2) % 3 * to.plane;
    for (std::int64_t i = 0; i < width; i += FLOATS) {
        Pixels p = change(from(i));
        if (CLIP) p = p.each(clip);
        store(to_r + i, p.r);
        store(to_g + i, p.g);
        store(to_b + i, p.b);
    }
}

template <class From, class Change>
SIMD_INLINE void map_row(bool clipped, const From& from, const Row& to, std::int64_t width,
                         const Change& change, int first = 0) {
    if (clipped)
        map_row<true>(from, to, width, change, first);
    else
        map_row<false>(from, to, width, change, first);
}

SIMD_INLINE Vec high_of(const Pixels& p) { return larger(larger(p.r, p.g), p.b); }
SIMD_INLINE Vec low_of(const Pixels& p) { return smaller(smaller(p.r, p.g), p.b); }

SIMD_INLINE Pixels saturated(const Pixels& p, Vec factor) {
    const Vec high = high_of(p), span = high - low_of(p);
    const Vec shrink = smaller(larger(high, Vec{}) / larger(span, splat(1e-12f)), factor);
    const Vec rest = high - shrink * high;
    return p.each([&](Vec x) { return shrink * x + rest; });
}

// The same for pixels in [0, 1] and a factor in [0, 1].
SIMD_INLINE Pixels desaturated(const Pixels& p, Vec factor, Vec one_less) {
    const Vec rest = one_less * high_of(p);
    return p.each([&](Vec x) { return factor * x + rest; });
}

// Rotates by -1 to 1 sixths of a turn. With s the span of the channels, the ramp of a channel c is
// min + clip(|distance of the hue from where c is 0 at the middle| - s, 0, s), in units of s = a
// sixth of a turn. Before the rotation distance - s + min is max + min - (r + g + b) + 2 c; which
// side of the middle the hue is on, and so whether the rotation adds or takes, says the order of
// the two other channels. Within a sixth of the middle the ramp is flat: no |..| is needed.
SIMD_INLINE Pixels rotated(const Pixels& p, Vec sixths) {
    const Vec high = high_of(p), low = low_of(p), span = high - low;
    const Vec rest = (high + low) - (p.r + p.g + p.b);
    const Vec more = rest + sixths * span, less = rest - sixths * span;
    const auto ramp = [&](Vec x, Vec before, Vec after) {
        const Vec level = 2.0f * x + by_sign(before - after, less, more);
        return smaller(larger(level, low), high);
    };
    return {ramp(p.r, p.b, p.g), ramp(p.g, p.r, p.b), ramp(p.b, p.g, p.r)};
}

// An operation that is not neutral.
struct Step {
    int code;     // 0 brightness, 1 contrast, 2 saturation, 3 hue
    float value;  // as in ViewParams
    bool inside;  // it gets pixels in [0, 1], to rounding
    bool clip;    // it may give others
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
        for (int code : params.order) {
            if (code < 0 || code > 3 || value[code] == neutral[code]) continue;
            if (code == 1) contrast = count;
            const float v = value[code];
            const bool inside = count > 0;
            const bool keeps = code == 3 || (code == 2 && v >= 0) ||
                               (v >= 0 && v <= 1 && !(code == 0 && format.add_brightness));
            at[count++] = {code, v, inside, !(inside && keeps)};
        }
    }
};

// Every operation but contrast.
template <class From>
SIMD_INLINE void apply(const Step& step, bool add_brightness, const From& from, const Row& to,
                       std::int64_t width) {
    const float v = step.value;
    if (step.code == 0) {
        const Vec factor = splat(add_brightness ? 1.0f : v), more = splat(add_brightness ? v : 0.0f);
        map_row(step.clip, from, to, width, [&](const Pixels& p) {
            return p.each([&](Vec x) { return x * factor + more; });
        });
    } else if (step.code == 2 && step.inside && v >= 0 && v <= 1) {
        const Vec factor = splat(v), one_less = splat(1 - v);
        map_row(step.clip, from, to, width,
                [&](const Pixels& p) { return desaturated(p, factor, one_less); });
    } else if (step.code == 2) {
        const Vec factor = splat(v);
        map_row(step.clip, from, to, width,
                [&](const Pixels& p) { return saturated(p, factor); });
    } else {
        // whole thirds of a turn move the channels round
        const float turns = v - std::floor(v);
        const int thirds = turns <= 1 ? int(3 * turns + 0.5f) : 0;
        const Vec sixths = splat(6 * turns - 2 * float(thirds));
        map_row(step.clip, from, to, width,
                [&](const Pixels& p) { return rotated(p, sixths); }, thirds);
    }
}

// Contrast of the pixels of a row, clipped.
struct FromContrast {
    const FromRow from;
    const Vec factor, r, g, b;

    FromContrast(const Row& row, float f, const float (&mean)[3])
        : from(row),
          factor(splat(f)),
          r(splat(mean[0] - f * mean[0])),
          g(splat(mean[1] - f * mean[1])),
          b(splat(mean[2] - f * mean[2])) {}

    SIMD_INLINE Pixels operator()(std::int64_t i) const {
        const Pixels p = from(i);
        return Pixels{p.r * factor + r, p.g * factor + g, p.b * factor + b}.each(clip);
    }
};

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
