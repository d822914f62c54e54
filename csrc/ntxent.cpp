#include "ntxent.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <limits>
#include <stdexcept>
#include <vector>

namespace simclr {
namespace {

constexpr float NORM_FLOOR = 1e-12f;
constexpr double LN2 = 0.69314718055994530942;
constexpr std::int64_t BLOCK_COLUMNS = 128;
constexpr std::int64_t LOGITS_STRIDE = BLOCK_COLUMNS + 16;  // rows in different cache sets
constexpr std::int64_t MAX_BLOCK_ROWS = 128;
constexpr double SMALLEST_SHARED_WORK = 1 << 22;  // products; below, one thread is as fast
constexpr std::int64_t MAX_WIDTH = 32;  // of a panel, over all instruction sets

// What the kernels of a block share.
struct Problem {
    const NtxentInput& in;
    std::int64_t block_rows;       // a multiple of every register tile
    std::int64_t padded_features;  // a multiple of every panel
    bool bounded;                  // |logit| is known to fit exp2 without a running maximum
    float scale;                   // similarity -> logit in base 2
    float shift;                   // bounded: exp2(logit - shift) is the term of the sum
    float unscale;                 // backward: what the weights were multiplied by, taken back

    float* unit;       // (padded rows, padded_features)
    float* columns;    // (groups of BLOCK_COLUMNS, panels, features, panel width)
    float* features;   // (groups of BLOCK_COLUMNS, panels, BLOCK_COLUMNS, panel width), backward
    float* inv_norm;   // (rows,), with normalize
    char* projected;   // (rows,), with normalize: above the floor of the norm
    float* dloss;      // (padded rows,), backward: times the power of two in unscale
    float* top;        // (padded rows,), backward
    float* rate;       // (padded rows,), backward: dloss / mass

    std::int64_t positive(std::int64_t i) const {
        return in.interleaved ? i ^ 1 : (i + in.rows / 2) % in.rows;
    }
    const float* row(std::int64_t i) const { return unit + i * padded_features; }
};

#if defined(__x86_64__)
namespace avx512 {
#define SIMD_FLOATS 16
#define SIMD_TARGET __attribute__((target("avx512f,avx2,fma")))
#include "simd.h"

#include "ntxent_block.h"
#undef SIMD_FLOATS
#undef SIMD_TARGET
#undef SIMD_INLINE
}  // namespace avx512

namespace avx2 {
#define SIMD_FLOATS 8
#define SIMD_TARGET __attribute__((target("avx2,fma")))
#include "simd.h"

#include "ntxent_block.h"
#undef SIMD_FLOATS
#undef SIMD_TARGET
#undef SIMD_INLINE
}  // namespace avx2
#endif

namespace baseline {
#define SIMD_FLOATS 4
#define SIMD_TARGET
#include "simd.h"

#include "ntxent_block.h"
#undef SIMD_FLOATS
#undef SIMD_TARGET
#undef SIMD_INLINE
}  // namespace baseline

struct Kernels {
    const char* name;
    bool runs_here;
    decltype(&baseline::pack_row) pack_row;
    decltype(&baseline::forward_rows) forward_rows;
    decltype(&baseline::backward_rows) backward_rows;
};

const Kernels all_kernels[] = {
#if defined(__x86_64__)
    {"avx512", bool(__builtin_cpu_supports("avx512f")), avx512::pack_row, avx512::forward_rows,
     avx512::backward_rows},
    {"avx2", __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"), avx2::pack_row,
     avx2::forward_rows, avx2::backward_rows},
#endif
    {"baseline", true, baseline::pack_row, baseline::forward_rows, baseline::backward_rows},
};

const Kernels* first_that_runs() {
    for (const Kernels& candidate : all_kernels)
        if (candidate.runs_here) return &candidate;
    return nullptr;
}

const Kernels* kernels = first_that_runs();
const pid_t loaded_by = getpid();

// body(index, thread) for every index; who runs what is open, so bodies own what they write.
template <class Body>
void parallel_for(std::int64_t count, int threads, const Body& body) {
    if (threads == 1) {
        for (std::int64_t k = 0; k < count; ++k) body(k, 0);
        return;
    }
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (std::int64_t k = 0; k < count; ++k) body(k, omp_get_thread_num());
}

std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

// The memory of one call, and the Problem that points into it.
struct Workspace {
    std::vector<float> floats;
    std::vector<char> projected;
    std::int64_t scratch_floats;
    int threads;
    Problem p;

    Workspace(const NtxentInput& in, bool backward) : p{in} {
        // few rows: smaller blocks, so that there is one for every core
        p.block_rows = in.rows < 4096 ? 32 : MAX_BLOCK_ROWS;
        p.padded_features = round_up(in.features, MAX_WIDTH);
        const double scale = 1.0 / (in.tau * LN2);
        p.bounded = in.normalize && in.tau >= 0.0128;
        p.scale = float(scale);
        p.shift = p.bounded ? float(std::max(scale - 100.0, 0.0)) : 0.0f;

        // a child of fork does not have the threads that its parent's OpenMP believes in
        const bool few = double(in.rows) * in.rows * in.features < SMALLEST_SHARED_WORK;
        threads = getpid() == loaded_by && !few ? std::max(in.threads, 1) : 1;
        const std::int64_t padded_rows = round_up(in.rows, BLOCK_COLUMNS);
        scratch_floats = p.block_rows * (LOGITS_STRIDE + (backward ? p.padded_features : 0));
        const std::int64_t padded = padded_rows * p.padded_features;
        const std::int64_t packed = padded_rows * in.features;
        floats.resize(padded + packed + in.rows + threads * scratch_floats +
                      (backward ? padded + 3 * padded_rows : 0));
        projected.resize(in.rows);
        p.projected = projected.data();
        p.unit = floats.data();
        p.columns = p.unit + padded;
        p.inv_norm = p.columns + packed;
        float* rest = p.inv_norm + in.rows + threads * scratch_floats;
        p.features = backward ? rest : nullptr;
        p.dloss = rest + padded;
        p.top = p.dloss + padded_rows;
        p.rate = p.top + padded_rows;

        parallel_for((in.rows + 255) / 256, threads, [&](std::int64_t k, int) {
            for (std::int64_t i = 256 * k; i < std::min(256 * (k + 1), in.rows); ++i)
                kernels->pack_row(p, i);
        });
    }

    float* scratch(int thread) { return p.inv_norm + p.in.rows + thread * scratch_floats; }
    std::int64_t blocks() const { return (p.in.rows + p.block_rows - 1) / p.block_rows; }
};

}  // namespace

std::vector<std::string> ntxent_instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels& candidate : all_kernels)
        if (candidate.runs_here) names.push_back(candidate.name);
    return names;
}

void ntxent_use(const std::string& name) {
    for (const Kernels& candidate : all_kernels)
        if (candidate.runs_here && name == candidate.name) {
            kernels = &candidate;
            return;
        }
    throw std::invalid_argument("instruction set must be one that runs here, got '" + name + "'");
}

void ntxent_forward(const NtxentInput& in, float* loss, float* top, float* mass,
                    float* negative_share) {
    Workspace work(in, false);
    parallel_for(work.blocks(), work.threads, [&](std::int64_t k, int thread) {
        kernels->forward_rows(work.p, k * work.p.block_rows, work.scratch(thread), loss, top, mass,
                             negative_share);
    });
}

double ntxent_backward(const NtxentInput& in, const float* top, const float* mass,
                       const float* negative_share, const float* dloss, float* dz) {
    Workspace work(in, true);
    Problem& p = work.p;
    // near 1, so that dloss / mass neither overflows nor loses digits
    float largest = 0.0f;
    for (std::int64_t i = 0; i < in.rows; ++i) largest = std::max(largest, std::fabs(dloss[i]));
    int exponent = 0;
    if (std::isfinite(largest)) std::frexp(largest, &exponent);
    p.unscale = float(std::ldexp(1.0 / in.tau, exponent));
    for (std::int64_t i = 0; i < in.rows; ++i) {
        p.dloss[i] = float(std::ldexp(double(dloss[i]), -exponent));
        p.top[i] = top[i];
        p.rate[i] = p.dloss[i] / mass[i];
    }
    std::vector<float> along(in.rows);
    parallel_for(work.blocks(), work.threads, [&](std::int64_t k, int thread) {
        kernels->backward_rows(p, k * p.block_rows, work.scratch(thread), negative_share, dz,
                              along.data());
    });
    double total = 0.0;
    for (float x : along) total += x;
    return -0.5 * std::ldexp(total, exponent) / (in.tau * in.tau);
}

}  // namespace simclr
