// Cuts a box out of an image and resizes it, a row of the view at a time.
//
// A row of the source is resized along x first, straight from its bytes: the 4 pixels behind an
// output are 12 bytes in a row, one load. The last four rows so resized are then blended along y.
#pragma once
#include "augment_kernels.h"
#include "simd.h"

namespace simclr {
namespace SIMD_NAME {

constexpr std::int64_t POSITIONS = 1 << 10;  // in a pixel
constexpr std::int64_t PREFETCHED_ROWS = 4;  // a row in memory takes longer to come than to resize
constexpr float KEYS_A = -0.5f;

SIMD_INLINE Vec clip(Vec x) { return smaller(larger(x, Vec{}), splat(1.0f)); }

// Planar pixels of one row.
struct Row {
    float* at;
    std::int64_t plane;  // from one channel to the next
};

// first[i] and weights[k][i]: output i is the sum of pixel first[i] + k of the crop times
// weights[k][i], k = 0 .. 3. See resize_taps in reference.py; here the first pixel is moved into
// the crop and the weights with it. fraction (stride,) is overwritten, all rows are of stride.
void resize_table(std::int64_t length, std::int64_t out, bool flip, std::int32_t* first,
                  float* weights, std::int64_t stride) {
    // position = ((2 i + 1) length - out) 2^10 / (2 out), rounded to even, step by step
    const std::int64_t den = 2 * out, step = 2 * length * POSITIONS;
    const std::int64_t num = (length - out) * POSITIONS + out;
    std::int64_t position = num / den - (num % den < 0), rest = num - position * den;
    const std::int64_t whole = step / den, part = step % den;
    float* fraction = weights;
    for (std::int64_t i = 0; i < out; ++i) {
        const std::int64_t even = position - (rest == 0 && (position & 1));
        const std::int64_t k = flip ? out - 1 - i : i;
        const std::int64_t inside = even & (POSITIONS - 1);
        first[k] = std::int32_t((even - inside) / POSITIONS) - 1;
        fraction[k] = float(inside) * (1.0f / POSITIONS);
        position += whole;
        rest += part;
        const bool carry = rest >= den;
        position += carry;
        rest -= carry ? den : 0;
    }
    for (std::int64_t i = out; i < stride; ++i) {
        first[i] = 0;
        fraction[i] = 0;
    }
    for (std::int64_t i = 0; i < stride; i += FLOATS) {
        const IntVec pixel = *reinterpret_cast<const UnalignedIntVec*>(first + i);
        const Vec f = load(fraction + i);
        Vec weight[4], total = {};
        for (int k = 0; k < 4; ++k) {
            const Vec d = k < 2 ? f + float(1 - k) : float(k - 1) - f;
            const Vec near = ((KEYS_A + 2) * d - (KEYS_A + 3)) * d * d + 1;
            const Vec far = ((KEYS_A * d - 5 * KEYS_A) * d + 8 * KEYS_A) * d - 4 * KEYS_A;
            const IntVec inside = (pixel + k >= 0) & (pixel + k < std::int32_t(length));
            weight[k] = (Vec)((IntVec)(k == 1 || k == 2 ? near : far) & inside);
            total += weight[k];
        }
        for (int k = 0; k < 4; ++k) store(weights + k * stride + i, weight[k] / total);
    }
    const std::int64_t last = length > 4 ? length - 4 : 0;
    for (std::int64_t i = 0; i < out; ++i) {
        const std::int64_t move = std::min(std::max<std::int64_t>(first[i], 0), last) - first[i];
        if (move == 0) continue;
        float moved[4];
        for (int k = 0; k < 4; ++k)
            moved[k] = k + move < 0 || k + move > 3 ? 0 : weights[(k + move) * stride + i];
        for (int k = 0; k < 4; ++k) weights[k * stride + i] = moved[k];
        first[i] += std::int32_t(move);
    }
    for (int k = 0; k < 4; ++k) std::fill(weights + k * stride + out, weights + (k + 1) * stride, 0);
}

// How a row of bytes becomes a row of the view. Channels are left in the byte of the 32-bit word
// that they are loaded in, and the weights take the powers of 2^8 back.
class ColumnTable {
   public:
    ColumnTable(const Crop& crop, std::int64_t out, bool flip, const Scratch& s, float* memory)
        : stride(s.stride), groups(memory + s.column_table()) {
        auto* offsets = reinterpret_cast<std::int32_t*>(memory + s.resized());
        float* weights = memory + s.resized() + stride;  // the rows are not there yet
        resize_table(crop.width, out, flip, offsets, weights, stride);
        float* group = groups;
        for (std::int64_t i = 0; i < stride; i += FLOATS, group += GROUP) {
            Vec w[4];
            for (int k = 0; k < 4; ++k) w[k] = load(weights + k * stride + i) * (1.0f / 255);
            const Vec scaled[10] = {w[0],          w[0] * 0x1p-8f, w[0] * 0x1p-16f, w[1],
                                    w[1] * 0x1p-8f, w[2],          w[2] * 0x1p-16f, w[3],
                                    w[3] * 0x1p-8f, w[3] * 0x1p-16f};
            for (int k = 0; k < 10; ++k) store(group + k * FLOATS, scaled[k]);
            auto* at = reinterpret_cast<std::int32_t*>(group + 10 * FLOATS);
            for (int k = 0; k < FLOATS; ++k) {
                at[k] = 3 * offsets[i + k];
                reach = std::max<std::int64_t>(reach, at[k] + WINDOW_BYTES);
            }
        }
    }

    // One row of the crop at the width of the view, three planes of stride.
    void resize(const Crop& crop, std::int64_t row, float* out) const {
        const std::uint8_t* bytes = crop.pixels + row * crop.row_bytes;
        if (bytes + reach > crop.end) {
            std::memcpy(crop.tail, bytes, 3 * crop.width);
            bytes = crop.tail;
        }
        if (row + PREFETCHED_ROWS < crop.height) {
            const std::uint8_t* later = bytes + PREFETCHED_ROWS * crop.row_bytes;
            for (std::int64_t i = 0; i < 3 * crop.width; i += 64) __builtin_prefetch(later + i);
        }
        const std::int64_t n = stride;
        const float* group = groups;
        for (std::int64_t i = 0; i < n; i += FLOATS, group += GROUP) {
            const auto* at = reinterpret_cast<const std::int32_t*>(group + 10 * FLOATS);
            BitsVec word[3];
            columns_of_quads(load_quads(bytes, at, 4), load_quads(bytes, at + 1, 4),
                             load_quads(bytes, at + 2, 4), load_quads(bytes, at + 3, 4), word,
                             std::make_integer_sequence<int, FLOATS>{});
            const auto term = [&](int k, BitsVec byte) {
                return load(group + k * FLOATS) * to_float((IntVec)byte);
            };
            const BitsVec A = word[0], B = word[1], C = word[2];
            // R0 G0 B0 R1 | G1 B1 R2 G2 | B2 R3 G3 B3
            store(out + i, term(0, A & 0xff) + term(3, A >> 24) + term(6, B & 0xff0000) +
                               term(8, C & 0xff00));
            store(out + n + i, term(1, A & 0xff00) + term(3, B & 0xff) + term(5, B >> 24) +
                                   term(9, C & 0xff0000));
            store(out + 2 * n + i, term(2, A & 0xff0000) + term(4, B & 0xff00) +
                                       term(5, C & 0xff) + term(7, C >> 24));
        }
    }

   private:
    // of FLOATS outputs: ten vectors of weights and one of offsets in bytes
    static constexpr std::int64_t GROUP = 11 * FLOATS;
    std::int64_t stride;
    float* groups;
    std::int64_t reach = 0;
};

// Hands out the rows of the resized crop, from the first to the last.
class ResizedRows {
   public:
    ResizedRows(const Crop& crop, std::int64_t size, bool flip, const Scratch& s, float* memory)
        : crop(crop),
          columns(crop, size, flip, s, memory),
          stride(s.stride),
          weights(memory + s.row_table()),
          first(reinterpret_cast<std::int32_t*>(memory + s.row_table() + 4 * stride)),
          rows(memory + s.resized()) {
        resize_table(crop.height, size, false, first, weights, stride);
    }

    // The four rows and weights behind a row of the view.
    struct Blend {
        const float* rows[4];
        Vec weights[4];
        std::int64_t stride;

        SIMD_INLINE Vec operator()(int channel, std::int64_t i) const {
            const std::int64_t at = channel * stride + i;
            return (weights[0] * load(rows[0] + at) + weights[1] * load(rows[1] + at)) +
                   (weights[2] * load(rows[2] + at) + weights[3] * load(rows[3] + at));
        }
    };

    // Row y, good until another is asked for.
    Blend row(std::int64_t y) {
        Blend blend{};
        blend.stride = stride;
        for (int k = 0; k < 4; ++k) {
            const std::int64_t source = std::min<std::int64_t>(first[y] + k, crop.height - 1);
            float* resized = rows + (source & 3) * 3 * stride;
            if (held[source & 3] != source) columns.resize(crop, source, resized);
            held[source & 3] = source;
            blend.rows[k] = resized;
            blend.weights[k] = splat(weights[k * stride + y]);
        }
        return blend;
    }

   private:
    const Crop& crop;
    ColumnTable columns;
    std::int64_t stride;
    float* weights;  // (4, stride)
    std::int32_t* first;
    float* rows;  // the last four resized rows, number r at r & 3
    std::int64_t held[4] = {-1, -1, -1, -1};
};

}  // namespace SIMD_NAME
}  // namespace simclr
