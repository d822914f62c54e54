#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "augment.h"
#include "bindings.h"

namespace {

using namespace simclr;

// (address, bytes, count), then of packed images (address of offsets, of sizes), of dense ones
// (height, width, bytes from image to image, from row to row)
using ImagesArg = std::tuple<Address, std::int64_t, std::int64_t, Address, Address, std::int64_t,
                             std::int64_t, std::int64_t, std::int64_t>;
// the tensors of AugmentParams in the order of its fields
using ParamsArg = std::array<Address, 10>;
// address of the result, size, dtype, channels last, brightness adds, mean and std or empty
using FormatArg = std::tuple<Address, std::int64_t, int, bool, bool, std::vector<float>>;
// see params._ranges
using RangesArg = std::array<double, 20>;

Images images_of(const ImagesArg& a) {
    return {at<const std::uint8_t>(std::get<0>(a)),
            std::get<1>(a),
            std::get<2>(a),
            at<const std::int64_t>(std::get<3>(a)),
            at<const std::int64_t>(std::get<4>(a)),
            std::get<5>(a),
            std::get<6>(a),
            std::get<7>(a),
            std::get<8>(a)};
}

ParamArrays params_of(const ParamsArg& a) {
    return {at<std::int32_t>(a[0]), at<bool>(a[1]), at(a[2]), at(a[3]),       at(a[4]), at(a[5]),
            at<std::int8_t>(a[6]),  at<bool>(a[7]), at(a[8]), at(a[9])};
}

ViewFormat format_of(const FormatArg& a) {
    ViewFormat format{};
    format.views = at<void>(std::get<0>(a));
    format.size = std::get<1>(a);
    format.dtype = Dtype(std::get<2>(a));
    format.channels_last = std::get<3>(a);
    format.add_brightness = std::get<4>(a);
    const std::vector<float>& mean_std = std::get<5>(a);
    format.normalize = mean_std.size() == 6;
    for (std::size_t k = 0; k < mean_std.size(); ++k)
        (k < 3 ? format.mean : format.std)[k % 3] = mean_std[k];
    return format;
}

ViewRanges ranges_of(const RangesArg& a) {
    return {a[0] != 0,      {a[1], a[2]}, {a[3], a[4]},   a[5],           a[6],  a[7],
            a[8],           a[9],         a[10],          a[11],          a[12], a[13] != 0,
            {a[14], a[15]}, {a[16], a[17]}, {a[18], a[19]}};
}

}  // namespace

void bind_augment(py::module_& m) {
    const auto release = py::call_guard<py::gil_scoped_release>();
    m.def(
        "sample_params",
        [](const RangesArg& ranges, std::uint64_t seed, std::uint32_t epoch, std::uint32_t view,
           Address index, Address sizes, std::int64_t count, const ParamsArg& out) {
            sample_views(ranges_of(ranges), {seed, epoch}, view, at<const std::int64_t>(index),
                         at<const std::int64_t>(sizes), count, params_of(out));
        },
        release);
    m.def(
        "augment_views",
        [](const ImagesArg& images, const ParamsArg& params, const FormatArg& format,
           int threads) {
            augment_views(images_of(images), params_of(params), format_of(format), threads);
        },
        release);
    m.def(
        "augment_two_views",
        [](const ImagesArg& images, const RangesArg& ranges, std::uint64_t seed,
           std::uint32_t epoch, Address index, const FormatArg& format, int threads) {
            augment_two_views(images_of(images), ranges_of(ranges), {seed, epoch},
                              at<const std::int64_t>(index), format_of(format), threads);
        },
        release);
}
