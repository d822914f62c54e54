#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#define SIMD_NAME portable
#define SIMD_FLOATS 4
#include "augment_view.h"
