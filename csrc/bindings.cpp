#include <pybind11/pybind11.h>

PYBIND11_MODULE(_C, m) { m.doc() = "Native CPU kernels of simclr_kernels. Raw pointers in: the callers in Python check them."; }
