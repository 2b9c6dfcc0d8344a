// Levels of draft heads of all layouts, with outputs in bf16, fp32 and bytes; and smart_draft,
// which drafts a round's trees.

#include "tiny.h"

using namespace tiny;

namespace {

constexpr int RANKS = 4;  // forecast children of a node

struct Layout {
    bool fused;  // EAGLE-1/2
    bool mtp;    // fused with norms, around a layer of any kind with a norm of its own
    bool feeds_back_normed;
    int layers;
    bool bytes;  // of outputs

    static Layout of(Random& random, bool bytes) {
        const bool fused = random.chance(0.5), mtp = fused && random.chance(0.6);
        return {fused, mtp, mtp || (!fused && random.chance(0.3)), random.chance(0.3) ? 2 : 1,
                bytes && (!fused || mtp)};
    }
};

// A matrix [n, k] in bf16, k whole blocks, row by row as quants lie.
struct AsStrips {
    std::vector<std::vector<uint8_t>> memory;
    std::vector<Strip> strips;

    void hold(const std::vector<float>& w, int64_t k) {
        const Blob file = plain(w, true);
        const int64_t n = w.size() / k;
        std::vector<const void*> rows(smart_packed_rows(n), nullptr);
        for (int64_t r = 0; r < n; r++) rows[r] = &file.bf16[r * k];
        for (int64_t r = 0; r < int64_t(rows.size()); r += smart_vector_width()) {
            memory.emplace_back(smart_strip_bytes(BF16_ROWS, k));
            strips.push_back({memory.back().data(), BF16_ROWS});
        }
        smart_pack_quants(strips.data(), strips.size(), rows.data(), k, NEVER);
    }
    Weight weight() const { return {nullptr, strips.data(), NEVER}; }
};

struct TinyHead {
    Layout layout;
    Shape shape;
    Precision precision;
    std::vector<TinyLayer> layers;
    std::vector<Layer> structs;
    int aux_count;
    bool bytes, plain_table, norm_before_residual, aux_together;
    float aux_eps = 1e-3f;
    int64_t vocab, outputs_count;
    std::vector<float> aux_norm, fc, fc_bias, input_norm, hidden_norm, final_norm, embedding,
        outputs;
    std::vector<int64_t> tokens;
    Blob fc_blob, embedding_blob, outputs_blob;
    std::vector<int8_t> outputs_bytes;
    std::vector<float> scale;
    std::vector<int32_t> sums;
    AsStrips qkv;  // of the first layer; may be empty
    Rotation rotation;

    static Shape of_head(Random& random, int head_dim, const Layout& layout) {
        Shape s = random_shape(random, head_dim);
        s.input = layout.fused ? s.hidden : 2 * s.hidden;
        return s;
    }
    TinyHead(Random& random, int head_dim, bool bf16, const Layout& layout_)
        : layout(layout_),
          shape(of_head(random, head_dim, layout)),
          precision(bf16, head_dim),
          aux_count(layout.fused ? 1 : int(random.between(1, 3))),
          bytes(layout.bytes),
          plain_table(random.chance(0.5)),
          norm_before_residual(random.chance(0.5)),
          aux_together(random.chance(0.5)),
          vocab(random.between(90, 150)),
          outputs_count(random.between(40, 90)),
          rotation(POSITIONS, head_dim) {
        const int64_t d = shape.hidden, reads = layout.fused ? 2 * d : aux_count * d;
        layers.emplace_back(random, shape, bf16, layout.mtp, !layout.mtp);
        Shape further = shape;
        further.input = d;
        if (layout.layers > 1) layers.emplace_back(random, further, bf16, true, true);
        for (const TinyLayer& layer : layers) structs.push_back(layer.layer());
        if (random.chance(0.5)) aux_norm = norm(random, aux_count * d);
        if (random.chance(0.4)) fc_bias = random.normals(d, 0.3);
        fc = matrix(random, d, reads, bf16);
        if (!layout.fused || layout.mtp) {
            input_norm = norm(random, d);
            hidden_norm = norm(random, d);
            final_norm = norm(random, d);
        }
        embedding = matrix(random, vocab, d, bf16, std::sqrt(double(d)));
        outputs = matrix(random, outputs_count, d, bf16 && !bytes, 2);
        std::vector<int64_t> all(vocab);
        for (int64_t i = 0; i < vocab; i++) all[i] = i;
        random.shuffle(all);
        tokens.assign(all.begin(), all.begin() + outputs_count);
        fc_blob = packed(fc, reads, bf16);
        embedding_blob = plain_table ? plain(embedding, bf16) : packed(embedding, d, bf16);
        if (!bytes)
            outputs_blob = packed(outputs, d, bf16);
        else {
            const int64_t size = smart_packed_rows(outputs_count), panel = 2 * smart_vector_width();
            outputs_bytes.resize(size * d);
            scale.resize(size);
            sums.resize(size);
            smart_pack_bytes(outputs.data(), outputs_count, d, outputs_bytes.data(), scale.data(),
                             sums.data());
            for (int64_t j = 0; j < outputs_count; j++)
                for (int64_t i = 0; i < d; i++) {
                    const int64_t at =
                        j / panel * panel * d + i / 4 * 4 * panel + j % panel * 4 + i % 4;
                    outputs[j * d + i] = scale[j] * float(outputs_bytes[at]);
                }
        }
        if (bf16 && shape.input % 32 == 0 && random.chance(0.5)) {
            std::vector<float> products = layers[0].w.qkv;
            const std::vector<float>& gates = layers[0].w.attention_gate;
            products.insert(products.end(), gates.begin(), gates.end());
            qkv.hold(products, shape.input);
            structs[0].qkv = qkv.weight();
        }
    }
    std::string text() const {
        return shape.text() + (precision.bf16 ? ", bf16" : ", fp32")
               + (qkv.strips.empty() ? "" : ", q, k and v in strips")
               + (bytes ? ", outputs in bytes" : "") + (layout.fused ? ", fused" : "")
               + (layout.mtp ? " with norms" : "")
               + (layers[0].w.attention_gate.empty() ? "" : ", gated")
               + (layout.feeds_back_normed ? ", feeds back normed" : "")
               + (layout.layers > 1 ? ", two layers" : "");
    }
    Head head() const {
        return {structs.data(),
                pointer(aux_norm),
                pointer(fc_bias),
                pointer(input_norm),
                pointer(hidden_norm),
                pointer(final_norm),
                fc_blob.weight(),
                plain_table ? Weight{} : embedding_blob.weight(),
                plain_table ? embedding_blob.data() : nullptr,
                bytes ? Weight{outputs_bytes.data(), nullptr, 0} : outputs_blob.weight(),
                pointer(scale),
                sums.empty() ? nullptr : sums.data(),
                tokens.data(),
                outputs_count,
                int32_t(layers.size()),
                aux_count,
                norm_before_residual,
                layout.fused,
                aux_together,
                layout.feeds_back_normed,
                aux_eps};
    }
    TinyCache cache(Random random, int64_t pages) const {
        return TinyCache(random, int64_t(layers.size()) * shape.kv_heads, pages, shape.head_dim,
                         precision.bf16);
    }
    Rows rows(const Batch& batch) const { return batch.rows(rotation); }
};

struct Drafted {  // what a level yields
    int32_t status = 0;
    std::vector<float> out;
    std::vector<int64_t> tokens;
    std::vector<double> probs;
};

struct Asked {  // what a level is asked
    bool first;
    int k;
    std::vector<const float*> features, embeddings;  // the latter may be empty
    std::vector<float> scale;                        // may be empty
    std::vector<uint64_t> keys;                      // may be empty
};

Drafted draft(const TinyHead& h, const Batch& batch, const Asked& asked, TinyCache& cache,
              int threads) {
    const int64_t wanted = asked.first ? int64_t(batch.block_table_start.size()) : batch.size();
    Drafted drafted{0, std::vector<float>(wanted * h.shape.hidden),
                    std::vector<int64_t>(wanted * asked.k, -7),
                    std::vector<double>(wanted * asked.k)};
    const Head head = h.head();
    const Rows rows = h.rows(batch);
    const Level level{asked.first,
                      asked.k,
                      batch.token.data(),
                      asked.features.data(),
                      asked.embeddings.empty() ? nullptr : asked.embeddings.data(),
                      drafted.out.data(),
                      asked.scale.empty() ? nullptr : asked.scale.data(),
                      asked.keys.empty() ? nullptr : asked.keys.data(),
                      drafted.tokens.data(),
                      drafted.probs.data()};
    drafted.status = smart_draft_level(&head, &rows, &level, cache.keys(), cache.values(),
                                       cache.pages, h.precision.bf16, h.precision.bf16, threads);
    return drafted;
}

// The states [rows, hidden] that a level leaves, of all rows.
Doubles states(const TinyHead& h, const Batch& batch, const Asked& asked, reference::Cache& cache) {
    const int64_t d = h.shape.hidden;
    const float eps = h.layers[0].w.eps;
    const reference::Rounds rounds = h.precision.rounds;
    const auto project = [&](Doubles values, int64_t k) {
        if (rounds.inputs) reference::round_all(values);
        return reference::linear(values, h.fc, k, h.fc_bias);
    };
    Doubles read, x;
    for (int64_t r = 0; r < batch.size(); r++) {
        const int64_t width = asked.first ? h.aux_count * d : d;
        Doubles features(asked.features[r], asked.features[r] + width);
        const int64_t together = h.aux_together ? width : d;
        for (int64_t at = 0; asked.first && !h.aux_norm.empty() && at < width; at += together)
            reference::rms_norm(&features[at], &h.aux_norm[at], h.aux_eps, together, &features[at]);
        const bool pictured = !asked.embeddings.empty() && asked.embeddings[r];
        const float* from = pictured ? asked.embeddings[r] : &h.embedding[batch.token[r] * d];
        Doubles embedding(from, from + d);
        if (h.layout.fused) {
            Doubles both = embedding;
            if (h.layout.mtp) {
                both = reference::rms_norms(both, h.input_norm.data(), eps, d);
                features = reference::rms_norms(features, h.hidden_norm.data(), eps, d);
            }
            both.insert(both.end(), features.begin(), features.end());
            const Doubles fused = pictured ? embedding : project(both, 2 * d);
            read.insert(read.end(), fused.begin(), fused.end());
            x.insert(x.end(), fused.begin(), fused.end());
            continue;
        }
        if (asked.first) features = project(features, width);
        embedding = reference::rms_norms(embedding, h.input_norm.data(), eps, d);
        const Doubles normed = reference::rms_norms(features, h.hidden_norm.data(), eps, d);
        read.insert(read.end(), embedding.begin(), embedding.end());
        read.insert(read.end(), normed.begin(), normed.end());
        const Doubles& residual = h.norm_before_residual ? normed : features;
        x.insert(x.end(), residual.begin(), residual.end());
    }
    const Rows rows = h.rows(batch);
    for (size_t i = 0; i < h.layers.size(); i++)
        reference::layer(h.layers[i].w, rows, i || h.layout.mtp ? nullptr : &read, x, cache,
                         int64_t(i), rounds);
    if (!h.layout.feeds_back_normed) return x;
    return reference::rms_norms(x, h.final_norm.data(), eps, d);
}

// Are the children what the states `out` [hidden] call for?
void compare_children(const TinyHead& h, const Asked& asked, const float* out,
                      const int64_t* tokens, const double* probs, int64_t row) {
    const int64_t d = h.shape.hidden, n = h.outputs_count;
    std::vector<float> normed(out, out + d);
    if (!h.final_norm.empty() && !h.layout.feeds_back_normed)
        smart_rms_norm(out, h.final_norm.data(), h.layers[0].w.eps, 1, d, normed.data(), d);
    if (h.precision.rounds.inputs && !h.bytes)
        for (float& x : normed) x = reference::rounded(x);
    const Doubles logits = reference::linear(reference::doubles(normed), h.outputs, d, {});
    const double scale = asked.scale.empty() ? 1.0 : asked.scale[row];
    const uint64_t key = asked.keys.empty() ? 0 : asked.keys[row];
    Doubles score(n);
    for (int64_t i = 0; i < n; i++) {
        score[i] = logits[i] * scale;
        if (key) score[i] += reference::gumbel(key, h.tokens[i]);
    }
    std::vector<int64_t> order = reference::ranked(score);
    if (key) {
        // The kernel may leave out entries this far below the best, unless they are among the k
        // best without noise: such an entry wins once in ten million times.
        constexpr double NEVER_WINS = -16, SLACK = 1e-2;
        const std::vector<int64_t> likely = reference::ranked(logits);
        const auto left_out = [&](int64_t id) {
            return (logits[id] - logits[likely[0]]) * scale < NEVER_WINS + SLACK
                   && std::find(likely.begin(), likely.begin() + asked.k, id)
                          == likely.begin() + asked.k
                   && std::find(tokens, tokens + asked.k, h.tokens[id]) == tokens + asked.k;
        };
        order.erase(std::remove_if(order.begin(), order.end(), left_out), order.end());
    }
    double sum = 0;
    for (int64_t i = 0; i < (key ? asked.k : n); i++)
        sum += std::exp(score[order[i]] - score[order[0]]);
    const double error =
        h.bytes ? 1e-3 : 1e-4;  // of scores; inputs of bytes are rounded to 16 bits
    std::vector<bool> taken(n, false);
    for (int j = 0; j < asked.k; j++) {
        const std::string name = "of row " + std::to_string(row) + ", place " + std::to_string(j);
        const int64_t id =
            std::find(h.tokens.begin(), h.tokens.end(), tokens[j]) - h.tokens.begin();
        if (!check::that(id < n && !taken[id], "a token of the head's, once, " + name)) return;
        taken[id] = true;
        check::near("score " + name, score[order[j]], score[id], 2 * error);
        const double expected = std::exp(score[id] - score[order[0]]) / sum;
        check::near("probability " + name, expected, probs[j], 4 * error * expected + 1e-7);
    }
}

std::vector<const float*> lines(const std::vector<float>& memory, int64_t rows, int64_t width) {
    std::vector<const float*> list;
    for (int64_t r = 0; r < rows; r++) list.push_back(&memory[r * width]);
    return list;
}

void one_head(uint64_t seed, int head_dim, bool bf16, bool bytes, bool long_prompt) {
    Random random(seed);
    const Layout layout = Layout::of(random, bytes);
    const TinyHead h(random, head_dim, bf16, layout);
    check::begin("draft", seed, h.text() + (long_prompt ? ", a long prompt" : ""));
    const int64_t d = h.shape.hidden, all_pages = 60;
    Pages pages(random, all_pages);
    const Random garbage(seed + 3);
    TinyCache cache = h.cache(garbage, all_pages);
    TinyCache parts = cache;
    reference::Cache plain_cache(layout.layers, h.shape.kv_heads, all_pages * smart_page(),
                                 head_dim);

    // The first level of several requests.
    const int64_t requests = long_prompt ? 1 : random.between(1, 3);
    Batch batch, beginning, ending;
    std::vector<int64_t> lengths;
    std::vector<std::vector<int32_t>> tables;
    std::vector<int64_t> in_ending;  // rows of `batch` that are in it
    for (int64_t i = 0; i < requests; i++) {
        const int64_t length = long_prompt ? 300 : random.of<int64_t>({1, 3, 16, 17, 40, 64, 70});
        lengths.push_back(length);
        tables.push_back(pages.take(length + 40));
        const int64_t cut = random.below(length);
        for (Batch* to : {&batch, &ending}) to->request(tables[i]);
        if (cut) beginning.request(tables[i]);
        for (int64_t j = 0; j < length; j++) {
            const int64_t token = random.below(h.vocab), slot = slot_of(tables[i], j);
            if (j >= cut) in_ending.push_back(batch.size());
            batch.row(token, j, slot, j + 1);
            (j < cut ? beginning : ending).row(token, j, slot, j + 1);
        }
    }
    const int64_t wide = h.aux_count * d;
    const std::vector<float> aux = random.normals(batch.size() * wide), picture = random.normals(d);
    const int k = int(random.between(1, 8));
    Asked asked{true, k, lines(aux, batch.size(), wide), {}, {}, {}};
    if (random.chance(0.3))
        for (int64_t r = 0; r < batch.size(); r++)
            asked.embeddings.push_back(random.chance(0.2) ? picture.data() : nullptr);
    for (int64_t i = 0; i < requests; i++) asked.scale.push_back(float(0.5 + random.uniform()));
    if (random.chance(0.5))
        for (int64_t i = 0; i < requests; i++)
            asked.keys.push_back(random.chance(0.7) ? random.next() | 1 : 0);
    if (random.chance(0.3)) asked.scale.clear();
    const Drafted first = draft(h, batch, asked, cache, int(random.between(1, 3)));
    if (!check::same("status", 0, first.status)) return;
    const Doubles expected = states(h, batch, asked, plain_cache);
    for (int64_t i = 0; i < requests; i++) {
        const int64_t last = batch.query_start_loc[i + 1] - 1;
        check::near_rows(check::at("out", i).c_str(), &expected[last * d], &first.out[i * d], 1, d,
                         h.precision.tolerance);
        compare_children(h, asked, &first.out[i * d], &first.tokens[i * k], &first.probs[i * k], i);
    }

    // The same in two parts, bit by bit.
    auto part_of = [&](const std::vector<int64_t>& at) {
        Asked part = asked;
        part.features.clear();
        part.embeddings.clear();
        for (int64_t r : at) {
            part.features.push_back(asked.features[r]);
            if (!asked.embeddings.empty()) part.embeddings.push_back(asked.embeddings[r]);
        }
        return part;
    };
    std::vector<int64_t> in_beginning;
    for (int64_t r = 0; r < batch.size(); r++)
        if (std::find(in_ending.begin(), in_ending.end(), r) == in_ending.end())
            in_beginning.push_back(r);
    if (beginning.size()) draft(h, beginning, part_of(in_beginning), parts, 2);
    const Drafted later = draft(h, ending, part_of(in_ending), parts, 1);
    check::bits("out after two parts", first.out.data(), later.out.data(), requests * d);
    check::same_all("tokens after two parts", first.tokens, later.tokens);
    check::that(cache.same(parts), "keys and values are the same after two parts");

    // Deeper levels: some children of the level above, which see their expanded ancestors.
    struct Node {
        int64_t request, depth, token;
        const float* features;
        std::vector<int32_t> path;
    };
    std::vector<Drafted> kept{first};
    kept.reserve(4);
    std::vector<Node> level_nodes;
    for (int64_t i = 0; i < requests; i++)
        for (int j = 0; j < k; j++)
            level_nodes.push_back({i, 1, first.tokens[i * k + j], &kept[0].out[i * d], {}});
    std::vector<int64_t> used = lengths;
    for (int depth = 1; depth <= 3; depth++) {
        Batch level;
        Asked deeper{false, k, {}, {}, {}, {}};
        const bool noisy = random.chance(0.5);
        std::vector<Node> expanded;
        for (int64_t i = 0; i < requests; i++) {
            int count = 0;
            for (Node& node : level_nodes) {
                if (node.request != i || count >= 5 || !random.chance(0.5)) continue;
                if (!count++) level.request(tables[i]);
                const int64_t slot = slot_of(tables[i], used[i]++);
                node.path.push_back(int32_t(slot));
                level.row(node.token, lengths[i] - 1 + depth, slot, lengths[i], node.path);
                deeper.features.push_back(node.features);
                deeper.scale.push_back(float(0.5 + random.uniform()));
                if (noisy) deeper.keys.push_back(random.next() | 1);
                expanded.push_back(node);
            }
        }
        if (expanded.empty()) break;
        kept.push_back(draft(h, level, deeper, cache, int(random.between(1, 3))));
        const Drafted& got = kept.back();
        const Doubles wanted = states(h, level, deeper, plain_cache);
        check::near_rows("out of a deeper level", wanted.data(), got.out.data(), level.size(), d,
                         h.precision.tolerance);
        for (int64_t r = 0; r < level.size(); r++) {
            compare_children(h, deeper, &got.out[r * d], &got.tokens[r * k], &got.probs[r * k], r);
            Asked one{false, k, {deeper.features[r]}, {}, {deeper.scale[r]}, {}};
            if (noisy) one.keys = {deeper.keys[r]};
            const Drafted alone = draft(h, level.alone(r), one, cache, 1);
            check::bits("out of a row alone", &got.out[r * d], alone.out.data(), d);
            for (int j = 0; j < k; j++) {
                check::same("token of a row alone", got.tokens[r * k + j], alone.tokens[j]);
                check::near("probability of a row alone", got.probs[r * k + j], alone.probs[j], 0);
            }
        }
        level_nodes.clear();
        for (int64_t r = 0; r < level.size(); r++)
            for (int j = 0; j < k; j++)
                level_nodes.push_back({expanded[r].request, depth + 1, got.tokens[r * k + j],
                                       &got.out[r * d], expanded[r].path});
    }
}

// -------------------------------------------------------------------------------- smart_draft

struct Grown {  // the trees of a batch
    int64_t batch, room, count = 0;
    std::vector<int64_t> ints;
    std::vector<double> floats;

    Grown(int64_t batch_, int64_t room_)
        : batch(batch_), room(room_), ints(5 * room_, -7), floats(3 * room_, -7) {}
    Trees trees() { return {count, batch, room, ints.data(), floats.data()}; }

    void add(int64_t owner, int64_t token, int64_t parent, int64_t source, double prob) {
        const int64_t depth = parent < 0 ? 1 : ints[3 * room + parent] + 1;
        const int64_t values[] = {owner, token, parent, depth, source};
        for (int row = 0; row < 5; row++) ints[row * room + count] = values[row];
        floats[count] = prob;
        floats[2 * room + count] = NAN;
        count++;
        set_paths();
    }
    // A child of the model's, which may be there already.
    void merge(int64_t given, int64_t owner, int64_t token, int64_t parent, double prob) {
        for (int64_t i = 0; i < given; i++)
            if (ints[i] == owner && ints[room + i] == token && ints[2 * room + i] == parent) {
                ints[4 * room + i] = 0;
                floats[i] = std::max(floats[i], prob);
                return set_paths();
            }
        add(owner, token, parent, 0, prob);
    }
    void set_paths() {
        for (int64_t i = 0; i < count; i++) {
            const int64_t parent = ints[2 * room + i];
            floats[room + i] = (parent < 0 ? 1.0 : floats[room + parent]) * floats[i];
        }
    }
};

struct Growing {  // what a drafter is asked
    int64_t batch, levels, slots, first_slot;
    int k;
    std::vector<int64_t> widths{1, 2, 3, 5, 8}, limits, ends, bins;
    std::vector<double> level_seconds, verify, below, table;
    std::vector<uint8_t> kind;
    std::vector<float> scale;
    std::vector<uint64_t> noise;
    bool scaled, noisy;
    Rule rule{};

    Growing(Random& random, const TinyHead& h, int64_t first_slot_)
        : batch(random.between(1, 3)),
          levels(random.between(1, 5)),
          slots(random.of<int64_t>({3, 20, 40})),
          first_slot(first_slot_),
          k(int(random.between(1, 5))),
          ends{h.tokens[0], h.tokens[7]},
          kind(batch, 0),
          scaled(random.chance(0.5)),
          noisy(random.chance(0.5)) {
        for (int i = 0; i < 40; i++)
            level_seconds.push_back(0.02 + 0.004 * double(i) * random.uniform());
        for (int i = 0; i < 60; i++) verify.push_back(1 + 0.02 * double(i));
        for (int64_t i = 0; i < levels * RANKS; i++) below.push_back(0.8 * random.uniform());
        for (int i = 0; i < 3 * 6 * 16; i++) table.push_back(0.3 + 0.7 * random.uniform());
        for (int64_t i = 0; i <= 100; i++) bins.push_back(i * 15 / 100);
        for (int64_t i = 0; i < batch; i++) {
            limits.push_back(random.of<int64_t>({0, 2, 9, 9}));
            scale.push_back(float(0.5 + 2 * random.uniform()));
        }
        for (int64_t i = 0; i < batch * levels; i++)
            noise.push_back(random.chance(0.8) ? random.next() | 1 : 0);
        const double limit = random.chance(0.3) ? 1.4 : INFINITY;
        Choice& expand = rule.expand;
        expand.kind = random.chance(0.7) ? RATE : BEST;
        expand.count = random.between(1, 4);
        expand.costs = {double(batch), 0.05, limit, level_seconds.data(), verify.data(), 40, 60};
        expand.widths = widths.data();
        expand.width_count = int64_t(widths.size());
        expand.below = below.data();
        rule.keep = expand;
        rule.keep.count = random.of<int64_t>({0, 0, 2});
        rule.levels = levels;
        rule.limits = limits.data();
        rule.kind = kind.data();
        rule.ends = ends.data();
        rule.end_count = int64_t(ends.size());
        rule.calibration = {table.data(), bins.data(), 100, 16, 6, 1};
    }
    // What is asked of the children of a request's node at a depth.
    void ask(Asked& asked, int64_t request, int64_t depth) const {
        if (scaled) asked.scale.push_back(scale[request]);
        if (noisy) asked.keys.push_back(noise[request * levels + depth]);
    }
};

// The same trees node by node, by smart_draft_level and smart_frontier, which have tests of their
// own.
struct NodeByNode {
    const TinyHead& h;
    const Growing& g;
    const Batch& rows;
    TinyCache& cache;
    Grown& grown;
    const int64_t d = h.shape.hidden, given = grown.count;
    std::vector<float> out{};
    std::vector<int64_t> place = std::vector<int64_t>(grown.room, -1);
    int64_t used = 0;

    void roots(const Asked& asked) {
        const Drafted found = draft(h, rows, asked, cache, 1);
        out = found.out;
        for (int64_t i = 0; i < g.batch; i++) add(found, i, i, -1);
    }
    void add(const Drafted& found, int64_t at, int64_t request, int64_t parent) {
        for (int j = 0; j < g.k; j++)
            grown.merge(given, request, found.tokens[at * g.k + j], parent,
                        found.probs[at * g.k + j]);
    }
    // How many nodes were expanded.
    int64_t level(int64_t depth) {
        std::vector<int64_t> nodes(grown.room);
        const Trees trees = grown.trees();
        int64_t count = smart_frontier(&g.rule, &trees, depth, nodes.data());
        count = std::min(count, std::min(g.slots - used, (grown.room - grown.count) / g.k));
        nodes.resize(count);
        std::stable_sort(nodes.begin(), nodes.end(),
                         [&](int64_t a, int64_t b) { return grown.ints[a] < grown.ints[b]; });
        for (int64_t node : nodes) place[node] = used++;
        for (int64_t node : nodes) expand(node, depth);
        return count;
    }
    void expand(int64_t node, int64_t depth) {
        const int64_t request = grown.ints[node], above = grown.ints[2 * grown.room + node];
        std::vector<int32_t> path;
        for (int64_t at = node; at >= 0; at = grown.ints[2 * grown.room + at])
            path.insert(path.begin(), int32_t(g.first_slot + place[at]));
        const int64_t first = rows.query_start_loc[request],
                      last = rows.query_start_loc[request + 1] - 1, length = last + 1 - first;
        Batch row;
        row.request(rows.alone(last).block_tables);
        row.row(grown.ints[grown.room + node], length - 1 + depth, path.back(), length, path);
        const int64_t from = above < 0 ? request : g.batch + place[above];
        const std::vector<float> features(&out[from * d], &out[from * d] + d);
        Asked asked{false, g.k, {features.data()}, {}, {}, {}};
        g.ask(asked, request, depth);
        const Drafted found = draft(h, row, asked, cache, 1);
        out.insert(out.end(), found.out.begin(), found.out.end());
        add(found, 0, request, node);
    }
};

// What free drafters propose: some of what the head does, too.
void propose(Random& random, const TinyHead& h, const Drafted& roots, int k, Grown& grown) {
    for (int64_t i = 0; i < grown.batch; i++)
        for (int64_t n = random.below(4); n > 0; n--) {
            const int64_t own = roots.tokens[i * k + n % k];
            grown.merge(grown.count, i, random.chance(0.6) ? own : h.tokens[n], -1,
                        random.uniform());
        }
    const int64_t firsts = grown.count;
    for (int64_t i = 0; i < firsts; i++)
        if (random.chance(0.6))
            grown.add(grown.ints[i], h.tokens[random.below(20)], i, 1, random.uniform());
    for (int64_t i = 0; i < grown.count; i++) grown.ints[4 * grown.room + i] = random.between(1, 2);
}

void one_growth(uint64_t seed, bool bf16) {
    Random random(seed);
    const int head_dim = random.of({16, 32});
    const TinyHead h(random, head_dim, bf16, Layout::of(random, random.chance(0.5)));
    const int64_t d = h.shape.hidden, all_pages = 24, wide = h.aux_count * d;
    // Slots for nodes lie behind those of all pages that are given out.
    const Growing g(random, h, all_pages * smart_page());
    const int64_t batch = g.batch, levels = g.levels;
    check::begin("grow", seed,
                 h.text() + ", levels " + std::to_string(levels) + ", k " + std::to_string(g.k));
    Pages pages(random, all_pages);
    Batch rows;
    for (int64_t i = 0; i < batch; i++) {
        const int64_t length = random.between(1, 30);
        const std::vector<int32_t> table = pages.take(length);
        rows.request(table);
        for (int64_t j = 0; j < length; j++)
            rows.row(random.below(h.vocab), j, slot_of(table, j), j + 1);
    }
    const std::vector<float> aux = random.normals(rows.size() * wide);
    const std::vector<const float*> features = lines(aux, rows.size(), wide);
    TinyCache cache = h.cache(Random(seed + 9), all_pages + 3), other = cache, unused = cache;
    Asked asked{true, g.k, features, {}, {}, {}};
    for (int64_t i = 0; i < batch; i++) g.ask(asked, i, 0);

    Grown expected(batch, random.chance(0.2) ? 40 + batch * g.k : 40 + (batch + g.slots) * g.k);
    if (random.chance(0.6)) propose(random, h, draft(h, rows, asked, unused, 1), g.k, expected);
    Grown got = expected;
    NodeByNode plain{h, g, rows, other, expected};
    plain.roots(asked);
    std::vector<int64_t> expanded_expected(levels, 0), kept_expected(got.room, -7);
    int64_t done_expected = 1;
    while (done_expected < levels) {
        const int64_t count = plain.level(done_expected);
        if (!count) break;
        expanded_expected[done_expected++] = count;
    }
    const Trees all = expected.trees();
    kept_expected.resize(smart_select(&g.rule, &all, kept_expected.data()));

    const Head head = h.head();
    const Rows in = h.rows(rows);
    std::vector<float> out((batch + g.slots) * d, 0.0f);
    std::vector<int64_t> tokens(batch * g.k), expanded(levels, 0), kept(got.room, -7);
    std::vector<double> probs(batch * g.k), seconds(levels);
    const Level level{1,          g.k,     rows.token.data(), features.data(), nullptr,
                      out.data(), nullptr, nullptr,           tokens.data(),   probs.data()};
    double choosing = -1;
    int64_t kept_count = -1;
    const Drafter drafter{&head,
                          nullptr,
                          nullptr,
                          g.first_slot,
                          g.slots,
                          g.scaled ? g.scale.data() : nullptr,
                          g.noisy ? g.noise.data() : nullptr,
                          cache.keys(),
                          cache.values(),
                          all_pages + 3,
                          bf16,
                          bf16,
                          2,
                          expanded.data(),
                          seconds.data(),
                          &choosing};
    Trees trees = got.trees();
    const int64_t done =
        smart_draft(&drafter, &g.rule, &in, &level, &trees, kept.data(), &kept_count);

    check::same("levels", done_expected, done);
    check::same("nodes", expected.count, trees.nodes);
    check::same_all("owner, token, parent, depth, source", expected.ints, got.ints);
    for (int64_t row = 0; row < 3; row++)
        for (int64_t i = 0; i < expected.count; i++)
            check::near_at("probabilities", row, i, expected.floats[row * got.room + i],
                           got.floats[row * got.room + i], 1e-12);
    check::same_all("expanded", expanded_expected, expanded);
    check::bits("outputs", plain.out.data(), out.data(), (batch + plain.used) * d);
    kept.resize(std::max<int64_t>(kept_count, 0));
    check::same_all("kept", kept_expected, kept);
    check::that(choosing >= 0, "time passes");
}

}  // namespace

void test_drafting() {
    uint64_t seed = 0;
    const uint64_t rounds = check::quick ? 1 : 8;
    for (uint64_t round = 0; round < rounds; round++)
        for (int head_dim : {16, 32, 64, 96, 128})
            for (bool bf16 : {false, true})
                for (bool bytes : {false, true}) one_head(++seed, head_dim, bf16, bytes, false);
    for (int prompt = 0; prompt < (check::quick ? 2 : 16); prompt++)
        one_head(++seed, 16, prompt % 2, true, true);
    for (uint64_t drafter = 1; drafter <= check::seeds(80); drafter++)
        one_growth(5000 + drafter, drafter % 2);
}
