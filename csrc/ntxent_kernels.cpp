// The kernels of the instruction set in use.
#include "ntxent_kernels.h"

#include "instruction_sets.h"

namespace simclr {

const Kernels& ntxent_kernels() {
    static const Kernels* const all[] = {
#if defined(__x86_64__)
        &ntxent_avx512,
        &ntxent_avx2,
#endif
        &ntxent_portable,
    };
    return *all[instruction_set()];
}

}  // namespace simclr
