// A round's drafting in one call: levels of a head or model into trees, as a TreeRule says.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>
#include <vector>

#include "rows.h"
#include "trees.h"

namespace [[gnu::visibility("hidden")]] smart {

typedef std::chrono::steady_clock Clock;

static double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Stopwatch {  // notes how long all but the levels took, on leaving
    const Drafter& g;
    int64_t levels;
    Clock::time_point start = Clock::now();

    ~Stopwatch() {
        *g.choosing = since(start) - std::accumulate(g.seconds, g.seconds + levels, 0.0);
    }
};

// ------------------------------------------------------------------------------------- the levels

// A level of a model: see Level. Nonzero where the kernels do not serve it.
static int32_t draft_by_model(const Drafter& g, const Rows& in, const Level& v) {
    const int64_t wanted = v.first ? in.requests : in.rows, vocab = g.model->vocab;
    std::vector<int64_t> token(in.rows), last, best(wanted), ids(wanted * v.k);
    // A free drafter may propose what the model does not know.
    for (int64_t r = 0; r < in.rows; r++) token[r] = std::min(v.token[r], vocab - 1);
    for (int64_t i = 0; v.first && i < wanted; i++) last.push_back(in.query_start_loc[i + 1] - 1);
    static thread_local std::vector<float> logits;
    if (int64_t(logits.size()) < wanted * vocab) logits.resize(wanted * vocab);
    std::vector<float> probs(wanted * v.k), scale(wanted, 1.0f);
    Pass pass{};
    pass.token = token.data();
    pass.embeddings = v.embeddings;
    pass.wanted = v.first ? last.data() : nullptr;
    pass.wanted_count = int32_t(wanted);
    pass.logits = logits.data();
    pass.best = best.data();
    if (const int32_t status = smart_forward(g.model, &in, &pass, g.threads)) return status;
    smart_top_k(logits.data(), int32_t(wanted), vocab, v.k, v.scale ? v.scale : scale.data(),
                v.keys, g.tokens, ids.data(), probs.data(), g.threads);
    for (int64_t i = 0; i < wanted * v.k; i++) {
        v.tokens[i] = g.tokens[ids[i]];
        v.probs[i] = probs[i];
    }
    return 0;
}

static bool run_level(const Drafter& g, const Rows& in, const Level& v) {
    if (!g.head) return !draft_by_model(g, in, v);
    return !smart_draft_level(g.head, &in, &v, g.keys, g.values, g.pages, g.w_bf16, g.kv_bf16,
                              g.threads);
}

// The rows of a level: nodes, sorted by owner, see all true rows of their request, their expanded
// ancestors and themselves.
struct NodeRows : RowVectors {
    std::vector<int64_t> owners;
    std::vector<const float*> features;
    std::vector<float> scale;
    std::vector<uint64_t> noise;
};

// --------------------------------------------------------------------------------------- the trees

struct Drafting {
    const Drafter& drafter;
    const Rule& rule;
    const Rows& first;   // the rows of the first level
    const Level& roots;  // and what it reads and leaves
    Trees& trees;
    const int64_t given;         // nodes that free drafters propose
    const int64_t hidden;        // of the outputs; 0 where there are none
    std::vector<int64_t> place;  // for each node, which of the expanded ones it is
    int64_t expanded = 0;
    std::vector<int64_t> tokens;  // of the last level
    std::vector<double> probs;

    Drafting(const Drafter& g, const Rule& rule_, const Rows& first_, const Level& v, Trees& t)
        : drafter(g),
          rule(rule_),
          first(first_),
          roots(v),
          trees(t),
          given(t.nodes),
          hidden(g.head ? g.head->layers->hidden : 0),
          place(t.room, -1) {}

    // False where the kernels do not serve what drafts.
    bool draft_roots() {
        Level level = roots;
        std::vector<uint64_t> noise(drafter.noise ? trees.batch : 0);
        for (int64_t i = 0; drafter.noise && i < trees.batch; i++)
            noise[i] = drafter.noise[i * rule.levels];
        level.scale = drafter.scale;
        level.keys = drafter.noise ? noise.data() : nullptr;
        if (!run_level(drafter, first, level)) return false;
        std::vector<int64_t> owners(trees.batch);
        std::iota(owners.begin(), owners.end(), 0);
        add(level, owners, std::vector<int64_t>(trees.batch, -1));
        return true;
    }

    // How many nodes there is room for to expand.
    int64_t room() const {
        return std::min(drafter.slots - expanded, (trees.room - trees.nodes) / roots.k);
    }

    // The children of `nodes`. False as above.
    bool draft_below(std::vector<int64_t> nodes) {
        std::stable_sort(nodes.begin(), nodes.end(),
                         [&](int64_t a, int64_t b) { return owner(trees, a) < owner(trees, b); });
        const int64_t count = int64_t(nodes.size());
        float* out = roots.out + hidden * (trees.batch + expanded);
        for (int64_t node : nodes) place[node] = expanded++;
        const NodeRows rows = rows_of(nodes);
        tokens.resize(count * roots.k);
        probs.resize(count * roots.k);
        Level level{};
        level.k = roots.k;
        level.token = rows.token.data();
        level.features = rows.features.data();
        level.out = out;
        level.scale = drafter.scale ? rows.scale.data() : nullptr;
        level.keys = drafter.noise ? rows.noise.data() : nullptr;
        level.tokens = tokens.data();
        level.probs = probs.data();
        if (!run_level(drafter, rows.view(first), level)) return false;
        add(level, rows.owners, nodes);
        return true;
    }

private:
    NodeRows rows_of(const std::vector<int64_t>& nodes) const {
        NodeRows rows;
        for (int64_t node : nodes) {
            const int64_t request = owner(trees, node);
            if (rows.owners.empty() || rows.owners.back() != request) {
                if (!rows.owners.empty())
                    rows.query_start_loc.push_back(int32_t(rows.owners.size()));
                rows.block_table_start.push_back(first.block_table_start[request]);
            }
            add_row(node, rows);
        }
        rows.query_start_loc.push_back(int32_t(nodes.size()));
        return rows;
    }

    void add_row(int64_t node, NodeRows& rows) const {
        const int64_t request = owner(trees, node), level = depth(trees, node),
                      above = parent(trees, node);
        const int64_t root = first.query_start_loc[request + 1] - 1;
        const int64_t own = int64_t(rows.ancestors.size());
        for (int64_t n = node; n >= 0; n = parent(trees, n))
            rows.ancestors.push_back(int32_t(drafter.first_slot + place[n]));
        rows.slot_mapping.push_back(rows.ancestors[own]);
        std::reverse(rows.ancestors.begin() + own, rows.ancestors.end());
        rows.ancestors_start.push_back(int32_t(rows.ancestors.size()));
        rows.owners.push_back(request);
        rows.token.push_back(token(trees, node));
        rows.position.push_back(first.position[root] + level);
        rows.context_len.push_back(first.context_len[root]);
        const int64_t output = above < 0 ? request : trees.batch + place[above];
        rows.features.push_back(roots.out + hidden * output);
        if (drafter.scale) rows.scale.push_back(drafter.scale[request]);
        if (drafter.noise) rows.noise.push_back(drafter.noise[request * rule.levels + level]);
    }

    // Adds the children that `v` found below `parents` (ROOT: -1), k of each. One that a free
    // drafter proposes, too, is that node from now on the model's.
    void add(const Level& v, const std::vector<int64_t>& owners,
             const std::vector<int64_t>& parents) {
        bool raised = false;
        for (size_t r = 0; r < owners.size(); r++) {
            std::vector<int64_t> present;  // children of free drafters
            for (int64_t i = 0; i < given; i++)
                if (owner(trees, i) == owners[r] && parent(trees, i) == parents[r])
                    present.push_back(i);
            for (int64_t j = int64_t(r) * v.k; j < int64_t(r + 1) * v.k; j++) {
                const auto same = std::find_if(present.begin(), present.end(), [&](int64_t i) {
                    return token(trees, i) == v.tokens[j];
                });
                if (same == present.end()) {
                    append(owners[r], parents[r], v.tokens[j], v.probs[j]);
                    continue;
                }
                source(trees, *same) = 0;
                raised |= v.probs[j] > draft_prob(trees, *same);
                draft_prob(trees, *same) = std::max(draft_prob(trees, *same), v.probs[j]);
            }
        }
        for (int64_t i = 0; raised && i < trees.nodes; i++) set_path(i);
    }

    void append(int64_t of, int64_t above, int64_t child, double prob) {
        const int64_t i = trees.nodes++;
        owner(trees, i) = of;
        token(trees, i) = child;
        parent(trees, i) = above;
        depth(trees, i) = above < 0 ? 1 : depth(trees, above) + 1;
        source(trees, i) = 0;
        draft_prob(trees, i) = prob;
        accept_prob(trees, i) = NAN;
        set_path(i);
    }

    void set_path(int64_t i) {
        const int64_t above = parent(trees, i);
        path_prob(trees, i) = (above < 0 ? 1.0 : path_prob(trees, above)) * draft_prob(trees, i);
    }
};

}  // namespace smart

using namespace smart;

extern "C" int64_t smart_draft(const Drafter* g, const Rule* rule, const Rows* first,
                               const Level* v, Trees* t, int64_t* kept, int64_t* kept_count) {
    std::fill_n(g->expanded, rule->levels, 0);
    std::fill_n(g->seconds, rule->levels, 0.0);
    const Stopwatch stopwatch{*g, rule->levels};
    Drafting drafting(*g, *rule, *first, *v, *t);
    int64_t done = 0;
    while (done < rule->levels) {
        std::vector<int64_t> nodes(t->nodes);
        if (done) {
            nodes.resize(smart_frontier(rule, t, done, nodes.data()));
            nodes.resize(std::min(int64_t(nodes.size()), drafting.room()));
            if (nodes.empty()) break;
        }
        const Clock::time_point start = Clock::now();
        if (!(done ? drafting.draft_below(nodes) : drafting.draft_roots())) return -1;
        if (done) g->expanded[done] = int64_t(nodes.size());
        g->seconds[done++] = since(start);
    }
    *kept_count = smart_select(rule, t, kept);
    return done;
}
