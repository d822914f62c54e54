#include "parallel.h"

#include <unistd.h>

#include <algorithm>

namespace simclr {
namespace {

const pid_t loaded_by = getpid();

}  // namespace

int usable_threads(int asked, bool enough) {
    return enough && getpid() == loaded_by ? std::max(asked, 1) : 1;
}

}  // namespace simclr
