// Threads that wait for each other, more of them than CPUs as well, and several teams at once.

#include <thread>

#include "check.h"
#include "team.h"

namespace {

constexpr int ITEMS = 40;

// Each thread writes what all read after the barrier; at times one of them is late, so that the
// others spin only, or sleep, or take it for a sign that the CPUs are shared.
int64_t wrong_after_barriers(int threads, int phases) {
    std::vector<int> reached(threads, -1), taken(ITEMS);
    std::atomic<int64_t> wrong{0};
    smart::run_team(threads, [&] {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        for (int phase = 0; phase < phases; phase++) {
            if (phase % 64 == me) std::this_thread::sleep_for(std::chrono::microseconds(phase * 3));
            for (int64_t i; (i = smart::next_item()) < ITEMS;) taken[i]++;
            reached[me] = phase;
            smart::barrier();
            for (int i = 0; i < team; i++) wrong += reached[i] != phase;
            for (int count : taken) wrong += count != phase + 1;
            smart::barrier();
        }
    });
    return wrong;
}

// Each item once, whoever takes it.
int64_t wrong_items(int threads, int64_t count) {
    std::atomic<int64_t> wrong{0};
    std::vector<std::atomic<int>> taken(count);
    smart::run_team(threads, [&] {
        for (int phase = 1; phase <= 50; phase++) {
            smart::Items items(count);
            for (int64_t i; (i = items.next()) < count;) taken[i]++;
            smart::barrier();
            for (const std::atomic<int>& times : taken) wrong += times != phase;
            smart::barrier();
        }
    });
    return wrong;
}

// One of two threads is kept in its first item until the other has done all that it can: what the
// first one does is the batch that it had taken, at most a quarter of its half.
void others_help(int64_t count) {
    std::atomic<bool> over{false};
    std::atomic<int64_t> late{0}, all{0};
    smart::run_team(2, [&] {
        const bool is_late = omp_get_thread_num() == 1;
        for (smart::Items items(count); items.next() < count; all++) {
            late += is_late;
            while (is_late && !over) std::this_thread::yield();
        }
        if (!is_late) over = true;
    });
    check::same("items", count, all);
    check::that(late <= count / 2 / 4, "a late thread leaves its items to others");
}

// Memory that grows, is used again, and holds what all threads have written.
int64_t wrong_in_memory(int threads) {
    std::atomic<int64_t> wrong{0};
    smart::run_team(threads, [&] {
        const int me = omp_get_thread_num(), team = omp_get_num_threads();
        int64_t phase = 0;
        for (int64_t lines : {1, 50, 3, 400, 2000, 2000}) {
            smart::CacheLine* const memory = smart::team_memory(lines);
            phase++;
            for (int64_t i = me; i < lines; i += team) memory[i].bytes[i % 64] = char(i + phase);
            smart::barrier();
            for (int64_t i = 0; i < lines; i++) wrong += memory[i].bytes[i % 64] != char(i + phase);
            smart::barrier();
        }
    });
    return wrong;
}

}  // namespace

void test_team() {
    for (int threads : {1, 2, 3, 16})
        for (int64_t count : {1, 2, 5, 48, 280}) {
            check::begin("team", uint64_t(threads), std::to_string(count) + " items");
            check::same("items", 0, wrong_items(threads, count));
        }
    check::begin("team", 2, "one of two threads is late");
    for (int trial = 0; trial < 100; trial++) others_help(60);
    for (int threads : {1, 2, 3, 16}) {
        check::begin("team", uint64_t(threads), "memory of the team");
        check::same("what is wrong", 0, wrong_in_memory(threads));
    }
    for (int threads : {1, 2, 3, 16}) {
        check::begin("team", uint64_t(threads), std::to_string(threads) + " threads, two teams");
        const int phases = check::quick ? 200 : 2000;
        int64_t beside = -1;
        std::thread other([&] { beside = wrong_after_barriers(threads, phases); });
        check::same("what is wrong", 0, wrong_after_barriers(threads, phases));
        other.join();
        check::same("what is wrong in the other team", 0, beside);
    }
}
