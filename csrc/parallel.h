// Threads and memory of one call, for all operations.
#pragma once
#include <omp.h>

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <type_traits>
#include <vector>

namespace simclr {

// At most the threads asked for, and one if `enough` work for more is not there: a child of fork
// does not have the threads that its parent's OpenMP believes in.
int usable_threads(int asked, bool enough);

// Asks for large pages under memory that is about to be written for the first time: page faults on
// small ones take up to half of the time of a large batch. What the system does not grant is no loss.
void ask_for_large_pages(void* memory, std::int64_t bytes);

inline std::int64_t round_up(std::int64_t x, std::int64_t step) {
    return (x + step - 1) / step * step;
}

// Memory of the one call that runs on this thread. Not initialised, and the first 2 MiB are kept
// for the next call: for a small batch, zeroing it, or page faults on memory that went back to the
// system, cost as much as the loss.
class Memory {
   public:
    Memory() {
        if (!kept) kept.reset(allocate(KEPT_BYTES));
        next = kept.get();
    }

    template <class T>
    T* take(std::int64_t count) {
        static_assert(std::is_trivially_destructible_v<T>);
        const std::int64_t bytes = round_up(count * std::int64_t(sizeof(T)), 64);
        if (bytes > left) {
            held.emplace_back(allocate(bytes));
            return reinterpret_cast<T*>(held.back().get());
        }
        char* start = next;
        next += bytes;
        left -= bytes;
        return reinterpret_cast<T*>(start);
    }

   private:
    struct Free {
        void operator()(char* p) const { std::free(p); }
    };
    using Bytes = std::unique_ptr<char, Free>;
    static constexpr std::int64_t KEPT_BYTES = 2 << 20;
    static inline thread_local Bytes kept;
    std::vector<Bytes> held;
    std::int64_t left = KEPT_BYTES;
    char* next;

    static char* allocate(std::int64_t bytes) {
        void* p = std::aligned_alloc(64, bytes);
        if (!p) throw std::bad_alloc();
        return static_cast<char*>(p);
    }
};

// body(thread) on each of at most `threads` threads. In it run() shares out loops.
template <class Body>
void in_parallel(int threads, const Body& body) {
    if (threads == 1) return body(0);
#pragma omp parallel num_threads(threads)
    body(omp_get_thread_num());
}

// body(index) for every index, by the threads of in_parallel, which wait for each other at its end.
template <class Body>
void share(std::int64_t count, const Body& body) {
#pragma omp for schedule(static)
    for (std::int64_t k = 0; k < count; ++k) body(k);
}

}  // namespace simclr
