// Levels of a draft head, with outputs in bf16, fp32 and bytes; and smart_grow, which drafts a
// round's trees.

#include "tiny.h"

using namespace tiny;

namespace {

constexpr int RANKS = 4;  // forecast children of a node

struct TinyHead {
    Shape shape;
    Precision precision;
    TinyLayer layer;
    int aux_count;
    bool bytes, plain_table, norm_before_residual;
    int64_t vocab, outputs_count;
    std::vector<float> aux_norm, fc, fc_bias, input_norm, hidden_norm, final_norm, embedding,
        outputs;
    std::vector<int64_t> tokens;
    Blob fc_blob, embedding_blob, outputs_blob;
    std::vector<int8_t> outputs_bytes;
    std::vector<float> scale;
    std::vector<int32_t> sums;
    Rotation rotation;

    static Shape of_head(Random& random, int head_dim) {
        Shape s = random_shape(random, head_dim);
        s.input = 2 * s.hidden;
        return s;
    }
    TinyHead(Random& random, int head_dim, bool bf16, bool bytes_)
        : shape(of_head(random, head_dim)),
          precision(bf16, head_dim),
          layer(random, shape, bf16, false),
          aux_count(int(random.between(1, 3))),
          bytes(bytes_),
          plain_table(random.chance(0.5)),
          norm_before_residual(random.chance(0.5)),
          vocab(random.between(90, 150)),
          outputs_count(random.between(40, 90)),
          rotation(POSITIONS, head_dim) {
        const int64_t d = shape.hidden;
        if (random.chance(0.4)) aux_norm = norm(random, d);
        if (random.chance(0.4)) fc_bias = random.normals(d, 0.3);
        fc = matrix(random, d, aux_count * d, bf16);
        input_norm = norm(random, d);
        hidden_norm = norm(random, d);
        final_norm = norm(random, d);
        embedding = matrix(random, vocab, d, bf16, std::sqrt(double(d)));
        outputs = matrix(random, outputs_count, d, bf16 && !bytes, 2);
        std::vector<int64_t> all(vocab);
        for (int64_t i = 0; i < vocab; i++) all[i] = i;
        random.shuffle(all);
        tokens.assign(all.begin(), all.begin() + outputs_count);
        fc_blob = packed(fc, aux_count * d, bf16);
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
    }
    std::string text() const {
        return shape.text() + (precision.bf16 ? ", bf16" : ", fp32")
               + (bytes ? ", outputs in bytes" : "");
    }
    Head head() const {
        const void* table = embedding_blob.data();
        return {layer.layer(),
                pointer(aux_norm),
                pointer(fc_bias),
                input_norm.data(),
                hidden_norm.data(),
                final_norm.data(),
                fc_blob.data(),
                plain_table ? nullptr : table,
                plain_table ? table : nullptr,
                bytes ? (const void*)outputs_bytes.data() : outputs_blob.data(),
                pointer(scale),
                sums.empty() ? nullptr : sums.data(),
                tokens.data(),
                outputs_count,
                aux_count,
                norm_before_residual};
    }
    Rows rows(const Batch& batch) const { return batch.rows(rotation.cosine, rotation.sine); }
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
    drafted.status = smart_draft(&head, &rows, &level, cache.keys(), cache.values(), cache.pages,
                                 h.precision.bf16, h.precision.bf16, threads);
    return drafted;
}

// The states [rows, hidden] that a level leaves, of all rows.
Doubles states(const TinyHead& h, const Batch& batch, const Asked& asked, reference::Cache& cache) {
    const int64_t d = h.shape.hidden;
    const float eps = h.layer.w.eps;
    const reference::Rounds rounds = h.precision.rounds;
    Doubles read, x;
    for (int64_t r = 0; r < batch.size(); r++) {
        Doubles features(asked.features[r],
                         asked.features[r] + (asked.first ? h.aux_count * d : d));
        if (asked.first) {
            if (!h.aux_norm.empty())
                features = reference::rms_norms(features, h.aux_norm.data(), eps, d);
            if (rounds.inputs) reference::round_all(features);
            features = reference::linear(features, h.fc, h.aux_count * d, h.fc_bias);
        }
        const float* from = &h.embedding[batch.token[r] * d];
        if (!asked.embeddings.empty() && asked.embeddings[r]) from = asked.embeddings[r];
        const Doubles embedding =
            reference::rms_norms(Doubles(from, from + d), h.input_norm.data(), eps, d);
        const Doubles normed = reference::rms_norms(features, h.hidden_norm.data(), eps, d);
        read.insert(read.end(), embedding.begin(), embedding.end());
        read.insert(read.end(), normed.begin(), normed.end());
        const Doubles& residual = h.norm_before_residual ? normed : features;
        x.insert(x.end(), residual.begin(), residual.end());
    }
    const Rows rows = h.rows(batch);
    reference::layer(h.layer.w, rows, &read, x, cache, 0, rounds);
    return x;
}

// Are the children what the states `out` [hidden] call for?
void compare_children(const TinyHead& h, const Asked& asked, const float* out,
                      const int64_t* tokens, const double* probs, int64_t row) {
    const int64_t d = h.shape.hidden, n = h.outputs_count;
    std::vector<float> normed(d);
    smart_rms_norm(out, h.final_norm.data(), h.layer.w.eps, 1, d, normed.data(), d);
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
    const std::vector<int64_t> order = reference::ranked(score);
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
    const TinyHead h(random, head_dim, bf16, bytes);
    check::begin("draft", seed, h.text() + (long_prompt ? ", a long prompt" : ""));
    const int64_t d = h.shape.hidden, all_pages = 60;
    Pages pages(random, all_pages);
    const Random garbage(seed + 3);
    TinyCache cache(garbage, h.shape.kv_heads, all_pages, head_dim, bf16);
    TinyCache parts = cache;
    reference::Cache plain_cache(1, h.shape.kv_heads, all_pages * smart_page(), head_dim);

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

// -------------------------------------------------------------------------------- smart_grow

struct Grown {  // the trees of a batch, and what was chosen of them
    int64_t batch, room;
    std::vector<int64_t> ints, limits, ends;
    std::vector<double> floats;
    std::vector<uint8_t> kind;

    Grown(int64_t batch_, int64_t room_)
        : batch(batch_),
          room(room_),
          ints(5 * room_, -7),
          limits(batch_),
          floats(3 * room_, -7),
          kind(batch_, 0) {}
    Trees trees() {
        return {0,           batch,         room,
                ints.data(), floats.data(), limits.data(),
                kind.data(), ends.data(),   int64_t(ends.size())};
    }
};

void one_growth(uint64_t seed, bool bf16) {
    Random random(seed);
    const int head_dim = random.of({16, 32});
    const TinyHead h(random, head_dim, bf16, random.chance(0.5));
    const int64_t d = h.shape.hidden, all_pages = 24, wide = h.aux_count * d;
    const int64_t batch = random.between(1, 3), levels = random.between(1, 5),
                  reach = random.between(1, 3);
    const int k = int(random.between(1, 5));
    check::begin("grow", seed,
                 h.text() + ", levels " + std::to_string(levels) + ", k " + std::to_string(k));
    Pages pages(random, all_pages);
    const int64_t slots = random.of<int64_t>({3, 20, 40});
    Batch rows;
    for (int64_t i = 0; i < batch; i++) {
        const int64_t length = random.between(1, 30);
        rows.request(pages.take(length));
        for (int64_t j = 0; j < length; j++)
            rows.row(random.below(h.vocab), j,
                     slot_of({rows.block_tables.begin() + rows.block_table_start[i],
                              rows.block_tables.end()},
                             j),
                     j + 1);
    }
    const std::vector<float> aux = random.normals(rows.size() * wide);
    const std::vector<const float*> features = lines(aux, rows.size(), wide);
    // Slots for nodes lie behind those of all pages that were given out.
    const int64_t first_slot = all_pages * smart_page(), total_pages = all_pages + 3;
    TinyCache cache(Random(seed + 9), h.shape.kv_heads, total_pages, head_dim, bf16);
    TinyCache other = cache;

    std::vector<int64_t> widths{1, 2, 3, 5, 8};
    std::vector<double> level_seconds(40), verify(60), below(levels * reach * RANKS),
        seconds(levels), table(6 * 16);
    for (size_t i = 0; i < level_seconds.size(); i++)
        level_seconds[i] = 0.02 + 0.004 * double(i) * random.uniform();
    for (size_t i = 0; i < verify.size(); i++) verify[i] = 1 + 0.02 * double(i);
    for (double& x : below) x = 0.8 * random.uniform();
    for (double& x : table) x = 0.3 + 0.7 * random.uniform();
    std::vector<int64_t> bins(101);
    for (int64_t i = 0; i <= 100; i++) bins[i] = i * 15 / 100;
    const Calibration calibration{table.data(), int64_t(table.size()), bins.data(), 100, 16, 6, 1};
    const double limit = random.chance(0.3) ? 1.4 : INFINITY;
    const Costs costs{double(batch), 0.05, limit, verify.data(), int64_t(verify.size())};
    std::vector<float> scale;
    std::vector<uint64_t> noise;
    for (int64_t i = 0; i < batch; i++) scale.push_back(float(0.5 + 2 * random.uniform()));
    for (int64_t i = 0; i < batch * levels; i++)
        noise.push_back(random.chance(0.8) ? random.next() | 1 : 0);
    const bool scaled = random.chance(0.5), noisy = random.chance(0.5);
    const int64_t room = random.chance(0.2) ? batch * k + 2 * k : (batch + slots) * k;
    Grown got(batch, room), expected(batch, room);
    for (int64_t i = 0; i < batch; i++) got.limits[i] = random.of<int64_t>({0, 2, 9, 9});
    got.ends = {h.tokens[0], h.tokens[7]};
    expected.limits = got.limits;
    expected.ends = got.ends;

    const Head head = h.head();
    const Rows in = h.rows(rows);
    std::vector<float> out((batch + slots) * d, 0.0f), out_expected = out;
    std::vector<int64_t> tokens(batch * k), expanded(levels, 0), scratch(room), kept(room, -7);
    std::vector<double> probs(batch * k);
    const Level level{1,          k,       rows.token.data(), features.data(), nullptr,
                      out.data(), nullptr, nullptr,           tokens.data(),   probs.data()};
    double choosing = -1;
    const int64_t least = random.of<int64_t>({0, 0, 2});
    const Growth growth{levels,
                        reach,
                        int64_t(widths.size()),
                        least,
                        widths.data(),
                        level_seconds.data(),
                        below.data(),
                        d,
                        first_slot,
                        slots,
                        scaled ? scale.data() : nullptr,
                        noisy ? noise.data() : nullptr,
                        cache.keys(),
                        cache.values(),
                        total_pages,
                        bf16,
                        bf16,
                        2,
                        expanded.data(),
                        seconds.data(),
                        &choosing};
    Trees trees = got.trees();
    Costs spent = costs;
    Choice choice{-1, -1, -1};
    const int64_t done = smart_grow(&head, &in, &level, &growth, &trees, &calibration, &spent,
                                    scratch.data(), kept.data(), &choice);

    // The same, node by node, by smart_draft, smart_frontier and smart_select, which have tests of
    // their own.
    Trees plain = expected.trees();
    Costs now = costs;
    Choice chosen{-1, -1, -1};
    std::vector<int64_t> kept_expected(room, -7), expanded_expected(levels, 0);
    std::vector<int64_t> place(room, -1);
    auto append = [&](const Drafted& children, int64_t at, int64_t request, int64_t parent) {
        for (int64_t j = 0; j < k; j++) {
            const int64_t i = plain.nodes++;
            const int64_t depth = parent < 0 ? 1 : expected.ints[3 * room + parent] + 1;
            const int64_t ints[] = {request, children.tokens[at * k + j], parent, depth, 0};
            for (int row = 0; row < 5; row++) expected.ints[row * room + i] = ints[row];
            expected.floats[i] = children.probs[at * k + j];
            expected.floats[room + i] =
                children.probs[at * k + j] * (parent < 0 ? 1.0 : expected.floats[room + parent]);
            expected.floats[2 * room + i] = NAN;
        }
    };
    Asked asked{true, k, features, {}, std::vector<float>(batch, 1.0f), {}};
    if (scaled) asked.scale = scale;
    for (int64_t i = 0; noisy && i < batch; i++) asked.keys.push_back(noise[i * levels]);
    const Drafted roots = draft(h, rows, asked, other, 1);
    std::copy(roots.out.begin(), roots.out.end(), out_expected.begin());
    for (int64_t i = 0; i < batch; i++) append(roots, i, i, -1);
    int64_t depth = 1, used = 0;
    bool is_chosen = false;
    for (; depth < levels; depth++) {
        std::vector<int64_t> nodes(room);
        int64_t count = smart_frontier(
            &plain, &calibration, &now, 0, depth, &below[(depth - 1) * reach * RANKS],
            std::min(reach, levels - depth), widths.data(), int64_t(widths.size()),
            level_seconds.data(), nodes.data(), least, kept_expected.data(), &chosen);
        is_chosen = !count;
        if (!count) break;
        now.sunk += level_seconds[count];
        count = std::min(count, std::min(slots - used, (room - plain.nodes) / k));
        if (!count) break;
        for (int64_t n = 0; n < count; n++) place[nodes[n]] = used++;
        for (int64_t n = 0; n < count; n++) {
            const int64_t node = nodes[n], request = expected.ints[node],
                          above = expected.ints[2 * room + node];
            std::vector<int32_t> path;
            for (int64_t at = node; at >= 0; at = expected.ints[2 * room + at])
                path.insert(path.begin(), int32_t(first_slot + place[at]));
            const int64_t length =
                rows.query_start_loc[request + 1] - rows.query_start_loc[request];
            const int64_t last = rows.query_start_loc[request + 1] - 1;
            Batch one = rows.alone(last);
            Batch row;
            row.request(one.block_tables);
            row.row(expected.ints[room + node], length - 1 + depth, path.back(), length, path);
            const int64_t from = above < 0 ? request : batch + place[above];
            Asked single{false, k, {&out_expected[from * d]}, {}, {}, {}};
            if (scaled) single.scale = {scale[request]};
            if (noisy) single.keys = {noise[request * levels + depth]};
            const Drafted children = draft(h, row, single, other, 1);
            std::copy(children.out.begin(), children.out.end(),
                      &out_expected[(batch + place[node]) * d]);
            append(children, 0, request, node);
        }
        expanded_expected[depth] = count;
    }
    if (!is_chosen)
        smart_select(&plain, &calibration, &now, 0, least, kept_expected.data(), &chosen);

    check::same("levels", depth, done);
    check::same("nodes", plain.nodes, trees.nodes);
    check::same_all("owner, token, parent, depth, source", expected.ints, got.ints);
    for (int64_t row = 0; row < 3; row++)
        for (int64_t i = 0; i < plain.nodes; i++)
            check::near_at("probabilities", row, i, expected.floats[row * room + i],
                           got.floats[row * room + i], 1e-12);
    check::same_all("expanded", expanded_expected, expanded);
    check::bits("outputs", out_expected.data(), out.data(), (batch + used) * d);
    check::same("chosen nodes", chosen.count, choice.count);
    check::near("rate", chosen.rate, choice.rate, 1e-9);
    check::near("expected", chosen.expected, choice.expected, 1e-9);
    for (int64_t i = 0; i < chosen.count && i < choice.count; i++)
        check::same(check::at("kept", i), kept_expected[i], kept[i]);
    check::near("sunk", now.sunk, spent.sunk, 1e-12);
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
    for (bool bf16 : {false, true}) one_head(++seed, 16, bf16, true, true);
    for (uint64_t growth = 1; growth <= check::seeds(80); growth++)
        one_growth(5000 + growth, growth % 2);
}
