// Linear layers, norms, and how weights are packed.

#include <algorithm>

#include "abi.h"
#include "check.h"
#include "reference.h"

using check::Random;
using reference::Doubles;

namespace {

constexpr float MARK = 12345.0f;  // in memory that must stay as it is

struct Tested {  // a weight [n, k], and packed
    int64_t n, k;
    bool bf16;
    std::vector<float> plain;
    std::vector<uint16_t> plain_bf16, packed_bf16;
    std::vector<float> packed_fp32;

    Tested(Random& random, int64_t n_, int64_t k_, bool bf16_, double twins)
        : n(n_), k(k_), bf16(bf16_) {
        plain = random.normals(n * k, 1 / std::sqrt(double(k)));
        for (int64_t j = 1; j < n; j++)  // equal rows, for ties of maxima
            if (random.chance(twins)) std::copy_n(&plain[random.below(j) * k], k, &plain[j * k]);
        if (bf16) {
            for (float& x : plain) {
                plain_bf16.push_back(reference::to_bf16(x));
                x = reference::from_bf16(plain_bf16.back());
            }
            packed_bf16.resize(smart_packed_rows(n) * k);
            smart_pack(plain_bf16.data(), n, k, packed_bf16.data(), 1);
        } else {
            packed_fp32.resize(smart_packed_rows(n) * k);
            smart_pack(plain.data(), n, k, packed_fp32.data(), 0);
        }
    }
    const void* packed() const {
        return bf16 ? (const void*)packed_bf16.data() : packed_fp32.data();
    }
};

struct Options {
    bool norm, bias, add;
    int hint, threads;
};

struct Linear {  // a call of smart_linear
    const Tested& w;
    std::vector<float> norm, bias;
    float eps = 1e-5f;
    Options options;

    // Of rows [first, first + rows) of x, into y; and their maxima.
    void run(const std::vector<float>& x, int first, int rows, float* y, int64_t ldy, bool add,
             int64_t* best, int threads) const {
        std::vector<float> scratch(rows * w.k);
        const Weight packed{w.packed(), nullptr, 0};
        smart_linear(&x[first * w.k], rows, &packed, w.n, w.k, w.bf16,
                     options.norm ? norm.data() : nullptr, eps,
                     options.bias ? bias.data() : nullptr, scratch.data(), y, ldy, add,
                     options.hint, best, threads);
    }
};

void one_linear(uint64_t seed, int64_t n, int64_t k, int rows, bool bf16) {
    Random random(seed);
    Options options{random.chance(0.4), random.chance(0.5), random.chance(0.3),
                    random.of({0, 2, 3}), int(random.between(1, 3))};
    check::begin("linear", seed,
                 "n " + std::to_string(n) + ", k " + std::to_string(k) + ", rows "
                     + std::to_string(rows) + (bf16 ? ", bf16" : ", fp32")
                     + (options.norm ? ", norm" : "") + (options.bias ? ", bias" : "")
                     + (options.add ? ", add" : "") + ", threads "
                     + std::to_string(options.threads));
    Tested weight(random, n, k, bf16, 0.1);
    Linear call{weight, random.normals(k, 0.3), random.normals(n), 1e-5f, options};
    for (float& x : call.norm) x += 1;
    const std::vector<float> x = random.normals(rows * k);
    const int64_t ldy = n + random.below(5);
    std::vector<float> before(rows * ldy, MARK);
    for (int r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j++) before[r * ldy + j] = float(random.normal());

    // What the products read: smart_rms_norm, which has a test of its own, yields the same floats.
    std::vector<float> read = x;
    if (options.norm) smart_rms_norm(x.data(), call.norm.data(), call.eps, rows, k, read.data(), k);
    if (bf16 && smart_rounds_inputs())
        std::transform(read.begin(), read.end(), read.begin(), reference::rounded);

    std::vector<float> y = before;
    std::vector<int64_t> best(rows, -7);
    call.run(x, 0, rows, y.data(), ldy, options.add, best.data(), options.threads);
    const double error =
        0x1p-24 * (double(k) / 4 + 8);  // of a sum, relative to that of its magnitudes
    for (int r = 0; r < rows; r++) {
        for (int64_t j = 0; j < n; j++) {
            double sum = options.bias ? call.bias[j] : 0.0, size = std::fabs(sum);
            for (int64_t i = 0; i < k; i++) {
                double product = double(read[r * k + i]) * weight.plain[j * k + i];
                sum += product;
                size += std::fabs(product);
            }
            if (options.add) {
                sum += before[r * ldy + j];
                size += std::fabs(before[r * ldy + j]);
            }
            if (!check::near_at("y", r, j, sum, y[r * ldy + j], error * size)) return;
        }
        check::bits("columns beyond n", &before[r * ldy] + n, &y[r * ldy] + n, ldy - n);
    }

    // Maxima are those of the result without what was there before; and no result is needed.
    std::vector<float> bare(rows * n);
    call.run(x, 0, rows, bare.data(), n, false, nullptr, options.threads);
    std::vector<int64_t> alone(rows, -7);
    call.run(x, 0, rows, nullptr, n, false, alone.data(), options.threads);
    for (int r = 0; r < rows; r++) {
        check::same(check::at("best", r), reference::argmax(&bare[r * n], n), best[r]);
        check::same(check::at("best without y", r), best[r], alone[r]);
    }

    // A row is the same, bit by bit, in any company and with any number of threads.
    for (int trial = 0; trial < 4; trial++) {
        int first = int(random.below(rows)),
            count = trial < 2 ? 1 : int(random.between(1, rows - first));
        std::vector<float> some(count * n);
        call.run(x, first, count, some.data(), n, false, nullptr, int(random.between(1, 3)));
        if (!check::bits(
                ("rows from " + std::to_string(first) + ", " + std::to_string(count) + " of them")
                    .c_str(),
                &bare[first * n], some.data(), count * n))
            return;
    }
}

void linears() {
    for (uint64_t seed = 1; seed <= check::seeds(160); seed++) {
        Random random(seed + 1000);
        bool bf16 = random.chance(0.6);
        int64_t k = random.of<int64_t>({2, 6, 30, 32, 34, 62, 64, 96, 128, 160, 192, 258});
        one_linear(seed, random.between(1, 140), k, int(random.between(1, 40)), bf16);
    }
    // Weights so deep that passes take panels in bites; every number of rows of a pass.
    for (uint64_t seed = 1; seed <= check::seeds(16); seed++) {
        Random random(seed + 2000);
        int64_t k = random.of<int64_t>({1536, 1538, 1600, 3104});
        one_linear(seed + 10000, random.between(1, 40), k, int(random.between(1, 40)), seed % 3);
    }
    for (int rows = 1; rows <= 40; rows++) {
        one_linear(20000 + rows, 37, 64, rows, true);
        if (!check::quick) one_linear(30000 + rows, 70, 50, rows, rows % 2);
    }
}

// A row with a NaN has no maximum, and rows beside it are what they are.
void not_numbers() {
    for (uint64_t seed = 1; seed <= check::seeds(8); seed++) {
        Random random(seed + 3000);
        check::begin("linear, NaN", seed, "");
        const int64_t n = random.between(1, 80), k = 64;
        const int rows = int(random.between(2, 20)), bad = int(random.below(rows));
        Tested weight(random, n, k, seed % 2, 0);
        Linear call{weight, {}, {}, 0, {false, false, false, 3, 2}};
        std::vector<float> x = random.normals(rows * k), clean(rows * n), y(rows * n);
        call.run(x, 0, rows, clean.data(), n, false, nullptr, 2);
        x[bad * k + random.below(k)] = NAN;
        std::vector<int64_t> best(rows);
        call.run(x, 0, rows, y.data(), n, false, best.data(), 2);
        for (int r = 0; r < rows; r++) {
            if (r == bad)
                check::same("best of a row of NaN", -1, best[r]);
            else
                check::bits("rows beside a NaN", &clean[r * n], &y[r * n], n);
        }
    }
}

void rms_norms() {
    for (uint64_t seed = 1; seed <= check::seeds(60); seed++) {
        Random random(seed + 4000);
        const int rows = int(random.between(1, 5));
        const int64_t d = random.between(1, 300), ldo = d + random.below(4);
        const float eps = random.of({1e-6f, 1e-5f, 0.1f});
        check::begin("rms_norm", seed, "rows " + std::to_string(rows) + ", d " + std::to_string(d));
        const std::vector<float> x = random.normals(rows * d, random.of({1e-3, 1.0, 50.0})),
                                 w = random.normals(d);
        std::vector<float> out(rows * ldo, MARK);
        smart_rms_norm(x.data(), w.data(), eps, rows, d, out.data(), ldo);
        const Doubles expected = reference::rms_norms(reference::doubles(x), w.data(), eps, d);
        for (int r = 0; r < rows; r++)
            for (int64_t i = 0; i < ldo; i++) {
                double value = i < d ? expected[r * d + i] : MARK;
                check::near_at("out", r, i, value, out[r * ldo + i],
                               i < d ? 2e-6 * std::fabs(value) : 0);
            }
    }
}

void packing() {
    const int64_t panel = 2 * smart_vector_width();
    for (uint64_t seed = 1; seed <= check::seeds(40); seed++) {
        Random random(seed + 5000);
        const int64_t n = random.between(1, 120), k = 2 * random.between(1, 60);
        const bool bf16 = random.chance(0.5);
        check::begin(
            "pack", seed,
            "n " + std::to_string(n) + ", k " + std::to_string(k) + (bf16 ? ", bf16" : ""));
        check::same("packed_rows", (n + panel - 1) / panel * panel, smart_packed_rows(n));
        Tested weight(random, n, k, bf16, 0);
        std::vector<int64_t> index(random.between(1, 9));
        for (int64_t& i : index) i = random.below(n);
        std::vector<float> out(index.size() * k);
        const Weight packed{weight.packed(), nullptr, 0};
        smart_unpack(&packed, k, bf16, index.data(), int32_t(index.size()), out.data());
        for (size_t r = 0; r < index.size(); r++)
            check::bits("unpacked", &weight.plain[index[r] * k], &out[r * k], k);
    }
    for (uint64_t seed = 1; seed <= check::seeds(40); seed++) {
        Random random(seed + 6000);
        const int64_t n = random.between(1, 120), k = 4 * random.between(1, 40),
                      size = smart_packed_rows(n);
        check::begin("pack_bytes", seed, "n " + std::to_string(n) + ", k " + std::to_string(k));
        std::vector<float> w = random.normals(n * k, 0.05);
        if (random.chance(0.3)) std::fill_n(&w[random.below(n) * k], k, 0.0f);  // a row of zeros
        std::vector<int8_t> packed(size * k, 99);
        std::vector<float> scale(size, MARK);
        std::vector<int32_t> sums(size, 77);
        smart_pack_bytes(w.data(), n, k, packed.data(), scale.data(), sums.data());
        for (int64_t j = 0; j < size; j++) {
            double top = 0;
            for (int64_t i = 0; i < k && j < n; i++)
                top = std::max(top, std::fabs(double(w[j * k + i])));
            check::near(check::at("scale", j), top / 127, scale[j], 1e-7 * top);
            int64_t sum = 0;
            for (int64_t i = 0; i < k; i++) {
                int value =
                    packed[j / panel * panel * k + i / 4 * 4 * panel + j % panel * 4 + i % 4];
                sum += value;
                double wanted = j < n ? w[j * k + i] : 0.0;
                check::near_at("w", j, i, wanted, double(scale[j]) * value, scale[j] * 0.50001);
            }
            check::same(check::at("sums", j), sum, sums[j]);
        }
    }
}

void reading() {
    for (uint64_t seed = 1; seed <= 4; seed++) {
        Random random(seed + 7000);
        check::begin("read", seed, "");
        const std::vector<float> x = random.normals(64 * random.between(1, 200));
        double sum = 0, size = 0;
        for (float value : x) {
            sum += value;
            size += std::fabs(value);
        }
        int32_t threads = int32_t(random.between(1, 3));
        check::near("sum", sum,
                    smart_read(x.data(), int64_t(4 * x.size()), random.of({0, 2, 3}), threads),
                    1e-5 * size);
    }
}

// Columns are equal from a panel on. A thread that comes to help has done some behind it before.
void ties_whoever_multiplies(int threads, int64_t from, int64_t k) {
    const int64_t panel = 2 * smart_vector_width(), n = 40 * panel, first = from * panel;
    std::vector<float> plain(n * k, 0.5f);
    std::fill_n(plain.begin(), first * k, 0.25f);
    const std::vector<float> x(k, 1.0f);
    std::vector<float> packed(smart_packed_rows(n) * k), scratch(k);
    smart_pack(plain.data(), n, k, packed.data(), 0);
    const Weight weight{packed.data(), nullptr, 0};
    for (uint64_t trial = 1; trial <= check::seeds(400); trial++) {
        int64_t best = -7;
        check::begin("linear", trial, "equal columns, " + std::to_string(threads) + " threads");
        smart_linear(x.data(), 1, &weight, n, k, 0, nullptr, 0, nullptr, scratch.data(), nullptr, n,
                     0, 3, &best, threads);
        check::same("best", first, best);
    }
}

}  // namespace

void test_linear() {
    ties_whoever_multiplies(2, 19, 2048);
    ties_whoever_multiplies(8, 0, 32);
    rms_norms();
    packing();
    reading();
    linears();
    not_numbers();
}
