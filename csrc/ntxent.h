// NT-Xent on a CPU: see fused_nt_xent in simclr_kernels/ntxent.py for the mathematics.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

namespace simclr {

// Rows of float32, contiguous. The caller has checked shapes and values.
struct NtxentInput {
    const float* z;         // (rows, features)
    std::int64_t rows;      // even, 2 or more
    std::int64_t features;  // 1 or more
    bool interleaved;       // the positive of row i is i ^ 1, otherwise (i + rows / 2) % rows
    bool normalize;
    double tau;
    int threads;  // at most so many; the result does not depend on it
};

// loss: of each row. top and mass: mass 2^top is the sum of exp(logit) over its rows - 1 candidates.
// negative_share: what the negatives hold of that sum, 1 - p(positive). All (rows,).
void ntxent_forward(const NtxentInput& in, float* loss, float* top, float* mass,
                    float* negative_share);

// dz (rows, features): gradient of sum_i dloss_i loss_i. Returns the gradient in tau.
double ntxent_backward(const NtxentInput& in, const float* top, const float* mass,
                       const float* negative_share, const float* dloss, float* dz);

// The instruction sets compiled in that this processor runs, best first; the first is in use.
std::vector<std::string> ntxent_instruction_sets();

// Takes another of them, for all later calls: for tests. Not while a call runs.
void ntxent_use(const std::string& name);

}  // namespace simclr
