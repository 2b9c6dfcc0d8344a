// Mixtures of experts against plain loops; and a row's bits in any company.

#include <set>

#include "tiny.h"

using namespace tiny;

namespace {

// A layer whose attention adds nothing, so that no rounding before it decides which experts a row
// has.
struct TinyMixture {
    TinyLayer base;
    std::vector<TinyLayer> experts;
    std::vector<float> router, router_bias, gate_up_bias, down_bias;
    Blob router_blob;
    std::vector<Weight> gate_up, down;
    int count, per_token;  // of the experts that a router chooses among
    bool normalised, shared;

    TinyMixture(Random& random, const Shape& s, bool bf16) : base(random, s, bf16, true) {
        base.w.output_bias.clear();
        std::fill(base.w.output.begin(), base.w.output.end(), 0.0f);
        base.output = packed(base.w.output, s.heads * s.head_dim, bf16);
        count = int(random.between(1, 20));
        const bool biased = !base.w.down_bias.empty();
        per_token = int(random.between(1, count));
        normalised = random.chance(0.5);
        shared = random.chance(0.4);
        const int networks = count + shared;
        router = matrix(random, networks, s.hidden, bf16, 2);
        for (int e = 1; e < count; e++)  // equals, of which the first ones are taken
            if (random.chance(0.2))
                std::copy_n(&router[(e - 1) * s.hidden], s.hidden, &router[e * s.hidden]);
        router_blob = packed(router, s.hidden, bf16);
        for (int e = 0; e < networks; e++) {
            experts.emplace_back(random, s, bf16, true);
            TinyLayer& expert = experts.back();
            expert.w.gelu = base.w.gelu;
            expert.w.clamped = base.w.clamped;
            if (biased) {
                expert.set_biases(random, s);
                append(gate_up_bias, expert.gate_up_bias);
                append(down_bias, expert.w.down_bias);
            } else {
                for (auto* bias : {&expert.w.gate_bias, &expert.w.up_bias, &expert.w.down_bias})
                    bias->clear();
            }
        }
        if (biased) router_bias = random.normals(networks, 1);
        for (const TinyLayer& expert : experts) {
            gate_up.push_back(expert.gate_up.weight());
            down.push_back(expert.down.weight());
        }
    }

    static void append(std::vector<float>& to, const std::vector<float>& more) {
        to.insert(to.end(), more.begin(), more.end());
    }

    Layer layer() const {
        Layer layer = base.layer();
        layer.gate_up_bias = pointer(gate_up_bias);
        layer.down_bias = pointer(down_bias);
        layer.router_bias = pointer(router_bias);
        layer.experts = count;
        layer.per_token = per_token;
        layer.shared = shared;
        layer.normalised = normalised;
        layer.router = router_blob.weight();
        layer.expert_gate_up = gate_up.data();
        layer.expert_down = down.data();
        return layer;
    }

    // x += what experts make of one row. Returns them.
    std::vector<int64_t> add_row(double* x, reference::Rounds rounds) const {
        const reference::Weights& w = base.w;
        Doubles normed(w.hidden), total(w.hidden);
        reference::rms_norm(x, w.post_norm.data(), w.eps, w.hidden, normed.data());
        if (rounds.inputs) reference::round_all(normed);
        Doubles probs = reference::linear(normed, router, w.hidden, router_bias);
        const double of_shared = shared ? 1 / (1 + std::exp(-probs.back())) : 0;
        probs.resize(count);
        const double most = *std::max_element(probs.begin(), probs.end());
        for (double& p : probs) p = std::exp(p - most);
        std::vector<int64_t> chosen = reference::ranked(probs);
        const double all = sum(probs, chosen);
        chosen.resize(per_token);
        const double by = normalised ? sum(probs, chosen) : all;
        const auto add = [&](int64_t e, double weight) {
            const Doubles own = reference::network(experts[e].w, normed, rounds);
            for (int i = 0; i < w.hidden; i++) total[i] += weight * own[i];
        };
        for (int64_t e : chosen) add(e, probs[e] / by);
        if (shared) add(count, of_shared);
        if (!w.ffn_norm.empty())
            total = reference::rms_norms(total, w.ffn_norm.data(), w.eps, w.hidden);
        for (int i = 0; i < w.hidden; i++) x[i] += total[i];
        return chosen;
    }

    static double sum(const Doubles& of, const std::vector<int64_t>& at) {
        double sum = 0;
        for (int64_t i : at) sum += of[i];
        return sum;
    }
};

// The layer on rows of x, each of which is a request. awake: receives the experts of all rows.
std::vector<float> run(const TinyMixture& m, std::vector<float> x, bool bf16, int threads,
                       int64_t* awake = nullptr) {
    const Layer layer = m.layer();
    const int64_t rows = int64_t(x.size()) / layer.hidden, hd = layer.head_dim;
    Random random(1);
    Pages pages(random, rows);
    Batch batch;
    for (int64_t r = 0; r < rows; r++) {
        const std::vector<int32_t> own = pages.take(1);
        batch.request(own);
        batch.row(0, 0, slot_of(own, 0), 1);
    }
    const Rotation rotation(1, hd);
    const Rows in = batch.rows(rotation);
    TinyCache cache(random, layer.kv_heads, rows, int(hd), bf16);
    const int64_t qkv_width =
        std::max<int64_t>((2 * layer.heads + 2 * layer.kv_heads) * hd, layer.hidden);
    std::vector<float> normed(x.size()), qkv(rows * qkv_width), attended(rows * layer.heads * hd),
        ffn(rows * (layer.per_token + layer.shared) * layer.ffn),
        mixture(rows
                * (layer.experts + layer.shared
                   + (layer.per_token + layer.shared) * (layer.hidden + 2)));
    const Workspace workspace{normed.data(),  qkv.data(), attended.data(), ffn.data(),
                              mixture.data(), awake,      nullptr};
    const int32_t status = smart_layers(&layer, 1, &in, nullptr, x.data(), cache.keys(),
                                        cache.values(), rows, &workspace, bf16, bf16, threads);
    check::same("status", 0, status);
    return x;
}

void one_mixture(uint64_t seed, bool bf16) {
    Random random(seed);
    const Shape shape = random_shape(random, 16);
    const TinyMixture m(random, shape, bf16);
    check::begin("experts", seed,
                 shape.text() + ", " + std::to_string(m.per_token) + " of "
                     + std::to_string(m.count) + (m.shared ? ", one shared" : "")
                     + (bf16 ? ", bf16" : ", fp32"));
    // the most: an expert's rows are more than a thread of a dense layer packs alone
    const int64_t rows = random.of<int64_t>({1, 2, 3, 9, 17, 40, 130, 700}), d = shape.hidden;
    const std::vector<float> x = random.normals(rows * d);
    int64_t awake = 0;
    const std::vector<float> all = run(m, x, bf16, int(random.between(1, 3)), &awake);

    const Precision precision(bf16, shape.head_dim);
    Doubles expected = reference::doubles(x);
    std::set<int64_t> woken;
    for (int64_t r = 0; r < rows; r++)
        for (int64_t e : m.add_row(&expected[r * d], precision.rounds)) woken.insert(e);
    check::near_rows("x", expected.data(), all.data(), rows, d, precision.tolerance);
    check::same("experts awake", int64_t(woken.size()), awake);

    // Some rows, in another order.
    std::vector<int64_t> some;
    for (int64_t r = rows; r--;)
        if (random.chance(0.4)) some.push_back(r);
    if (some.empty()) return;
    std::vector<float> fewer;
    for (int64_t r : some) fewer.insert(fewer.end(), &x[r * d], &x[r * d] + d);
    fewer = run(m, fewer, bf16, int(random.between(1, 3)));
    for (size_t i = 0; i < some.size(); i++)
        check::bits("a row in other company", &all[some[i] * d], &fewer[i * d], d);
}

}  // namespace

void test_experts() {
    const int seeds = check::quick ? 10 : 60;
    for (int seed = 1; seed <= seeds; seed++)
        for (bool bf16 : {false, true}) one_mixture(seed, bf16);
}
