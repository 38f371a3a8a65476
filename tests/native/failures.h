// Allocations and threads that fail when a test says so.

#pragma once

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <new>

static std::atomic<int> allocations_left(-1), threads_left(-1);  // until one fails; -1: none fails
static std::atomic<bool> failing(false);
static std::atomic<int> refused_allocations(0), refused_threads(0);

// The allocation and the thread with these numbers fail in the next call of with_failures, and all after them; -1: none fails.
static inline void fail_next(int allocation, int thread) { allocations_left = allocation, threads_left = thread; }

template <class Call> static auto with_failures(Call call) {
    failing = true;
    const auto result = call();
    failing = false;
    return result;
}

static inline bool fails(std::atomic<int>& left) {
    if (!failing || left < 0) return false;
    if (left == 0) return true;
    left--;
    return false;
}

static inline void* allocate(size_t bytes, size_t alignment) {
    if (fails(allocations_left)) {
        refused_allocations++;
        throw std::bad_alloc();
    }
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment < sizeof(void*) ? sizeof(void*) : alignment, bytes ? bytes : 1)) throw std::bad_alloc();
    return memory;
}
void* operator new(size_t bytes) { return allocate(bytes, sizeof(void*)); }
void* operator new[](size_t bytes) { return allocate(bytes, sizeof(void*)); }
void* operator new(size_t bytes, std::align_val_t alignment) { return allocate(bytes, (size_t)alignment); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

// Stands before the one of the C library, which it calls.
extern "C" int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*), void* argument) {
    typedef int (*Create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);
    static const Create create = (Create)dlsym(RTLD_NEXT, "pthread_create");
    if (fails(threads_left)) {
        refused_threads++;
        return EAGAIN;
    }
    return create(thread, attributes, start, argument);
}
