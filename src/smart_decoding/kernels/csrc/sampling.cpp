// First maxima, the largest entries of rows of logits, and tokens drawn from them.

#include "sampling.h"

#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#include "abi.h"
#include "maxima.h"

namespace [[gnu::visibility("hidden")]] smart {

// ------------------------------------------------------------------------------------------ maxima

int64_t first_of(const Maxima* row, int parts, int64_t stride) {
    float best = -INFINITY;
    int64_t first = -1;
    for (int p = 0; p < parts; p++, row += stride)
        for (int j = 0; j < PANEL; j++) {
            float value = j < VW ? row->low[j] : row->high[j - VW];
            int64_t at = j < VW ? row->low_at[j] + j : row->high_at[j - VW] + j;
            if (value > best || (value == best && at < first)) {
                best = value;
                first = at;
            }
        }
    return std::isfinite(best) ? first : -1;
}

int64_t first_maximum(const float* row, int64_t n) {
    Maxima found;
    float tail[PANEL];
    for (int64_t i = 0; i < n; i += PANEL, row += PANEL) {
        const float* at =
            i + PANEL <= n ? row : (const float*)memcpy(tail, row, (n - i) * sizeof(float));
        found.add(i, n, loadu<vf>(at), loadu<vf>(at + VW));
    }
    return first_of(&found, 1, 1);
}

static bool has_nan(const float* row, int64_t n) {
    vi found = {};
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        vf x = loadu<vf>(row + i);
        found |= x != x;
    }
    bool any = any_of(found);
    for (; i < n; i++) any |= std::isnan(row[i]);
    return any;
}

// ------------------------------------------------------------------------------------------- noise

// The random bits of models/sampling/noise.py.
namespace noise {

constexpr uint64_t INCREMENT = 0x9E3779B97F4A7C15u;

static inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

// noise_key of models/sampling/noise.py.
static inline uint64_t key_of(uint64_t seed, uint64_t sample, uint64_t position) {
    return mix((mix((mix(seed + INCREMENT) ^ sample) + INCREMENT) ^ position) + INCREMENT);
}

static inline uint32_t bits(uint64_t key, uint64_t token) {
    return uint32_t(mix(token * INCREMENT + key + INCREMENT) >> 32);
}

static inline double uniform(uint64_t key, uint64_t token) {
    return (double(bits(key, token)) + 0.5) * 0x1p-32;
}

// 1 - uniform, rounded.
static inline float uniform_tail(uint64_t key, uint64_t token) {
    return (float(~bits(key, token)) + 0.5f) * 0x1p-32f;
}

static inline double gumbel(double uniform) { return -std::log(-std::log(uniform)); }

}  // namespace noise

// --------------------------------------------------------------------------------- largest entries

// The best entries found so far, best first.
struct TopEntries {
    int64_t* id;
    float* score;
    int k, found;

    void add(float value, int64_t index) {
        if (found == k && !(value > score[k - 1])) return;
        int at = found < k ? found++ : k - 1;
        for (; at > 0 && value > score[at - 1]; at--) {
            score[at] = score[at - 1];
            id[at] = id[at - 1];
        }
        score[at] = value;
        id[at] = index;
    }

    bool has(int64_t index) const { return std::find(id, id + k, index) != id + k; }
};

static void find_largest(const float* row, int64_t n, TopEntries& top) {
    for (int64_t i = 0; i < n; i += VW) {
        if (top.found == top.k && i + VW <= n && !any_of(loadu<vf>(row + i) > top.score[top.k - 1]))
            continue;
        for (int64_t j = i; j < std::min(n, i + VW); j++) top.add(row[j], j);
    }
}

// Scores become probabilities of softmax(row * scale).
static void softmax_of(const float* row, int64_t n, float scale, TopEntries& top) {
    const float best = top.score[0];
    vf sums = {};
    int64_t i = 0;
    for (; i + VW <= n; i += VW) sums += vexp((loadu<vf>(row + i) - best) * scale);
    float sum = sum_in_order(sums);
    for (; i < n; i++) sum += std::exp((row[i] - best) * scale);
    for (int j = 0; j < top.k; j++) top.score[j] = std::exp((top.score[j] - best) * scale) / sum;
}

// What row * scale weighs from `first` to `end`, VW entries at most, given the largest entry. False
// where all are so low that one of them wins once in ten million times.
static bool weights_of(const float* row, int64_t first, int64_t end, float best, float scale,
                       float* weights) {
    constexpr float NEVER_WINS = -16.0f;
    if (end < first + VW) {
        for (int64_t j = first; j < end; j++)
            weights[j - first] = std::exp((row[j] - best) * scale);
        return true;
    }
    vf score = (loadu<vf>(row + first) - best) * scale;
    if (!any_of(score > NEVER_WINS)) return false;
    storeu(weights, vexp(score));
    return true;
}

// Replaces the largest entries by the largest of row * scale + noise. A token can only be among
// them if 1 - uniform < exp(its score - the last one's), which spares the others their logarithms.
static void find_noisy_largest(const float* row, int64_t n, float scale, uint64_t key,
                               const int64_t* tokens, TopEntries& top) {
    const float best = top.score[0];
    std::vector<int64_t> ids(top.k);
    std::vector<float> scores(top.k);
    TopEntries noisy{ids.data(), scores.data(), top.k, 0};
    auto consider = [&](int64_t i, double uniform) {
        noisy.add(float((row[i] - best) * scale + noise::gumbel(uniform)), i);
    };
    for (int j = 0; j < top.k; j++) consider(top.id[j], noise::uniform(key, tokens[top.id[j]]));
    double last = std::exp(double(scores[top.k - 1]));
    for (int64_t i = 0; i < n; i += VW) {
        const int64_t end = std::min(n, i + VW);
        float weights[VW] = {};
        if (!weights_of(row, i, end, best, scale, weights)) continue;
        for (int64_t j = i; j < end; j++) {
            const double uniform = noise::uniform(key, tokens[j]);
            if ((1.0 - uniform) * last > 1.0001 * weights[j - i] || top.has(j)) continue;
            consider(j, uniform);
            last = std::exp(double(scores[top.k - 1]));
        }
    }
    float sum = 0;
    for (int j = 0; j < top.k; j++) sum += std::exp(scores[j] - scores[0]);
    for (int j = 0; j < top.k; j++) {
        top.id[j] = ids[j];
        top.score[j] = std::exp(scores[j] - scores[0]) / sum;
    }
}

void top_k_row(const float* row, int64_t n, int k, float scale, uint64_t key, const int64_t* tokens,
               int64_t* ids, float* probs) {
    TopEntries top{ids, probs, k, 0};
    find_largest(row, n, top);
    if (key)
        find_noisy_largest(row, n, scale, key, tokens, top);
    else
        softmax_of(row, n, scale, top);
}

// Of a row without NaN.
static float kth_largest(const float* row, int64_t n, int64_t k) {
    constexpr int64_t FEW = 64;
    if (k > FEW) {
        std::vector<float> entries(row, row + n);
        std::nth_element(entries.begin(), entries.begin() + (k - 1), entries.end(),
                         std::greater<float>());
        return entries[k - 1];
    }
    std::vector<int64_t> ids(k);
    std::vector<float> scores(k);
    TopEntries top{ids.data(), scores.data(), int(k), 0};
    find_largest(row, n, top);
    return scores[k - 1];
}

// ----------------------------------------------------------------------------------------- drawing

constexpr double NEAR_SCORES = 1e-3;  // scores this far apart are told apart whatever the rounding,
constexpr double LARGE_SCORE = 2048;  // unless they are larger than this
constexpr double MOST_NOISE = 23;     // no noise exceeds it
constexpr float LOWEST = std::numeric_limits<float>::lowest();  // forbidden tokens are at -inf
// Of a probability: nearer to top_p, sums are not exact enough to say what is in the nucleus.
constexpr double MARGIN = 1e-4;

struct NoisyBest {  // the best noisy score, and the second best as far as it is near
    double score = -INFINITY, second = -INFINITY;
    int64_t token = -1;

    void add(double other, int64_t at) {
        second = std::max(second, std::min(score, other));
        if (other > score) {
            score = other;
            token = at;
        }
    }
    void add(const NoisyBest& other) {
        add(other.score, other.token);
        second = std::max(second, other.second);
    }
};

// What noisy_best looks at: row * scale + noise among the entries of at least `floor`. best: the
// row's largest entry.
struct NoisyRow {
    const float* row;
    float best, scale, floor;
    uint64_t key;

    double score(int64_t i) const {
        return double(row[i] - best) * scale + noise::gumbel(noise::uniform(key, i));
    }
};

constexpr int64_t DRAW_BLOCK = 256;  // entries that are looked at together

// Adds those of `size` entries, a block at most, from `first` on whose noisy score may reach
// `bound`.
static void add_block(const NoisyRow& noisy, int64_t first, int64_t size, double bound,
                      NoisyBest& found) {
    const float* row = noisy.row + first;
    const float best = noisy.best, scale = noisy.scale, floor = noisy.floor;
    vi above = {};
    const float reach = float(std::max(double(floor), best + (bound - MOST_NOISE) / scale));
    int64_t i = 0;
    for (; i + VW <= size; i += VW) above |= loadu<vf>(row + i) >= reach;
    if (i == size && !any_of(above)) return;
    float weight[DRAW_BLOCK], tail[DRAW_BLOCK];
    for (i = 0; i + VW <= size; i += VW)
        storeu(weight + i, vexp((loadu<vf>(row + i) - best) * scale));
    for (; i < size; i++) weight[i] = std::exp((row[i] - best) * scale);
    for (i = 0; i < size; i++) tail[i] = noise::uniform_tail(noisy.key, first + i);
    const float last = float(std::exp(bound - NEAR_SCORES));
    int32_t hits = 0, hit[DRAW_BLOCK];
    for (i = 0; i < size; i++) {
        hit[i] = (tail[i] * last <= 1.001f * weight[i]) & (row[i] >= floor);
        hits += hit[i];
    }
    for (i = 0; hits && i < size; i++)
        if (hit[i]) found.add(noisy.score(first + i), first + i);
}

// The argmax from `first` to `end`, where it may be that of the whole row, whose largest entry is
// the one at `top`.
static NoisyBest noisy_best(const NoisyRow& noisy, int64_t first, int64_t end, int64_t top) {
    NoisyBest found;
    double bound = noise::gumbel(noise::uniform(noisy.key, top));
    for (; first < end; first += DRAW_BLOCK) {
        add_block(noisy, first, std::min(DRAW_BLOCK, end - first), bound, found);
        bound = std::max(bound, found.score);
    }
    return found;
}

// Where rounding does not decide.
static int64_t token_of(const NoisyBest& found) {
    return found.score - found.second > NEAR_SCORES ? found.token : -1;
}

// What a row leaves to draw from. best: its first maximum, -1 if there is nothing to draw from;
// floor: the score below which top-k and min-p cut, rounded as numpy rounds it.
struct Cut {
    int64_t best = -1;
    float floor = LOWEST;

    Cut() = default;
    Cut(const Draw& d, int64_t n)
        : best(d.k >= 0 && has_nan(d.row, n) ? -1 : first_maximum(d.row, n)) {
        if (best < 0 || d.k < 0) return;
        if (d.k > 0 && d.k < n) floor = std::max(floor, kth_largest(d.row, n, d.k));
        floor = std::max(floor, float(d.row[best] + d.below));
    }

    NoisyRow noisy(const Draw& d, float from) const {
        const uint64_t key = noise::key_of(d.seed, d.sample, d.position);
        return NoisyRow{d.row, d.row[best], float(d.scale), from, key};
    }
};

struct Mass {
    double all, above;
};

// The sum of exp((entry - best) * scale) over the entries of at least `floor`, and over those of
// them beyond `value`, to about 1e-6.
static Mass mass_of(const float* row, int64_t n, float best, float scale, float floor,
                    float value) {
    constexpr int64_t BLOCK = 4096;  // floats sum up to so many well enough
    Mass mass{0, 0};
    for (int64_t first = 0; first < n; first += BLOCK) {
        vf sums = {}, higher = {};
        int64_t i = first, end = std::min(n, first + BLOCK);
        for (; i + VW <= end; i += VW) {
            vf x = loadu<vf>(row + i), weight = vexp((x - best) * scale);
            weight = x >= floor ? weight : vf{};
            sums += weight;
            higher += x > value ? weight : vf{};
        }
        for (int j = 0; j < VW; j++) {
            mass.all += sums[j];
            mass.above += higher[j];
        }
        for (; i < end; i++) {
            double weight = row[i] >= floor ? std::exp((row[i] - best) * scale) : 0.0f;
            mass.all += weight;
            if (row[i] > value) mass.above += weight;
        }
    }
    return mass;
}

// The token drawn, or where it is not in the nucleus, the one drawn above it: what scores no better
// is not in it either. -1 where rounding would decide.
static int64_t in_nucleus(const Draw& d, const Cut& cut, int64_t n, int64_t token) {
    while (token >= 0 && token != cut.best && d.top_p < 1) {
        const Mass mass =
            mass_of(d.row, n, d.row[cut.best], float(d.scale), cut.floor, d.row[token]);
        const double above = mass.above / mass.all;
        if (std::abs(above - d.top_p) <= MARGIN) return -1;
        if (above < d.top_p) break;
        const float next = std::nextafter(d.row[token], INFINITY);
        token = token_of(noisy_best(cut.noisy(d, next), 0, n, cut.best));
    }
    return token;
}

}  // namespace smart

using namespace smart;

extern "C" {

void smart_argmax(const float* x, const int64_t* which, int32_t rows, int64_t n, int64_t* out,
                  int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int32_t r = 0; r < rows; r++) out[r] = first_maximum(x + which[r] * n, n);
}

void smart_top_k(const float* x, int32_t rows, int64_t n, int32_t k, const float* scale,
                 const uint64_t* keys, const int64_t* tokens, int64_t* ids, float* probs,
                 int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; r++)
        top_k_row(x + r * n, n, k, scale[r], keys ? keys[r] : 0, tokens, ids + r * k,
                  probs + r * k);
}

void smart_draw(const Draw* draws, int64_t count, int64_t n, int64_t* best, int64_t* drawn,
                int32_t threads) {
    if (count < 1) return;
    std::vector<Cut> cuts(count);
    // Rows are drawn from in parts, so that all threads have work.
    const int64_t parts = (threads + count - 1) / count, size = (n + parts - 1) / parts;
    std::vector<NoisyBest> found(count * parts);
    run_team(threads, [&] {
        for (int64_t r; (r = next_item()) < count;) cuts[r] = Cut(draws[r], n);
        barrier();
        for (int64_t part; (part = next_item()) < count * parts;) {
            const int64_t r = part / parts, first = part % parts * size;
            const Cut& cut = cuts[r];
            if (cut.best < 0 || draws[r].k < 0) continue;
            found[part] = noisy_best(cut.noisy(draws[r], cut.floor), first,
                                     std::min(n, first + size), cut.best);
        }
        barrier();
        for (int64_t r; (r = next_item()) < count;) {
            const Draw& d = draws[r];
            NoisyBest all;
            for (int64_t part = r * parts; part < (r + 1) * parts; part++) all.add(found[part]);
            best[r] = cuts[r].best;
            const bool coarse = best[r] >= 0 && std::abs(d.row[best[r]] * d.scale) > LARGE_SCORE;
            drawn[r] = coarse ? -1 : in_nucleus(d, cuts[r], n, token_of(all));
        }
    });
}
}
