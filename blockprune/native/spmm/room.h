// Memory that calls work in, kept for the next one: the pages of fresh memory cost more than filling them.

#pragma once

#include "../common.h"

#include <mutex>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

class Room {
  public:
    explicit Room(int64_t bytes) {
        if (!bytes) return;
        take(bytes);
        if (piece.bytes >= bytes) return;
        drop();  // too small for this: there are never more pieces than were in use at once
        piece.bytes = rounded(bytes);
        piece.memory = ::operator new(piece.bytes, std::align_val_t(alignment(piece.bytes)));
#if defined(__linux__) && defined(MADV_HUGEPAGE)
        if (alignment(piece.bytes) == LARGE) madvise(piece.memory, piece.bytes, MADV_HUGEPAGE);
#endif
    }
    ~Room() {
#if defined(SANITIZED)
        drop();
#else
        if (!piece.memory) return;
        std::lock_guard<std::mutex> hold(shelf().lock);
        shelf().kept.push_back(piece);
#endif
    }
    Room(const Room&) = delete;
    Room& operator=(const Room&) = delete;
    void* get() const { return piece.memory; }

  private:
    static const int64_t LARGE = 1 << 21;  // a large page
    struct Piece {
        void* memory = nullptr;
        int64_t bytes = 0;
    } piece;
    struct Shelf {
        std::mutex lock;
        std::vector<Piece> kept;
    };
    static Shelf& shelf() {
        static Shelf& all = *new Shelf;  // never destroyed: threads may outlive it
        return all;
    }

#if defined(SANITIZED)  // just what was asked for, so that a sanitizer sees a step over its end
    static int64_t rounded(int64_t bytes) { return bytes; }
    static int64_t alignment(int64_t) { return 64; }
#else
    static int64_t rounded(int64_t bytes) {
        const int64_t page = bytes >= LARGE / 4 ? LARGE : 4096;
        return (bytes + page - 1) / page * page;
    }
    static int64_t alignment(int64_t bytes) { return bytes >= LARGE ? LARGE : 64; }
#endif

    // the smallest piece that is enough, or else the largest
    void take(int64_t bytes) {
        std::lock_guard<std::mutex> hold(shelf().lock);
        auto& kept = shelf().kept;
        if (kept.empty()) return;
        const auto best = std::min_element(kept.begin(), kept.end(), [bytes](const Piece& a, const Piece& b) {
            return a.bytes < bytes || b.bytes < bytes ? a.bytes > b.bytes : a.bytes < b.bytes;
        });
        piece = *best;
        kept.erase(best);
    }
    void drop() {
        if (piece.memory) ::operator delete(piece.memory, std::align_val_t(alignment(piece.bytes)));
        piece = Piece();
    }
};
