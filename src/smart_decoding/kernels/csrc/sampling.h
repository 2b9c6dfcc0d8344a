// The largest entries of rows of logits, with sampling noise where asked.

#pragma once
#include <alloca.h>

#include "abi.h"
#include "vectors.h"

// The best entries found so far, best first.
struct Top {
    int64_t* id;
    float* score;
    int k, found;
    void add(float value, int64_t index) {
        if (found == k && !(value > score[k - 1])) return;
        int at = found < k ? found++ : k - 1;
        for (; at > 0 && value > score[at - 1]; at--) { score[at] = score[at - 1]; id[at] = id[at - 1]; }
        score[at] = value;
        id[at] = index;
    }
};

static void largest(const float* row, int64_t n, Top& top) {
    for (int64_t i = 0; i < n; i += VW) {
        if (top.found == top.k && i + VW <= n) {
            vi above = loadu<vf>(row + i) > top.score[top.k - 1];
            int any = 0;
            for (int j = 0; j < VW; j++) any |= above[j];
            if (!any) continue;
        }
        for (int64_t j = i; j < std::min(n, i + VW); j++) top.add(row[j], j);
    }
}

// Scores become probabilities of softmax(row * scale).
static void softmax_of(const float* row, int64_t n, float scale, Top& top) {
    float best = top.score[0], sum = 0;
    vf sums = {};
    int64_t i = 0;
    for (; i + VW <= n; i += VW) sums += vexp<vf, vi>((loadu<vf>(row + i) - best) * scale);
    for (int j = 0; j < VW; j++) sum += sums[j];
    for (; i < n; i++) sum += std::exp((row[i] - best) * scale);
    for (int j = 0; j < top.k; j++) top.score[j] = std::exp((top.score[j] - best) * scale) / sum;
}

constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;
static inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}
// The random bits of models/noise.py for one key and token.
static inline uint32_t noise_bits(uint64_t key, uint64_t token) { return mix(token * STEP + key + STEP) >> 32; }
static inline double uniform(uint64_t key, uint64_t token) { return (double(noise_bits(key, token)) + 0.5) * 0x1p-32; }
static inline float uniform_tail(uint64_t key, uint64_t token) {  // 1 - uniform, rounded
    return (float(~noise_bits(key, token)) + 0.5f) * 0x1p-32f;
}

// Replaces the largest entries by the largest of row * scale + noise. A token can only be among them if
// 1 - uniform < exp(its score - the last one's), which spares the others their logarithms.
static void noisy_largest(const float* row, int64_t n, float scale, uint64_t key, const int64_t* tokens, Top& top) {
    float best = top.score[0];
    Top noisy{(int64_t*)alloca(top.k * sizeof(int64_t)), (float*)alloca(top.k * sizeof(float)), top.k, 0};
    auto consider = [&](int64_t i, double u) {
        noisy.add(float((row[i] - best) * scale - std::log(-std::log(u))), i);
    };
    for (int j = 0; j < top.k; j++) consider(top.id[j], uniform(key, tokens[top.id[j]]));
    double last = std::exp(double(noisy.score[top.k - 1]));
    constexpr float FAR = -16.0f;  // beyond it a token wins once in ten million times
    for (int64_t i = 0; i < n; i += VW) {
        int64_t end = std::min(n, i + VW);
        float weight[VW] = {};
        if (end == i + VW) {
            vf score = (loadu<vf>(row + i) - best) * scale;
            vi near = score > FAR;
            int any = 0;
            for (int j = 0; j < VW; j++) any |= near[j];
            if (!any) continue;
            storeu(weight, vexp<vf, vi>(score));
        } else for (int64_t j = i; j < end; j++) weight[j - i] = std::exp((row[j] - best) * scale);
        for (int64_t j = i; j < end; j++) {
            double u = uniform(key, tokens[j]);
            if ((1.0 - u) * last > 1.0001 * weight[j - i]) continue;
            bool known = false;  // it is one of those that were considered first
            for (int t = 0; t < top.k; t++) known |= top.id[t] == j;
            if (known) continue;
            consider(j, u);
            last = std::exp(double(noisy.score[top.k - 1]));
        }
    }
    float sum = 0;
    for (int j = 0; j < top.k; j++) sum += std::exp(noisy.score[j] - noisy.score[0]);
    for (int j = 0; j < top.k; j++) {
        top.id[j] = noisy.id[j];
        top.score[j] = std::exp(noisy.score[j] - noisy.score[0]) / sum;
    }
}

static void top_row(const float* row, int64_t n, int k, float scale, uint64_t key, const int64_t* tokens, int64_t* ids,
                    float* probs) {
    Top top{ids, probs, k, 0};
    largest(row, n, top);
    if (key) noisy_largest(row, n, scale, key, tokens, top);
    else softmax_of(row, n, scale, top);
}

static float kth_largest(const float* row, int64_t n, int k) {
    Top top{(int64_t*)alloca(k * sizeof(int64_t)), (float*)alloca(k * sizeof(float)), k, 0};
    largest(row, n, top);
    return top.score[k - 1];
}

static bool has_nan(const float* row, int64_t n) {
    vi found = {};
    int64_t i = 0;
    for (; i + VW <= n; i += VW) {
        vf x = loadu<vf>(row + i);
        found |= x != x;
    }
    bool any = false;
    for (int j = 0; j < VW; j++) any |= found[j] != 0;
    for (; i < n; i++) any |= std::isnan(row[i]);
    return any;
}

// noise_key of models/noise.py.
static inline uint64_t noise_key(uint64_t seed, uint64_t sample, uint64_t position) {
    return mix((mix((mix(seed + STEP) ^ sample) + STEP) ^ position) + STEP);
}

constexpr double NEAR = 1e-3;   // scores this far apart are told apart whatever the rounding,
constexpr double LARGE = 2048;  // unless they are larger than this

struct Noisy {  // the best noisy score, and the second best as far as it is near
    double score = -INFINITY, second = -INFINITY;
    int64_t token = -1;
    void add(double other, int64_t at) {
        second = std::max(second, std::min(score, other));
        if (other > score) score = other, token = at;
    }
    void add(const Noisy& other) {
        add(other.score, other.token);
        second = std::max(second, other.second);
    }
};

// The argmax of row * scale + noise from `first` to `end`, among the entries of at least `floor`, where it may be that of the whole
// row, whose largest entry is the one at `top`.
static Noisy noisy_best(const float* row, int64_t first, int64_t end, int64_t top, float scale, float floor, uint64_t key) {
    constexpr int64_t BLOCK = 256;
    constexpr double MOST = 23;  // no noise exceeds it
    Noisy found;
    float best = row[top];
    double bound = -std::log(-std::log(uniform(key, top)));
    float weight[BLOCK], tail[BLOCK];
    for (; first < end; first += BLOCK) {
        int64_t size = std::min(BLOCK, end - first), i = 0;
        vi above = {};
        float reach = std::max(double(floor), best + (bound - MOST) / scale);
        for (; i + VW <= size; i += VW) above |= loadu<vf>(row + first + i) >= reach;
        int any = size % VW;
        for (int j = 0; j < VW; j++) any |= above[j];
        if (!any) continue;
        for (i = 0; i + VW <= size; i += VW) storeu(weight + i, vexp<vf, vi>((loadu<vf>(row + first + i) - best) * scale));
        for (; i < size; i++) weight[i] = std::exp((row[first + i] - best) * scale);
        for (i = 0; i < size; i++) tail[i] = uniform_tail(key, first + i);
        float last = std::exp(bound - NEAR);
        int32_t hits = 0, hit[BLOCK];
        for (i = 0; i < size; i++) {
            hit[i] = (tail[i] * last <= 1.001f * weight[i]) & (row[first + i] >= floor);
            hits += hit[i];
        }
        if (!hits) continue;
        for (i = 0; i < size; i++)
            if (hit[i]) found.add(double(row[first + i] - best) * scale - std::log(-std::log(uniform(key, first + i))), first + i);
        bound = std::max(bound, found.score);
    }
    return found;
}
