// The kernels of one pair of blocks, for the instruction set of the file that includes this.
//
// A block of similarities, then of their exponentials or weights, fills a buffer that stays in the
// second-level cache; nothing else ever holds similarities. All three products are register tiles
// of ROWS rows and WIDTH columns: rows by rows, and the weights and their transpose by rows.
#pragma once
#include "ntxent_kernels.h"
#include "simd.h"

namespace simclr {
namespace SIMD_NAME {

constexpr int ROWS = FLOATS == 16 ? 8 : FLOATS == 8 ? 6 : 4;  // accumulators leave room to load
constexpr int LAST_ROWS = 32 % ROWS ? 2 : ROWS;  // of the tiles behind the last whole one
constexpr int WIDTH = 2 * FLOATS;
constexpr std::int64_t DEPTH = 128;  // a panel of so many rows fits the first-level cache
constexpr float NONE = -std::numeric_limits<float>::max();

SIMD_INLINE std::int64_t round_up(std::int64_t x, std::int64_t step) {
    return (x + step - 1) / step * step;
}

// acc[r, :] = sum of a[r, k] b[k, :] over k.
template <int R>
SIMD_INLINE void multiply_tile(Vec (&acc)[R][2], const float* a, std::int64_t a_row,
                               std::int64_t a_step, const float* b, std::int64_t b_step,
                               std::int64_t depth) {
    for (std::int64_t k = 0; k < depth; ++k) {
        const Vec left = load(b), right = load(b + FLOATS);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            const float x = a[r * a_row];
            acc[r][0] += x * left;
            acc[r][1] += x * right;
        }
        a += a_step;
        b += b_step;
    }
}

template <int R>
SIMD_INLINE void add_tile(Vec (&acc)[R][2], const float* c, std::int64_t c_row) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        acc[r][0] += load(c + r * c_row);
        acc[r][1] += load(c + r * c_row + FLOATS);
    }
}

template <int R>
SIMD_INLINE void store_tile(const Vec (&acc)[R][2], float* c, std::int64_t c_row) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        store(c + r * c_row, acc[r][0]);
        store(c + r * c_row + FLOATS, acc[r][1]);
    }
}

template <int R, class Map>
SIMD_INLINE void map_tile(Vec (&acc)[R][2], const Map& map, std::int64_t row, std::int64_t column) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
        acc[r][0] = map(acc[r][0], row + r, column);
        acc[r][1] = map(acc[r][1], row + r, column + FLOATS);
    }
}

// visit(rows of the tile, its first row) until `rows` rows are covered.
template <class Visit>
SIMD_INLINE void row_tiles(std::int64_t rows, const Visit& visit) {
    std::int64_t r = 0;
    for (; r + ROWS <= round_up(rows, LAST_ROWS); r += ROWS)
        visit(std::integral_constant<int, ROWS>{}, r);
    if constexpr (LAST_ROWS < ROWS)
        for (; r < rows; r += LAST_ROWS) visit(std::integral_constant<int, LAST_ROWS>{}, r);
}

// out[r, j] = map(s_rj, r, j) for the rows of a and the columns of b.
template <class Map>
SIMD_INLINE void map_similarities(const Problem& p, const Block& a, const Block& b, float* out,
                                  const Map& map) {
    const std::int64_t slices = (p.features + DEPTH - 1) / DEPTH;
    const std::int64_t slice = (p.features + slices - 1) / slices;
    for (std::int64_t k = 0; k < p.features; k += slice) {
        const std::int64_t depth = std::min(slice, p.features - k);
        const bool started = k > 0, complete = k + depth == p.features;
        const float* rows = a.transposed + k * p.stride;
        const float* columns = b.transposed + k * p.stride;
        for (std::int64_t j = 0; j < b.rows; j += WIDTH)
            row_tiles(a.rows, [&](auto R, std::int64_t r) __attribute__((always_inline)) {
                float* c = out + r * WEIGHTS_STRIDE + j;
                Vec acc[decltype(R)::value][2] = {};
                multiply_tile(acc, rows + r, 1, p.stride, columns + j, p.stride, depth);
                if (started) add_tile(acc, c, WEIGHTS_STRIDE);
                if (complete) map_tile(acc, map, r, j);
                store_tile(acc, c, WEIGHTS_STRIDE);
            });
    }
}

// c (rows, features) += w panels, where w[r, k] is w[r w_row + k w_step].
SIMD_INLINE void add_product(const Problem& p, const float* w, std::int64_t w_row,
                             std::int64_t w_step, std::int64_t rows, const Block& b, float* c) {
    const std::int64_t D = p.features;
    for (std::int64_t j = 0; j < D; j += WIDTH)
        row_tiles(rows, [&](auto R, std::int64_t r) __attribute__((always_inline)) {
            constexpr int HEIGHT = decltype(R)::value;
            float* out = c + r * D + j;
            const bool whole = r + HEIGHT <= rows && j + WIDTH <= D;
            if (whole)
                for (int q = 0; q < HEIGHT; ++q) __builtin_prefetch(out + q * D, 1);
            Vec acc[HEIGHT][2] = {};
            multiply_tile(acc, w + r * w_row, w_row, w_step, b.panels + j * p.block_rows, WIDTH,
                          b.rows);
            if (whole) {
                add_tile(acc, out, D);
                store_tile(acc, out, D);
                return;
            }
            float part[HEIGHT][WIDTH];
            store_tile(acc, part[0], WIDTH);
            for (int q = 0; q < HEIGHT && r + q < rows; ++q)
                for (int d = 0; d < WIDTH && j + d < D; ++d) out[q * D + d] += part[q][d];
        });
}

// Writes value where the column is no negative of the row: itself, its positive, or not there.
SIMD_INLINE void mask(const Problem& p, const Block& a, const Block& b, float value, float* out) {
    for (std::int64_t j = b.rows; j < round_up(b.rows, WIDTH); ++j)
        for (std::int64_t r = 0; r < a.rows; ++r) out[r * WEIGHTS_STRIDE + j] = value;
    if (b.first < 0) return;
    for (std::int64_t r = 0; r < a.rows; ++r) {
        const std::int64_t j = p.positive[a.first + r] - b.first;
        if (j >= 0 && j < b.rows) out[r * WEIGHTS_STRIDE + j] = value;
    }
    if (a.first == b.first)
        for (std::int64_t r = 0; r < a.rows; ++r) out[r * WEIGHTS_STRIDE + r] = value;
}

SIMD_INLINE void add_each(double* to, Vec v) {
    float each[FLOATS];
    store(each, v);
    for (int k = 0; k < FLOATS; ++k) to[k] += each[k];
}

// Adds a block of terms to the masses of its rows and its columns.
SIMD_INLINE void add_terms(const Problem& p, const Block& a, const Block& b, bool both_sides,
                           const float* terms) {
    Vec by_row[MAX_BLOCK_ROWS];
    std::fill_n(by_row, a.rows, Vec{});
    for (std::int64_t j = 0; j < b.rows; j += WIDTH) {
        Vec left = {}, right = {};
        for (std::int64_t r = 0; r < a.rows; ++r) {
            const Vec x = load(terms + r * WEIGHTS_STRIDE + j);
            const Vec y = load(terms + r * WEIGHTS_STRIDE + j + FLOATS);
            by_row[r] = by_row[r] + x + y;
            left += x;
            right += y;
        }
        if (!both_sides) continue;
        add_each(p.sums.mass + b.first + j, left);
        add_each(p.sums.mass + b.first + j + FLOATS, right);
    }
    for (std::int64_t r = 0; r < a.rows; ++r) p.sums.mass[a.first + r] += sum(by_row[r]);
}

// The level of row i once it has seen an exponent: 0, or the running maximum. Rescales its sums.
SIMD_INLINE float raise_level(const Problem& p, std::int64_t i, float seen) {
    Sums s = p.sums;
    const float old = s.top[i];
    // finite, so that a row without negatives so far does not subtract infinities
    s.top[i] = seen > old ? seen : old;
    if (p.bounded) return 0.0f;
    if (s.top[i] > old && s.mass[i] != 0.0) {
        const double up = double(s.top[i]) - old, factor = std::exp2(-up);
        if (p.with_metrics) s.spread[i] = factor * (s.spread[i] - up * s.mass[i]);
        s.mass[i] *= factor;
    }
    return s.top[i];
}

SIMD_INLINE void add_exponents(const Problem& p, const Block& a, const Block& b, bool both_sides,
                               const float* exponents) {
    const std::int64_t columns = round_up(b.rows, WIDTH);
    for (std::int64_t r = 0; r < a.rows; ++r) {
        const float* row = exponents + r * WEIGHTS_STRIDE;
        const std::int64_t i = a.first + r;
        Vec seen = splat(NONE), total = {}, spread = {};
        for (std::int64_t j = 0; j < columns; j += FLOATS) seen = larger(load(row + j), seen);
        const float level = raise_level(p, i, largest(seen));
        for (std::int64_t j = 0; j < columns; j += FLOATS) {
            const Vec x = load(row + j) - level, term = exp2(x);
            total += term;
            spread += term * larger(x, splat(-200.0f));
        }
        p.sums.mass[i] += sum(total);
        if (p.with_metrics) p.sums.spread[i] += sum(spread);
    }
    if (!both_sides) return;
    for (std::int64_t j = 0; j < b.rows; j += FLOATS) {
        const float* column = exponents + j;
        const std::int64_t i = b.first + j;
        Vec seen = splat(NONE), total = {}, spread = {};
        for (std::int64_t r = 0; r < a.rows; ++r)
            seen = larger(load(column + r * WEIGHTS_STRIDE), seen);
        float each[FLOATS];
        store(each, seen);
        for (int k = 0; k < FLOATS; ++k) each[k] = raise_level(p, i + k, each[k]);
        const Vec level = load(each);
        for (std::int64_t r = 0; r < a.rows; ++r) {
            const Vec x = load(column + r * WEIGHTS_STRIDE) - level, term = exp2(x);
            total += term;
            spread += term * larger(x, splat(-200.0f));
        }
        add_each(p.sums.mass + i, total);
        if (p.with_metrics) add_each(p.sums.spread + i, spread);
    }
}

void forward(const Problem& p, const Block& a, const Block& b, bool both_sides, float* weights) {
    const float scale = p.scale, shift = p.shift;
    if (p.bounded && !p.with_metrics) {
        const auto term = [&](Vec s, std::int64_t, std::int64_t) __attribute__((always_inline)) {
            return exp2_in_range(s * scale - shift);
        };
        map_similarities(p, a, b, weights, term);
        mask(p, a, b, 0.0f, weights);
        add_terms(p, a, b, both_sides, weights);
    } else {
        const auto exponent = [&](Vec s, std::int64_t, std::int64_t)
                                  __attribute__((always_inline)) { return s * scale - shift; };
        map_similarities(p, a, b, weights, exponent);
        mask(p, a, b, -std::numeric_limits<float>::infinity(), weights);
        add_exponents(p, a, b, both_sides, weights);
    }
}

void backward(const Problem& p, const Block& a, const Block& b, bool both_sides, float* weights) {
    const float scale = p.scale, shift = p.shift;
    if (p.bounded) {
        const auto weight = [&](Vec s, std::int64_t r, std::int64_t j)
                                __attribute__((always_inline)) {
            return exp2_in_range(s * scale - shift) * (a.rate[r] + load(b.rate + j));
        };
        map_similarities(p, a, b, weights, weight);
    } else {
        const auto weight = [&](Vec s, std::int64_t r, std::int64_t j)
                                __attribute__((always_inline)) {
            // rounded as in the forward, where it made the total
            const Vec logit = s * scale - shift;
            return exp2(logit - a.top[r]) * a.rate[r] +
                   exp2(logit - load(b.top + j)) * load(b.rate + j);
        };
        map_similarities(p, a, b, weights, weight);
    }
    mask(p, a, b, 0.0f, weights);
    add_product(p, weights, WEIGHTS_STRIDE, 1, a.rows, b, p.dz + a.first * p.features);
    if (both_sides)
        add_product(p, weights, 1, WEIGHTS_STRIDE, b.rows, a, p.dz + b.first * p.features);
}

SIMD_INLINE float dot(const float* a, const float* b, std::int64_t n) {
    Vec total = {};
    for (std::int64_t d = 0; d < n; d += FLOATS)
        total += load_some(a + d, n - d) * load_some(b + d, n - d);
    return sum(total);
}

Norm norm(const float* row, std::int64_t features, bool normalize) {
    if (!normalize) return {1.0f, 0.0f};
    const float square = dot(row, row, features);
    if (square < NORM_FLOOR) return {1.0f / std::sqrt(NORM_FLOOR), 0.0f};
    return {1.0f / std::sqrt(square), 1.0f};
}

double similarity(const float* a, const float* b, Norm norm_a, Norm norm_b, std::int64_t features) {
    Vec product = {}, square = {};
    for (std::int64_t d = 0; d < features; d += FLOATS) {
        const Vec x = load_some(a + d, features - d) * norm_a.inverse;
        const Vec y = load_some(b + d, features - d) * norm_b.inverse;
        product += x * y;
        square += (x - y) * (x - y);
    }
    const float s = sum(product);
    const bool close = norm_a.kept * norm_b.kept != 0.0f && s > 0.5f;
    return close ? 1.0 - 0.5 * sum(square) : s;
}

void pack(const Problem& p, const float* source, std::int64_t rows, float* transposed,
          float* panels, Norm* norms) {
    const std::int64_t D = p.features, height = p.block_rows;
    for (std::int64_t r = 0; r < height; ++r) {
        const float* row = source + r * D;
        norms[r] = r < rows ? norm(row, D, p.normalize) : Norm{};
        for (std::int64_t d = 0; d < p.padded_features; d += FLOATS) {
            const Vec x = r < rows && d < D ? load_some(row + d, D - d) * norms[r].inverse : Vec{};
            store(panels + d / WIDTH * WIDTH * height + r * WIDTH + d % WIDTH, x);
        }
    }
    for (std::int64_t d = 0; d < p.padded_features; d += FLOATS)
        for (std::int64_t r = 0; r < height; r += FLOATS) {
            const float* corner = panels + d / WIDTH * WIDTH * height + r * WIDTH + d % WIDTH;
            Vec square[FLOATS];
            for (int k = 0; k < FLOATS; ++k) square[k] = load(corner + k * WIDTH);
            transpose(square);
            for (int k = 0; k < FLOATS; ++k) store(transposed + (d + k) * p.stride + r, square[k]);
        }
}

// Unit row i, which lies in panels; at(d) are its features from d on.
struct UnitRow {
    const float* start;
    std::int64_t panel;

    UnitRow(const Problem& p, std::int64_t i)
        : start(p.panels + i / p.block_rows * p.block_rows * p.padded_features +
                i % p.block_rows * WIDTH),
          panel(p.block_rows * WIDTH) {}
    Vec at(std::int64_t d) const { return load(start + d / WIDTH * panel + d % WIDTH); }
};

void note_along(const Problem& p, const Block& a) {
    for (std::int64_t i = a.first; i < a.first + a.rows; ++i) {
        const float* row = p.dz + i * p.features;
        const UnitRow own(p, i);
        Vec inner = {};
        for (std::int64_t d = 0; d < p.features; d += FLOATS)
            inner += load_some(row + d, p.features - d) * own.at(d);
        p.along[i] = sum(inner);
    }
}

void finish(const Problem& p, const Block& a) {
    const std::int64_t D = p.features;
    for (std::int64_t i = a.first; i < a.first + a.rows; ++i) {
        float* row = p.dz + i * D;
        const std::int64_t partner = p.positive[i];
        const UnitRow own(p, i), other(p, partner);
        const float weight = -(p.positive_share[i] + p.positive_share[partner]);
        // the difference keeps the digits of a close pair; what it adds along z^ the projection
        // removes
        const float kept = p.norm[i].kept;
        Vec products = {};
        for (std::int64_t d = 0; d < D; d += FLOATS) {
            const Vec x = load_some(row + d, D - d) + weight * (other.at(d) - kept * own.at(d));
            products += x * own.at(d);
            store_some(row + d, x, D - d);
        }
        const float inner = sum(products), scale = p.inv_tau * p.norm[i].inverse;
        p.along[i] += inner + kept * weight;
        for (std::int64_t d = 0; d < D; d += FLOATS) {
            // not one factor: that may overflow where the gradient does not
            const Vec x = scale * (load_some(row + d, D - d) - kept * inner * own.at(d));
            store_some(row + d, p.unscale * x, D - d);
        }
    }
}

}  // namespace SIMD_NAME

extern const Kernels SIMD_TABLE(ntxent_) = {
    SIMD_NAME::norm,     SIMD_NAME::similarity, SIMD_NAME::pack,   SIMD_NAME::forward,
    SIMD_NAME::backward, SIMD_NAME::note_along, SIMD_NAME::finish,
};

}  // namespace simclr
