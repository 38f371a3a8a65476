// Scratch buffers that are kept for the next call: the page faults of fresh memory cost more than filling it.

#pragma once

#include <mutex>
#include <new>

#include "../common.h"

class ScratchBuffer {
  public:
    explicit ScratchBuffer(int64_t bytes) {
        if (!bytes) return;
        take(bytes);
        if (block.bytes >= bytes) return;
        release();  // a block that is too small is replaced: there are never more blocks than were in use at the same time
        block.bytes = rounded(bytes);
        block.memory = ::operator new(block.bytes, std::align_val_t(alignment(block.bytes)));
        advise_large_pages(block.memory, block.bytes);
    }
    ~ScratchBuffer() {
#if defined(SANITIZED)
        release();
#else
        if (!block.memory) return;
        try {
            std::lock_guard<std::mutex> guard(pool().lock);
            pool().blocks.push_back(block);
        } catch (const std::bad_alloc&) {
            release();
        }
#endif
    }
    ScratchBuffer(const ScratchBuffer&) = delete;
    ScratchBuffer& operator=(const ScratchBuffer&) = delete;
    void* get() const { return block.memory; }

  private:
    static const int64_t LARGE_PAGE = 1 << 21;
    struct Block {
        void* memory = nullptr;
        int64_t bytes = 0;
    } block;
    struct Pool {
        std::mutex lock;
        std::vector<Block> blocks;
    };
    static Pool& pool() {
        static Pool& shared = *new Pool;  // is never destroyed, because threads may outlive it
        return shared;
    }

#if defined(SANITIZED)  // exactly what was asked for, so that a sanitizer sees an access past the end
    static int64_t rounded(int64_t bytes) { return bytes; }
    static int64_t alignment(int64_t) { return 64; }
#else
    static int64_t rounded(int64_t bytes) { return round_up(bytes, bytes >= LARGE_PAGE / 4 ? LARGE_PAGE : 4096); }
    static int64_t alignment(int64_t bytes) { return bytes >= LARGE_PAGE ? LARGE_PAGE : 64; }
#endif

    // Takes the smallest block that is large enough, or else the largest.
    void take(int64_t bytes) {
        std::lock_guard<std::mutex> guard(pool().lock);
        auto& blocks = pool().blocks;
        if (blocks.empty()) return;
        const auto best = std::min_element(blocks.begin(), blocks.end(), [bytes](const Block& a, const Block& b) {
            return a.bytes < bytes || b.bytes < bytes ? a.bytes > b.bytes : a.bytes < b.bytes;
        });
        block = *best;
        blocks.erase(best);
    }
    void release() {
        if (block.memory) ::operator delete(block.memory, std::align_val_t(alignment(block.bytes)));
        block = Block();
    }
};
