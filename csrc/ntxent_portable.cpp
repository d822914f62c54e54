#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <utility>

#define SIMD_NAME portable
#define SIMD_FLOATS 4
#include "ntxent_block.h"
