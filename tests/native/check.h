// What all tests share: the case being checked, comparisons that report it where they fail, and
// random numbers.

#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace check {

inline int failures = 0;
inline long comparisons = 0;
inline bool quick = false;
inline std::string test, text;
inline uint64_t seed = 0;

constexpr int MOST_REPORTS = 20;

// Seeds 1 to what this returns are tried.
inline uint64_t seeds(uint64_t all) { return quick ? (all + 7) / 8 : all; }

// Names the case that the comparisons after it belong to.
inline void begin(const char* name, uint64_t number, const std::string& what) {
    test = name;
    seed = number;
    text = what;
}

inline bool fail(const std::string& what, const std::string& expected, const std::string& got) {
    if (failures++ < MOST_REPORTS)
        printf("FAILED %s, seed %llu (%s): %s: expected %s, got %s\n", test.c_str(),
               (unsigned long long)seed, text.c_str(), what.c_str(), expected.c_str(), got.c_str());
    return false;
}

inline std::string number(double x) {
    char buffer[40];
    snprintf(buffer, sizeof buffer, "%.9g", x);
    return buffer;
}

inline std::string at(const char* what, int64_t i) {
    return std::string(what) + "[" + std::to_string(i) + "]";
}

inline bool that(bool holds, const std::string& what) {
    comparisons++;
    return holds || fail(what, "it to hold", "that it does not");
}

inline bool same(const std::string& what, int64_t expected, int64_t got) {
    comparisons++;
    return expected == got || fail(what, std::to_string(expected), std::to_string(got));
}

// A NaN is near a NaN only.
inline bool is_near(double expected, double got, double tolerance) {
    if (std::isnan(expected) && std::isnan(got)) return true;
    return expected == got || std::fabs(expected - got) <= tolerance;
}

inline bool near(const std::string& what, double expected, double got, double tolerance) {
    comparisons++;
    if (is_near(expected, got, tolerance)) return true;
    return fail(what, number(expected) + " +- " + number(tolerance), number(got));
}

// Of a matrix's entry, whose name is made where it is needed only.
inline bool near_at(const char* what, int64_t row, int64_t column, double expected, double got,
                    double tolerance) {
    comparisons++;
    if (is_near(expected, got, tolerance)) return true;
    const std::string name =
        std::string(what) + "[" + std::to_string(row) + ", " + std::to_string(column) + "]";
    return fail(name, number(expected) + " +- " + number(tolerance), number(got));
}

template <class T>
inline bool same_all(const char* what, const std::vector<T>& expected, const std::vector<T>& got) {
    if (!same(std::string("size of ") + what, expected.size(), got.size())) return false;
    for (size_t i = 0; i < expected.size(); i++)
        if (!same(at(what, i), expected[i], got[i])) return false;
    return true;
}

// Floats, bit by bit.
inline bool bits(const char* what, const float* expected, const float* got, int64_t count) {
    comparisons++;
    if (!count || !memcmp(expected, got, count * sizeof(float))) return true;
    for (int64_t i = 0; i < count; i++)
        if (memcmp(expected + i, got + i, sizeof(float)))
            return fail(at(what, i) + ", of which the bits count", number(expected[i]),
                        number(got[i]));
    return true;
}

// Within `tolerance` times the root mean square of what is expected. The first entry that is not is
// reported.
inline bool near_rows(const char* what, const double* expected, const float* got, int64_t rows,
                      int64_t width, double tolerance) {
    for (int64_t r = 0; r < rows; r++) {
        double squares = 0;
        for (int64_t i = 0; i < width; i++)
            squares += expected[r * width + i] * expected[r * width + i];
        double allowed = tolerance * std::sqrt(squares / double(width));
        for (int64_t i = 0; i < width; i++)
            if (!near_at(what, r, i, expected[r * width + i], got[r * width + i], allowed))
                return false;
    }
    return true;
}

// SplitMix64: the same numbers everywhere.
struct Random {
    uint64_t state;
    explicit Random(uint64_t start) : state(start * 0x2545F4914F6CDD1Du) {}

    uint64_t next() {
        uint64_t z = state += 0x9E3779B97F4A7C15u;
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
        z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
        return z ^ (z >> 31);
    }
    double uniform() { return double(next() >> 11) * 0x1p-53; }
    int64_t below(int64_t n) { return int64_t(next() % uint64_t(n)); }
    int64_t between(int64_t low, int64_t high) { return low + below(high - low + 1); }
    bool chance(double p) { return uniform() < p; }
    double normal() {  // about so
        double sum = 0;
        for (int i = 0; i < 12; i++) sum += uniform();
        return sum - 6;
    }
    template <class T>
    T of(std::initializer_list<T> choices) {
        return choices.begin()[below(choices.size())];
    }
    template <class T>
    void shuffle(std::vector<T>& list) {
        for (size_t i = list.size(); i > 1; i--) std::swap(list[i - 1], list[below(i)]);
    }
    std::vector<float> normals(int64_t count, double deviation = 1) {
        std::vector<float> list(count);
        for (float& x : list) x = float(deviation * normal());
        return list;
    }
};

}  // namespace check

// Each of these is a file of tests.
void test_linear();
void test_quants();
void test_sampling();
void test_layers();
void test_drafting();
void test_rounds();
void test_selection();
void test_team();
void test_experts();
void test_delta();
