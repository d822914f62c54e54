#include "ntxent.h"

#include <omp.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>
#include <thread>
#include <type_traits>
#include <vector>

#include "ntxent_kernels.h"

namespace simclr {
namespace {

constexpr double SMALLEST_SHARED_WORK = 1 << 20;  // products; below, one thread is as fast
constexpr std::int64_t SLAB_FLOATS = 1 << 19;     // of the columns of others packed at a time

const Kernels* const all_kernels[] = {
#if defined(__x86_64__)
    &ntxent_avx512,
    &ntxent_avx2,
#endif
    &ntxent_portable,
};

bool runs_here(const Kernels* candidate) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (candidate == &ntxent_avx512) return avx2 && __builtin_cpu_supports("avx512f");
    if (candidate == &ntxent_avx2) return avx2;
#endif
    return candidate == &ntxent_portable;
}

const Kernels* kernels = *std::find_if(std::begin(all_kernels), std::end(all_kernels), runs_here);
const pid_t loaded_by = getpid();

std::int64_t round_up(std::int64_t x, std::int64_t step) { return (x + step - 1) / step * step; }

// Memory of the one call that runs on this thread. Not initialised, and the first MiB kept by the thread for its next call: for
// a small batch, zeroing it, or page faults on memory returned to the system, cost as much as the
// loss.
class Memory {
   public:
    Memory() {
        if (!kept) kept.reset(allocate(KEPT_BYTES));
        next = kept.get();
    }

    template <class T>
    T* take(std::int64_t count) {
        static_assert(std::is_trivially_destructible_v<T>);
        const std::int64_t bytes = round_up(count * std::int64_t(sizeof(T)), 64);
        if (bytes > left) {
            held.emplace_back(allocate(bytes));
            return reinterpret_cast<T*>(held.back().get());
        }
        char* start = next;
        next += bytes;
        left -= bytes;
        return reinterpret_cast<T*>(start);
    }

   private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    using Bytes = std::unique_ptr<char, Free>;
    static constexpr std::int64_t KEPT_BYTES = 1 << 20;
    static thread_local Bytes kept;
    std::vector<Bytes> held;
    std::int64_t left = KEPT_BYTES;
    char* next;

    static char* allocate(std::int64_t bytes) {
        void* p = std::aligned_alloc(64, bytes);
        if (!p) throw std::bad_alloc();
        return static_cast<char*>(p);
    }
};

thread_local Memory::Bytes Memory::kept;

// body(thread) on each of at most `threads` threads. In it run() shares out loops.
template <class Body>
void in_parallel(int threads, const Body& body) {
    if (threads == 1) return body(0);
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num());
}

// body(index) for every index, by the threads of in_parallel, which wait for each other at its end.
template <class Body>
void share(std::int64_t count, const Body& body) {
#pragma omp for schedule(static)
    for (std::int64_t k = 0; k < count; ++k) body(k);
}

// Rows of one source, columns of every row asked for.
struct Columns {
    const float* source;
    std::int64_t rows;
    std::int64_t first;  // of dloss and stats; under 0 for the extra negatives
};

// The plan and the memory of one call.
//
// The rows asked for are cut into blocks. Pairs of blocks run in the rounds of a round-robin
// tournament, in which every block plays once a round, so that a pair may write to both its blocks.
// A block goes into its next round when it has finished the last: the order of what is added to it
// is the same for any number of threads, and nobody waits for a whole round.
class Work {
   public:
    Problem p{};
    Memory memory;
    int threads;
    std::int64_t blocks, padded_rows;

    Work(const NtxentInput& in, bool backward) : in(in), backward(backward) {
        p.features = in.features;
        p.padded_features = round_up(in.features, MAX_WIDTH);
        // few rows: smaller blocks, so that there is one for every core
        p.block_rows = in.count <= 256 ? 32 : in.count <= 2048 ? 64 : MAX_BLOCK_ROWS;
        p.stride = p.block_rows == 32 ? 32 : p.block_rows + 16;
        p.normalize = in.normalize;
        p.bounded = in.normalize && in.tau >= 0.0128;
        const double scale = 1.0 / (in.tau * LN2);
        p.scale = float(scale);
        p.shift = p.bounded ? float(std::max(scale - 100.0, 0.0)) : 0.0f;
        blocks = (in.count + p.block_rows - 1) / p.block_rows;
        padded_rows = blocks * p.block_rows;

        // a child of fork does not have the threads that its parent's OpenMP believes in
        const double work = double(in.count) * double(in.rows + in.extra) * double(in.features);
        const bool alone = work < SMALLEST_SHARED_WORK || getpid() != loaded_by;
        threads = alone ? 1 : int(std::clamp<std::int64_t>(in.threads, 1, blocks));

        std::int32_t* positive = memory.take<std::int32_t>(in.count);
        for (std::int64_t i = 0; i < in.count; i += in.span)
            for (std::int64_t k = 0; k < in.span; ++k)
                positive[i + k] = std::int32_t(i + (k + in.span / 2) % in.span);
        p.positive = positive;
        block_floats = p.padded_features * p.block_rows;
        transposed = memory.take<float>(blocks * p.padded_features * p.stride);
        panels = memory.take<float>((backward ? blocks : threads) * block_floats);
        norms = memory.take<Norm>(padded_rows + threads * p.block_rows);
        weights = memory.take<float>(threads * WEIGHTS_FLOATS);
        p.panels = panels;
        p.norm = norms;
        done = std::vector<std::atomic<std::int64_t>>(blocks);

        columns = {{in.negatives, in.extra, -1},
                   {in.z, in.first, 0},
                   {in.z + (in.first + in.count) * in.features, in.rows - in.first - in.count,
                    in.first + in.count}};
        const bool alone_in_world = in.extra == 0 && in.rows == in.count;
        slab_blocks = alone_in_world ? 0 : std::max<std::int64_t>(1, SLAB_FLOATS / block_floats);
        slab_transposed = memory.take<float>(slab_blocks * p.padded_features * p.stride);
        slab_panels = memory.take<float>(backward ? slab_blocks * block_floats : 0);
        slab_top = memory.take<float>(slab_blocks * p.block_rows);
        slab_rate = memory.take<float>(slab_blocks * p.block_rows);
    }

    // Backward: the level and the rate of each row of z.
    void weigh_by(const float* top_of_all, const float* rate_of_all) {
        all_top = top_of_all;
        all_rate = rate_of_all;
        top = memory.take<float>(padded_rows);
        rate = memory.take<float>(padded_rows);
        copy_rates(in.first, in.count, padded_rows, top, rate);
    }

    Block block(std::int64_t b) const {
        const std::int64_t first = b * p.block_rows;
        return {transposed + b * p.padded_features * p.stride,
                panels + b * block_floats,
                std::min(p.block_rows, in.count - first),
                first,
                top + first,
                rate + first};
    }

    // In in_parallel: packs the rows asked for.
    void pack(int thread) {
        share(blocks, [&](std::int64_t b) {
            const std::int64_t first = b * p.block_rows;
            kernels->pack(p, in.z + (in.first + first) * in.features,
                          std::min(p.block_rows, in.count - first),
                          transposed + b * p.padded_features * p.stride,
                          panels + (backward ? b : thread) * block_floats, norms + first);
        });
    }

    // In in_parallel: every block of rows meets the columns of others.
    void meet_others(int thread, const Columns& others) {
        for (std::int64_t start = 0; start < others.rows; start += slab_blocks * p.block_rows) {
            const std::int64_t rows = std::min(slab_blocks * p.block_rows, others.rows - start);
            const std::int64_t height = p.block_rows, count = (rows + height - 1) / height;
            share(count, [&](std::int64_t b) {
                kernels->pack(p, others.source + (start + b * height) * in.features,
                              std::min(height, rows - b * height),
                              slab_transposed + b * p.padded_features * p.stride,
                              backward ? slab_panels + b * block_floats
                                       : panels + thread * block_floats,
                              norms + padded_rows + thread * height);
                const std::int64_t k = b * height;
                if (backward)
                    copy_rates(others.first < 0 ? -1 : others.first + start + k,
                               std::min(height, rows - k), height, slab_top + k, slab_rate + k);
            });
            share(blocks, [&](std::int64_t a) {
                for (std::int64_t b = 0; b < count; ++b)
                    meet(block(a),
                         {slab_transposed + b * p.padded_features * p.stride,
                          slab_panels + b * block_floats, std::min(height, rows - b * height), -1,
                          slab_top + b * height, slab_rate + b * height},
                         false, thread);
            });
        }
    }

    void meet_negatives(int thread) { meet_others(thread, columns[0]); }

    // In in_parallel: every block of rows meets all rows, once each.
    void meet_rows(int thread) {
        meet_others(thread, columns[1]);
        meet_others(thread, columns[2]);
        // players: the blocks and, if they are odd, one more that lets its partner rest
        const std::int64_t players = round_up(blocks, 2), rounds = players - 1;
        const std::int64_t tasks = blocks + rounds * players / 2;
        for (std::int64_t task = next++; task < tasks; task = next++) {
            if (task < blocks) {
                meet(block(task), block(task), false, thread);
                done[task].store(1, std::memory_order_release);
                continue;
            }
            const std::int64_t round = (task - blocks) / (players / 2);
            const std::int64_t table = (task - blocks) % (players / 2);
            const std::int64_t one = table ? (round + table) % rounds : round;
            const std::int64_t two = table ? (round + rounds - table) % rounds : rounds;
            const std::int64_t a = std::min(one, two), b = std::max(one, two);
            await(a, round + 1);
            if (b < blocks) {
                await(b, round + 1);
                meet(block(a), block(b), true, thread);
                done[b].store(round + 2, std::memory_order_release);
            }
            done[a].store(round + 2, std::memory_order_release);
        }
#pragma omp barrier
    }

   private:
    const NtxentInput& in;
    const bool backward;
    std::int64_t block_floats, slab_blocks;
    float *transposed, *panels, *weights, *top = nullptr, *rate = nullptr;
    float *slab_transposed, *slab_panels, *slab_top, *slab_rate;
    Norm* norms;  // of the padded rows, then one block for each thread
    const float *all_top = nullptr, *all_rate = nullptr;
    std::vector<Columns> columns;
    std::vector<std::atomic<std::int64_t>> done;  // rounds each block has finished
    std::atomic<std::int64_t> next{0};            // task to be taken

    void meet(const Block& a, const Block& b, bool both_sides, int thread) {
        const auto kernel = backward ? kernels->backward : kernels->forward;
        kernel(p, a, b, both_sides, weights + thread * WEIGHTS_FLOATS);
    }

    void await(std::int64_t b, std::int64_t round) {
        for (int spins = 0; done[b].load(std::memory_order_acquire) < round; ++spins)
            if (spins > 1000) std::this_thread::yield();
    }

    void copy_rates(std::int64_t first, std::int64_t rows, std::int64_t padded, float* to_top,
                    float* to_rate) const {
        if (first < 0)
            rows = 0;
        else
            std::copy_n(all_top + first, rows, to_top), std::copy_n(all_rate + first, rows, to_rate);
        // a level no exponent reaches: 2^(exponent - level) is 0, never infinite
        std::fill(to_top + rows, to_top + padded, std::numeric_limits<float>::max());
        std::fill(to_rate + rows, to_rate + padded, 0.0f);
    }
};

// The positive of row i, and the logit of the two in base 2.
std::int64_t partner_of(const NtxentInput& in, std::int64_t i) {
    return i - i % in.span + (i % in.span + in.span / 2) % in.span;
}

double positive_logit(const NtxentInput& in, std::int64_t i) {
    const float* own = in.z + i * in.features;
    const float* other = in.z + partner_of(in, i) * in.features;
    const Norm norm = kernels->norm(own, in.features, in.normalize);
    const Norm norm_other = kernels->norm(other, in.features, in.normalize);
    return kernels->similarity(own, other, norm, norm_other, in.features) / (in.tau * LN2);
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

std::vector<std::string> ntxent_instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* candidate : all_kernels)
        if (runs_here(candidate)) names.push_back(candidate->name);
    return names;
}

void ntxent_use(const std::string& name) {
    for (const Kernels* candidate : all_kernels)
        if (runs_here(candidate) && name == candidate->name) {
            kernels = candidate;
            return;
        }
    throw std::invalid_argument("instruction set must be one that runs here, got '" + name + "'");
}

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
        work.meet_rows(thread);
        share(work.blocks, [&](std::int64_t b) {
            const std::int64_t first = b * p.block_rows;
            for (std::int64_t i = first; i < std::min(first + p.block_rows, in.count); ++i) {
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
    const bool bounded = in.normalize && in.tau >= 0.0128;
    const bool alone = in.rows * in.features < 1 << 16 || getpid() != loaded_by;
    const auto finish = [&](std::int64_t i, double logit) {
        const double excess = (top[i] - logit) * LN2 + std::log(double(mass[i]));
        const double small = std::exp(-std::fabs(excess));  // odds of the less likely side
        loss[i] = float((excess < 0 ? 0 : excess) + std::log1p(small));
        shares[i] = float((excess < 0 ? small : 1) / (1 + small));
        levels[i] = bounded ? top[i] : float(std::max(double(top[i]), logit));
        const double kept = bounded ? 1 : std::exp2(double(top[i]) - levels[i]);
        totals[i] = float(mass[i] * kept + std::exp2(logit - levels[i]));
    };
    in_parallel(alone ? 1 : std::max(in.threads, 1), [&](int) {
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
    int exponent = 0;
    if (std::isfinite(largest)) std::frexp(largest, &exponent);
    const double nearer = std::ldexp(1.0, -exponent);
    float* rates = memory.take<float>(in.rows);
    float* positive_share = memory.take<float>(in.count);
    for (std::int64_t i = 0; i < in.rows; ++i) rates[i] = float(dloss[i] * nearer) / totals[i];
    for (std::int64_t i = 0; i < in.count; ++i)
        positive_share[i] = float(dloss[in.first + i] * nearer) * shares[in.first + i];
    work.weigh_by(stats, rates);
    p.unscale = float(std::ldexp(1.0 / in.tau, exponent));
    p.positive_share = positive_share;
    p.dz = dz;
    p.along = memory.take<float>(in.count);
    in_parallel(work.threads, [&](int thread) {
        work.pack(thread);
        share(work.blocks, [&](std::int64_t b) {
            const Block a = work.block(b);
            std::fill_n(dz + a.first * in.features, a.rows * in.features, 0.0f);
            std::fill_n(p.along + a.first, a.rows, 0.0f);
        });
        if (in.extra) {
            work.meet_negatives(thread);
            share(work.blocks, [&](std::int64_t b) { kernels->note_along(p, work.block(b)); });
        }
        work.meet_rows(thread);
        share(work.blocks, [&](std::int64_t b) { kernels->finish(p, work.block(b)); });
    });
    double total = 0.0;
    for (std::int64_t i = 0; i < in.count; ++i) total += p.along[i];
    return -0.5 * std::ldexp(total, exponent) / (in.tau * in.tau);
}

}  // namespace simclr
