#include "augment.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>

#include "augment_kernels.h"
#include "instruction_sets.h"
#include "parallel.h"

namespace simclr {
namespace {

// of the views; below, one thread is as fast
constexpr std::int64_t SMALLEST_SHARED_PIXELS = 1 << 14;
// bytes of the views from which on new memory is worth a call of the system
constexpr std::int64_t LARGE_RESULT = 1 << 23;
// offsets in a row of a crop are 32-bit numbers of bytes, rows 32-bit numbers
constexpr std::int64_t WIDEST = (1 << 29) - 1, HIGHEST = INT32_MAX;

const ViewKernels& view_kernels() {
    static const ViewKernels* const all[] = {
#if defined(__x86_64__)
        &augment_avx512,
        &augment_avx2,
#endif
        &augment_portable,
    };
    return *all[instruction_set()];
}

struct Image {
    const std::uint8_t* pixels;
    std::int64_t height, width, row_bytes;
};

Image image_at(const Images& images, std::int64_t i) {
    if (!images.offsets)
        return {images.memory + i * images.image_bytes, images.height, images.width,
                images.row_bytes};
    const std::int64_t width = images.sizes[2 * i + 1];
    return {images.memory + images.offsets[i], images.sizes[2 * i], width, 3 * width};
}

// view(k, image, tail memory..) for k of `views`, view k being of image k % images.count.
template <class Params>
void make_views(const Images& images, std::int64_t views, const ViewFormat& format, int threads,
                const Params& params_of) {
    const ViewKernels& kernels = view_kernels();
    const std::int64_t pixels = format.size * format.size;
    const std::int64_t view_bytes = 3 * pixels * (format.dtype == Dtype::FLOAT32 ? 4 : 2);
    const std::int64_t floats = Scratch(format.size).floats();
    const std::int64_t grain = std::max<std::int64_t>(1, SMALLEST_SHARED_PIXELS / pixels);
    const std::int64_t shares = (views + grain - 1) / grain;
    threads = int(std::min<std::int64_t>(usable_threads(threads, shares > 1), shares));
    if (views * view_bytes >= LARGE_RESULT) ask_for_large_pages(format.views, views * view_bytes);
    std::atomic<bool> out_of_memory{false};
    std::atomic<std::int64_t> next{0};
    in_parallel(std::max(threads, 1), [&](int) {
        try {
            Memory memory;
            float* scratch = memory.take<float>(floats);
            std::unique_ptr<std::uint8_t[]> tail;
            std::int64_t tail_bytes = 0;
            for (std::int64_t first = grain * next++; first < views; first = grain * next++)
                for (std::int64_t k = first; k < std::min(first + grain, views); ++k) {
                    const Image image = image_at(images, k % images.count);
                    const ViewParams params = params_of(k, image);
                    const std::int64_t needed = std::int64_t(3) * params.width + WINDOW_BYTES;
                    if (needed > tail_bytes) {
                        tail.reset(new std::uint8_t[needed]());
                        tail_bytes = needed;
                    }
                    const Crop crop{image.pixels + params.y * image.row_bytes + std::int64_t(3) * params.x,
                                    image.row_bytes,
                                    params.height,
                                    params.width,
                                    images.memory + images.bytes,
                                    tail.get()};
                    kernels.view(format, crop, params, scratch,
                                 static_cast<char*>(format.views) + k * view_bytes);
                }
        } catch (const std::bad_alloc&) {
            out_of_memory = true;
        }
    });
    if (out_of_memory) throw std::bad_alloc();
}

void refuse_wide(std::int64_t width) {
    if (width > WIDEST)
        throw std::invalid_argument("images must be at most 2^29 - 1 pixels wide, got " +
                                    std::to_string(width));
}

void refuse_counters(const std::int64_t* index, std::int64_t count) {
    if (count == 0) return;
    const auto [low, high] = std::minmax_element(index, index + count);
    if (*low < 0 || *high > 0xFFFFFFFF)
        throw std::invalid_argument("index must be in [0, 2^32), got " + std::to_string(*low) +
                                    " .. " + std::to_string(*high));
}

void refuse_high(std::int64_t height) {
    if (height > HIGHEST)
        throw std::invalid_argument("images must be at most 2^31 - 1 pixels high, got " +
                                    std::to_string(height));
}

void refuse_order(std::int64_t i, const std::int8_t* order) {
    unsigned seen = 0;
    std::string text;
    for (int k = 0; k < 4; ++k) {
        seen |= order[k] >= 0 && order[k] < 4 ? 1u << order[k] : 0;
        text += (k ? ", " : "") + std::to_string(order[k]);
    }
    if (seen != 15)
        throw std::invalid_argument("the order of image " + std::to_string(i) +
                                    " must be a permutation of 0, 1, 2, 3, got " + text);
}

}  // namespace

ViewParams ParamArrays::get(std::int64_t i) const {
    ViewParams p;
    p.y = crop[4 * i], p.x = crop[4 * i + 1];
    p.height = crop[4 * i + 2], p.width = crop[4 * i + 3];
    p.flip = flip[i], p.grayscale = grayscale[i];
    std::copy_n(order + 4 * i, 4, p.order);
    p.brightness = brightness[i], p.contrast = contrast[i];
    p.saturation = saturation[i], p.hue_turns = hue_turns[i];
    p.sigma_px = sigma_px[i], p.solarize = solarize[i];
    return p;
}

void ParamArrays::set(std::int64_t i, const ViewParams& p) const {
    crop[4 * i] = p.y, crop[4 * i + 1] = p.x;
    crop[4 * i + 2] = p.height, crop[4 * i + 3] = p.width;
    flip[i] = p.flip, grayscale[i] = p.grayscale;
    std::copy_n(p.order, 4, order + 4 * i);
    brightness[i] = p.brightness, contrast[i] = p.contrast;
    saturation[i] = p.saturation, hue_turns[i] = p.hue_turns;
    sigma_px[i] = p.sigma_px, solarize[i] = p.solarize;
}

void augment_views(const Images& images, const ParamArrays& params, const ViewFormat& format,
                   int threads) {
    for (std::int64_t i = 0; i < images.count; ++i) {
        refuse_wide(params.crop[4 * i + 3]);
        refuse_order(i, params.order + 4 * i);
    }
    make_views(images, images.count, format, threads,
               [&](std::int64_t k, const Image&) { return params.get(k); });
}

void augment_two_views(const Images& images, const ViewRanges& ranges, DrawKey key,
                       const std::int64_t* index, const ViewFormat& format, int threads) {
    refuse_counters(index, images.count);
    for (std::int64_t i = 0; i < images.count; ++i) {
        refuse_wide(image_at(images, i).width);
        refuse_high(image_at(images, i).height);
    }
    make_views(images, 2 * images.count, format, threads,
               [&](std::int64_t k, const Image& image) {
                   const std::int64_t i = k % images.count;
                   return sample_view(ranges, key, std::uint32_t(index[i]),
                                      std::uint32_t(k / images.count), image.height, image.width);
               });
}

}  // namespace simclr
