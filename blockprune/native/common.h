// What the loops share: how they are exported, compiled for several processors, and run on threads.

#pragma once

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

#if defined(_WIN32)
#define EXPORT extern "C" __declspec(dllexport)
#else
#define EXPORT extern "C" __attribute__((visibility("default")))
#endif

#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__)) && !defined(SANITIZED)
#define CLONES __attribute__((target_clones("avx512f", "avx2", "default")))  // chosen by the processor at load time
#else
#define CLONES
#endif
#if defined(_MSC_VER)
#define INLINE static __forceinline
#else
#define INLINE static inline __attribute__((always_inline))
#endif

// run part(begin, end) over [0, n) on some threads, the calling one included
template <class F> static void parallel(int64_t n, int64_t threads, F part) {
    threads = std::max<int64_t>(1, std::min(threads, n));
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++) others.emplace_back(part, n * t / threads, n * (t + 1) / threads);
    part(0, n / threads);
    for (auto& other : others) other.join();
}
