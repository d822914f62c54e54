// Random views of images that end where their memory ends, for AddressSanitizer and UBSan: a load
// or store outside is an abort. Argument: an instruction set. Prints how many views it made.
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../csrc/augment.h"
#include "../csrc/instruction_sets.h"

using namespace simclr;

int main(int count, char** arguments) {
    if (count != 2) return 2;
    use_instruction_set(arguments[1]);
    std::mt19937 random(1);
    const auto below = [&](int n) { return int(random() % unsigned(n)); };
    const auto uniform = [&](float low, float high) {
        return low + (high - low) * float(random() >> 8) * 0x1p-24f;
    };
    const float odd[] = {std::numeric_limits<float>::quiet_NaN(),
                         std::numeric_limits<float>::infinity(),
                         -std::numeric_limits<float>::infinity(), -1.0f, 1e30f, 0.0f};
    int views = 0;
    for (int round = 0; round < 400; ++round) {
        // mostly tiny: every number of pixels beside a vector, a window, a crop of less than 4
        const int B = 1 + below(3), size = below(8) ? 1 + below(48) : 60 + below(80);
        std::vector<std::int64_t> offsets, sizes;
        std::int64_t bytes = 0;
        for (int i = 0; i < B; ++i) {
            const int H = 1 + below(below(3) ? 6 : 300), W = 1 + below(below(3) ? 12 : 300);
            offsets.push_back(bytes);
            sizes.insert(sizes.end(), {H, W});
            bytes += 3 * H * W;
        }
        // of exactly so many bytes
        std::unique_ptr<std::uint8_t[]> memory(new std::uint8_t[bytes]);
        for (std::int64_t k = 0; k < bytes; ++k) memory[k] = std::uint8_t(random());

        std::vector<std::int32_t> crop;
        std::vector<std::int8_t> order;
        std::vector<float> values[6];
        std::unique_ptr<bool[]> flip(new bool[B]), gray(new bool[B]);
        for (int i = 0; i < B; ++i) {
            const int H = int(sizes[2 * i]), W = int(sizes[2 * i + 1]);
            const int h = below(3) ? 1 + below(H) : 1, w = below(3) ? 1 + below(W) : 1;
            // often in the last corner
            const int y = below(2) ? H - h : below(H - h + 1);
            const int x = below(2) ? W - w : below(W - w + 1);
            crop.insert(crop.end(), {y, x, h, w});
            std::int8_t one[] = {0, 1, 2, 3};
            for (int k = 3; k > 0; --k) std::swap(one[k], one[below(k + 1)]);
            order.insert(order.end(), one, one + 4);
            flip[i] = below(2);
            gray[i] = below(3) == 0;
            const float low[] = {0, 0, 0, -0.5f, 0.1f, 0}, high[] = {2, 2, 2, 0.5f, 4, 1};
            const float off[] = {1, 1, 1, 0, 0, 1};
            for (int k = 0; k < 6; ++k)
                values[k].push_back(below(3) == 0    ? off[k]
                                    : below(20) == 0 ? odd[below(6)]
                                                     : uniform(low[k], high[k]));
        }
        const ParamArrays params{crop.data(),      flip.get(),       values[0].data(),
                                 values[1].data(), values[2].data(), values[3].data(),
                                 order.data(),     gray.get(),       values[4].data(),
                                 values[5].data()};
        ViewFormat format{};
        format.size = size;
        format.add_brightness = below(4) == 0;
        format.normalize = below(2);
        for (int k = 0; k < 3; ++k) format.mean[k] = 0.5f, format.std[k] = 0.2f;
        format.dtype = Dtype(below(3));
        format.channels_last = below(2);
        const std::int64_t each = 3 * size * size * (format.dtype == Dtype::FLOAT32 ? 4 : 2);
        // aligned for its elements and no more
        std::unique_ptr<char[]> out(new char[2 * B * each + 4]);
        format.views = out.get() + 4;
        const Images packed{memory.get(), bytes, B, offsets.data(), sizes.data(), 0, 0, 0, 0};
        augment_views(packed, params, format, 1);
        // the first image alone, as a dense one, and both views of all
        const Images dense{memory.get(), 3 * sizes[0] * sizes[1], 1, nullptr, nullptr, sizes[0],
                           sizes[1], 3 * sizes[0] * sizes[1], 3 * sizes[1]};
        augment_views(dense, params, format, 1);
        const ViewRanges ranges{true,  {0.08, 1}, {0.75, 4 / 3.}, 0.1, 0.5,  0.8,
                                0.8,   0.8,       0.8,            0.2, 0.2,  format.add_brightness,
                                {0.5, 0.5}, {0.2, 0.2}, {0.1, 2}};
        const std::vector<std::int64_t> index(B, round);
        augment_two_views(packed, ranges, {7, 1}, index.data(), format, 1);
        views += 3 * B + 1;
    }
    std::printf("%d views\n", views);
}
