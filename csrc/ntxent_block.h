// One block of rows of the loss, for one instruction set: included by ntxent.cpp after simd.h.
// No include guard, on purpose.
//
// A block of rows meets the columns in groups of BLOCK_COLUMNS. Its logits fill a buffer that stays
// in the second-level cache; only this buffer ever holds similarities. Both products, rows by
// columns and weights by rows, are `multiply` with the right side packed in panels.

constexpr int ROWS = SIMD_FLOATS >= 16 ? 8 : 4;  // of one register tile
constexpr int WIDTH = 2 * SIMD_FLOATS;           // columns of one register tile and of a panel

// c (ROWS, WIDTH) = a (ROWS, depth) b (depth, WIDTH), or += .
SIMD_INLINE void multiply_tile(const float* a, std::int64_t a_stride, const float* b,
                               std::int64_t depth, float* c, std::int64_t c_stride, bool add) {
    Vec acc[ROWS][2] = {};
    for (std::int64_t k = 0; k < depth; ++k) {
        const Vec left = load(b + k * WIDTH), right = load(b + k * WIDTH + SIMD_FLOATS);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const float x = a[r * a_stride + k];
            acc[r][0] += x * left;
            acc[r][1] += x * right;
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
        float* out = c + r * c_stride;
        store(out, add ? load(out) + acc[r][0] : acc[r][0]);
        store(out + SIMD_FLOATS, add ? load(out + SIMD_FLOATS) + acc[r][1] : acc[r][1]);
    }
}

// c (rows, width) = a (rows, depth) b (depth, width), or += ; b in panels (width / WIDTH, depth, WIDTH).
SIMD_TARGET inline void multiply(const float* a, std::int64_t a_stride, const float* b,
                                 std::int64_t rows, std::int64_t depth, std::int64_t width, float* c,
                                 std::int64_t c_stride, bool add) {
    // a slice of a panel that fits the first-level cache serves all rows
    constexpr std::int64_t DEPTH = 128;
    for (std::int64_t k = 0; k < depth; k += DEPTH) {
        const std::int64_t slice = depth - k < DEPTH ? depth - k : DEPTH;
        for (std::int64_t j = 0; j < width; j += WIDTH)
            for (std::int64_t r = 0; r < rows; r += ROWS)
                multiply_tile(a + r * a_stride + k, a_stride, b + j * depth + k * WIDTH, slice,
                              c + r * c_stride + j, c_stride, add || k > 0);
    }
}

// Unit row i, its inverse norm, and its place among the column panels (and the feature panels).
SIMD_TARGET inline void pack_row(const Problem& p, std::int64_t i) {
    const std::int64_t D = p.in.features;
    float* unit = p.unit + i * p.padded_features;
    std::copy_n(p.in.z + i * D, D, unit);
    if (p.in.normalize) {
        const float square = dot(unit, unit, p.padded_features);
        const float inv_norm = 1.0f / std::sqrt(square < NORM_FLOOR ? NORM_FLOOR : square);
        for (std::int64_t d = 0; d < D; ++d) unit[d] *= inv_norm;
        p.inv_norm[i] = inv_norm;
        p.projected[i] = !(square < NORM_FLOOR);
    }
    const std::int64_t group = i / BLOCK_COLUMNS, k = i % BLOCK_COLUMNS;
    float* columns = p.columns + group * BLOCK_COLUMNS * D + k / WIDTH * WIDTH * D + k % WIDTH;
    for (std::int64_t d = 0; d < D; ++d) columns[d * WIDTH] = unit[d];
    if (!p.features) return;
    float* features = p.features + group * BLOCK_COLUMNS * p.padded_features + k * WIDTH;
    for (std::int64_t d = 0; d < p.padded_features; d += WIDTH)
        std::copy_n(unit + d, WIDTH, features + d * BLOCK_COLUMNS);
}

// Logits of `rows` rows and BLOCK_COLUMNS columns in base 2; -inf where a column is no negative.
SIMD_TARGET inline void block_logits(const Problem& p, std::int64_t first_row, std::int64_t rows,
                                     std::int64_t first_column, float* logits) {
    multiply(p.unit + first_row * p.padded_features, p.padded_features,
             p.columns + first_column * p.in.features, rows, p.in.features, BLOCK_COLUMNS, logits,
             LOGITS_STRIDE, false);
    for (std::int64_t r = 0; r < rows; ++r) {
        float* row = logits + r * LOGITS_STRIDE;
        for (int j = 0; j < BLOCK_COLUMNS; j += SIMD_FLOATS) store(row + j, load(row + j) * p.scale);
        for (std::int64_t out : {first_row + r, p.positive(first_row + r)})
            if (out >= first_column && out < first_column + BLOCK_COLUMNS)
                row[out - first_column] = -INFINITY;
        for (std::int64_t j = p.in.rows - first_column; j < BLOCK_COLUMNS; ++j) row[j] = -INFINITY;
    }
}

// s_ip. Between close unit rows through their difference, which keeps its digits.
SIMD_TARGET inline double positive_similarity(const Problem& p, std::int64_t i) {
    const std::int64_t partner = p.positive(i), n = p.padded_features;
    const float *own = p.row(i), *other = p.row(partner);
    const float s = dot(own, other, n);
    if (!p.in.normalize || !p.projected[i] || !p.projected[partner] || !(s > 0.5f)) return s;
    Vec total = {};
    for (std::int64_t d = 0; d < n; d += SIMD_FLOATS) {
        const Vec gap = load(own + d) - load(other + d);
        total += gap * gap;
    }
    return 1.0 - 0.5 * sum(total);
}

SIMD_TARGET void forward_rows(const Problem& p, std::int64_t first_row, float* scratch, float* loss,
                              float* top_out, float* mass_out, float* negative_share) {
    const std::int64_t rows = std::min(p.block_rows, p.in.rows - first_row);
    float* logits = scratch;
    float top[MAX_BLOCK_ROWS];
    double mass[MAX_BLOCK_ROWS] = {};
    std::fill_n(top, rows, p.bounded ? p.shift : -INFINITY);
    for (std::int64_t column = 0; column < p.in.rows; column += BLOCK_COLUMNS) {
        block_logits(p, first_row, p.block_rows, column, logits);
        for (std::int64_t r = 0; r < rows; ++r) {
            const float* row = logits + r * LOGITS_STRIDE;
            if (!p.bounded) {
                Vec seen = splat(top[r]);
                for (int j = 0; j < BLOCK_COLUMNS; j += SIMD_FLOATS) seen = larger(load(row + j), seen);
                // finite, so that a row without negatives so far does not subtract infinities
                const float grown = std::max(largest(seen), -std::numeric_limits<float>::max());
                mass[r] *= std::exp2(double(top[r]) - grown);
                top[r] = grown;
            }
            Vec total = {};
            for (int j = 0; j < BLOCK_COLUMNS; j += SIMD_FLOATS) total += exp2(load(row + j) - top[r]);
            mass[r] += sum(total);
        }
    }
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t i = first_row + r;
        const double logit = positive_similarity(p, i) / (p.in.tau * LN2);
        const double excess = (top[r] - logit) * LN2 + std::log(mass[r]);
        loss[i] = float((excess < 0 ? 0 : excess) + std::log1p(std::exp(-std::fabs(excess))));
        negative_share[i] = float(1 / (1 + std::exp(-excess)));
        const double level = p.bounded ? p.shift : std::max(double(top[r]), logit);
        top_out[i] = float(level);
        mass_out[i] =
            float(mass[r] * std::exp2(top[r] - top_out[i]) + std::exp2(logit - top_out[i]));
    }
}

// Turns the logits of row i into the weights of their columns in its gradient.
SIMD_TARGET inline void logits_to_weights(const Problem& p, std::int64_t i, std::int64_t first_column,
                                          float* row) {
    const float* top = p.top + first_column;
    const float* rate = p.rate + first_column;
    for (int j = 0; j < BLOCK_COLUMNS; j += SIMD_FLOATS) {
        const Vec logit = load(row + j);
        if (p.bounded)
            store(row + j, exp2(logit - p.shift) * (p.rate[i] + load(rate + j)));
        else
            store(row + j, exp2(logit - p.top[i]) * p.rate[i] +
                               exp2(logit - load(top + j)) * load(rate + j));
    }
}

// Gradient of a block of rows; dz^ . z^ of each goes to `along`, for the gradient in tau.
SIMD_TARGET void backward_rows(const Problem& p, std::int64_t first_row, float* scratch,
                               const float* negative_share, float* dz, float* along) {
    const std::int64_t rows = std::min(p.block_rows, p.in.rows - first_row);
    float* logits = scratch;
    float* acc = scratch + p.block_rows * LOGITS_STRIDE;
    std::fill_n(acc, p.block_rows * p.padded_features, 0.0f);
    for (std::int64_t column = 0; column < p.in.rows; column += BLOCK_COLUMNS) {
        block_logits(p, first_row, p.block_rows, column, logits);
        for (std::int64_t r = 0; r < rows; ++r)
            logits_to_weights(p, first_row + r, column, logits + r * LOGITS_STRIDE);
        multiply(logits, LOGITS_STRIDE, p.features + column * p.padded_features, p.block_rows,
                 BLOCK_COLUMNS, p.padded_features, acc, p.padded_features, true);
    }
    const std::int64_t D = p.in.features;
    for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t i = first_row + r, partner = p.positive(i);
        const float* own = p.row(i);
        const float* other = p.row(partner);
        float* sum_w = acc + r * p.padded_features;
        const float weight = -(p.dloss[i] * negative_share[i] + p.dloss[partner] * negative_share[partner]);
        const bool projected = p.in.normalize && p.projected[i];
        // the difference keeps the digits of a close pair; what it adds along z^ the projection removes
        const float kept = projected ? 1.0f : 0.0f;
        for (std::int64_t d = 0; d < D; ++d) sum_w[d] += weight * (other[d] - kept * own[d]);
        const float inner = dot(sum_w, own, p.padded_features);
        along[i] = inner + kept * weight;
        const float scale = p.unscale * (p.in.normalize ? p.inv_norm[i] : 1.0f);
        for (std::int64_t d = 0; d < D; ++d)
            dz[i * D + d] = scale * (sum_w[d] - kept * inner * own[d]);
    }
}
