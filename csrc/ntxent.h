// NT-Xent on a CPU: see simclr_kernels/ntxent.py for the mathematics, ntxent_cpu.py for the calls.
#pragma once
#include <cstdint>

namespace simclr {

// Rows of float32, contiguous. The caller has checked shapes and values.
struct NtxentInput {
    const float* z;         // (rows, features)
    std::int64_t rows;      // even, 2 or more
    std::int64_t features;  // 1 or more
    std::int64_t span;      // rows of a group: the first half meets the second half as positives
    bool normalize;
    double tau;
    int threads;  // at most so many; the result does not depend on it

    std::int64_t first = 0, count = 0;  // the rows asked for, whole groups
    const float* negatives = nullptr;   // (extra, features), columns of every row
    std::int64_t extra = 0;

    // |logit| is known to fit float32 powers of two without a running maximum
    bool bounded() const { return normalize && tau >= 0.0128; }
};

// mass 2^top is the sum of exp(logit) over the negatives of each of `count` rows. metrics
// (3, count) or null: logit of the positive, largest logit of a negative, entropy in nats.
void ntxent_negative_sums(const NtxentInput& in, float* top, float* mass, float* metrics);

// loss (rows,) and stats (3, rows) from the top and mass (rows,) of all rows. stats: top; total,
// for which total 2^top is the sum over all candidates; the share of the negatives in that sum.
void ntxent_finish_rows(const NtxentInput& in, const float* top, const float* mass, float* loss,
                        float* stats);

// dz (count, features): gradient of sum_i dloss_i loss_i over all rows. Returns what the rows asked
// for add to the gradient in tau.
double ntxent_row_gradients(const NtxentInput& in, const float* stats, const float* dloss,
                            float* dz);

}  // namespace simclr
