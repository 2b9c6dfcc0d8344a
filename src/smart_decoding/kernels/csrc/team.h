// A team of threads. OpenMP makes it, so that a process has one, torch's too; how its threads wait
// for each other is decided here, by time. OpenMP spins by a count, which it reads once in a
// process's life, and whose time differs between CPUs by a factor of ten.

#pragma once
#include <linux/futex.h>
#include <omp.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <vector>

#include "isa.h"

namespace [[gnu::visibility("hidden")]] smart {

struct alignas(64) CacheLine {
    char bytes[64];
};
typedef std::vector<CacheLine> CacheLines;

struct Range {
    int64_t first, last;

    bool empty() const { return first == last; }
};

class Team {
    typedef std::chrono::steady_clock Clock;

    // Who waits spins for about as long as a thread takes to wake up, then sleeps: no wait costs
    // more than twice what it must.
    static constexpr std::chrono::microseconds SPINNING{50};
    static constexpr int LOOKS = 16;  // between two at the clock

    // After a wait so long, others work on these CPUs, and threads of a team may have to share one,
    // where who spins keeps back the one he waits for: for a while all sleep at once.
    static constexpr std::chrono::milliseconds LONG{1}, SHARING{50};
    static inline std::atomic<Clock::rep> shared_until{0};

    static constexpr uint32_t SOME_SLEEP = 1, NEXT = 2;

    // Of what is left a part is taken at once: behind an atomic exchange nothing is read ahead, so
    // that one item after another would wait for memory.
    static constexpr int64_t PARTS = 4;

    alignas(64) std::atomic<uint32_t> phase{0};  // NEXT for each barrier passed, and SOME_SLEEP
    alignas(64) std::atomic<uint32_t> arrived{0};
    std::atomic<int64_t> counter{0};  // of items that are nobody's own

    // How many of a thread's own items are taken, and since which barrier: (phase, count).
    struct alignas(64) Own {
        std::atomic<uint64_t> taken{~uint64_t(0)};
    };
    alignas(64) std::vector<Own> own;  // not where arriving threads write

public:
    CacheLines& memory;

    Team(int threads, CacheLines& kept) : own(threads), memory(kept) {}

    void wait(uint32_t size) {
        const uint32_t now = phase.load(std::memory_order_relaxed) & ~SOME_SLEEP;
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < size) return wait_until_past(now);
        arrived.store(0, std::memory_order_relaxed);
        counter.store(0, std::memory_order_relaxed);
        if (phase.exchange(now + NEXT, std::memory_order_release) & SOME_SLEEP)
            futex(FUTEX_WAKE_PRIVATE, INT_MAX);
    }

    int64_t take() { return counter.fetch_add(1, std::memory_order_relaxed); }

    Range take_of(int whose, const Range& items) {
        std::atomic<uint64_t>& taken = own[whose].taken;
        const uint64_t now = phase.load(std::memory_order_relaxed) & ~SOME_SLEEP;
        uint64_t seen = taken.load(std::memory_order_relaxed);
        for (;;) {
            const int64_t before = seen >> 32 == now ? int64_t(uint32_t(seen)) : 0;
            const int64_t first = items.first + before, left = items.last - first;
            if (!left) return {items.last, items.last};
            const int64_t count = std::max<int64_t>(1, left / PARTS);
            if (taken.compare_exchange_weak(seen, now << 32 | uint64_t(before + count),
                                            std::memory_order_relaxed))
                return {first, first + count};
        }
    }

private:
    void wait_until_past(uint32_t now) {
        const Clock::time_point start = Clock::now();
        const bool shared =
            start.time_since_epoch().count() < shared_until.load(std::memory_order_relaxed);
        do
            for (int i = 0; i < LOOKS; i++, relax())
                if ((phase.load(std::memory_order_acquire) & ~SOME_SLEEP) != now) return;
        while (!shared && Clock::now() - start < SPINNING);
        while ((phase.fetch_or(SOME_SLEEP, std::memory_order_acquire) & ~SOME_SLEEP) == now)
            futex(FUTEX_WAIT_PRIVATE, now | SOME_SLEEP);
        if (const Clock::time_point end = Clock::now(); end - start > LONG)
            shared_until.store((end + SHARING).time_since_epoch().count(),
                               std::memory_order_relaxed);
    }

    void futex(int operation, uint32_t value) {
        syscall(SYS_futex, (uint32_t*)&phase, operation, value, nullptr, nullptr, 0);
    }
};

inline thread_local Team* my_team = nullptr;
inline thread_local CacheLines team_lines;  // of the teams that this thread makes

// All threads of the team wait for each other.
static inline void barrier() { my_team->wait(uint32_t(omp_get_num_threads())); }

// The next of the items 0, 1, ... that no thread of the team has taken since the last barrier.
static inline int64_t next_item() { return my_team->take(); }

// The items 0 to count - 1, one after another for each thread of a team: its own first, then what
// others have left. Cores differ in speed, and at times others work on them. A barrier comes before
// the next ones.
class Items {
    const int threads = omp_get_num_threads(), me = omp_get_thread_num();
    int turn = 0;  // whose batch it is, counted from this thread on
    Range batch{0, 0};

public:
    const int64_t count;

    explicit Items(int64_t count_) : count(count_) {}

    // The first of this thread's own.
    static int64_t first_of(int64_t count) {
        return count * omp_get_thread_num() / omp_get_num_threads();
    }

    // The next one; `count` where none is left.
    int64_t next() {
        while (batch.empty()) {
            if (turn == threads) return count;
            const int whose = (me + turn) % threads;
            batch =
                my_team->take_of(whose, {count * whose / threads, count * (whose + 1) / threads});
            if (batch.empty()) turn++;
        }
        return batch.first++;
    }
};

// A weight's panels, one after another for each thread that multiplies them: all items of a stage,
// or some of them.
class Panels {
    Items& items;
    const int64_t before = 0;  // items of other weights
    int64_t item = -1;         // the one taken last
    bool waits = false;        // `next` did not return it yet

public:
    const int64_t count;
    const bool alone;  // no other thread is known to multiply the same rows

    explicit Panels(Items& all) : items(all), count(all.count), alone(false) {}

    // The `count_` items after the first `before_`. first: one of them, which this thread has
    // taken.
    Panels(Items& all, int64_t before_, int64_t count_, int64_t first)
        : items(all), before(before_), item(first), waits(true), count(count_), alone(true) {}

    // Where this thread begins.
    int64_t start() const { return waits ? item - before : Items::first_of(count); }

    // The next one; `count` where none is left.
    int64_t next() {
        if (!waits) item = items.next();
        waits = false;
        return item >= before && item < before + count ? item - before : count;
    }

    // The item that was taken when none of these was left: another weight's, or none.
    int64_t after() const { return item; }
};

// Memory of the whole team, which all its threads ask for at once; what was in it may be lost.
static inline CacheLine* team_memory(size_t lines) {
    CacheLines& kept = my_team->memory;
    if (kept.size() < lines) {
        barrier();  // all have looked
        if (!omp_get_thread_num()) kept = CacheLines(lines + lines / 4);
        barrier();
    }
    return kept.data();
}

// Calls `run` on each of so many threads. The barrier at its end spares OpenMP's the waiting.
template <class F>
static void run_team(int threads, F&& run) {
    Team team(threads, team_lines);
#pragma omp parallel num_threads(threads)
    {
        Team* const before = my_team;
        my_team = &team;
        run();
        barrier();
        my_team = before;
    }
}

}  // namespace smart
