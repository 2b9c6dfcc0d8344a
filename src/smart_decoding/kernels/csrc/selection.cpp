// What the policy `smart` asks of every round: which nodes to expand next, and which to verify. The
// same mathematics in numpy (core/policies/chooser.py) is the reference and runs without a
// compiler; as dozens of numpy calls on a few dozen nodes it takes as long as a level of the
// drafter. And, where a head runs on the kernels, a round's whole drafting in one call.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "abi.h"

namespace {

constexpr int RANKS = 4;  // forecast children of a node (core/lookahead.py)

int64_t& owner(const Trees& t, int64_t i) { return t.ints[i]; }
int64_t& token(const Trees& t, int64_t i) { return t.ints[t.room + i]; }
int64_t& parent(const Trees& t, int64_t i) { return t.ints[2 * t.room + i]; }
int64_t& depth(const Trees& t, int64_t i) { return t.ints[3 * t.room + i]; }
int64_t& source(const Trees& t, int64_t i) { return t.ints[4 * t.room + i]; }
double& draft_prob(const Trees& t, int64_t i) { return t.floats[i]; }
double& path_prob(const Trees& t, int64_t i) { return t.floats[t.room + i]; }
double& accept_prob(const Trees& t, int64_t i) { return t.floats[2 * t.room + i]; }

bool ends_answer(const Trees& t, int64_t node) {
    return std::find(t.ends, t.ends + t.end_count, token(t, node)) != t.ends + t.end_count;
}

// Whether a node lies below an end token, for all nodes; parents come before their children.
std::vector<char> behind_ends(const Trees& t) {
    std::vector<char> behind(t.nodes, 0);
    for (int64_t i = 0; i < t.nodes; i++)
        if (parent(t, i) >= 0) behind[i] = behind[parent(t, i)] || ends_answer(t, parent(t, i));
    return behind;
}

// A node's parent among all roots and then all nodes.
int64_t parent_place(const Trees& t, int64_t node) {
    return parent(t, node) < 0 ? owner(t, node) : t.batch + parent(t, node);
}

// Sets accept_prob; false if there are nodes of a drafter that the table does not know.
bool score(const Trees& t, const Calibration& b) {
    std::vector<double> given(t.nodes), sum(t.batch + t.nodes, 0.0);
    for (int64_t i = 0; i < t.nodes; i++) {
        double p = std::fmin(std::fmax(draft_prob(t, i), 0.0), 1.0);
        int64_t cell = source(t, i) * b.depths + std::min(depth(t, i), b.depths) - 1;
        cell = (cell * b.kinds + t.kind[owner(t, i)]) * b.bins
               + b.bin_of[int64_t(p * double(b.resolution))];
        if (cell >= b.cells) return false;
        sum[parent_place(t, i)] += given[i] = b.table[cell];
    }
    for (int64_t i = 0; i < t.nodes; i++) {
        double conditional = given[i] / std::max(sum[parent_place(t, i)], 1.0);
        accept_prob(t, i) =
            parent(t, i) < 0 ? conditional : accept_prob(t, parent(t, i)) * conditional;
    }
    return true;
}

// The nodes that may be verified.
std::vector<int64_t> useful(const Trees& t, const std::vector<char>& behind) {
    std::vector<int64_t> nodes;
    for (int64_t i = 0; i < t.nodes; i++)
        if (depth(t, i) <= t.limits[owner(t, i)] && !behind[i]) nodes.push_back(i);
    return nodes;
}

// The nodes of a level that a head can draft below.
std::vector<int64_t> expandable(const Trees& t, const std::vector<char>& behind, int64_t level) {
    std::vector<char> by_model(t.batch + t.nodes,
                               0);  // a head has a state above children of its own only
    for (int64_t i = 0; i < t.nodes; i++)
        if (source(t, i) == 0) by_model[parent_place(t, i)] = 1;
    std::vector<int64_t> nodes;
    for (int64_t i = 0; i < t.nodes; i++) {
        if (depth(t, i) != level || level >= t.limits[owner(t, i)]) continue;
        if (!behind[i] && !ends_answer(t, i) && by_model[parent_place(t, i)]) nodes.push_back(i);
    }
    return nodes;
}

// By falling probability, ties to the lower index: parents come before their children.
void rank(const Trees& t, std::vector<int64_t>& nodes) {
    std::stable_sort(nodes.begin(), nodes.end(),
                     [&](int64_t a, int64_t b) { return accept_prob(t, a) > accept_prob(t, b); });
}

// The most tokens per second over the sizes of a tree; `gains` are sorted. Returns the size.
int64_t best_size(const std::vector<double>& gains, const Costs& p, double sunk, int64_t least,
                  double* rate) {
    int64_t best = -1;
    double tokens = p.tokens;
    for (int64_t n = 0; n <= int64_t(gains.size()) && n < p.verify_count; n++) {
        if (n) tokens += gains[n - 1];
        const double total = sunk + p.verify[n],
                     value = n && total > p.limit ? -1.0 : tokens / total;
        if (n >= least && (best < 0 || value > *rate)) {
            best = n;
            *rate = value;
        }
    }
    return best;
}

// How many nodes a round may verify at all: best_size looks at no more gains, so no more need be
// sorted.
int64_t most_nodes(const Costs& p) {
    int64_t n = p.verify_count - 1;
    while (n > 0 && p.sunk + p.verify[n] > p.limit) n--;
    return n;
}

// The `most` largest of two sorted lists, into `out`.
void merge(const std::vector<double>& a, const std::vector<double>& b, int64_t most,
           std::vector<double>& out) {
    out.clear();
    for (size_t i = 0, j = 0; int64_t(out.size()) < most && (i < a.size() || j < b.size());)
        out.push_back(j == b.size() || (i < a.size() && a[i] >= b[j]) ? a[i++] : b[j++]);
}

// The nodes to verify, ascending, into `out` [nodes] (`least` of them at least, as far as there
// are), of ranked ones.
Choice choose(const Costs& p, const std::vector<int64_t>& nodes, const std::vector<double>& gains,
              int64_t least, int64_t* out) {
    Choice choice{0, 0.0, 0.0};
    choice.count =
        best_size(gains, p, p.sunk, std::min(least, int64_t(nodes.size())), &choice.rate);
    choice.expected = std::accumulate(gains.begin(), gains.begin() + choice.count, 0.0);
    std::copy(nodes.begin(), nodes.begin() + choice.count, out);
    std::sort(out, out + choice.count);
    return choice;
}

// What nodes gain, in their order.
std::vector<double> gains_of(const Trees& t, const std::vector<int64_t>& nodes) {
    std::vector<double> gains;
    for (int64_t i : nodes) gains.push_back(accept_prob(t, i));
    return gains;
}

// Appends the children that `v` found below `parents` (ROOT: -1), k of each.
void append(Trees& t, const Level& v, const std::vector<int64_t>& owners,
            const std::vector<int64_t>& parents) {
    for (size_t r = 0; r < owners.size(); r++)
        for (int j = 0; j < v.k; j++) {
            int64_t i = t.nodes++, above = parents[r];
            owner(t, i) = owners[r];
            token(t, i) = v.tokens[r * v.k + j];
            parent(t, i) = above;
            depth(t, i) = above < 0 ? 1 : depth(t, above) + 1;
            source(t, i) = 0;
            draft_prob(t, i) = v.probs[r * v.k + j];
            path_prob(t, i) = (above < 0 ? 1.0 : path_prob(t, above)) * draft_prob(t, i);
            accept_prob(t, i) = NAN;
        }
}

// The rows of a level: nodes, sorted by owner, see all true rows of their request, their expanded
// ancestors and themselves.
struct NodeRows {
    std::vector<int32_t> query_start_loc{0}, block_table_start, slot_mapping, context_len,
        ancestors_start{0}, ancestors;
    std::vector<int64_t> position, token, owners;
    std::vector<const float*> features;
    std::vector<float> scale;
    std::vector<uint64_t> noise;

    Rows view(const Rows& first) const {
        Rows in = first;
        in.rows = int32_t(owners.size());
        in.requests = int32_t(block_table_start.size());
        in.query_start_loc = query_start_loc.data();
        in.block_table_start = block_table_start.data();
        in.slot_mapping = slot_mapping.data();
        in.context_len = context_len.data();
        in.ancestors_start = ancestors_start.data();
        in.ancestors = ancestors.data();
        in.position = position.data();
        return in;
    }
};

// A round's drafting: levels of a head into trees.
struct Drafting {
    const Head& head;
    const Rows& first;   // the rows of the first level
    const Level& roots;  // and what it reads and leaves
    const Growth& growth;
    Trees& trees;
    std::vector<int64_t> place;  // for each node, which of the expanded ones it is
    int64_t expanded = 0;
    std::vector<int64_t> tokens;  // of the last level
    std::vector<double> probs;

    Drafting(const Head& head_, const Rows& first_, const Level& roots_, const Growth& growth_,
             Trees& trees_)
        : head(head_),
          first(first_),
          roots(roots_),
          growth(growth_),
          trees(trees_),
          place(trees_.room, -1) {}

    bool run(const Rows& in, const Level& level) const {
        return !smart_draft(&head, &in, &level, growth.keys, growth.values, growth.pages,
                            growth.w_bf16, growth.kv_bf16, growth.threads);
    }

    // False where the kernels do not serve the head.
    bool draft_roots() {
        Level level = roots;
        std::vector<float> scale(trees.batch, 1.0f);
        std::vector<uint64_t> noise(growth.noise ? trees.batch : 0);
        for (int64_t i = 0; i < trees.batch; i++) {
            if (growth.scale) scale[i] = growth.scale[i];
            if (growth.noise) noise[i] = growth.noise[i * growth.levels];
        }
        level.scale = scale.data();
        level.keys = growth.noise ? noise.data() : nullptr;
        if (!run(first, level)) return false;
        std::vector<int64_t> owners(trees.batch);
        std::iota(owners.begin(), owners.end(), 0);
        append(trees, level, owners, std::vector<int64_t>(trees.batch, -1));
        return true;
    }

    // The children of `nodes`. False as above.
    bool draft_below(const std::vector<int64_t>& nodes) {
        const int64_t count = int64_t(nodes.size());
        float* out = roots.out + growth.hidden * (trees.batch + expanded);
        for (int64_t node : nodes) place[node] = expanded++;
        const NodeRows rows = rows_of(nodes);
        tokens.resize(count * roots.k);
        probs.resize(count * roots.k);
        Level level{};
        level.k = roots.k;
        level.token = rows.token.data();
        level.features = rows.features.data();
        level.out = out;
        level.scale = growth.scale ? rows.scale.data() : nullptr;
        level.keys = growth.noise ? rows.noise.data() : nullptr;
        level.tokens = tokens.data();
        level.probs = probs.data();
        if (!run(rows.view(first), level)) return false;
        append(trees, level, rows.owners, nodes);
        return true;
    }

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
            rows.ancestors.push_back(int32_t(growth.first_slot + place[n]));
        rows.slot_mapping.push_back(rows.ancestors[own]);
        std::reverse(rows.ancestors.begin() + own, rows.ancestors.end());
        rows.ancestors_start.push_back(int32_t(rows.ancestors.size()));
        rows.owners.push_back(request);
        rows.token.push_back(token(trees, node));
        rows.position.push_back(first.position[root] + level);
        rows.context_len.push_back(first.context_len[root]);
        const int64_t output = above < 0 ? request : trees.batch + place[above];
        rows.features.push_back(roots.out + growth.hidden * output);
        if (growth.scale) rows.scale.push_back(growth.scale[request]);
        if (growth.noise) rows.noise.push_back(growth.noise[request * growth.levels + level]);
    }
};

typedef std::chrono::steady_clock Clock;

double since(Clock::time_point start) {
    return std::chrono::duration<double>(Clock::now() - start).count();
}

struct Stopwatch {  // notes how long all but the levels took, on leaving
    Clock::time_point start;
    const Growth* g;

    ~Stopwatch() {
        *g->choosing = since(start) - std::accumulate(g->seconds, g->seconds + g->levels, 0.0);
    }
};

// Looks `ahead` levels below ever wider frontiers: the best rate of any, and the width that gives
// it, where it beats `rate`. present: what there is to gain now.
struct Lookahead {
    const Trees& trees;
    const Costs& costs;
    const std::vector<int64_t>& frontier;  // ranked
    const std::vector<double>& present;
    const int64_t most = most_nodes(costs);
    double rate = 0;
    int64_t width = 0;

    void look(int64_t ahead, const double* below, const int64_t* widths, int64_t width_count,
              const double* level_seconds) {
        std::vector<double> tree(below, below + ahead * RANKS), node(tree.size()), forecast, merged,
            all;
        std::sort(tree.begin(), tree.end(), std::greater<double>());
        int64_t expanded = 0, before = 0;
        for (int64_t w = 0; w < width_count; w++) {
            const int64_t wanted = std::min(widths[w], int64_t(frontier.size()));
            if (wanted == before) break;
            for (; expanded < wanted; expanded++) {
                const double given = accept_prob(trees, frontier[expanded]);
                for (size_t j = 0; j < tree.size(); j++) node[j] = tree[j] * given;
                merge(forecast, node, most, merged);
                forecast.swap(merged);
            }
            merge(present, forecast, most, all);
            double value = 0;
            best_size(all, costs, costs.sunk + double(ahead) * level_seconds[wanted], 0, &value);
            if (value > rate) {
                rate = value;
                width = wanted;
            }
            before = wanted;
        }
    }
};

}  // namespace

extern "C" {

int64_t smart_frontier(const Trees* t, const Calibration* b, const Costs* p, int32_t scored,
                       int64_t level, const double* below, int64_t reach, const int64_t* widths,
                       int64_t width_count, const double* level_seconds, int64_t* out,
                       int64_t least, int64_t* kept, Choice* choice) {
    if (!scored && !score(*t, *b)) return -1;
    const std::vector<char> behind = behind_ends(*t);
    std::vector<int64_t> frontier = expandable(*t, behind, level), candidates = useful(*t, behind);
    rank(*t, frontier);
    rank(*t, candidates);
    const std::vector<double> present = gains_of(*t, candidates);
    Lookahead lookahead{*t, *p, frontier, present};
    best_size(present, *p, p->sunk, 0, &lookahead.rate);
    for (int64_t ahead = 1; ahead <= reach && !frontier.empty(); ahead++)
        lookahead.look(ahead, below, widths, width_count, level_seconds);
    const int64_t width = lookahead.width;
    if (!width) *choice = choose(*p, candidates, present, least, kept);
    std::copy(frontier.begin(), frontier.begin() + width, out);
    std::sort(out, out + width);
    return width;
}

int64_t smart_select(const Trees* t, const Calibration* b, const Costs* p, int32_t scored,
                     int64_t least, int64_t* out, Choice* choice) {
    if (!scored && !score(*t, *b)) return -1;
    std::vector<int64_t> nodes = useful(*t, behind_ends(*t));
    rank(*t, nodes);
    *choice = choose(*p, nodes, gains_of(*t, nodes), least, out);
    return 0;
}

int64_t smart_grow(const Head* head, const Rows* first, const Level* v, const Growth* g, Trees* t,
                   const Calibration* b, Costs* p, int64_t* out, int64_t* kept, Choice* choice) {
    Clock::time_point start = Clock::now();
    std::fill_n(g->expanded, g->levels, 0);
    std::fill_n(g->seconds, g->levels, 0.0);
    const Stopwatch stopwatch{start, g};
    Drafting drafting(*head, *first, *v, *g, *t);
    if (!drafting.draft_roots()) return -2;
    g->seconds[0] = since(start);
    int64_t done = 1;
    for (; done < g->levels; done++) {
        const int64_t ahead = std::min(g->reach, g->levels - done);
        const double* below = g->below + (done - 1) * g->reach * RANKS;
        int64_t count = smart_frontier(t, b, p, 0, done, below, ahead, g->widths, g->widths_count,
                                       g->level_seconds, out, g->least, kept, choice);
        if (count <= 0) return count < 0 ? count : done;  // the choice is made
        p->sunk += g->level_seconds[count];
        count = std::min({count, g->slots - drafting.expanded, (t->room - t->nodes) / v->k});
        if (count <= 0) break;
        start = Clock::now();
        if (!drafting.draft_below(std::vector<int64_t>(out, out + count))) return -2;
        g->expanded[done] = count;
        g->seconds[done] = since(start);
    }
    return smart_select(t, b, p, 0, g->least, kept, choice) < 0 ? -1 : done;
}
}
