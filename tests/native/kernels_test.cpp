// Checks the kernels against plain loops, through abi.h only. Random cases, numbered by seeds: a
// failure names its seed.
//
//     kernels_test [--quick] [TEST ...]
//
// Exit code 0: all hold; 1: some do not; 77: this CPU or its system cannot run this variant.

#include <chrono>
#include <functional>

#include "abi.h"
#include "check.h"

struct Test {
    const char* name;
    void (*run)();
};

static const Test TESTS[] = {
    {"linear", test_linear},       {"quants", test_quants},     {"sampling", test_sampling},
    {"layers", test_layers},       {"drafting", test_drafting}, {"rounds", test_rounds},
    {"selection", test_selection}, {"team", test_team},         {"experts", test_experts},
    {"delta", test_delta},
};

int main(int count, char** arguments) {
    std::vector<std::string> asked;
    for (int i = 1; i < count; i++) {
        std::string argument = arguments[i];
        if (argument == "--quick")
            check::quick = true;
        else
            asked.push_back(argument);
    }
    if (smart_enable()) {
        printf("this system cannot run this variant\n");
        return 77;
    }
    const Weight panels = {};
    printf("%d lanes, %d rows a pass of bf16, inputs %s\n", smart_vector_width(),
           smart_pass_rows(&panels, 1), smart_rounds_inputs() ? "rounded to bf16" : "in fp32");
    int run = 0;
    for (const Test& test : TESTS) {
        bool wanted = asked.empty();
        for (const std::string& name : asked) wanted |= name == test.name;
        if (!wanted) continue;
        run++;
        const long before = check::comparisons;
        const int failed = check::failures;
        const auto start = std::chrono::steady_clock::now();
        test.run();
        const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
        printf("%-10s %9ld comparisons, %3d failed, %6.2f s\n", test.name,
               check::comparisons - before, check::failures - failed, seconds.count());
        fflush(stdout);
    }
    if (!run) printf("there is no such test\n");
    return check::failures || !run ? 1 : 0;
}
