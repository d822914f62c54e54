// What augment.cpp, which says which image goes where, shares with the kernels of one view.
#pragma once
#include <cstdint>

#include "augment.h"

namespace simclr {

constexpr std::int64_t MAX_FLOATS = 16;  // in a vector, over all instruction sets
constexpr std::int64_t WINDOW_BYTES = 16;  // that the crop loads at a time
constexpr std::int64_t BLUR_BLOCK = 8;     // rows that leave the blur together

// The pixels of a crop.
struct Crop {
    const std::uint8_t* pixels;
    std::int64_t row_bytes, height, width;
    const std::uint8_t* end;  // of the readable memory
    std::uint8_t* tail;       // (3 width + WINDOW_BYTES,) for a copy of a row near the end
};

// Where the parts of the working memory of a view lie, in floats.
struct Scratch {
    std::int64_t size;
    std::int64_t stride;  // of a row: the size, in whole vectors of any instruction set
    std::int64_t radius;  // of the blur
    std::int64_t pad;     // beside a row that is going to be blurred

    explicit Scratch(std::int64_t size)
        : size(size),
          stride((size + MAX_FLOATS - 1) / MAX_FLOATS * MAX_FLOATS),
          radius(size / 10 / 2),
          pad((radius + MAX_FLOATS - 1) / MAX_FLOATS * MAX_FLOATS) {}

    // The size in whole vectors.
    std::int64_t width(std::int64_t floats) const { return (size + floats - 1) / floats * floats; }

    std::int64_t blur_rows() const { return BLUR_BLOCK + 2 * radius; }
    std::int64_t column_table() const { return 0; }
    std::int64_t row_table() const { return 11 * stride; }
    std::int64_t resized() const { return row_table() + 5 * stride; }
    std::int64_t work() const { return resized() + 4 * 3 * stride; }
    std::int64_t padded() const { return work() + 3 * stride; }
    std::int64_t zeros() const { return padded() + 3 * (stride + 2 * pad); }
    std::int64_t taps() const { return zeros() + 3 * stride; }
    std::int64_t pointers() const { return taps() + pad + MAX_FLOATS; }
    std::int64_t ring() const { return pointers() + 2 * (BLUR_BLOCK + 2 * pad); }
    std::int64_t blurred() const { return ring() + blur_rows() * 3 * stride; }
    std::int64_t staged() const { return blurred() + BLUR_BLOCK * 3 * stride; }
    std::int64_t floats() const { return staged() + 3 * size * stride; }
};

struct ViewKernels {
    // writes one view to `out` (3, size, size); scratch has Scratch::floats
    void (*view)(const ViewFormat& format, const Crop& crop, const ViewParams& params,
                 float* scratch, void* out);
};

#if defined(__x86_64__)
extern const ViewKernels augment_avx512, augment_avx2;
#endif
extern const ViewKernels augment_portable;

}  // namespace simclr
