// Maxima, the largest entries, and draws with noise.

#include <algorithm>

#include "abi.h"
#include "check.h"
#include "reference.h"

using check::Random;
using reference::Doubles;

namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// Logits, some of which may be equal.
std::vector<float> logits(Random& random, int64_t count, double deviation, double twins) {
    std::vector<float> list = random.normals(count, deviation);
    for (int64_t i = 1; i < count; i++)
        if (random.chance(twins)) list[i] = list[random.below(i)];
    return list;
}

void argmaxes() {
    for (uint64_t seed = 1; seed <= check::seeds(200); seed++) {
        Random random(seed + 100);
        const int64_t n = random.between(1, 300);
        const int rows = int(random.between(1, 6)), wanted = int(random.between(1, 8));
        check::begin("argmax", seed, "n " + std::to_string(n));
        std::vector<float> x = logits(random, rows * n, 1, 0.5);
        for (int r = 0; r < rows; r++) {  // what is not finite
            float* row = &x[r * n];
            int64_t count = random.chance(0.3) ? n : random.below(4);
            float what = random.of({NAN, -INF, NAN, INF});
            if (random.chance(0.5))
                for (int64_t i = 0; i < count; i++) row[random.below(n)] = what;
            if (random.chance(0.1)) std::fill_n(row, n, what);
        }
        std::vector<int64_t> which(wanted), out(wanted, -7);
        for (int64_t& r : which) r = random.below(rows);
        smart_argmax(x.data(), which.data(), wanted, n, out.data(), int32_t(random.between(1, 3)));
        for (int i = 0; i < wanted; i++)
            check::same(check::at("best", i), reference::argmax(&x[which[i] * n], n), out[i]);
    }
}

void top_ks() {
    for (uint64_t seed = 1; seed <= check::seeds(200); seed++) {
        Random random(seed + 200);
        const int64_t n = random.chance(0.1) ? random.between(1000, 3000) : random.between(1, 400);
        const int k = int(random.between(1, std::min<int64_t>(n, random.of({1, 4, 10, 64}))));
        const int rows = int(random.between(1, 4));
        check::begin("top_k", seed, "n " + std::to_string(n) + ", k " + std::to_string(k));
        const std::vector<float> x = logits(random, rows * n, 3, 0.2);
        std::vector<float> scale(rows), probs(rows * k);
        std::vector<uint64_t> keys(rows, 0);
        std::vector<int64_t> tokens(n), ids(rows * k, -7);
        for (float& s : scale) s = float(0.3 + 1.5 * random.uniform());
        for (int64_t i = 0; i < n; i++) tokens[i] = 3 * i + 5;
        random.shuffle(tokens);
        const bool noisy = random.chance(0.6);
        for (uint64_t& key : keys)
            if (random.chance(0.7)) key = random.next() | 1;
        smart_top_k(x.data(), rows, n, k, scale.data(), noisy ? keys.data() : nullptr,
                    tokens.data(), ids.data(), probs.data(), int32_t(random.between(1, 3)));
        for (int r = 0; r < rows; r++) {
            const uint64_t key = noisy ? keys[r] : 0;
            Doubles score(n);
            double best = -INF;
            for (int64_t i = 0; i < n; i++) best = std::max(best, double(x[r * n + i]));
            for (int64_t i = 0; i < n; i++) {
                score[i] = (x[r * n + i] - best) * scale[r];
                if (key) score[i] += reference::gumbel(key, tokens[i]);
            }
            const std::vector<int64_t> order =
                key ? reference::ranked(score)
                    : reference::ranked(std::vector<float>(&x[r * n], &x[r * n] + n));
            double sum = 0, top = score[order[0]];
            for (int64_t i = 0; i < (key ? k : n); i++) sum += std::exp(score[order[i]] - top);
            for (int j = 0; j < k; j++) {
                const std::string name =
                    "of row " + std::to_string(r) + ", place " + std::to_string(j);
                const int64_t id = ids[r * k + j];
                if (!check::that(id >= 0 && id < n, "a valid id " + name)) return;
                // Without noise the order is exact. With it, nearly equal scores may change places.
                if (!key || std::fabs(score[id] - score[order[j]]) > 1e-5)
                    check::same("id " + name, order[j], id);
                check::near("probability " + name, std::exp(score[id] - top) / sum,
                            probs[r * k + j], 3e-5 * std::exp(score[id] - top) / sum + 1e-12);
            }
        }
    }
}

// What is nearer than NEAR is told apart by no one, what is further than FAR must be: scores
// (NEAR_SCORES in the kernels is 1e-3), and the mass above a token and top_p (MARGIN is 1e-4).
constexpr double NEAR_SCORES = 0.9e-3, FAR_SCORES = 1.1e-3, NEAR_MASS = 0.9e-4, FAR_MASS = 1.1e-4;

struct Expected {
    int64_t token = -1;
    bool close = false, unsure = false;  // must be -1; may be -1
};

// The share of softmax(row * scale) above `value`, among the entries of at least `floor`.
double mass_above(const float* row, int64_t n, double scale, double floor, double value) {
    double all = 0, above = 0;
    const double best = *std::max_element(row, row + n);
    for (int64_t i = 0; i < n; i++) {
        const double weight = row[i] >= floor ? std::exp((row[i] - best) * scale) : 0;
        all += weight;
        if (row[i] > value) above += weight;
    }
    return above / all;
}

// The argmax of row * scale + noise among entries of at least `floor`, and beyond `value`.
Expected noisy_argmax(const Draw& d, int64_t n, int64_t best, double floor, double value) {
    const uint64_t key = reference::noise_key(d.seed, d.sample, d.position);
    double first = -INF, second = -INF;
    Expected expected;
    for (int64_t i = 0; i < n; i++) {
        if (d.row[i] < floor || !(d.row[i] > value)) continue;
        double score = (double(d.row[i]) - d.row[best]) * d.scale + reference::gumbel(key, i);
        if (score > first) {
            second = first;
            first = score;
            expected.token = i;
        } else
            second = std::max(second, score);
    }
    expected.close = first - second < NEAR_SCORES;
    expected.unsure = first - second < FAR_SCORES;
    return expected;
}

// One draw after another, each above a token that top-p cuts.
Expected expected_draw(const Draw& d, int64_t n, int64_t best) {
    double floor = std::max(std::numeric_limits<float>::lowest(), float(d.row[best] + d.below));
    if (d.k > 0 && d.k < n) {
        std::vector<float> sorted(d.row, d.row + n);
        std::sort(sorted.begin(), sorted.end(), std::greater<float>());
        floor = std::max(floor, double(sorted[d.k - 1]));
    }
    Expected all = noisy_argmax(d, n, best, floor, -INF);
    while (!all.unsure && all.token != best && d.top_p < 1) {
        const double away = mass_above(d.row, n, d.scale, floor, d.row[all.token]) - d.top_p;
        if (std::fabs(away) < FAR_MASS) {
            all.unsure = true;
            all.close = std::fabs(away) < NEAR_MASS;
        } else if (away < 0) {
            break;
        } else {
            all = noisy_argmax(d, n, best, -INF, d.row[all.token]);
        }
    }
    return all;
}

void one_draw(const Draw& draw, int64_t n, int64_t best, int64_t drawn, const std::string& name) {
    bool nan = false;
    for (int64_t i = 0; i < n; i++) nan |= std::isnan(draw.row[i]);
    const int64_t expected_best = nan && draw.k >= 0 ? -1 : reference::argmax(draw.row, n);
    check::same("best " + name, expected_best, best);
    if (expected_best < 0 || draw.k < 0) {
        check::same("nothing drawn " + name, -1, drawn);
        return;
    }
    if (std::fabs(draw.row[expected_best] * draw.scale) > 2048) {
        check::same("drawn of coarse scores " + name, -1, drawn);
        return;
    }
    const Expected expected = expected_draw(draw, n, expected_best);
    if (expected.close)
        check::same("drawn, too near, " + name, -1, drawn);
    else if (!expected.unsure)
        check::same("drawn " + name, expected.token, drawn);
}

void draws() {
    int64_t near = 0, drawn_at_all = 0;
    for (uint64_t seed = 1; seed <= check::seeds(300); seed++) {
        Random random(seed + 300);
        const int64_t n = random.chance(0.15) ? random.between(2000, 6000) : random.between(1, 700);
        const int rows = int(random.between(1, 5));
        const double deviation = random.of({0.01, 1.0, 4.0, 8.0});
        check::begin("draw", seed,
                     "n " + std::to_string(n) + ", deviation " + check::number(deviation));
        std::vector<float> x = logits(random, rows * n, deviation, random.of({0.0, 0.5}));
        std::vector<Draw> what(rows);
        for (int r = 0; r < rows; r++) {
            float* row = &x[r * n];
            if (random.chance(0.1)) row[random.below(n)] = random.of({NAN, INF, -INF, NAN});
            if (random.chance(0.05)) std::fill_n(row, n, -INF);
            if (random.chance(0.3))  // a grammar's mask
                for (int64_t i = 0; i < n; i++)
                    if (random.chance(0.5)) row[i] = -INF;
            if (random.chance(0.05)) row[random.below(n)] = 5000;
            Draw& d = what[r];
            d.row = row;
            d.seed = random.chance(0.3) ? -random.below(1000) : int64_t(random.next() >> 1);
            d.sample = random.below(4);
            d.position = random.below(2000);
            d.k = random.chance(0.4) ? random.between(1, random.chance(0.5) ? 64 : n)
                                     : random.of<int64_t>({0, -1, n, n + 3, 1});
            d.scale = 0.4 + 1.6 * random.uniform();
            d.top_p = random.chance(0.5) ? 0.05 + 0.94 * random.uniform() : 1;
            d.below = random.chance(0.2) ? -random.uniform() * 2 * deviation : -INF;
        }
        std::vector<int64_t> best(rows, -7), drawn(rows, -7);
        smart_draw(what.data(), rows, n, best.data(), drawn.data(), int32_t(random.between(1, 4)));
        for (int r = 0; r < rows; r++) {
            one_draw(what[r], n, best[r], drawn[r], check::at("of row", r));
            near += best[r] >= 0 && what[r].k >= 0 && drawn[r] < 0;
            drawn_at_all += drawn[r] >= 0;
        }
    }
    check::begin("draw", 0, "all");
    check::that(near * 10 < drawn_at_all, "most draws are not too near");

    // Frequencies are those of softmax: of three tokens.
    check::begin("draw", 0, "frequencies");
    const float row[3] = {0.0f, std::log(2.0f), std::log(3.0f)};
    const int64_t trials = check::quick ? 3000 : 12000;
    std::vector<Draw> what;
    for (int64_t i = 0; i < trials; i++) what.push_back({row, 11, 0, i, 0, 1.0, -INF, 1.0});
    std::vector<int64_t> best(trials), drawn(trials);
    smart_draw(what.data(), trials, 3, best.data(), drawn.data(), 2);
    double counts[3] = {};
    for (int64_t token : drawn)
        if (token >= 0) counts[token]++;
    for (int i = 0; i < 3; i++)
        check::near(check::at("share", i), (i + 1) / 6.0, counts[i] / double(trials),
                    2.5 / std::sqrt(double(trials)));
}

}  // namespace

void test_sampling() {
    argmaxes();
    top_ks();
    draws();
}
