// Linear attention beside attention: prompts against plain loops; and the same bits however rows
// are cut, whatever is drafted, and in any company.

#include "tiny.h"

using namespace tiny;

namespace {

// A layer's linear attention, in place of its attention.
struct TinyDelta {
    int key_heads, value_heads, key_dim, value_dim, kernel;
    bool tiled;
    std::vector<float> products, rates, convolution, decay, bias, norm, output;
    Blob products_blob, rates_blob, output_blob;
    Delta delta;

    TinyDelta(Random& random, int hidden, const Delta& shape, bool bf16)
        : key_heads(shape.key_heads),
          value_heads(shape.value_heads),
          key_dim(shape.key_dim),
          value_dim(shape.value_dim),
          kernel(shape.kernel),
          tiled(shape.tiled) {
        products = matrix(random, channels() + values(), hidden, bf16, 1.5);
        rates = matrix(random, 2 * value_heads, hidden, bf16, 2);
        output = matrix(random, hidden, values(), bf16, 1.5);
        convolution = random.normals(kernel * channels(), 0.7);
        bias = random.normals(value_heads, 1);
        for (float x : random.normals(value_heads, 1)) decay.push_back(-std::exp(x));
        norm = tiny::norm(random, value_dim);
        products_blob = packed(products, hidden, bf16);
        rates_blob = packed(rates, hidden, bf16);
        output_blob = packed(output, values(), bf16);
        delta = shape;
        delta.convolution = convolution.data();
        delta.decay = decay.data();
        delta.bias = bias.data();
        delta.norm = norm.data();
        delta.rates = rates_blob.weight();
    }
    int keys() const { return key_heads * key_dim; }
    int values() const { return value_heads * value_dim; }
    int channels() const { return 2 * keys() + values(); }

    Layer in_place_of(Layer layer) const {
        layer.heads = layer.kv_heads = layer.head_dim = 0;
        layer.qkv_bias = nullptr;
        layer.qkv = products_blob.weight();
        layer.output = output_blob.weight();
        layer.delta = &delta;
        return layer;
    }

    static double silu(double x) { return x / (1 + std::exp(-x)); }

    // What it makes of a request's rows [rows, hidden] from its first one on, before `output`.
    Doubles mixed(const Doubles& input, int hidden, double eps) const {
        const int64_t rows = input.size() / hidden, all = channels() + values();
        const Doubles x = linear(input, products, hidden), rate = linear(input, rates, hidden);
        Doubles out(rows * values()), state(value_heads * key_dim * value_dim);
        for (int64_t r = 0; r < rows; r++) {
            Doubles qkv(channels());
            for (int c = 0; c < channels(); c++) {
                for (int tap = 0; tap < kernel; tap++)
                    if (r + tap + 1 >= kernel)
                        qkv[c] +=
                            convolution[tap * channels() + c] * x[(r + tap + 1 - kernel) * all + c];
                qkv[c] = silu(qkv[c]);
            }
            for (int h = 0; h < 2 * key_heads; h++) normalise(&qkv[h * key_dim]);
            for (int h = 0; h < value_heads; h++) {
                const int key_head = tiled ? h % key_heads : h / (value_heads / key_heads);
                const double* q = &qkv[key_head * key_dim];
                const double *k = q + keys(), *v = &qkv[2 * keys() + h * value_dim];
                const double decayed = rate[r * 2 * value_heads + h] + bias[h],
                             learn = rate[r * 2 * value_heads + value_heads + h];
                const double keep = std::exp(decay[h] * std::log1p(std::exp(decayed)));
                double* s = &state[h * key_dim * value_dim];
                double* o = &out[r * values() + h * value_dim];
                for (int column = 0; column < value_dim; column++) {
                    double found = 0, sum = 0;
                    for (int i = 0; i < key_dim; i++)
                        found += (s[i * value_dim + column] *= keep) * k[i];
                    const double change = (v[column] - found) / (1 + std::exp(-learn));
                    for (int i = 0; i < key_dim; i++)
                        sum += (s[i * value_dim + column] += k[i] * change) * q[i];
                    o[column] = sum / std::sqrt(double(key_dim));
                }
                reference::rms_norm(o, norm.data(), eps, value_dim, o);
                for (int i = 0; i < value_dim; i++)
                    o[i] *= silu(x[r * all + channels() + h * value_dim + i]);
            }
        }
        return out;
    }

    static Doubles linear(const Doubles& x, const std::vector<float>& w, int k) {
        return reference::linear(x, w, k, {});
    }
    void normalise(double* x) const {
        double sum = 1e-6;
        for (int i = 0; i < key_dim; i++) sum += x[i] * x[i];
        for (int i = 0; i < key_dim; i++) x[i] /= std::sqrt(sum);
    }
};

// States and keys and values: what a model remembers.
struct TinyMemory {
    std::vector<float> states, inputs;
    std::vector<int32_t> waiting;
    TinyCache cache;

    States of(int64_t layers, int64_t room) {
        return {int64_t(waiting.size()), layers,        room,
                states.data(),           inputs.data(), waiting.data()};
    }
};

constexpr int64_t SLOTS = 4, ROOM = 6;

// Some layers with linear attention, some with attention.
struct TinyHybrid {
    TinyModel model;
    Delta shape;
    std::vector<std::unique_ptr<TinyDelta>> deltas;  // of each layer, null: attention
    int64_t linear = 0;

    TinyHybrid(Random& random, const Shape& s, bool bf16)
        : model(random, s, random.between(2, 4), random.between(40, 70), bf16) {
        model.change_windows([](int) { return 0; });
        const int each = random.of({1, 2, 3}), key_heads = random.of({1, 2, 4});
        shape = {};
        shape.key_heads = key_heads;
        shape.value_heads = each * key_heads;
        shape.key_dim = random.of({4, 8, 12, 32, 36});
        shape.value_dim = random.of({2, 8, 12, 16, 18, 40});
        shape.kernel = random.of({2, 3, 4, 4, 4, 8});
        shape.tiled = random.chance(0.4);
        const size_t attention = random.below(model.layers.size());
        for (size_t i = 0; i < model.layers.size(); i++) {
            deltas.emplace_back();
            if (i == attention || (linear && random.chance(0.2))) continue;
            deltas[i] = std::make_unique<TinyDelta>(random, s.hidden, shape, bf16);
            model.structs[i] = deltas[i]->in_place_of(model.structs[i]);
            linear++;
        }
    }
    std::string text() const {
        return model.shape.text() + ", " + std::to_string(linear) + " linear of "
               + std::to_string(deltas.size()) + " layers, heads " + std::to_string(shape.key_heads)
               + "/" + std::to_string(shape.value_heads) + " of " + std::to_string(shape.key_dim)
               + "/" + std::to_string(shape.value_dim) + ", kernel " + std::to_string(shape.kernel)
               + (shape.tiled ? ", tiled" : "");
    }
    int64_t inputs() const {
        const int64_t keys = int64_t(shape.key_heads) * shape.key_dim;
        return 2 * keys + int64_t(shape.value_heads) * (shape.value_dim + 2);
    }
    TinyMemory memory(Random random, int64_t pages) const {
        const int64_t blocks = (shape.value_dim + COLUMNS - 1) / COLUMNS,
                      state = shape.value_heads * blocks * shape.key_dim * COLUMNS;
        std::vector<float> rubbish(SLOTS * linear * state, NAN);
        std::vector<float> more(SLOTS * linear * (shape.kernel - 1 + ROOM) * inputs(), NAN);
        return {rubbish, more, std::vector<int32_t>(SLOTS, 3), model.cache(random, pages)};
    }

    // Logits of a whole sequence, in plain loops.
    Doubles logits(const std::vector<int64_t>& tokens) const {
        const int64_t n = int64_t(tokens.size()), d = model.shape.hidden;
        Batch batch;
        std::vector<int32_t> pages;
        for (int64_t i = 0; i < n; i += smart_page()) pages.push_back(int32_t(pages.size()));
        batch.request(pages);
        for (int64_t i = 0; i < n; i++) batch.row(tokens[i], i, i, i + 1);
        const Rows rows = model.rows(batch);
        reference::Cache cache(int64_t(deltas.size()), model.shape.kv_heads,
                               int64_t(pages.size()) * smart_page(), model.shape.head_dim);
        Doubles x;
        for (int64_t token : tokens)
            for (int64_t i = 0; i < d; i++)
                x.push_back(model.embedding[token * d + i] * model.embedding_scale);
        for (size_t i = 0; i < deltas.size(); i++) {
            const reference::Weights& w = model.layers[i].w;
            if (deltas[i])
                layer(*deltas[i], w, x);
            else
                reference::layer(w, rows, nullptr, x, cache, int64_t(i), model.precision.rounds);
        }
        Doubles normed = reference::rms_norms(x, model.final_norm.data(), 1e-5, d);
        if (model.precision.rounds.inputs) reference::round_all(normed);
        return reference::linear(normed, model.output, d, {});
    }
    void layer(const TinyDelta& delta, reference::Weights w, Doubles& x) const {
        Doubles read = reference::rms_norms(x, w.input_norm.data(), w.eps, w.hidden);
        if (model.precision.rounds.inputs) reference::round_all(read);
        w.output = delta.output;
        w.heads = delta.value_heads;
        w.head_dim = delta.value_dim;
        reference::finish(w, delta.mixed(read, w.hidden, w.eps), x, model.precision.rounds);
    }
};

struct Forwarded {
    std::vector<float> logits, nodes;
    int64_t count = 0;  // of nodes
};

// slots: of each request, or empty: none has any.
Forwarded run(const TinyHybrid& h, TinyMemory& memory, const Batch& batch,
              const std::vector<int64_t>& slots, int threads) {
    Forwarded out;
    for (int64_t r = 0; r < batch.size(); r++)
        out.count += batch.ancestors_start[r + 1] > batch.ancestors_start[r];
    out.logits.resize(batch.size() * h.model.vocab);
    out.nodes.resize(out.count * h.linear * h.inputs());
    const States states = memory.of(h.linear, ROOM);
    Model model = h.model.model(memory.cache);
    model.states = &states;
    Rows rows = h.model.rows(batch);
    rows.states = slots.empty() ? nullptr : slots.data();
    std::vector<int64_t> best(batch.size());
    Pass pass{};
    pass.token = batch.token.data();
    pass.logits = out.logits.data();
    pass.best = best.data();
    pass.wanted_count = int32_t(batch.size());
    pass.nodes = out.count ? out.nodes.data() : nullptr;
    check::same("status", 0, smart_forward(&model, &rows, &pass, threads));
    return out;
}

struct Conversation {
    std::vector<int32_t> pages;
    std::vector<int64_t> tokens;  // committed ones
    int64_t slot;
};

void add(Batch& batch, const Conversation& c, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++) batch.row(c.tokens[i], i, slot_of(c.pages, i), i + 1);
}

// Logits of a request's last token, by itself and token by token.
struct Alone {
    const TinyHybrid& h;
    TinyMemory memory;
    int64_t vocab = h.model.vocab;

    std::vector<float> last(const Conversation& c, int threads) {
        std::vector<float> logits;
        for (int64_t i = 0; i < int64_t(c.tokens.size()); i++) {
            Batch one;
            one.request(c.pages);
            add(one, c, i, i + 1);
            logits = run(h, memory, one, {SLOTS - 1 - c.slot}, threads).logits;
        }
        return logits;
    }
};

struct TreeNode {
    int64_t request, row, token;
    std::vector<int64_t> path;  // of nodes, itself the last
};

// Last tokens, a random tree below each; rows follow each other as in `nodes`.
Batch trees_of(Random& random, const std::vector<Conversation>& all, int64_t vocab, int64_t most,
               std::vector<TreeNode>& nodes) {
    Batch batch;
    for (size_t i = 0; i < all.size(); i++) {
        const Conversation& c = all[i];
        const int64_t length = int64_t(c.tokens.size());
        batch.request(c.pages);
        add(batch, c, length - 1, length);
        const size_t first = nodes.size();
        std::vector<std::vector<int32_t>> slots;
        for (int64_t left = random.below(most + 1); left > 0; left--) {
            TreeNode node{int64_t(i), batch.size(), random.below(vocab), {}};
            std::vector<int32_t> above;
            if (nodes.size() > first && random.chance(0.75)) {
                const size_t parent = random.chance(0.5)
                                          ? nodes.size() - 1
                                          : first + random.below(nodes.size() - first);
                if (nodes[parent].path.size() == size_t(ROOM)) continue;
                node.path = nodes[parent].path;
                above = slots[parent - first];
            }
            above.push_back(int32_t(slot_of(c.pages, length + int64_t(slots.size()))));
            node.path.push_back(int64_t(nodes.size()));
            batch.row(node.token, length - 1 + int64_t(above.size()), above.back(), length, above);
            slots.push_back(above);
            nodes.push_back(node);
        }
    }
    return batch;
}

std::vector<int64_t> slots_of(const std::vector<Conversation>& all) {
    std::vector<int64_t> slots;
    for (const Conversation& c : all) slots.push_back(c.slot);
    return slots;
}

// Some paths are accepted: their rows wait, and their keys and values are moved.
void accept(Random& random, const TinyHybrid& h, TinyMemory& memory, const Batch& batch,
            const Forwarded& done, const std::vector<TreeNode>& nodes,
            std::vector<Conversation>& all) {
    std::vector<int64_t> path, accepted;
    std::vector<int32_t> from, to;
    for (size_t i = 0; i < all.size(); i++) {
        std::vector<int64_t> mine;
        for (size_t n = 0; n < nodes.size(); n++)
            if (nodes[n].request == int64_t(i) && random.chance(0.4)) mine = nodes[n].path;
        accepted.push_back(int64_t(mine.size()));
        for (int64_t n : mine) {
            path.push_back(n);
            from.push_back(batch.slot_mapping[nodes[n].row]);
            to.push_back(int32_t(slot_of(all[i].pages, int64_t(all[i].tokens.size()))));
            all[i].tokens.push_back(nodes[n].token);
        }
    }
    const States states = memory.of(h.linear, ROOM);
    Model model = h.model.model(memory.cache);
    model.states = &states;
    smart_advance(&model, done.nodes.data(), done.count, int64_t(all.size()), slots_of(all).data(),
                  path.data(), accepted.data(), int(random.between(1, 3)));
    TinyCache& cache = memory.cache;
    smart_move_kv(cache.keys(), cache.values(), cache.planes, cache.pages, int32_t(cache.head_dim),
                  h.model.precision.bf16 ? 2 : 4, from.data(), to.data(), int32_t(from.size()));
}

void one_hybrid(uint64_t seed, bool bf16) {
    Random random(seed);
    const TinyHybrid h(random, random_shape(random, random.of({16, 32})), bf16);
    check::begin("delta", seed, h.text() + (bf16 ? ", bf16" : ", fp32"));
    const int64_t vocab = h.model.vocab, most = 8, page_count = 3 * 11;
    Pages pages(random, page_count);
    std::vector<Conversation> all(random.between(1, 3));
    for (size_t i = 0; i < all.size(); i++) {
        const int64_t length = random.of<int64_t>({1, 2, 3, 4, 5, 15, 16, 17, 33});
        all[i].pages = pages.take(length + 4 * (ROOM + 1) + most);
        all[i].slot = (seed + i) % (SLOTS - 1);
        for (int64_t j = 0; j < length; j++) all[i].tokens.push_back(random.below(vocab));
    }
    const Random rubbish(seed + 77);
    TinyMemory memory = h.memory(rubbish, page_count), parts = memory;
    auto threads = [&] { return int(random.between(1, 3)); };

    // Whole prompts, against plain loops.
    Batch prompts;
    for (const Conversation& c : all) {
        prompts.request(c.pages);
        add(prompts, c, 0, int64_t(c.tokens.size()));
    }
    const Forwarded whole = run(h, memory, prompts, slots_of(all), threads());
    for (size_t i = 0; i < all.size(); i++) {
        const Doubles expected = h.logits(all[i].tokens);
        check::near_rows(
            "logits", expected.data(), &whole.logits[prompts.query_start_loc[i] * vocab],
            int64_t(all[i].tokens.size()), vocab, (bf16 ? 5 : 2) * h.model.precision.tolerance);
    }

    // In chunks, and token by token; and of nobody who keeps a state.
    std::vector<int64_t> done(all.size(), 0);
    for (bool more = true; more;) {
        more = false;
        Batch chunk;
        std::vector<int64_t> at, slots;
        for (size_t i = 0; i < all.size(); i++) {
            const int64_t left = int64_t(all[i].tokens.size()) - done[i],
                          size = std::min(left, random.of<int64_t>({0, 1, 1, 2, 5, 20}));
            more |= size < left;
            if (!size) continue;
            chunk.request(all[i].pages);
            slots.push_back(all[i].slot);
            add(chunk, all[i], done[i], done[i] + size);
            for (int64_t j = 0; j < size; j++)
                at.push_back(prompts.query_start_loc[i] + done[i] + j);
            done[i] += size;
        }
        if (at.empty()) continue;
        const Forwarded part = run(h, parts, chunk, slots, threads());
        for (size_t i = 0; i < at.size(); i++)
            check::bits("logits of a row in a chunk", &whole.logits[at[i] * vocab],
                        &part.logits[i * vocab], vocab);
    }
    TinyMemory other = h.memory(rubbish, page_count);
    const Forwarded without = run(h, other, prompts, {}, threads());
    check::bits("logits without a state", whole.logits.data(), without.logits.data(),
                int64_t(whole.logits.size()));

    // Rounds: each row as it would be alone, whatever rows wait; some forwards have no trees.
    for (int round = 0; round < 4; round++) {
        for (Conversation& c : all) c.tokens.push_back(random.below(vocab));
        std::vector<TreeNode> nodes;
        const Batch batch = trees_of(random, all, vocab, round == 2 ? 0 : most, nodes);
        const Forwarded got = run(h, memory, batch, slots_of(all), threads());
        Alone alone{h, h.memory(rubbish, page_count)};
        for (size_t i = 0; i < all.size(); i++)
            check::bits("logits of a root", alone.last(all[i], 1).data(),
                        &got.logits[batch.query_start_loc[i] * vocab], vocab);
        for (const TreeNode& node : nodes) {
            Conversation with = all[node.request];
            for (int64_t n : node.path) with.tokens.push_back(nodes[n].token);
            check::bits("logits of a node", alone.last(with, 1).data(),
                        &got.logits[node.row * vocab], vocab);
        }
        accept(random, h, memory, batch, got, nodes, all);
    }
}

}  // namespace

void test_delta() {
    const int seeds = check::quick ? 12 : 60;
    for (int seed = 1; seed <= seeds; seed++)
        for (bool bf16 : {false, true}) one_hybrid(seed, bf16);
}
