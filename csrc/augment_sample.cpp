// Draws what is random about a view, bit for bit as params.py does, which documents the words.
#include <algorithm>
#include <cmath>

#include "augment.h"

// each step rounds to float32, as in torch
#pragma GCC optimize("fp-contract=off")

namespace simclr {
namespace {

constexpr std::uint32_t FIRST_VALUE_DRAW = 1 << 16;
constexpr std::uint32_t ATTEMPTS = 100;
constexpr float SOLARIZE_THRESHOLD = 0.5f;

struct Words {
    std::uint32_t at[4];
};

Words philox(std::uint64_t key, std::uint32_t c0, std::uint32_t c1, std::uint32_t c2,
             std::uint32_t c3) {
    std::uint32_t k0 = std::uint32_t(key), k1 = std::uint32_t(key >> 32);
    for (int round = 0; round < 10; ++round) {
        const std::uint64_t p0 = std::uint64_t(c0) * 0xD2511F53u;
        const std::uint64_t p1 = std::uint64_t(c2) * 0xCD9E8D57u;
        c0 = std::uint32_t(p1 >> 32) ^ c1 ^ k0;
        c2 = std::uint32_t(p0 >> 32) ^ c3 ^ k1;
        c1 = std::uint32_t(p1);
        c3 = std::uint32_t(p0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

float uniform(std::uint32_t word) { return float(word >> 8) * 0x1p-24f; }

float between(std::uint32_t word, double low, double high) {
    const float from = float(low), to = float(high);
    return uniform(word) * (to - from) + from;
}

std::int64_t below(std::uint32_t word, std::int64_t n) { return (word * n) >> 32; }

// One attempt of TensorFlow's sample_distorted_bounding_box.
bool sample_crop(const ViewRanges& ranges, const Words& words, std::int64_t H, std::int64_t W,
                 ViewParams& params) {
    const float aspect = between(words.at[0], ranges.aspect[0], ranges.aspect[1]);
    const float min_area = float(ranges.area[0]) * float(W) * float(H);
    const float max_area = float(ranges.area[1]) * float(W) * float(H);
    const auto width_of = [&](std::int64_t height) {
        return std::int64_t(std::nearbyint(float(height) * aspect));
    };
    const auto height_of = [&](float area) {
        return std::int64_t(std::nearbyint(std::sqrt(area / aspect)));
    };
    std::int64_t height = height_of(min_area), most = height_of(max_area);
    // the largest height whose width still fits
    if (width_of(most) > W) {
        most = std::int64_t((float(W) + 0.5f - 1e-7f) / aspect);
        most -= width_of(most) > W;
    }
    most = std::min(most, H);
    height = std::min(height, most);
    height += below(words.at[1], most - height + 1);
    // rounding may leave the range of areas by one pixel of height
    height += float(height * width_of(height)) < min_area;
    height -= float(height * width_of(height)) > max_area;
    const std::int64_t width = width_of(height), area = height * width;
    const bool accepted = float(area) >= min_area && float(area) <= max_area && width <= W &&
                          height <= H && width > 0 && height > 0 &&
                          float(area) / float(H * W) >= float(ranges.min_covered);
    if (!accepted) return false;
    // an offset of H - height, the last one possible, is never drawn
    params.y = std::int32_t(below(words.at[2], H - height));
    params.x = std::int32_t(below(words.at[3], W - width));
    params.height = std::int32_t(height);
    params.width = std::int32_t(width);
    return true;
}

// Order number k of 0, 1, 2, 3, in lexicographic order.
void order_of(std::int64_t k, std::int8_t (&order)[4]) {
    std::int8_t left[] = {0, 1, 2, 3};
    for (int position = 0, orders = 6; position < 4; ++position) {
        const std::int64_t chosen = k / orders;
        k %= orders;
        order[position] = left[chosen];
        std::copy(left + chosen + 1, left + 4 - position, left + chosen);
        orders = position < 2 ? orders / (3 - position) : 1;
    }
}

}  // namespace

ViewParams sample_view(const ViewRanges& ranges, DrawKey key, std::uint32_t index,
                       std::uint32_t view, std::int64_t height, std::int64_t width) {
    const auto draw = [&](std::uint32_t number) {
        return philox(key.seed, key.epoch, index, view, number);
    };
    ViewParams params{};
    params.height = std::int32_t(height);
    params.width = std::int32_t(width);
    if (ranges.crop)
        for (std::uint32_t attempt = 0; attempt < ATTEMPTS; ++attempt)
            if (sample_crop(ranges, draw(attempt), height, width, params)) break;

    const Words events = draw(FIRST_VALUE_DRAW), color = draw(FIRST_VALUE_DRAW + 1),
                last = draw(FIRST_VALUE_DRAW + 2);
    const auto happens = [](std::uint32_t word, double p) { return uniform(word) < float(p); };
    const bool jitter = happens(events.at[1], ranges.jitter);
    const auto jittered = [&](int k, double low, double high, float neutral) {
        return jitter ? between(color.at[k], low, high) : neutral;
    };
    const auto factor = [&](int k, double range) { return jittered(k, 1 - range, 1 + range, 1); };
    params.flip = happens(events.at[0], ranges.flip);
    order_of(below(events.at[2], 24), params.order);
    params.grayscale = happens(events.at[3], ranges.grayscale);
    const double b = ranges.brightness;
    params.brightness = ranges.add_brightness ? jittered(0, -b, b, 0)
                                              : jittered(0, std::max(1 - b, 0.0), 1 + b, 1);
    params.contrast = factor(1, ranges.contrast);
    params.saturation = factor(2, ranges.saturation);
    params.hue_turns = jittered(3, -ranges.hue, ranges.hue, 0);
    const bool blurred = happens(last.at[0], ranges.blur[view % 2]);
    params.sigma_px =
        blurred ? between(last.at[1], ranges.sigma_px[0], ranges.sigma_px[1]) : 0.0f;
    const bool solarized = happens(last.at[2], ranges.solarize[view % 2]);
    params.solarize = solarized ? SOLARIZE_THRESHOLD : 1.0f;
    return params;
}

void sample_views(const ViewRanges& ranges, DrawKey key, std::uint32_t view,
                  const std::int64_t* index, const std::int64_t* sizes, std::int64_t count,
                  const ParamArrays& out) {
    for (std::int64_t i = 0; i < count; ++i)
        out.set(i, sample_view(ranges, key, std::uint32_t(index[i]), view, sizes[2 * i],
                               sizes[2 * i + 1]));
}

}  // namespace simclr
