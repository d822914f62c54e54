#include "instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <stdexcept>

namespace simclr {
namespace {

const char* const names[] = {
#if defined(__x86_64__)
    "avx512",
    "avx2",
#endif
    "portable",
};

#if defined(__x86_64__)
// half floats: older compilers do not know the name
bool has_f16c() {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

bool runs_here(int set) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
    if (set == AVX512) return avx2 && __builtin_cpu_supports("avx512f");
    if (set == AVX2) return avx2;
#endif
    return set == PORTABLE;
}

int best() {
    int set = 0;
    while (!runs_here(set)) ++set;
    return set;
}

int in_use = best();

}  // namespace

InstructionSet instruction_set() { return InstructionSet(in_use); }

std::vector<std::string> instruction_sets() {
    std::vector<std::string> found;
    for (int set = 0; set <= PORTABLE; ++set)
        if (runs_here(set)) found.push_back(names[set]);
    return found;
}

void use_instruction_set(const std::string& name) {
    for (int set = 0; set <= PORTABLE; ++set)
        if (runs_here(set) && name == names[set]) {
            in_use = set;
            return;
        }
    throw std::invalid_argument("instruction set must be one that runs here, got '" + name + "'");
}

}  // namespace simclr
