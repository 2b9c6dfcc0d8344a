// smart_round: a round's verification, against decoding token by token.

#include "tiny.h"

using namespace tiny;

namespace {

struct Node {
    int64_t owner, token, parent, depth;
};

struct Answer {                   // of a request, decoded token by token: what follows the root
    std::vector<int64_t> tokens;  // -1 where rounding would decide, and what follows is anything
    std::vector<std::vector<float>> aux;  // of each row, the root's first
};

int undecided = 0, drawn = 0;

// How a request's tokens are drawn, or that they are first maxima.
Draw random_draw(Random& random, int64_t vocab) {
    const bool coarse = random.chance(0.05);  // whatever is drawn is left to others
    const double top_p = random.chance(0.5) ? 0.5 + 0.5 * random.uniform() : 1;
    return {nullptr,
            random.between(-5, 1000),
            random.below(3),
            random.below(100),
            random.chance(0.4) ? -1 : random.below(vocab),
            coarse ? 1e9 : 0.5 + random.uniform(),
            random.chance(0.3) ? -2.0 : -INFINITY,
            top_p};
}

int64_t token_of(Draw draw, int64_t depth, const Result& result, int64_t vocab) {
    if (draw.k < 0) return result.best[0];
    int64_t best, token;
    draw.row = result.logits.data();
    draw.position += depth;
    smart_draw(&draw, 1, vocab, &best, &token, 1);
    return token;
}

void one_round(uint64_t seed, int head_dim, bool bf16) {
    Random random(seed);
    const Shape shape = random_shape(random, head_dim);
    const int64_t vocab = random.between(20, 60), layers = random.between(1, 2), deepest = 6,
                  all_pages = 40;
    check::begin("round", seed, shape.text() + (bf16 ? ", bf16" : ", fp32"));
    const TinyModel m(random, shape, layers, vocab, bf16);
    Pages pages(random, all_pages);
    TinyCache cache = m.cache(Random(seed + 1), all_pages);
    const std::vector<int32_t> aux(1, 1);
    const int64_t requests = random.between(1, 4), d = shape.hidden, tree_room = 30;

    // Prompts, and the roots that follow them, whose rotary positions may be others.
    const bool draws = random.chance(0.6);
    std::vector<Draw> draw;
    std::vector<int64_t> lengths, rotary, roots;
    std::vector<std::vector<int32_t>> tables;
    Batch prompts;
    for (int64_t i = 0; i < requests; i++) {
        lengths.push_back(random.of<int64_t>({1, 9, 15, 16, 17, 33, 62, 64}));
        rotary.push_back(lengths[i] + random.of<int64_t>({0, 0, 7, -1}));
        draw.push_back(random_draw(random, vocab));
        if (!draws) draw[i].k = -1;
        tables.push_back(pages.take(lengths[i] + 1 + tree_room));
        prompts.request(tables[i]);
        for (int64_t j = 0; j < lengths[i]; j++)
            prompts.row(random.below(vocab), j, slot_of(tables[i], j), j + 1);
        roots.push_back(random.below(vocab));
    }
    forward(m, cache, prompts, 2);

    // Answers, token by token, with a cache of their own.
    TinyCache single = cache;
    std::vector<Answer> answers(requests);
    for (int64_t i = 0; i < requests; i++) {
        int64_t token = roots[i];
        for (int64_t j = 0; j <= deepest + 1; j++) {
            Batch row;
            row.request(tables[i]);
            row.row(token, rotary[i] + j, slot_of(tables[i], lengths[i] + j), lengths[i] + j + 1);
            const Result result = forward(m, single, row, 1, aux);
            answers[i].tokens.push_back(token_of(draw[i], j, result, vocab));
            answers[i].aux.push_back(result.aux);
            token = std::max<int64_t>(0, answers[i].tokens[j]);
        }
    }

    // Trees in which some nodes are right; a prefix-closed part of them is verified.
    std::vector<Node> nodes;
    std::vector<int64_t> counts(requests, 0);
    for (int64_t trial = random.below(12 * requests + 1); trial > 0; trial--) {
        int64_t parent = nodes.empty() || random.chance(0.3) ? -1 : random.below(nodes.size());
        if (!nodes.empty() && random.chance(0.4)) parent = int64_t(nodes.size()) - 1;
        const int64_t owner = parent < 0 ? random.below(requests) : nodes[parent].owner;
        const int64_t depth = parent < 0 ? 1 : nodes[parent].depth + 1;
        if (depth > deepest || counts[owner]++ >= tree_room) continue;
        const int64_t right = answers[owner].tokens[depth - 1];
        const bool follows = right >= 0 && random.chance(0.6);
        nodes.push_back({owner, follows ? right : random.below(vocab), parent, depth});
    }
    std::vector<int64_t> kept;
    std::vector<bool> is_kept(nodes.size());
    for (size_t i = 0; i < nodes.size(); i++) {
        is_kept[i] = (nodes[i].parent < 0 || is_kept[nodes[i].parent]) && random.chance(0.9);
        if (is_kept[i]) kept.push_back(int64_t(i));
    }
    const int64_t room = int64_t(nodes.size()) + 3, count = int64_t(kept.size()),
                  rows = requests + count;
    std::vector<int64_t> trees(5 * room, -9);
    for (size_t i = 0; i < nodes.size(); i++) {
        trees[i] = nodes[i].owner;
        trees[room + i] = nodes[i].token;
        trees[2 * room + i] = nodes[i].parent;
        trees[3 * room + i] = nodes[i].depth;
    }

    // The round.
    std::vector<const int32_t*> tables_of;
    for (const std::vector<int32_t>& table : tables) tables_of.push_back(table.data());
    std::vector<int64_t> after(rows, -7), emitted(rows, -7), path(count + 1, -7),
        accepted(requests), first(requests);
    std::vector<float> aux_hidden(rows * d), logits(rows * vocab);
    double seconds[3] = {-1, -1, -1};
    const Round round{requests,
                      count,
                      room,
                      roots.data(),
                      lengths.data(),
                      rotary.data(),
                      draws ? draw.data() : nullptr,
                      tables_of.data(),
                      trees.data(),
                      kept.data(),
                      d,
                      shape.kv_heads,
                      head_dim,
                      m.rotation.cosine.data(),
                      m.rotation.sine.data(),
                      m.rotation.angles,
                      nullptr,
                      after.data(),
                      emitted.data(),
                      path.data(),
                      accepted.data(),
                      first.data(),
                      seconds};
    const bool with_aux = random.chance(0.7);
    const Pass pass{
        nullptr,       nullptr, nullptr, aux.data(), with_aux ? aux_hidden.data() : nullptr,
        logits.data(), nullptr, nullptr, 0,          with_aux ? 1 : 0,
        nullptr};
    const Model model = m.model(cache);
    const int32_t status = smart_round(&model, &round, &pass, int(random.between(1, 3)));

    // The walk in plain loops.
    std::vector<int64_t> after_expected(rows, -1), emitted_expected, path_expected, depths;
    for (int64_t i = 0; i < requests; i++) {
        int64_t tip = -1, depth = 0;
        emitted_expected.push_back(answers[i].tokens[0]);
        after_expected[i] = answers[i].tokens[0];
        for (bool found = true; found;) {
            found = false;
            for (int64_t n = 0; n < count && !found; n++) {
                const Node& node = nodes[kept[n]];
                if (node.owner != i || node.parent != tip || node.token != answers[i].tokens[depth])
                    continue;
                found = true;
                tip = kept[n];
                depth++;
                path_expected.push_back(n);
                emitted_expected.push_back(answers[i].tokens[depth]);
                after_expected[requests + n] = answers[i].tokens[depth];
            }
        }
        depths.push_back(depth);
    }
    drawn += draws;
    if (std::count(emitted_expected.begin(), emitted_expected.end(), -1)) {
        undecided++;
        check::same("status, undecided", -1, status);
        return;
    }
    if (!check::same("status", 0, status)) return;
    check::same_all("accepted", depths, accepted);
    for (int64_t i = 0; with_aux && i < requests; i++)
        for (int64_t j = 0; j <= depths[i]; j++)
            check::bits("aux_hidden of the root and accepted nodes", answers[i].aux[j].data(),
                        &aux_hidden[(first[i] + j) * d], d);
    emitted.resize(emitted_expected.size());
    path.resize(path_expected.size());
    check::same_all("after", after_expected, after);
    check::same_all("emitted", emitted_expected, emitted);
    check::same_all("path", path_expected, path);

    // Keys and values of what was accepted are in place: the next token's logits are those of plain
    // decoding.
    int64_t next = 0;
    for (int64_t i = 0; i < requests; i++) {
        const int64_t bonus = accepted[i], position = lengths[i] + bonus + 1;
        const int64_t turned = rotary[i] + bonus + 1;
        next += bonus;
        Batch row;
        row.request(tables[i]);
        row.row(answers[i].tokens[bonus], turned, slot_of(tables[i], position), position + 1);
        const Result got = forward(m, cache, row, 1), expected = forward(m, single, row, 1);
        check::bits("logits after the round", expected.logits.data(), got.logits.data(), vocab);
    }
    check::same("path's length", next, int64_t(path_expected.size()));
    check::that(seconds[0] >= 0 && seconds[1] >= 0 && seconds[2] >= 0, "time passes");
}

}  // namespace

void test_rounds() {
    const uint64_t rounds = check::quick ? 1 : 20;
    for (uint64_t seed = 1; seed <= rounds; seed++)
        for (int head_dim : {16, 32, 64, 96, 128})
            for (bool bf16 : {false, true})
                one_round(1000 * seed + 2 * head_dim + bf16, head_dim, bf16);
    check::begin("round", 0, "all");
    check::that(3 * undecided < drawn, "most rounds are decided");
    check::that(check::quick || undecided > 0, "not all rounds are decided");
}
