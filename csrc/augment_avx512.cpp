#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "augment_kernels.h"

// behind these headers: what they define inline must run on every processor
#pragma GCC target("avx512f,avx2,fma,f16c")
// GCC warns of the undefined operands in its own intrinsics
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#define SIMD_NAME avx512
#define SIMD_FLOATS 16
#include "augment_view.h"
#endif
