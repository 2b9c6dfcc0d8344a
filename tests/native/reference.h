// What the kernels compute, as plain loops: sums in double, rounded to bf16 exactly where the
// kernels say they round.

#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "abi.h"

namespace reference {

typedef std::vector<double> Doubles;

inline Doubles doubles(const std::vector<float>& list) { return Doubles(list.begin(), list.end()); }

// ----------------------------------------------------------------------------------- numbers

// Nearest, ties to even.
inline uint16_t to_bf16(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    uint32_t kept = bits >> 16, rest = bits & 0xffff;
    if (rest > 0x8000 || (rest == 0x8000 && (kept & 1))) kept++;
    return uint16_t(kept);
}

inline float from_bf16(uint16_t x) {
    uint32_t bits = uint32_t(x) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline float rounded(float x) { return from_bf16(to_bf16(x)); }

inline void round_all(Doubles& list) {
    for (double& x : list) x = rounded(float(x));
}

// ------------------------------------------------------------------------------------ layers

inline void rms_norm(const double* x, const float* weight, double eps, int64_t d, double* out) {
    double sum = 0;
    for (int64_t i = 0; i < d; i++) sum += x[i] * x[i];
    double scale = 1 / std::sqrt(sum / double(d) + eps);
    for (int64_t i = 0; i < d; i++) out[i] = x[i] * scale * weight[i];
}

inline Doubles rms_norms(const Doubles& x, const float* weight, double eps, int64_t d) {
    Doubles out(x.size());
    for (size_t at = 0; at < x.size(); at += d) rms_norm(&x[at], weight, eps, d, &out[at]);
    return out;
}

// x [rows, k] w^T [n, k] + bias, which may be empty.
inline Doubles linear(const Doubles& x, const std::vector<float>& w, int64_t k,
                      const std::vector<float>& bias) {
    int64_t rows = x.size() / k, n = w.size() / k;
    Doubles y(rows * n);
    for (int64_t r = 0; r < rows; r++)
        for (int64_t j = 0; j < n; j++) {
            double sum = bias.empty() ? 0.0 : bias[j];
            for (int64_t i = 0; i < k; i++) sum += x[r * k + i] * w[j * k + i];
            y[r * n + j] = sum;
        }
    return y;
}

struct Weights {  // of a layer, as [out, in]; vectors that it does not have are empty
    int hidden, input, heads, kv_heads, head_dim, ffn;
    float eps;
    std::vector<float> input_norm{}, q_norm{}, k_norm{}, qkv_bias{}, output_bias{}, post_norm{},
        attention_norm{}, ffn_norm{}, sinks{}, gate_bias{}, up_bias{}, down_bias{}, qkv{}, output{},
        gate{}, up{}, down{}, attention_gate{};
    int window = 0, angle = 0;
    bool gelu = false, clamped = false;
};

struct Rounds {       // what is rounded to bf16
    bool inputs, kv;  // what linear layers read; keys and values
    bool queries;     // where attention goes by pairs
};

struct Cache {  // keys and values [layers, kv_heads, slots, head_dim]
    int64_t kv_heads, slots, head_dim;
    Doubles k, v;
    Cache(int64_t layers, int64_t kv_heads_, int64_t slots_, int64_t head_dim_)
        : kv_heads(kv_heads_),
          slots(slots_),
          head_dim(head_dim_),
          k(layers * kv_heads_ * slots_ * head_dim_),
          v(k) {}
    int64_t at(int64_t layer, int64_t head, int64_t slot) const {
        return ((layer * kv_heads + head) * slots + slot) * head_dim;
    }
};

// Turns halves of x by the angles of a position, after an optional norm.
inline void rope(const Weights& w, const Rows& in, int64_t row, const std::vector<float>& norm,
                 double* x) {
    int64_t half = w.head_dim / 2, first = in.position[row] * in.angles + w.angle;
    const float *cosine = in.cosine + first, *sine = in.sine + first;
    if (!norm.empty()) rms_norm(x, norm.data(), w.eps, w.head_dim, x);
    for (int64_t d = 0; d < half; d++) {
        double a = x[d], b = x[d + half];
        x[d] = a * cosine[d] - b * sine[d];
        x[d + half] = b * cosine[d] + a * sine[d];
    }
}

inline int64_t request_of(const Rows& in, int64_t row) {
    int64_t request = 0;
    while (row >= in.query_start_loc[request + 1]) request++;
    return request;
}

// The slots that a row sees, in order: its context through the block table, then its ancestors and
// itself; with a window the last of these.
inline std::vector<int64_t> seen_by(const Rows& in, int64_t row, int64_t window) {
    const int32_t* table = in.block_tables + in.block_table_start[request_of(in, row)];
    const int page = smart_page();
    std::vector<int64_t> slots;
    for (int64_t i = 0; i < in.context_len[row]; i++)
        slots.push_back(int64_t(table[i / page]) * page + i % page);
    for (int64_t i = in.ancestors_start[row]; i < in.ancestors_start[row + 1]; i++)
        slots.push_back(in.ancestors[i]);
    const int64_t hidden = window ? int64_t(slots.size()) - window : 0;
    if (hidden > 0) slots.erase(slots.begin(), slots.begin() + hidden);
    return slots;
}

// From the inputs of q, k and v [rows, input] to what attention yields [rows, heads * head_dim];
// stores keys and values.
inline Doubles attention(const Weights& w, const Rows& in, const Doubles& input, Cache& cache,
                         int64_t layer, Rounds rounds) {
    int64_t hd = w.head_dim, width = (w.heads + 2 * w.kv_heads) * hd;
    Doubles qkv = linear(input, w.qkv, w.input, w.qkv_bias);
    for (int64_t r = 0; r < in.rows; r++) {
        double* x = &qkv[r * width];
        for (int64_t h = 0; h < w.heads; h++) rope(w, in, r, w.q_norm, x + h * hd);
        for (int64_t h = 0; h < w.kv_heads; h++) {
            double *key = x + (w.heads + h) * hd, *value = key + w.kv_heads * hd;
            rope(w, in, r, w.k_norm, key);
            for (int64_t d = 0; d < hd; d++) {
                int64_t at = cache.at(layer, h, in.slot_mapping[r]) + d;
                cache.k[at] = rounds.kv ? rounded(float(key[d])) : key[d];
                cache.v[at] = rounds.kv ? rounded(float(value[d])) : value[d];
            }
        }
    }
    Doubles out(in.rows * w.heads * hd);
    for (int64_t r = 0; r < in.rows; r++) {
        const std::vector<int64_t> slots = seen_by(in, r, w.window);
        for (int64_t h = 0; h < w.heads; h++) {
            int64_t kv = h / (w.heads / w.kv_heads);
            Doubles query(&qkv[r * width + h * hd], &qkv[r * width + h * hd] + hd), weight;
            if (rounds.queries) round_all(query);
            double sum = 0, best = -std::numeric_limits<double>::infinity();
            for (int64_t slot : slots) {
                double score = 0;
                for (int64_t d = 0; d < hd; d++)
                    score += query[d] * cache.k[cache.at(layer, kv, slot) + d];
                weight.push_back(score / std::sqrt(double(hd)));
                best = std::max(best, weight.back());
            }
            for (double& x : weight) sum += x = std::exp(x - best);
            if (!w.sinks.empty()) sum += std::exp(w.sinks[h] - best);
            for (int64_t d = 0; d < hd; d++) {
                double value = 0;
                for (size_t i = 0; i < slots.size(); i++)
                    value += weight[i] * cache.v[cache.at(layer, kv, slots[i]) + d];
                out[(r * w.heads + h) * hd + d] = value / sum;
            }
        }
    }
    if (!w.attention_gate.empty()) {
        const Doubles gates = linear(input, w.attention_gate, w.input, {});
        for (size_t i = 0; i < out.size(); i++) out[i] /= 1 + std::exp(-gates[i]);
    }
    return out;
}

// x += more, or what a norm that is there makes of it.
inline void add(const Weights& w, Doubles more, const std::vector<float>& norm, Doubles& x) {
    if (!norm.empty()) more = rms_norms(more, norm.data(), w.eps, w.hidden);
    for (size_t i = 0; i < x.size(); i++) x[i] += more[i];
}

inline double activated(double x, bool gelu) {
    const double root = std::sqrt(2 / std::acos(-1.0));
    return gelu ? 0.5 * x * (1 + std::tanh(root * (x + 0.044715 * x * x * x)))
                : x / (1 + std::exp(-x));
}

inline double clamped(double gate, double up) {
    gate = std::min(gate, 7.0);
    return (std::clamp(up, -7.0, 7.0) + 1) * gate / (1 + std::exp(-1.702 * gate));
}

// What a network makes of rows that are normed, and rounded as linear layers read them.
inline Doubles network(const Weights& w, const Doubles& normed, Rounds rounds) {
    Doubles gate = linear(normed, w.gate, w.hidden, w.gate_bias),
            up = linear(normed, w.up, w.hidden, w.up_bias);
    for (size_t i = 0; i < gate.size(); i++)
        gate[i] = w.clamped ? clamped(gate[i], up[i]) : activated(gate[i], w.gelu) * up[i];
    if (rounds.inputs) round_all(gate);
    return linear(gate, w.down, w.ffn, w.down_bias);
}

// What follows attention: x += attention output^T, then the gated part.
inline void finish(const Weights& w, Doubles attended, Doubles& x, Rounds rounds) {
    if (rounds.inputs) round_all(attended);
    add(w, linear(attended, w.output, w.heads * w.head_dim, w.output_bias), w.attention_norm, x);
    Doubles normed = rms_norms(x, w.post_norm.data(), w.eps, w.hidden);
    if (rounds.inputs) round_all(normed);
    add(w, network(w, normed, rounds), w.ffn_norm, x);
}

// A layer in place on x [rows, hidden]. input: what q, k and v read; null: the norm of x.
inline void layer(const Weights& w, const Rows& in, const Doubles* input, Doubles& x, Cache& cache,
                  int64_t number, Rounds rounds) {
    Doubles read = input ? *input : rms_norms(x, w.input_norm.data(), w.eps, w.hidden);
    if (rounds.inputs) round_all(read);
    finish(w, attention(w, in, read, cache, number, rounds), x, rounds);
}

// ---------------------------------------------------------------------------------- sampling

inline uint64_t mix(uint64_t z) {
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

constexpr uint64_t STEP = 0x9E3779B97F4A7C15u;

// models/sampling/noise.py.
inline uint64_t noise_key(int64_t seed, int64_t sample, int64_t position) {
    uint64_t key = mix(uint64_t(seed) + STEP);
    key = mix((key ^ uint64_t(sample)) + STEP);
    return mix((key ^ uint64_t(position)) + STEP);
}

inline double gumbel(uint64_t key, uint64_t token) {
    uint64_t bits = mix(token * STEP + (key + STEP)) >> 32;
    return -std::log(-std::log((double(bits) + 0.5) * 0x1p-32));
}

// The first index of the largest entry that is no NaN; -1 if there is none, or if it is infinite.
inline int64_t argmax(const float* row, int64_t n) {
    int64_t best = -1;
    for (int64_t i = 0; i < n; i++)
        if (!std::isnan(row[i]) && (best < 0 || row[i] > row[best])) best = i;
    return best >= 0 && std::isfinite(row[best]) ? best : -1;
}

// Indices by falling score, ties by index.
template <class T>
inline std::vector<int64_t> ranked(const std::vector<T>& score) {
    std::vector<int64_t> order(score.size());
    for (size_t i = 0; i < order.size(); i++) order[i] = int64_t(i);
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return score[a] > score[b]; });
    return order;
}

}  // namespace reference
