#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "instruction_sets.h"
#include "ntxent.h"

using simclr::NtxentInput;

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native CPU kernels of simclr_kernels. They take addresses, which Python checks.";
    const auto release = py::call_guard<py::gil_scoped_release>();

    bind_augment(m);
    m.def("instruction_sets", &simclr::instruction_sets);
    m.def("use_instruction_set", &simclr::use_instruction_set);
    m.def(
        "ntxent_negative_sums",
        [](Address z, std::int64_t rows, std::int64_t features, std::int64_t span, bool normalize,
           double tau, int threads, std::int64_t first, std::int64_t count, Address negatives,
           std::int64_t extra, Address top, Address mass, Address metrics) {
            const NtxentInput in{at(z),   rows,    features, span,  normalize,     tau,
                                 threads, first, count,    at(negatives), extra};
            simclr::ntxent_negative_sums(in, at(top), at(mass), at(metrics));
        },
        release);
    m.def(
        "ntxent_finish_rows",
        [](Address z, std::int64_t rows, std::int64_t features, std::int64_t span, bool normalize,
           double tau, int threads, Address top, Address mass, Address loss, Address stats) {
            const NtxentInput in{at(z), rows, features, span, normalize, tau, threads};
            simclr::ntxent_finish_rows(in, at(top), at(mass), at(loss), at(stats));
        },
        release);
    m.def(
        "ntxent_row_gradients",
        [](Address z, std::int64_t rows, std::int64_t features, std::int64_t span, bool normalize,
           double tau, int threads, std::int64_t first, std::int64_t count, Address negatives,
           std::int64_t extra, Address stats, Address dloss, Address dz) {
            const NtxentInput in{at(z),   rows,    features, span,  normalize,     tau,
                                 threads, first, count,    at(negatives), extra};
            return simclr::ntxent_row_gradients(in, at(stats), at(dloss), at(dz));
        },
        release);
}
