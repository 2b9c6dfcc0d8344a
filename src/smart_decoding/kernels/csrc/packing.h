// Who packs the rows that a linear layer reads: each thread all of them for itself, or,
// where that takes longer than to wait for others, the team together.

#pragma once
#include "quants.h"

namespace [[gnu::visibility("hidden")]] smart {

// Inputs that a thread packs in a few microseconds, as long as threads wait for each other.
constexpr int64_t PACKED_ALONE = 16 << 10;

// For all threads of a team alike, unless a thread is `alone`. Before the next one that is shared
// they pass a barrier, as after every linear layer.
struct Packing {
    const bool shared;
    const int64_t first, last;  // this thread's part of k, of whole blocks as far as k is
    CacheLine* const memory;

    Packing(int64_t rows, int64_t k, size_t bytes, bool alone)
        : shared(!alone && omp_get_num_threads() > 1 && rows * k > PACKED_ALONE),
          first(shared ? part(k, omp_get_thread_num()) : 0),
          last(shared ? part(k, omp_get_thread_num() + 1) : k),
          memory(shared ? team_memory(lines_of(bytes)) : own_memory(lines_of(bytes))) {}

    // All is packed.
    void finish() const {
        if (shared) barrier();
    }

private:
    static int64_t part(int64_t k, int thread) {
        if (thread == omp_get_num_threads()) return k;
        return k / QUANT_BLOCK * thread / omp_get_num_threads() * QUANT_BLOCK;
    }

    static size_t lines_of(size_t bytes) { return bytes / sizeof(CacheLine) + 1; }

    static CacheLine* own_memory(size_t lines) {
        static thread_local CacheLines kept;
        if (kept.size() < lines) kept.resize(lines);
        return kept.data();
    }
};

}  // namespace smart
