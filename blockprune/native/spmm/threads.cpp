// Tasks run on torch's own threads, so that cores are not oversubscribed: torch is built with an OpenMP library, whose entry GOMP_parallel
// has kept its form for years. The loader of this library looks the entry up and hands it over. Without it, each call starts threads.

#include <mutex>

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
    FirstError error;
};

// Every thread takes the next task until none is left, so the number of threads that come does not matter.
void work(void* shared) {
    Tasks& tasks = *(Tasks*)shared;
    tasks.error.run([&] {
        for (int64_t i; (i = tasks.next.fetch_add(1, std::memory_order_relaxed)) < tasks.count;) tasks.body(tasks.data, i);
    });
}

// Whether the system gives this thread so many others. OpenMP ends the process where it is refused one, so they are tried first.
bool can_start(int64_t count) {
    std::mutex gate;
    Threads trial;
    std::lock_guard<std::mutex> closed(gate);  // is opened before the threads are joined
    for (int64_t i = 0; i < count; i++)
        if (!trial.start([&gate] { std::lock_guard<std::mutex> wait(gate); })) return false;
    return true;
}
}  // namespace

void run_tasks(const Team& team, int64_t count, void (*body)(void*, int64_t), void* data) {
    static thread_local int64_t team_size = 1;  // OpenMP keeps the threads of the last team for the next one
    Tasks tasks{count, body, data};
    const int64_t threads = std::min(team.useful, count);
    const Parallel parallel_region = openmp;
    if (threads > 1 && parallel_region && (team.all <= team_size || can_start(team.all - 1))) {
        team_size = team.all;  // always the same size: a smaller team would end threads, which the next one would have to start
        parallel_region(work, &tasks, (unsigned)team.all, 0);
    } else {
        Threads others;
        for (int64_t t = 1; t < threads && others.start([&tasks] { work(&tasks); }); t++) {}
        work(&tasks);
    }
    tasks.error.rethrow();
}
