// How tensors cross from Python: by address.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>

namespace py = pybind11;
using Address = std::uintptr_t;

template <class T = float>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

void bind_augment(py::module_& m);
