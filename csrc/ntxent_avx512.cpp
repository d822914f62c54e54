#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

// behind the standard headers: what they define inline must run on every processor
#pragma GCC target("avx512f,avx2,fma")
// GCC warns of the undefined operands in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define SIMD_NAME avx512
#define SIMD_FLOATS 16
#include "ntxent_block.h"
#endif
