// The plan of one call of the loss: its memory, its threads, and which blocks meet when.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <limits>
#include <thread>
#include <vector>

#include "ntxent.h"
#include "ntxent_kernels.h"
#include "parallel.h"

namespace simclr {

constexpr double SMALLEST_SHARED_WORK = 1 << 20;  // products; below, one thread is as fast
constexpr std::int64_t SLAB_FLOATS = 1 << 19;     // of the columns of others packed at a time

// Rows of one source, columns of every row asked for.
struct Columns {
    const float* source;
    std::int64_t rows;
    std::int64_t first;  // of dloss and stats; under 0 for the extra negatives
};

// The plan and the memory of one call.
//
// The rows asked for are cut into blocks, and these put into groups. Pairs of groups run in the
// rounds of a round-robin tournament, in which every group plays once a round, so that a pair may
// write to both. A group goes into its next round when it has finished the last: the order of what
// is added to it is the same for any number of threads, and nobody waits for a whole round.
class Work {
   public:
    const Kernels& kernels = ntxent_kernels();
    Problem p{};
    Memory memory;
    int threads;
    std::int64_t blocks, padded_rows;

    Work(const NtxentInput& in, bool backward) : in(in), backward(backward) {
        p.features = in.features;
        p.padded_features = round_up(in.features, MAX_WIDTH);
        // few rows: smaller blocks, so that every core has some
        p.block_rows = in.count <= 256 ? 32 : in.count <= 2048 ? 64 : MAX_BLOCK_ROWS;
        p.stride = p.block_rows == 32 ? 32 : p.block_rows + 16;
        p.normalize = in.normalize;
        p.bounded = in.bounded();
        const double scale = 1.0 / (in.tau * LN2);
        p.scale = float(scale);
        p.shift = p.bounded ? float(std::max(scale - 100.0, 0.0)) : 0.0f;
        blocks = (in.count + p.block_rows - 1) / p.block_rows;
        padded_rows = blocks * p.block_rows;
        // many rows: fewer times out of the caches, as long as a round has 16 pairs
        group_blocks = std::clamp<std::int64_t>(blocks / 32, 1, 4);

        const double products = double(in.count) * double(in.rows + in.extra) * in.features;
        const int usable = usable_threads(in.threads, products >= SMALLEST_SHARED_WORK);
        threads = int(std::min<std::int64_t>(usable, blocks));

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
        const bool no_others = in.extra == 0 && in.rows == in.count;
        slab_blocks = no_others ? 0 : std::max<std::int64_t>(1, SLAB_FLOATS / block_floats);
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
                backward ? panels + b * block_floats : nullptr,
                std::min(p.block_rows, in.count - first),
                first,
                backward ? top + first : nullptr,
                backward ? rate + first : nullptr};
    }

    // In in_parallel: packs the rows asked for and clears their gradients.
    void pack(int thread) {
        share(blocks, [&](std::int64_t b) {
            const Block a = block(b);
            kernels.pack(p, in.z + (in.first + a.first) * in.features, a.rows,
                         transposed + b * p.padded_features * p.stride,
                         panels + (backward ? b : thread) * block_floats, norms + a.first);
            if (!backward) return;
            std::fill_n(p.dz + a.first * in.features, a.rows * in.features, 0.0f);
            std::fill_n(p.along + a.first, a.rows, 0.0f);
        });
    }

    // In in_parallel: every block of rows meets the columns of others.
    void meet_others(int thread, const Columns& others) {
        for (std::int64_t start = 0; start < others.rows; start += slab_blocks * p.block_rows) {
            const std::int64_t rows = std::min(slab_blocks * p.block_rows, others.rows - start);
            const std::int64_t height = p.block_rows, count = (rows + height - 1) / height;
            share(count, [&](std::int64_t b) {
                const std::int64_t k = b * height, here = std::min(height, rows - k);
                kernels.pack(p, others.source + (start + k) * in.features, here,
                             slab_transposed + b * p.padded_features * p.stride,
                             backward ? slab_panels + b * block_floats
                                      : panels + thread * block_floats,
                             norms + padded_rows + thread * height);
                if (!backward) return;
                const std::int64_t known = others.first < 0 ? 0 : here;
                copy_rates(others.first + start + k, known, height, slab_top + k, slab_rate + k);
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

    // In in_parallel, as the last: every block of rows meets all rows, once each, and then goes to
    // finish(block).
    template <class Finish>
    void meet_rows(int thread, const Finish& finish) {
        meet_others(thread, columns[1]);
        meet_others(thread, columns[2]);
        // players: the groups and, if they are odd, one more that lets its partner rest
        const std::int64_t groups = (blocks + group_blocks - 1) / group_blocks;
        const std::int64_t players = round_up(groups, 2), rounds = players - 1;
        const std::int64_t tasks = groups + rounds * players / 2;
        for (std::int64_t task = next++; task < tasks; task = next++) {
            if (task < groups) {
                meet_groups(task, task, thread);
                done[task].store(1, std::memory_order_release);
                continue;
            }
            const std::int64_t round = (task - groups) / (players / 2);
            const std::int64_t table = (task - groups) % (players / 2);
            const std::int64_t one = table ? (round + table) % rounds : round;
            const std::int64_t two = table ? (round + rounds - table) % rounds : rounds;
            const std::int64_t a = std::min(one, two), b = std::max(one, two);
            await(a, round + 1);
            if (b < groups) {
                await(b, round + 1);
                meet_groups(a, b, thread);
                done[b].store(round + 2, std::memory_order_release);
            }
            done[a].store(round + 2, std::memory_order_release);
            if (round + 1 < rounds) continue;
            for (std::int64_t group : {a, b})
                for (std::int64_t k = group * group_blocks;
                     k < std::min((group + 1) * group_blocks, blocks); ++k)
                    finish(block(k));
        }
    }

   private:
    const NtxentInput& in;
    const bool backward;
    std::int64_t group_blocks, block_floats, slab_blocks;
    float *transposed, *panels, *weights, *top = nullptr, *rate = nullptr;
    float *slab_transposed, *slab_panels, *slab_top, *slab_rate;
    Norm* norms;  // of the padded rows, then one block for each thread
    const float *all_top = nullptr, *all_rate = nullptr;
    std::vector<Columns> columns;
    std::vector<std::atomic<std::int64_t>> done;  // rounds each group has finished
    std::atomic<std::int64_t> next{0};            // task to be taken

    void meet(const Block& a, const Block& b, bool both_sides, int thread) {
        const auto kernel = backward ? kernels.backward : kernels.forward;
        kernel(p, a, b, both_sides, weights + thread * WEIGHTS_FLOATS);
    }

    // Every pair of blocks of two groups, each next pair with a block of the last.
    void meet_groups(std::int64_t a, std::int64_t b, int thread) {
        const std::int64_t first = b * group_blocks, end = std::min(first + group_blocks, blocks);
        for (std::int64_t k = 0; k < group_blocks; ++k) {
            const std::int64_t i = a * group_blocks + k;
            if (i >= blocks) break;
            for (std::int64_t step = 0; step < end - first; ++step) {
                const std::int64_t j = k % 2 ? end - 1 - step : first + step;
                if (a != b || j >= i) meet(block(i), block(j), i != j, thread);
            }
        }
    }

    void await(std::int64_t group, std::int64_t round) {
        for (int spins = 0; done[group].load(std::memory_order_acquire) < round; ++spins)
            if (spins > 1000) std::this_thread::yield();
    }

    void copy_rates(std::int64_t first, std::int64_t rows, std::int64_t padded, float* to_top,
                    float* to_rate) const {
        std::copy_n(all_top + (rows ? first : 0), rows, to_top);
        std::copy_n(all_rate + (rows ? first : 0), rows, to_rate);
        // a level no exponent reaches: 2^(exponent - level) is 0, never infinite
        std::fill(to_top + rows, to_top + padded, std::numeric_limits<float>::max());
        std::fill(to_rate + rows, to_rate + padded, 0.0f);
    }
};

}  // namespace simclr
