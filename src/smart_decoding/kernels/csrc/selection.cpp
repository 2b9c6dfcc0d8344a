// What the policy `smart` asks of every round: which nodes to expand next, and which to verify. The same mathematics in numpy
// (core/policies/chooser.py) is the reference and runs without a compiler; as dozens of numpy calls on a few dozen nodes it
// takes as long as a level of the drafter. And, where a head runs on the kernels, a round's whole drafting in one call.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <numeric>
#include <vector>

#include "abi.h"

constexpr int RANKS = 4;  // forecast children of a node (core/lookahead.py)

static int64_t& owner(const Trees& t, int64_t i) { return t.ints[i]; }
static int64_t& token(const Trees& t, int64_t i) { return t.ints[t.room + i]; }
static int64_t& parent(const Trees& t, int64_t i) { return t.ints[2 * t.room + i]; }
static int64_t& depth(const Trees& t, int64_t i) { return t.ints[3 * t.room + i]; }
static int64_t& source(const Trees& t, int64_t i) { return t.ints[4 * t.room + i]; }
static double& draft_prob(const Trees& t, int64_t i) { return t.floats[i]; }
static double& path_prob(const Trees& t, int64_t i) { return t.floats[t.room + i]; }
static double& accept_prob(const Trees& t, int64_t i) { return t.floats[2 * t.room + i]; }

static bool ends_answer(const Trees& t, int64_t node) {
    return std::find(t.ends, t.ends + t.end_count, token(t, node)) != t.ends + t.end_count;
}

// Whether a node lies below an end token, for all nodes; parents come before their children.
static std::vector<char> behind_ends(const Trees& t) {
    std::vector<char> behind(t.nodes, 0);
    for (int64_t i = 0; i < t.nodes; i++)
        if (parent(t, i) >= 0) behind[i] = behind[parent(t, i)] || ends_answer(t, parent(t, i));
    return behind;
}

static int64_t slot_of(const Trees& t, int64_t node) { return parent(t, node) < 0 ? owner(t, node) : t.batch + parent(t, node); }

// Sets accept_prob; false if there are nodes of a drafter that the table does not know.
static bool score(const Trees& t, const Calibration& b) {
    std::vector<double> given(t.nodes), sum(t.batch + t.nodes, 0.0);
    for (int64_t i = 0; i < t.nodes; i++) {
        double p = std::fmin(std::fmax(draft_prob(t, i), 0.0), 1.0);
        int64_t cell = source(t, i) * b.depths + std::min(depth(t, i), b.depths) - 1;
        cell = (cell * b.kinds + t.kind[owner(t, i)]) * b.bins + b.bin_of[int64_t(p * double(b.resolution))];
        if (cell >= b.cells) return false;
        sum[slot_of(t, i)] += given[i] = b.table[cell];
    }
    for (int64_t i = 0; i < t.nodes; i++) {
        double conditional = given[i] / std::max(sum[slot_of(t, i)], 1.0);
        accept_prob(t, i) = parent(t, i) < 0 ? conditional : accept_prob(t, parent(t, i)) * conditional;
    }
    return true;
}

static std::vector<int64_t> useful(const Trees& t, const std::vector<char>& behind) {
    std::vector<int64_t> nodes;
    for (int64_t i = 0; i < t.nodes; i++)
        if (depth(t, i) <= t.limits[owner(t, i)] && !behind[i]) nodes.push_back(i);
    return nodes;
}

static std::vector<int64_t> expandable(const Trees& t, const std::vector<char>& behind, int64_t level) {
    std::vector<char> by_model(t.batch + t.nodes, 0);  // a head has a state above children of its own only
    for (int64_t i = 0; i < t.nodes; i++)
        if (source(t, i) == 0) by_model[slot_of(t, i)] = 1;
    std::vector<int64_t> nodes;
    for (int64_t i = 0; i < t.nodes; i++)
        if (depth(t, i) == level && level < t.limits[owner(t, i)] && !behind[i] && !ends_answer(t, i) && by_model[slot_of(t, i)])
            nodes.push_back(i);
    return nodes;
}

// By falling probability, ties to the lower index: parents come before their children.
static void rank(const Trees& t, std::vector<int64_t>& nodes) {
    std::stable_sort(nodes.begin(), nodes.end(), [&](int64_t a, int64_t b) { return accept_prob(t, a) > accept_prob(t, b); });
}

// The most tokens per second over the sizes of a tree; `gains` are sorted. Returns the size.
static int64_t best_size(const std::vector<double>& gains, const Costs& p, double sunk, int64_t least, double* rate) {
    int64_t best = -1;
    double tokens = p.tokens;
    for (int64_t n = 0; n <= int64_t(gains.size()) && n < p.verify_count; n++) {
        if (n) tokens += gains[n - 1];
        double total = sunk + p.verify[n], value = n && total > p.limit ? -1.0 : tokens / total;
        if (n >= least && (best < 0 || value > *rate)) { best = n; *rate = value; }
    }
    return best;
}

// How many nodes a round may verify at all: best_size looks at no more gains, so no more need be sorted.
static int64_t most_nodes(const Costs& p) {
    int64_t n = p.verify_count - 1;
    while (n > 0 && p.sunk + p.verify[n] > p.limit) n--;
    return n;
}

// The `most` largest of two sorted lists, into `out`.
static void merge(const std::vector<double>& a, const std::vector<double>& b, int64_t most, std::vector<double>& out) {
    out.clear();
    for (size_t i = 0, j = 0; int64_t(out.size()) < most && (i < a.size() || j < b.size());)
        out.push_back(j == b.size() || (i < a.size() && a[i] >= b[j]) ? a[i++] : b[j++]);
}

// The nodes to verify, ascending, into `out` [nodes] (`least` of them at least, as far as there are), of ranked ones.
static Choice choose(const Costs& p, const std::vector<int64_t>& nodes, const std::vector<double>& gains, int64_t least, int64_t* out) {
    Choice choice{0, 0.0, 0.0};
    choice.count = best_size(gains, p, p.sunk, std::min(least, int64_t(nodes.size())), &choice.rate);
    choice.expected = std::accumulate(gains.begin(), gains.begin() + choice.count, 0.0);
    std::copy(nodes.begin(), nodes.begin() + choice.count, out);
    std::sort(out, out + choice.count);
    return choice;
}

// Appends the children that `v` found below `parents` (ROOT: -1), k of each.
static void append(Trees& t, const Level& v, const std::vector<int64_t>& owners, const std::vector<int64_t>& parents) {
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

// The rows of a level: nodes, sorted by owner, see all true rows of their request, their expanded ancestors and themselves.
struct NodeRows {
    std::vector<int32_t> query_start_loc{0}, block_table_start, slot_mapping, context_len, ancestors_start{0}, ancestors;
    std::vector<int64_t> position, token, owners;
    std::vector<const float*> features;
    std::vector<float> scale;
    std::vector<uint64_t> noise;
};

// `first`: the rows of the first level. place: for each node, which of the expanded ones it is.
static NodeRows rows_of(const Trees& t, const Growth& g, const Rows& first, const float* out, const std::vector<int64_t>& nodes,
                        const std::vector<int64_t>& place) {
    NodeRows rows;
    for (int64_t node : nodes) {
        int64_t request = owner(t, node), level = depth(t, node), above = parent(t, node), root = first.query_start_loc[request + 1] - 1;
        if (rows.owners.empty() || rows.owners.back() != request) {
            if (!rows.owners.empty()) rows.query_start_loc.push_back(int32_t(rows.owners.size()));
            rows.block_table_start.push_back(first.block_table_start[request]);
        }
        size_t own = rows.ancestors.size();
        for (int64_t n = node; n >= 0; n = parent(t, n)) rows.ancestors.push_back(int32_t(g.first_slot + place[n]));
        rows.slot_mapping.push_back(rows.ancestors[own]);
        std::reverse(rows.ancestors.begin() + own, rows.ancestors.end());
        rows.ancestors_start.push_back(int32_t(rows.ancestors.size()));
        rows.owners.push_back(request);
        rows.token.push_back(token(t, node));
        rows.position.push_back(first.position[root] + level);
        rows.context_len.push_back(first.context_len[root]);
        rows.features.push_back(out + g.hidden * (above < 0 ? request : t.batch + place[above]));
        if (g.scale) rows.scale.push_back(g.scale[request]);
        if (g.noise) rows.noise.push_back(g.noise[request * g.levels + level]);
    }
    rows.query_start_loc.push_back(int32_t(nodes.size()));
    return rows;
}

static double since(std::chrono::steady_clock::time_point start) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
struct Stopwatch {  // notes how long all but the levels took, on leaving
    std::chrono::steady_clock::time_point start;
    const Growth* g;
    ~Stopwatch() { *g->choosing = since(start) - std::accumulate(g->seconds, g->seconds + g->levels, 0.0); }
};

extern "C" {

// The nodes of `level` to expand next, ascending, into `out` [nodes]; returns how many: 0 where no deeper tree beats
// stopping (then `choice` and `kept` [nodes] say what to verify), -1 where the table of beliefs is too small. `below` [reach * RANKS]: forecast descendants of a frontier node, given that node, level by level.
// `widths` [width_count], ascending: how many nodes may be expanded (cut to those there are); level_seconds by width.
int64_t smart_frontier(const Trees* t, const Calibration* b, const Costs* p, int scored, int64_t level, const double* below, int64_t reach,
                       const int64_t* widths, int64_t width_count, const double* level_seconds, int64_t* out, int64_t least,
                       int64_t* kept, Choice* choice) {
    if (!scored && !score(*t, *b)) return -1;
    std::vector<char> behind = behind_ends(*t);
    std::vector<int64_t> frontier = expandable(*t, behind, level), candidates = useful(*t, behind);
    rank(*t, frontier);
    rank(*t, candidates);
    std::vector<double> present, forecast, merged, all;
    for (int64_t i : candidates) present.push_back(accept_prob(*t, i));
    double best = 0;
    best_size(present, *p, p->sunk, 0, &best);
    int64_t width = 0, most = most_nodes(*p);
    for (int64_t ahead = 1; ahead <= reach && !frontier.empty(); ahead++) {
        std::vector<double> tree(below, below + ahead * RANKS), node(tree.size());
        std::sort(tree.begin(), tree.end(), std::greater<double>());
        forecast.clear();
        int64_t expanded = 0, before = 0;
        for (int64_t w = 0; w < width_count; w++) {
            int64_t wanted = std::min(widths[w], int64_t(frontier.size()));
            if (wanted == before) break;
            for (; expanded < wanted; expanded++) {
                for (size_t j = 0; j < tree.size(); j++) node[j] = tree[j] * accept_prob(*t, frontier[expanded]);
                merge(forecast, node, most, merged);
                forecast.swap(merged);
            }
            merge(present, forecast, most, all);
            double rate = 0;
            best_size(all, *p, p->sunk + double(ahead) * level_seconds[wanted], 0, &rate);
            if (rate > best) { best = rate; width = wanted; }
            before = wanted;
        }
    }
    if (!width) *choice = choose(*p, candidates, present, least, kept);
    std::copy(frontier.begin(), frontier.begin() + width, out);
    std::sort(out, out + width);
    return width;
}

// What to verify of the trees as they are, into `out` [nodes]; returns 0, or -1 where the table of beliefs is too small.
int64_t smart_select(const Trees* t, const Calibration* b, const Costs* p, int scored, int64_t least, int64_t* out, Choice* choice) {
    if (!scored && !score(*t, *b)) return -1;
    std::vector<int64_t> nodes = useful(*t, behind_ends(*t));
    rank(*t, nodes);
    std::vector<double> gains;
    for (int64_t i : nodes) gains.push_back(accept_prob(*t, i));
    *choice = choose(*p, nodes, gains, least, out);
    return 0;
}

// Drafts a round: the first level of a head (`first` and `v`, whose tokens and probs are [batch, k]), then what smart_frontier
// says, level by level, into the empty trees `t`; then what to verify, as smart_select. `out` [nodes] is scratch. p->sunk is
// what the first level costs. Returns the levels run, or -1 where the table of beliefs is too small, -2 where the kernels do not
// serve the head.
int64_t smart_grow(const Head* head, const Rows* first, const Level* v, const Growth* g, Trees* t, const Calibration* b, Costs* p,
                   int64_t* out, int64_t* kept, Choice* choice) {
    auto start = std::chrono::steady_clock::now();
    const Stopwatch stopwatch{start, g};
    Level level = *v;
    std::vector<float> scale(t->batch, 1.0f);
    std::vector<uint64_t> noise(g->noise ? t->batch : 0);
    for (int64_t i = 0; i < t->batch; i++) {
        if (g->scale) scale[i] = g->scale[i];
        if (g->noise) noise[i] = g->noise[i * g->levels];
    }
    level.scale = scale.data();
    level.keys = g->noise ? noise.data() : nullptr;
    if (smart_draft(head, first, &level, g->keys, g->values, g->pages, g->w_bf16, g->kv_bf16, g->threads)) return -2;
    std::vector<int64_t> owners(t->batch), parents(t->batch, -1), place(t->room, -1), tokens;
    std::vector<double> probs;
    std::iota(owners.begin(), owners.end(), 0);
    append(*t, level, owners, parents);
    g->seconds[0] = since(start);
    int64_t done = 1, expanded = 0;
    for (; done < g->levels; done++) {
        int64_t ahead = std::min(g->reach, g->levels - done), count;
        count = smart_frontier(t, b, p, 0, done, g->below + (done - 1) * g->reach * RANKS, ahead, g->widths, g->widths_count,
                               g->level_seconds, out, g->least, kept, choice);
        if (count <= 0) return count < 0 ? count : done;  // the choice is made
        p->sunk += g->level_seconds[count];
        count = std::min({count, g->slots - expanded, (t->room - t->nodes) / level.k});
        if (count <= 0) break;
        start = std::chrono::steady_clock::now();
        std::vector<int64_t> nodes(out, out + count);
        for (int64_t node : nodes) place[node] = expanded++;
        NodeRows rows = rows_of(*t, *g, *first, v->out, nodes, place);
        Rows in = *first;
        in.rows = int32_t(count);
        in.requests = int32_t(rows.block_table_start.size());
        in.query_start_loc = rows.query_start_loc.data(), in.block_table_start = rows.block_table_start.data(), in.slot_mapping = rows.slot_mapping.data();
        in.context_len = rows.context_len.data(), in.ancestors_start = rows.ancestors_start.data(), in.ancestors = rows.ancestors.data();
        in.position = rows.position.data();
        tokens.resize(count * level.k);
        probs.resize(count * level.k);
        level = {0, v->k, rows.token.data(), rows.features.data(), nullptr, v->out + g->hidden * (t->batch + expanded - count),
                 g->scale ? rows.scale.data() : nullptr, g->noise ? rows.noise.data() : nullptr, tokens.data(), probs.data()};
        if (smart_draft(head, &in, &level, g->keys, g->values, g->pages, g->w_bf16, g->kv_bf16, g->threads)) return -2;
        append(*t, level, rows.owners, nodes);
        g->expanded[done] = count;
        g->seconds[done] = since(start);
    }
    return smart_select(t, b, p, 0, g->least, kept, choice) < 0 ? -1 : done;
}
}
