// Of OpenMP's runtime what the kernels use, for ThreadSanitizer: libgomp itself is not built with
// it, so that its barriers would look like none and all that is shared like a race. Threads are
// made anew for each region. What orders threads is what OpenMP promises, barriers and the ends of
// regions; a loop's counter is relaxed, so that it hides no race.

#include <atomic>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <thread>
#include <vector>

namespace {

constexpr int MOST_LOOPS = 512;  // dynamic ones of a region
constexpr long UNSET = -1;

struct Team {
    const int size;
    std::mutex mutex;
    std::condition_variable changed;
    int waiting = 0;
    long barriers = 0;
    std::atomic<long> next[MOST_LOOPS];  // of each dynamic loop, its next index

    explicit Team(int size_) : size(size_) {
        for (std::atomic<long>& at : next) at.store(UNSET, std::memory_order_relaxed);
    }
    void barrier() {
        std::unique_lock<std::mutex> lock(mutex);
        const long number = barriers;
        if (++waiting == size) {
            waiting = 0;
            barriers++;
            changed.notify_all();
        } else
            changed.wait(lock, [&] { return barriers != number; });
    }
};

struct Member {  // what a thread is in its team, and which dynamic loop it is in
    Team* team = nullptr;
    int number = 0, loop = -1;
    long end = 0, step = 1, chunk = 1;
};

thread_local Member mine;

bool take(long* first, long* last) {
    const long size = mine.step * mine.chunk;
    *first = mine.team->next[mine.loop].fetch_add(size, std::memory_order_relaxed);
    *last = *first + size < mine.end ? *first + size : mine.end;
    return *first < mine.end;
}

}  // namespace

extern "C" {

int omp_get_thread_num() { return mine.number; }
int omp_get_num_threads() { return mine.team ? mine.team->size : 1; }

void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
    Team team(mine.team ? 1 : threads ? int(threads) : 2);
    const Member before = mine;
    auto member = [&](int number) {
        mine = Member();
        mine.team = &team;
        mine.number = number;
        run(data);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < team.size; i++) others.emplace_back(member, i);
    member(0);
    for (std::thread& other : others) other.join();
    mine = before;
}

void GOMP_barrier() {
    if (mine.team) mine.team->barrier();
}

bool GOMP_loop_nonmonotonic_dynamic_start(long start, long end, long step, long chunk, long* first,
                                          long* last) {
    if (++mine.loop == MOST_LOOPS || start < 0 || step < 1 || !mine.team) {
        fprintf(stderr, "openmp.cpp does not know such loops\n");
        abort();
    }
    mine.end = end, mine.step = step, mine.chunk = chunk;
    long unset = UNSET;
    mine.team->next[mine.loop].compare_exchange_strong(unset, start, std::memory_order_relaxed);
    return take(first, last);
}
bool GOMP_loop_nonmonotonic_dynamic_next(long* first, long* last) { return take(first, last); }
void GOMP_loop_end() { GOMP_barrier(); }
void GOMP_loop_end_nowait() {}
}
