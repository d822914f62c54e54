#include "ntxent.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "ntxent_kernels.h"
#include "ntxent_work.h"

namespace simclr {
namespace {

// Logit in base 2 of row i with its positive.
double positive_logit(const NtxentInput& in, std::int64_t i) {
    const std::int64_t k = i % in.span, partner = i - k + (k + in.span / 2) % in.span;
    const float *own = in.z + i * in.features, *other = in.z + partner * in.features;
    const Kernels& kernels = ntxent_kernels();
    const Norm norm = kernels.norm(own, in.features, in.normalize);
    const Norm norm_other = kernels.norm(other, in.features, in.normalize);
    return kernels.similarity(own, other, norm, norm_other, in.features) / (in.tau * LN2);
}

// Of one row, in double: metrics (3, count) from its sums and the logit of its positive.
void write_metrics(const Problem& p, std::int64_t i, double positive, float* metrics,
                   std::int64_t count) {
    const bool none = p.sums.top[i] <= -std::numeric_limits<float>::max();
    const double top = p.sums.top[i], level = p.bounded ? 0.0 : top;
    // relative to the larger of the level and the positive, so that nothing overflows
    const double above = positive - p.shift - level, up = std::max(above, 0.0);
    const double factor = std::exp2(-up), term = std::exp2(above - up);
    const double mass = factor * p.sums.mass[i] + term;
    double spread = term * std::max(above - up, -2000.0);
    if (factor > 0) spread += factor * (p.sums.spread[i] - up * p.sums.mass[i]);
    const double entropy = LN2 * (std::log2(mass) - spread / mass);
    metrics[i] = float(positive * LN2);
    metrics[count + i] =
        none ? -std::numeric_limits<float>::infinity() : float((top + p.shift) * LN2);
    metrics[2 * count + i] = entropy < 0 ? 0.0f : float(entropy);
}

}  // namespace

void ntxent_negative_sums(const NtxentInput& in, float* top, float* mass, float* metrics) {
    Work work(in, false);
    Problem& p = work.p;
    p.with_metrics = metrics != nullptr;
    Memory& memory = work.memory;
    const bool levels = !p.bounded || p.with_metrics;
    p.sums.mass = memory.take<double>(work.padded_rows);
    p.sums.top = memory.take<float>(levels ? work.padded_rows : 0);
    p.sums.spread = memory.take<double>(p.with_metrics ? work.padded_rows : 0);
    std::fill_n(p.sums.mass, work.padded_rows, 0.0);
    if (levels) std::fill_n(p.sums.top, work.padded_rows, -std::numeric_limits<float>::max());
    if (p.with_metrics) std::fill_n(p.sums.spread, work.padded_rows, 0.0);
    in_parallel(work.threads, [&](int thread) {
        work.pack(thread);
        work.meet_negatives(thread);
        work.meet_rows(thread, [&](const Block& a) {
            for (std::int64_t i = a.first; i < a.first + a.rows; ++i) {
                top[i] = p.bounded ? p.shift : p.sums.top[i];
                mass[i] = float(p.sums.mass[i]);
                if (metrics)
                    write_metrics(p, i, positive_logit(in, in.first + i), metrics, in.count);
            }
        });
    });
}

void ntxent_finish_rows(const NtxentInput& in, const float* top, const float* mass, float* loss,
                        float* stats) {
    float *levels = stats, *totals = stats + in.rows, *shares = stats + 2 * in.rows;
    const bool bounded = in.bounded();
    const auto finish = [&](std::int64_t i, double logit) {
        const double excess = (top[i] - logit) * LN2 + std::log(double(mass[i]));
        const double small = std::exp(-std::fabs(excess));  // odds of the less likely side
        loss[i] = float((excess < 0 ? 0 : excess) + std::log1p(small));
        shares[i] = float((excess < 0 ? small : 1) / (1 + small));
        levels[i] = bounded ? top[i] : float(std::max(double(top[i]), logit));
        const double kept = bounded ? 1 : std::exp2(double(top[i]) - levels[i]);
        totals[i] = float(mass[i] * kept + std::exp2(logit - levels[i]));
    };
    // from memory, and with a few exponentials: each feature takes as long as some ten products
    const double products = 16.0 * double(in.rows) * double(in.features);
    in_parallel(usable_threads(in.threads, products >= SMALLEST_SHARED_WORK), [&](int) {
        share(in.rows / 2, [&](std::int64_t image) {
            const std::int64_t half = in.span / 2, i = image / half * in.span + image % half;
            const double logit = positive_logit(in, i);
            finish(i, logit);
            finish(i + half, logit);
        });
    });
}

double ntxent_row_gradients(const NtxentInput& in, const float* stats, const float* dloss,
                            float* dz) {
    Work work(in, true);
    Problem& p = work.p;
    Memory& memory = work.memory;
    const float *totals = stats + in.rows, *shares = stats + 2 * in.rows;
    // near 1, so that dloss / total neither overflows nor loses digits
    float largest = 0.0f;
    for (std::int64_t i = 0; i < in.rows; ++i) largest = std::max(largest, std::fabs(dloss[i]));
    const int exponent = std::isfinite(largest) && largest > 0 ? std::ilogb(largest) : 0;
    const double nearer = std::ldexp(1.0, -exponent);
    float* rates = memory.take<float>(in.rows);
    float* positive_share = memory.take<float>(in.count);
    for (std::int64_t i = 0; i < in.rows; ++i) rates[i] = float(dloss[i] * nearer) / totals[i];
    for (std::int64_t i = 0; i < in.count; ++i)
        positive_share[i] = float(dloss[in.first + i] * nearer) * shares[in.first + i];
    work.weigh_by(stats, rates);
    p.inv_tau = float(1.0 / in.tau);
    p.unscale = float(std::ldexp(1.0, exponent));
    p.positive_share = positive_share;
    p.dz = dz;
    p.along = memory.take<float>(in.count);
    in_parallel(work.threads, [&](int thread) {
        work.pack(thread);
        if (in.extra) {
            work.meet_negatives(thread);
            share(work.blocks, [&](std::int64_t b) { work.kernels.note_along(p, work.block(b)); });
        }
        work.meet_rows(thread, [&](const Block& a) { work.kernels.finish(p, a); });
    });
    double total = 0.0;
    for (std::int64_t i = 0; i < in.count; ++i) total += p.along[i];
    return -0.5 * std::ldexp(total, exponent) / (in.tau * in.tau);
}

}  // namespace simclr
