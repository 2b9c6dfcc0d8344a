// Of OpenMP's runtime what the kernels use, for ThreadSanitizer: libgomp itself is not built with
// it, so that all that a team shares would look like a race. Threads are made anew for each region.

#include <thread>
#include <vector>

namespace {

thread_local int my_number = 0, my_team = 1;

}  // namespace

extern "C" {

int omp_get_thread_num() { return my_number; }
int omp_get_num_threads() { return my_team; }
int omp_get_max_threads() { return 2; }

void GOMP_parallel(void (*run)(void*), void* data, unsigned threads, unsigned) {
    const int number = my_number, team = my_team, size = team > 1 ? 1 : threads ? int(threads) : 2;
    auto member = [&](int i) {
        my_number = i;
        my_team = size;
        run(data);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < size; i++) others.emplace_back(member, i);
    member(0);
    for (std::thread& other : others) other.join();
    my_number = number;
    my_team = team;
}
}
