// What the files of both extension modules share.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <exception>
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

// Keeps the first exception of several threads: one that leaves a thread, or an OpenMP region, would end the process.
class FirstError {
  public:
    template <class Body> void run(const Body& body) {
        try {
            body();
        } catch (...) {
            if (!taken.exchange(true)) error = std::current_exception();
        }
    }
    // Throws it again, once all threads have ended.
    void rethrow() const {
        if (error) std::rethrow_exception(error);
    }

  private:
    std::atomic<bool> taken{false};
    std::exception_ptr error;
};

// Threads that are joined at the end of their scope.
class Threads {
  public:
    // Returns false where the system refuses another thread.
    template <class Body> bool start(const Body& body) {
        try {
            all.emplace_back(body);
        } catch (const std::exception&) {
            return false;
        }
        return true;
    }
    Threads() = default;
    Threads(const Threads&) = delete;
    ~Threads() {
        for (auto& thread : all) thread.join();
    }

  private:
    std::vector<std::thread> all;
};

// Runs part(begin, end, thread) over [0, n) on some threads, the calling one included, which also does the parts of threads that the system
// refuses. Throws what a part has thrown.
template <class Part> static void parallel(int64_t n, int64_t threads, const Part& part) {
    threads = std::max<int64_t>(1, std::min(threads, n));
    FirstError error;
    const auto run = [&](int64_t thread) {
        error.run([&] { part(n * thread / threads, n * (thread + 1) / threads, thread); });
    };
    {
        Threads others;
        int64_t started = 1;
        while (started < threads && others.start([&run, started] { run(started); })) started++;
        run(0);
        for (int64_t thread = started; thread < threads; thread++) run(thread);
    }
    error.rethrow();
}
