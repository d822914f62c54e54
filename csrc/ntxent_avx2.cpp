#if defined(__x86_64__)
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

// behind the standard headers: what they define inline must run on every processor
#pragma GCC target("avx2,fma")
#define SIMD_NAME avx2
#define SIMD_FLOATS 8
#include "ntxent_block.h"
#endif
