#include "parallel.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

namespace simclr {
namespace {

const pid_t loaded_by = getpid();
constexpr std::uintptr_t LARGE_PAGE = 1 << 21;

}  // namespace

int usable_threads(int asked, bool enough) {
    return enough && getpid() == loaded_by ? std::max(asked, 1) : 1;
}

void ask_for_large_pages(void* memory, std::int64_t bytes) {
#ifdef MADV_HUGEPAGE
    const auto from = reinterpret_cast<std::uintptr_t>(memory);
    const std::uintptr_t first = (from + LARGE_PAGE - 1) & ~(LARGE_PAGE - 1);
    const std::uintptr_t end = (from + std::uintptr_t(bytes)) & ~(LARGE_PAGE - 1);
    if (first < end) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
#endif
}

}  // namespace simclr
