#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "ntxent.h"

namespace py = pybind11;
using Address = std::uintptr_t;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native CPU kernels of simclr_kernels. Addresses in: the callers in Python check them.";
    const auto release = py::call_guard<py::gil_scoped_release>();

    m.def("ntxent_instruction_sets", &simclr::ntxent_instruction_sets);
    m.def("ntxent_use", &simclr::ntxent_use);
    m.def(
        "ntxent_forward",
        [](Address z, std::int64_t rows, std::int64_t features, bool interleaved, bool normalize,
           double tau, int threads, Address loss, Address top, Address mass,
           Address negative_share) {
            simclr::ntxent_forward({reinterpret_cast<const float*>(z), rows, features, interleaved,
                                    normalize, tau, threads},
                                   reinterpret_cast<float*>(loss), reinterpret_cast<float*>(top),
                                   reinterpret_cast<float*>(mass),
                                   reinterpret_cast<float*>(negative_share));
        },
        release);
    m.def(
        "ntxent_backward",
        [](Address z, std::int64_t rows, std::int64_t features, bool interleaved, bool normalize,
           double tau, int threads, Address top, Address mass, Address negative_share,
           Address dloss, Address dz) {
            return simclr::ntxent_backward(
                {reinterpret_cast<const float*>(z), rows, features, interleaved, normalize, tau,
                 threads},
                reinterpret_cast<const float*>(top), reinterpret_cast<const float*>(mass),
                reinterpret_cast<const float*>(negative_share),
                reinterpret_cast<const float*>(dloss), reinterpret_cast<float*>(dz));
        },
        release);
}
