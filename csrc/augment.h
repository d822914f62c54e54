// Views on a CPU: see simclr_kernels/reference.py for the formulas, augment_cpu.py for the calls.
#pragma once
#include <cstdint>

namespace simclr {

// RGB images of uint8, pixels of a row side by side. The caller has checked that they lie inside
// the memory.
struct Images {
    const std::uint8_t* memory;
    std::int64_t bytes;  // of the memory; nothing outside is read
    std::int64_t count;
    const std::int64_t* offsets;           // (count,) bytes, of packed images; null: dense ones
    const std::int64_t* sizes;             // (count, 2) height and width of packed images
    std::int64_t height, width;            // of dense images
    std::int64_t image_bytes, row_bytes;   // from one dense image, or row of it, to the next
};

// What is random about one view of one image: see AugmentParams in params.py.
struct ViewParams {
    std::int32_t y, x, height, width;  // of the crop
    bool flip, grayscale;
    std::int8_t order[4];  // 0 brightness, 1 contrast, 2 saturation, 3 hue
    float brightness, contrast, saturation, hue_turns;
    float sigma_px, solarize;
};

// The same of many views, each an array as AugmentParams has it.
struct ParamArrays {
    std::int32_t* crop;
    bool* flip;
    float *brightness, *contrast, *saturation, *hue_turns;
    std::int8_t* order;
    bool* grayscale;
    float *sigma_px, *solarize;

    ViewParams get(std::int64_t i) const;
    void set(std::int64_t i, const ViewParams& params) const;
};

enum class Dtype { FLOAT32, FLOAT16, BFLOAT16 };

// What all views of a call share.
struct ViewFormat {
    std::int64_t size;
    bool add_brightness;  // brightness is an addend, neutral 0, instead of a factor
    bool normalize;
    float mean[3], std[3];
    Dtype dtype;
    bool channels_last;
    void* views;  // (count, 3, size, size), contiguous in its layout
};

// The ranges and probabilities of AugmentConfig, drawn by the sampler "tensorflow".
struct ViewRanges {
    bool crop;
    double area[2], aspect[2], min_covered;
    double flip, jitter, brightness, contrast, saturation, hue, grayscale;
    bool add_brightness;
    double blur[2], solarize[2], sigma_px[2];
};

// The counters of the random numbers: see sample_params in params.py.
struct DrawKey {
    std::uint64_t seed;
    std::uint32_t epoch;
};

// Draws view `view` of an image.
ViewParams sample_view(const ViewRanges& ranges, DrawKey key, std::uint32_t index,
                       std::uint32_t view, std::int64_t height, std::int64_t width);

// The same for many images, of sizes (count, 2), and their numbers in the data set.
void sample_views(const ViewRanges& ranges, DrawKey key, std::uint32_t view,
                  const std::int64_t* index, const std::int64_t* sizes, std::int64_t count,
                  const ParamArrays& out);

// One view of each image, by params.
void augment_views(const Images& images, const ParamArrays& params, const ViewFormat& format,
                   int threads);

// Views 0 and 1 of each image, of its number in the data set (count,): view-major.
void augment_two_views(const Images& images, const ViewRanges& ranges, DrawKey key,
                       const std::int64_t* index, const ViewFormat& format, int threads);

}  // namespace simclr
