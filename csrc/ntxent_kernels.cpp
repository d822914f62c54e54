// Which of the instruction sets compiled in is in use.
#include <algorithm>
#include <iterator>
#include <stdexcept>

#include "ntxent.h"
#include "ntxent_kernels.h"

namespace simclr {
namespace {

const Kernels* const all_kernels[] = {
#if defined(__x86_64__)
    &ntxent_avx512,
    &ntxent_avx2,
#endif
    &ntxent_portable,
};

bool runs_here(const Kernels* candidate) {
#if defined(__x86_64__)
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (candidate == &ntxent_avx512) return avx2 && __builtin_cpu_supports("avx512f");
    if (candidate == &ntxent_avx2) return avx2;
#endif
    return candidate == &ntxent_portable;
}

const Kernels* in_use = *std::find_if(std::begin(all_kernels), std::end(all_kernels), runs_here);

}  // namespace

const Kernels& ntxent_kernels() { return *in_use; }

std::vector<std::string> ntxent_instruction_sets() {
    std::vector<std::string> names;
    for (const Kernels* candidate : all_kernels)
        if (runs_here(candidate)) names.push_back(candidate->name);
    return names;
}

void ntxent_use(const std::string& name) {
    for (const Kernels* candidate : all_kernels)
        if (runs_here(candidate) && name == candidate->name) {
            in_use = candidate;
            return;
        }
    throw std::invalid_argument("instruction set must be one that runs here, got '" + name + "'");
}

}  // namespace simclr
