// What the files of both extension modules share.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(_MSC_VER)
#define ALWAYS_INLINE __forceinline
#else
#define ALWAYS_INLINE inline __attribute__((always_inline))
#endif
#define INLINE static ALWAYS_INLINE

static inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

// Asks the system for large pages before a large array is first written: a page fault for each 4 KiB would cost as much as filling it.
static inline void advise_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)1 << 21, begin = ((uintptr_t)memory + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)memory + bytes) & ~(page - 1);
    if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

// Runs part(begin, end, thread) over [0, n) on some threads, the calling one included.
template <class Part> static void parallel(int64_t n, int64_t threads, const Part& part) {
    threads = std::max<int64_t>(1, std::min(threads, n));
    const auto run = [&part, n, threads](int64_t thread) { part(n * thread / threads, n * (thread + 1) / threads, thread); };
    std::vector<std::thread> others;
    for (int64_t thread = 1; thread < threads; thread++) others.emplace_back(run, thread);
    run(0);
    for (auto& other : others) other.join();
}
