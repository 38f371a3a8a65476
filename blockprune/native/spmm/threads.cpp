// Tasks run on torch's own threads, so that cores are not oversubscribed: torch is built with an OpenMP library, whose entry GOMP_parallel
// has kept its form for years. The loader of this library looks the entry up and hands it over. Without it, each call starts threads.

#include <atomic>

#include "spmm.h"

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);
static std::atomic<Parallel> openmp{nullptr};

EXPORT void use_openmp(void* gomp_parallel) { openmp = (Parallel)gomp_parallel; }

namespace {
struct Tasks {
    int64_t count;
    void (*body)(void*, int64_t);
    void* data;
    std::atomic<int64_t> next{0};
};

// Every thread takes the next task until none is left, so the number of threads that come does not matter.
void work(void* shared) {
    Tasks& tasks = *(Tasks*)shared;
    for (int64_t i; (i = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;) tasks.body(tasks.data, i);
}
}  // namespace

void run_tasks(int64_t threads, int64_t count, void (*body)(void*, int64_t), void* data) {
    Tasks tasks{count, body, data};
    threads = std::min(threads, count);
    if (threads <= 1) return work(&tasks);
    if (Parallel parallel_region = openmp) return parallel_region(work, &tasks, (unsigned)threads, 0);
    std::vector<std::thread> others;
    for (int64_t t = 1; t < threads; t++) others.emplace_back(work, &tasks);
    work(&tasks);
    for (auto& other : others) other.join();
}
