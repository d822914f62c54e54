// What ntxent.cpp, which says who works on which block when, shares with the kernels of a block.
#pragma once
#include <cstdint>

namespace simclr {

constexpr double LN2 = 0.69314718055994530942;
constexpr float NORM_FLOOR = 1e-12f;  // of the squared norm
constexpr std::int64_t MAX_BLOCK_ROWS = 128;
constexpr std::int64_t WEIGHTS_STRIDE = MAX_BLOCK_ROWS + 16;  // rows in different cache sets
constexpr std::int64_t WEIGHTS_FLOATS = MAX_BLOCK_ROWS * WEIGHTS_STRIDE;
constexpr std::int64_t MAX_WIDTH = 32;  // of a register tile, over all instruction sets

struct Norm {
    float inverse;
    float kept;  // 1 where the gradient loses its part along the row, 0 under the floor
};

// Sums over the negatives of the rows asked for, padded to whole blocks. Exponents are logits in
// base 2 less Problem::shift.
struct Sums {
    double* mass;    // of 2^(exponent - level); the level is 0 if bounded, otherwise `top`
    float* top;      // largest exponent; kept unless bounded without metrics
    double* spread;  // with metrics: sum of 2^(exponent - level) (exponent - level)
};

// What all blocks share. "Local" rows are those asked for.
struct Problem {
    std::int64_t features;
    std::int64_t padded_features;  // a multiple of MAX_WIDTH
    std::int64_t block_rows;       // 32, 64 or 128
    std::int64_t stride;           // of the transposed copy of a block
    bool normalize;
    bool bounded;       // see NtxentInput
    bool with_metrics;  // forward
    float scale;        // similarity -> logit in base 2
    float shift;        // bounded: 2^(logit - shift) is the term of the sums; otherwise 0

    const std::int32_t* positive;  // (local rows,) among the local rows
    Sums sums;                     // forward

    // backward
    const float* panels;          // of the local rows, block after block
    const Norm* norm;             // (local rows,)
    const float* positive_share;  // (local rows,) what the positive adds to the weights, positive
    float inv_tau;
    float unscale;                // takes back the power of two in the weights
    float* dz;                    // (local rows, features)
    float* along;                 // (local rows,) dz^ . z^, for the gradient in tau
};

// Unit rows of one block, zeros behind the last.
struct Block {
    const float* transposed;  // (padded features, Problem::stride)
    const float* panels;      // (padded features / WIDTH, block_rows, WIDTH), backward
    std::int64_t rows;        // those that exist, 1 to block_rows
    std::int64_t first;       // among the local rows; under 0 for the columns of others
    const float* top;         // backward, (block_rows,)
    const float* rate;        // backward, (block_rows,): dloss / total; 0 for extra negatives
};

struct Kernels {
    Norm (*norm)(const float* row, std::int64_t features, bool normalize);
    // s of two rows. Between close unit rows through their difference, which keeps its digits.
    double (*similarity)(const float* a, const float* b, Norm norm_a, Norm norm_b,
                         std::int64_t features);
    // writes both copies of a block of `rows` rows of source (see Block), and norms (block_rows,)
    void (*pack)(const Problem&, const float* source, std::int64_t rows, float* transposed,
                 float* panels, Norm* norms);
    // adds the columns b to the sums of the rows a and, if both_sides, the other way round
    void (*forward)(const Problem&, const Block& a, const Block& b, bool both_sides,
                    float* weights);
    // the same for the gradients of the unit rows
    void (*backward)(const Problem&, const Block& a, const Block& b, bool both_sides,
                     float* weights);
    // writes along (see Problem) of a block from the gradients so far
    void (*note_along)(const Problem&, const Block& a);
    // turns the gradients of the unit rows of a block, positives not yet in, into those of z
    void (*finish)(const Problem&, const Block& a);
};

#if defined(__x86_64__)
extern const Kernels ntxent_avx512, ntxent_avx2;
#endif
extern const Kernels ntxent_portable;

// The one in use.
const Kernels& ntxent_kernels();

}  // namespace simclr
