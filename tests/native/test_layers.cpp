// Attention, layers and whole models: prompts, chunks of them, trees; and moving keys and values.

#include "attention.h"
#include "tiny.h"

using namespace tiny;

namespace {

struct Request {
    std::vector<int32_t> pages;
    std::vector<int64_t> prompt;
};

// Prompts whose lengths lie around borders of pages (16) and of attention's steps (64), except
// where the first one's is given.
std::vector<Request> random_requests(Random& random, Pages& pages, int64_t vocab, int64_t tree_room,
                                     int64_t first_length = 0) {
    std::vector<Request> requests(random.between(1, 3));
    for (Request& request : requests) {
        int64_t length =
            random.of<int64_t>({1, 2, 5, 15, 16, 17, 31, 33, 40, 63, 64, 65, 81, 127, 129});
        if (first_length && &request == &requests[0]) length = first_length;
        request.pages = pages.take(length + 1 + tree_room);
        for (int64_t i = 0; i < length; i++) request.prompt.push_back(random.below(vocab));
    }
    return requests;
}

void add_prompt(Batch& batch, const Request& request, int64_t first, int64_t end) {
    for (int64_t i = first; i < end; i++)
        batch.row(request.prompt[i], i, slot_of(request.pages, i), i + 1);
}

struct Path {  // of a node: how many positions it sees through the block table, then its ancestors
               // and itself
    int64_t sees;
    std::vector<int32_t> slots;
};

// A root and a random tree below it for each request, stored behind the prompt. Some branches leave
// the prompt earlier.
Batch random_trees(Random& random, const std::vector<Request>& requests, int64_t vocab,
                   int64_t most) {
    Batch batch;
    for (const Request& request : requests) {
        const int64_t length = int64_t(request.prompt.size());
        batch.request(request.pages);
        batch.row(random.below(vocab), length, slot_of(request.pages, length), length + 1);
        std::vector<Path> paths;
        for (int64_t i = random.below(most + 1); i > 0; i--) {
            Path path{length + 1, {}};
            if (!paths.empty() && random.chance(0.7))
                path = paths[random.below(paths.size())];
            else if (random.chance(0.3))
                path.sees = random.between(std::max<int64_t>(1, length - 20), length);
            const int64_t slot = slot_of(request.pages, length + 1 + int64_t(paths.size()));
            path.slots.push_back(int32_t(slot));
            paths.push_back(path);
            const int64_t position = path.sees + int64_t(path.slots.size()) - 1;
            if (path.sees == length + 1
                && random.chance(0.3)) {  // the root is listed among the ancestors
                path.sees = length;
                path.slots.insert(path.slots.begin(), int32_t(slot_of(request.pages, length)));
            }
            batch.row(random.below(vocab), position, slot, path.sees, path.slots);
        }
    }
    return batch;
}

// Reference hidden states of a batch; those after each of the `aux` layers are appended to `kept`,
// layer by layer.
Doubles hidden_states(const TinyModel& m, const Batch& batch, reference::Cache& cache,
                      const std::vector<const float*>& embeddings, const std::vector<int32_t>& aux,
                      std::vector<Doubles>* kept) {
    const int64_t d = m.shape.hidden;
    const Rows rows = m.rows(batch);
    Doubles x;
    for (int64_t r = 0; r < batch.size(); r++) {
        const bool given = !embeddings.empty() && embeddings[r];
        const float* from = given ? embeddings[r] : &m.embedding[batch.token[r] * d];
        for (int64_t i = 0; i < d; i++) x.push_back(from[i] * (given ? 1.0f : m.embedding_scale));
    }
    for (size_t i = 0; i < m.layers.size(); i++) {
        reference::layer(m.layers[i].w, rows, nullptr, x, cache, int64_t(i), m.precision.rounds);
        for (int32_t layer : aux)
            if (layer == int32_t(i) + 1) kept->push_back(x);
    }
    return x;
}

Doubles logits_of(const TinyModel& m, const Doubles& x) {
    Doubles normed = reference::rms_norms(x, m.final_norm.data(), 1e-5, m.shape.hidden);
    if (m.precision.rounds.inputs) reference::round_all(normed);
    return reference::linear(normed, m.output, m.shape.hidden, {});
}

void compare(const TinyModel& m, const Batch& batch, const Result& got, reference::Cache& cache,
             const std::vector<int32_t>& aux, const std::vector<int64_t>& wanted,
             const std::vector<const float*>& embeddings) {
    const int64_t d = m.shape.hidden, vocab = m.vocab;
    std::vector<Doubles> kept;
    const Doubles x = hidden_states(m, batch, cache, embeddings, aux, &kept);
    const Doubles logits = logits_of(m, x);
    for (size_t i = 0; i < aux.size(); i++)
        for (int64_t r = 0; r < batch.size(); r++)
            check::near_rows("aux_hidden", &kept[i][r * d],
                             &got.aux[(r * int64_t(aux.size()) + int64_t(i)) * d], 1, d,
                             m.precision.tolerance);
    for (size_t i = 0; i < got.best.size(); i++) {
        const int64_t r = wanted.empty() ? int64_t(i) : wanted[i];
        check::near_rows(("logits of row " + std::to_string(r)).c_str(), &logits[r * vocab],
                         &got.logits[i * vocab], 1, vocab, m.precision.tolerance);
        check::same(check::at("best", i), reference::argmax(&got.logits[i * vocab], vocab),
                    got.best[i]);
    }
}

void one_model(uint64_t seed, int head_dim, bool bf16, int64_t first_length = 0) {
    Random random(seed);
    const Shape shape = random_shape(random, head_dim);
    const int64_t vocab = random.between(60, 130), count = random.between(1, 2), room = 24,
                  page_count = 40 + first_length / smart_page();
    check::begin("forward", seed, shape.text() + (bf16 ? ", bf16" : ", fp32"));
    TinyModel m(random, shape, count, vocab, bf16, POSITIONS + first_length);
    if (first_length) m.change_windows([](int window) { return 8 * window; });
    Pages pages(random, page_count);
    const std::vector<Request> requests = random_requests(random, pages, vocab, room, first_length);
    const Random garbage(seed + 77);
    TinyCache whole = m.cache(garbage, page_count), parts = m.cache(garbage, page_count);
    reference::Cache plain_cache(count, shape.kv_heads, page_count * smart_page(), head_dim);

    // All prompts at once, some tokens' embeddings replaced, against plain loops.
    Batch prompts;
    for (const Request& request : requests) {
        prompts.request(request.pages);
        add_prompt(prompts, request, 0, int64_t(request.prompt.size()));
    }
    std::vector<std::vector<float>> pictures;
    for (int i = 0; i < 3; i++) pictures.push_back(random.normals(shape.hidden));
    std::vector<const float*> embeddings;
    if (random.chance(0.4))
        for (int64_t i = 0; i < prompts.size(); i++)
            embeddings.push_back(random.chance(0.2) ? pictures[random.below(3)].data() : nullptr);
    std::vector<int32_t> aux;
    for (int32_t layer = 1; layer <= count; layer++)
        if (random.chance(0.6)) aux.push_back(layer);
    const Result all = forward(m, whole, prompts, int(random.between(1, 3)), aux, {}, embeddings);
    if (!check::same("status", 0, all.status)) return;
    compare(m, prompts, all, plain_cache, aux, {}, embeddings);

    // Only some rows' logits are wanted.
    std::vector<int64_t> wanted;
    for (int64_t r = prompts.size() - 1; r >= 0; r--)
        if (random.chance(0.2)) wanted.push_back(r);
    if (!wanted.empty()) {
        TinyCache other = m.cache(garbage, page_count);
        const Result some = forward(m, other, prompts, 2, aux, wanted, embeddings);
        for (size_t i = 0; i < wanted.size(); i++) {
            check::bits("logits of wanted rows", &all.logits[wanted[i] * vocab],
                        &some.logits[i * vocab], vocab);
            check::same(check::at("best of wanted", i), all.best[wanted[i]], some.best[i]);
        }
        check::that(whole.same(other), "keys and values are those of all rows");
    }

    // In chunks, of all requests together, bit by bit.
    std::vector<int64_t> done(requests.size(), 0);
    for (bool more = true; more;) {
        more = false;
        Batch chunk;
        std::vector<int64_t> at;
        std::vector<const float*> inserted;
        for (size_t i = 0; i < requests.size(); i++) {
            const int64_t left = int64_t(requests[i].prompt.size()) - done[i],
                          size = std::min(left, random.below(60));
            more |= size < left;
            if (!size) continue;
            chunk.request(requests[i].pages);
            add_prompt(chunk, requests[i], done[i], done[i] + size);
            for (int64_t j = 0; j < size; j++) {
                at.push_back(prompts.query_start_loc[i] + done[i] + j);
                if (!embeddings.empty()) inserted.push_back(embeddings[at.back()]);
            }
            done[i] += size;
        }
        if (at.empty()) continue;
        const Result part = forward(m, parts, chunk, int(random.between(1, 3)), {}, {}, inserted);
        for (size_t i = 0; i < at.size(); i++)
            if (!check::bits(("logits of row " + std::to_string(at[i]) + " in a chunk").c_str(),
                             &all.logits[at[i] * vocab], &part.logits[i * vocab], vocab))
                return;
    }
    check::that(whole.same(parts), "keys and values are the same after chunks");

    // Trees, against plain loops; then each row alone, bit by bit.
    const Batch trees = random_trees(random, requests, vocab, room);
    const Result tree = forward(m, whole, trees, int(random.between(1, 3)), aux);
    compare(m, trees, tree, plain_cache, aux, {}, {});
    for (int64_t r = 0; r < trees.size(); r++) {
        if (trees.size() > 20 && random.chance(0.5)) continue;
        const Result row = forward(m, whole, trees.alone(r), int(random.between(1, 3)), aux);
        const int64_t width = int64_t(aux.size()) * shape.hidden;
        check::bits(("logits of row " + std::to_string(r) + " alone").c_str(),
                    &tree.logits[r * vocab], row.logits.data(), vocab);
        check::bits("aux_hidden of a row alone", tree.aux.data() + r * width, row.aux.data(),
                    width);
    }
}

// smart_layers, whose first layer may read inputs of another width; and what it stores, which is
// rounded once.
void one_stack(uint64_t seed, int head_dim, bool bf16) {
    Random random(seed);
    Shape shape = random_shape(random, head_dim);
    const int count = int(random.between(1, 2));
    const bool given = random.chance(0.7);
    check::begin("layers", seed,
                 shape.text() + (bf16 ? ", bf16" : ", fp32") + (given ? ", inputs given" : ""));
    const Precision precision(bf16, head_dim);
    std::vector<TinyLayer> layers;
    std::vector<Layer> structs;
    for (int i = 0; i < count; i++) {
        Shape own = shape;
        if (given && !i) own.input = 2 * shape.hidden;
        layers.emplace_back(random, own, bf16, !given || i);
    }
    for (const TinyLayer& layer : layers) structs.push_back(layer.layer());
    constexpr int64_t page_count = 3 * 9;  // for as many positions as three requests can have
    Pages pages(random, page_count);
    const std::vector<Request> requests = random_requests(random, pages, 10, 0);
    Batch batch;
    for (const Request& request : requests) {
        batch.request(request.pages);
        add_prompt(batch, request, 0, int64_t(request.prompt.size()));
    }
    const Rotation rotation(POSITIONS, head_dim);
    const Rows rows = batch.rows(rotation);
    const int64_t n = batch.size(), d = shape.hidden, wide = structs[0].input, hd = head_dim;
    TinyCache cache(Random(seed + 5), int64_t(count) * shape.kv_heads, page_count, head_dim, bf16);
    const std::vector<float> x = random.normals(n * d), inputs = random.normals(n * wide);
    const int64_t qkv_width = std::max((2 * shape.heads + 2 * shape.kv_heads) * hd, d);
    std::vector<float> normed(n * wide), qkv(n * qkv_width), attended(n * shape.heads * hd);
    std::vector<float> ffn(n * shape.ffn), out = x;
    const Workspace workspace{normed.data(), qkv.data(), attended.data(), ffn.data(),
                              nullptr,       nullptr,    nullptr};
    const int32_t status =
        smart_layers(structs.data(), count, &rows, given ? inputs.data() : nullptr, out.data(),
                     cache.keys(), cache.values(), page_count, &workspace, bf16, bf16, 2);
    if (!check::same("status", 0, status)) return;

    reference::Cache plain_cache(count, shape.kv_heads, page_count * smart_page(), hd);
    Doubles expected = reference::doubles(x);
    const Doubles read = reference::doubles(inputs);
    for (int i = 0; i < count; i++)
        reference::layer(layers[i].w, rows, given && !i ? &read : nullptr, expected, plain_cache, i,
                         precision.rounds);
    check::near_rows("x", expected.data(), out.data(), n, d, precision.tolerance);

    // Keys and values of the first layer depend on one product only: where its inputs are given,
    // not even a norm's rounding lies between. So they are exact to half a unit of bf16.
    if (!given) return;
    auto close = [&](const char* what, int64_t row, int64_t column, double wanted, float got) {
        const double unit =
            bf16 ? std::ldexp(1.0, std::ilogb(wanted == 0 ? 1e-30 : wanted) - 7) : 0;
        return check::near_at(what, row, column, wanted, got, 0.5 * unit + 2e-5);
    };
    reference::Cache exact(1, shape.kv_heads, page_count * smart_page(), hd);
    Doubles rounded = read;
    if (precision.rounds.inputs) reference::round_all(rounded);
    reference::attention(layers[0].w, rows, rounded, exact, 0,
                         {precision.rounds.inputs, false, false});
    for (int64_t h = 0; h < shape.kv_heads; h++)
        for (int64_t r = 0; r < n; r++)
            for (int64_t i = 0; i < hd; i++) {
                const int64_t slot = batch.slot_mapping[r], at = exact.at(0, h, slot) + i;
                if (!close("key", r, i, exact.k[at], cache.key(h, slot, i))) return;
                if (!close("value", r, i, exact.v[at], cache.value(h, slot, i))) return;
            }
}

void refused() {
    Random random(1);
    check::begin("refused", 0, "");
    Shape shape{32, 32, 2, 1, 16, 32};
    const TinyModel m(random, shape, 1, 40, false);
    TinyCache cache = m.cache(random, 4);
    Batch batch;
    batch.request({0});
    batch.row(1, 0, 0, 1);
    std::vector<Layer> layers = m.structs;
    layers[0].head_dim = 48;
    Model model = m.model(cache);
    model.layers = layers.data();
    const Rows rows = m.rows(batch);
    int64_t best;
    const Pass pass{batch.token.data(),
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    nullptr,
                    &best,
                    nullptr,
                    1,
                    0,
                    nullptr};
    check::that(smart_forward(&model, &rows, &pass, 1) != 0, "head_dim 48 is refused");
    layers[0] = m.structs[0];
    layers[0].heads = 33;  // a block of rows has room for 32 queries
    check::that(smart_forward(&model, &rows, &pass, 1) != 0, "33 query heads to a key are refused");
    model = m.model(cache);
    model.kv_bf16 = 1;
    check::that(smart_forward(&model, &rows, &pass, 1) != 0,
                "fp32 weights with a bf16 cache are refused");
}

// Threads that share the splits of a long context find what is found in a whole prompt, where each
// takes whole jobs: for rows alone, and for a chain of drafts across the border of a split beside
// another request.
void shared_splits(bool bf16, int head_dim, int window) {
    Random random(6);
    check::begin("shared splits", window,
                 "head_dim " + std::to_string(head_dim) + (bf16 ? ", bf16" : ", fp32"));
    const int64_t length = 2 * smart::SPLIT + 410, page_count = length / smart_page() + 4;
    TinyModel m(random, {32, 32, 6, 2, head_dim, 32}, 1, 40, bf16, length);
    m.change_windows([&](int) { return window; });
    Pages pages(random, page_count);
    Request request{pages.take(length), {}}, other{pages.take(8), {1, 2, 3, 4, 5, 6, 7, 8}};
    for (int i = 0; i < length; i++) request.prompt.push_back(random.below(m.vocab));
    Batch prompts;
    prompts.request(request.pages);
    add_prompt(prompts, request, 0, length);
    prompts.request(other.pages);
    add_prompt(prompts, other, 0, 8);
    TinyCache cache = m.cache(random, page_count);
    const Result all = forward(m, cache, prompts, 2);
    auto same = [&](const Result& got, int64_t row, int64_t from, int64_t count) {
        check::bits("logits", &all.logits[row * m.vocab], &got.logits[from * m.vocab],
                    count * m.vocab);
    };
    for (int64_t border : {smart::SPLIT, 2 * smart::SPLIT}) {
        for (int64_t row : {border - 1, border, border + 400})
            for (int threads : {1, 4})
                same(forward(m, cache, prompts.alone(row), threads), row, 0, 1);
        Batch drafts;
        drafts.request(request.pages);
        std::vector<int32_t> chain;
        for (int64_t i = 0; i < 9; i++) {
            chain.push_back(pages.free[0] * smart_page() + i);
            const int64_t position = border - 4 + i;
            drafts.row(request.prompt[position], position, chain[i], border - 4, chain);
        }
        drafts.request(other.pages);
        add_prompt(drafts, other, 7, 8);
        for (int threads : {1, 16}) {
            const Result got = forward(m, cache, drafts, threads);
            same(got, border - 4, 0, 9);
            same(got, length + 7, 9, 1);
        }
    }
}

// When threads share splits. What `shared_splits` and `overflows` ask 16, 4 and 3 threads for is
// so.
void choices() {
    check::begin("makespan", 0, "");
    using smart::makespan;
    using smart::sharing_pays;
    check::same("none", 0, makespan({}, 3));
    check::same("one for each", 7, makespan({5, 7, 1}, 3));
    check::same("three for two", 800, makespan({400, 400, 400}, 2));
    check::same("the longest last", 900, makespan({100, 100, 100, 800}, 2));
    check::same("the longest first", 800, makespan({800, 100, 100, 100}, 2));
    const int64_t split = smart::SPLIT;
    check::that(sharing_pays(split + 400, split, 4), "one of two splits");
    check::that(sharing_pays(2 * split - 48, split, 2), "a window");
    check::that(sharing_pays(2 * split - 48, split + 10, 27), "nine drafts across a border");
    check::that(!sharing_pays(split + 300, split, 4), "the second split is short");
    check::that(!sharing_pays(2 * 1000, 1512, 36), "SmolLM2, 1000 positions, four rows, measured");
    check::that(sharing_pays(2 * 2000, 3072, 72), "the same with 2000");
    check::that(!sharing_pays(8000, 8000, 0), "nobody waits");
}

// A row whose own value is too large for any number has no logits, nor have those that see it, be
// it the first of a page, a step or a split of attention. Those before it do not know.
void overflows(bool bf16) {
    Random random(5);
    check::begin("overflow", 0, bf16 ? "bf16" : "fp32");
    const Shape shape{32, 32, 3, 1, 32, 32};
    const int64_t length = smart::SPLIT + 400;
    TinyModel m(random, shape, 1, 40, bf16, length);
    TinyLayer& layer = m.layers[0];
    for (int64_t row = 0; row < 5 * 32; row++) layer.w.qkv[row * 32] = row == 4 * 32 ? 3e38f : 0;
    layer.w.attention_gate.clear();
    layer.qkv = packed(layer.w.qkv, 32, bf16);
    layer.w.input_norm[0] = 4;
    m.change_windows([](int) { return 0; });
    Pages pages(random, 60);
    Request request{pages.take(length), std::vector<int64_t>(length, 1)};
    std::vector<std::vector<float>> states;
    std::vector<const float*> embeddings;
    for (int64_t i = 0; i < length; i++) {
        states.push_back(random.normals(32));
        states[i][0] = 0;
        embeddings.push_back(states[i].data());
    }
    Batch prompt;
    prompt.request(request.pages);
    add_prompt(prompt, request, 0, length);
    TinyCache cache = m.cache(random, 60);
    const Result clean = forward(m, cache, prompt, 3, {}, {}, embeddings);
    for (int64_t bad : {0, 1, 63, 64, smart::SPLIT - 1, smart::SPLIT, smart::SPLIT + 20}) {
        if (check::quick && bad != 1 && bad != smart::SPLIT) continue;
        states[bad][0] = 1;
        const Result all = forward(m, cache, prompt, 3, {}, {}, embeddings);
        check::bits("logits before", clean.logits.data(), all.logits.data(), bad * m.vocab);
        const Result alone = forward(m, cache, prompt.alone(bad), 3, {}, {}, {embeddings[bad]});
        const Result last =
            forward(m, cache, prompt.alone(length - 1), 3, {}, {}, {embeddings[length - 1]});
        check::that(!std::isfinite(alone.logits[0]), "a row alone that overflows has no logits");
        check::that(!std::isfinite(last.logits[0]), "nor has a row alone that sees one");
        for (int64_t row = bad; row < length; row++)
            check::that(!std::isfinite(all.logits[row * m.vocab]),
                        "rows that see what overflows have no logits");
        states[bad][0] = 0;
    }
}

// Slots are copied one after another, in every plane; all else stays.
void moves() {
    for (uint64_t seed = 1; seed <= check::seeds(24); seed++) {
        Random random(seed + 900);
        const int head_dim = random.of({16, 32, 64, 96, 128, 256});
        const bool bf16 = random.chance(0.6);
        const int64_t planes = random.between(1, 3), pages = random.between(1, 4),
                      slots = pages * smart_page();
        check::begin("move_kv", seed,
                     "head_dim " + std::to_string(head_dim) + (bf16 ? ", bf16" : ", fp32"));
        TinyCache cache(random, planes, pages, head_dim, bf16);
        const TinyCache before = cache;
        std::vector<int32_t> from(random.between(1, 12)), to(from.size());
        std::vector<int64_t> holds(slots);  // which slot's entries lie where
        for (int64_t i = 0; i < slots; i++) holds[i] = i;
        for (size_t i = 0; i < from.size(); i++) {
            from[i] = int32_t(random.below(slots));
            to[i] = int32_t(random.below(slots));
            holds[to[i]] = holds[from[i]];
        }
        smart_move_kv(cache.keys(), cache.values(), planes, pages, head_dim, bf16 ? 2 : 4,
                      from.data(), to.data(), int32_t(from.size()));
        for (int64_t p = 0; p < planes; p++)
            for (int64_t s = 0; s < slots; s++)
                for (int64_t i = 0; i < head_dim; i++) {
                    const float key = before.key(p, holds[s], i),
                                value = before.value(p, holds[s], i);
                    if (!check::near_at("key of slot", s, i, key, cache.key(p, s, i), 0)) return;
                    if (!check::near_at("value of slot", s, i, value, cache.value(p, s, i), 0))
                        return;
                }
    }
}

}  // namespace

void test_layers() {
    const uint64_t rounds = check::quick ? 1 : 8;
    for (uint64_t seed = 1; seed <= rounds; seed++)
        for (int head_dim : {16, 32, 64, 96, 128, 256})
            for (bool bf16 : {false, true}) {
                one_model(1000 * seed + 2 * head_dim + bf16, head_dim, bf16);
                one_stack(1000 * seed + 2 * head_dim + bf16, head_dim, bf16);
            }
    if (!check::quick)
        for (int length : {smart::SPLIT, smart::SPLIT + 1, 2 * smart::SPLIT + 6})
            for (bool bf16 : {false, true})
                one_model(100000 + 2 * length + bf16, 16 << length % 3, bf16, length);
    choices();
    refused();
    for (bool bf16 : {false, true}) {
        overflows(bf16);
        for (int head_dim : {16, 32, 96, 128, 256})
            for (int window : {0, 2 * smart::SPLIT - 48})
                if (!check::quick || (head_dim == 32 && bf16 == bool(window)))
                    shared_splits(bf16, head_dim, window);
    }
    moves();
}
