// Memory for the length of a call. What is large the C library maps anew for each call, and the system gives each page of
// it when it is first written to: for 600 kB that takes longer than a small product. So it is kept for the next call.

#pragma once

#include <omp.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>

class Scratch {
  public:
    explicit Scratch(int64_t bytes) : block(bytes == 0 ? nullptr : bytes < LARGE ? fresh(bytes) : large(bytes)) {}
    ~Scratch() {
        if (block != nullptr && (block->size < LARGE || block->size > most() || !kept(block))) std::free(block);
    }
    Scratch(const Scratch&) = delete;

    // Where it lies, at a multiple of 64; nowhere when there is no memory, or none was asked for.
    char* at() const { return block == nullptr ? nullptr : reinterpret_cast<char*>(block + 1); }

  private:
    static constexpr int64_t LARGE = 64 << 10;  // bytes from which on it is kept,
    static constexpr int64_t EACH = 2 << 20;    // and for each thread up to which: attention may want far more
    static constexpr int PLACES = 6;            // calls of other threads have theirs at the same time
    struct alignas(64) Block { int64_t size; };
    Block* block;

    static int64_t most() { return EACH * omp_get_max_threads(); }

    // One for the process, as its allocator is.
    static std::atomic<Block*>* places() {
        static std::atomic<Block*> own[PLACES];
        return own;
    }

    static Block* fresh(int64_t bytes) {
        const int64_t size = (bytes + 63) / 64 * 64;
        Block* const made = static_cast<Block*>(std::aligned_alloc(64, sizeof(Block) + size));
        if (made != nullptr) made->size = size;
        return made;
    }

    // One that is kept and large enough, or a new one in place of one that is too small.
    static Block* large(int64_t bytes) {
        Block* small = nullptr;
        for (int i = 0; i < PLACES; i++) {
            Block* const found = places()[i].exchange(nullptr, std::memory_order_acq_rel);
            if (found == nullptr) continue;
            if (found->size >= bytes) {
                if (small != nullptr && !kept(small)) std::free(small);
                return found;
            }
            if (small != nullptr && !kept(small)) std::free(small);
            small = found;
        }
        std::free(small);
        return fresh(bytes);
    }

    // Whether there was a place left for it.
    static bool kept(Block* block) {
        for (int i = 0; i < PLACES; i++) {
            Block* none = nullptr;
            if (places()[i].compare_exchange_strong(none, block, std::memory_order_acq_rel)) return true;
        }
        return false;
    }
};
