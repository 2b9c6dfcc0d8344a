// Which nodes to expand and which to verify, against plain loops of the same mathematics
// (core/selection.py), which tests/parity holds to the kernels' bits.

#include <algorithm>
#include <functional>

#include "abi.h"
#include "check.h"
#include "reference.h"

using check::Random;
using reference::Doubles;

namespace {

constexpr int RANKS = 4;  // forecast children of a node

struct Node {
    int64_t owner, token, parent, depth, source;
    double draft_prob, path_prob, accept_prob;
};

struct Case {
    int64_t batch, room;
    std::vector<Node> nodes;
    std::vector<int64_t> limits, ends, bin_of, ints;
    std::vector<uint8_t> kind;
    Doubles floats, table, verify;
    int64_t sources, depths = 6, kinds, bins;
    double tokens, sunk, limit;
    int64_t least;
    bool calibrated;
    Doubles level_seconds;

    explicit Case(Random& random) {
        batch = random.between(1, 4);
        kinds = random.between(1, 4);
        sources = random.between(1, 3);
        bins = random.between(1, 20);
        calibrated = random.chance(0.7);
        for (int64_t i = 0; i < batch; i++) {
            limits.push_back(random.of<int64_t>({0, 1, 3, 20, 20}));
            kind.push_back(uint8_t(random.below(kinds)));
        }
        for (int64_t i = random.below(3); i > 0; i--) ends.push_back(random.below(12));
        for (int64_t i = random.below(60); i > 0; i--) {
            int64_t parent = nodes.empty() || random.chance(0.25) ? -1 : random.below(nodes.size());
            if (!nodes.empty() && random.chance(0.3)) parent = int64_t(nodes.size()) - 1;
            Node node{parent < 0 ? random.below(batch) : nodes[parent].owner,
                      random.below(12),
                      parent,
                      parent < 0 ? 1 : nodes[parent].depth + 1,
                      random.chance(0.6) ? 0 : random.below(sources),
                      random.uniform(),
                      0,
                      0};
            if (random.chance(0.1)) node.draft_prob = random.of({0.0, 0.5, 1.0});
            if (calibrated && random.chance(0.03))
                node.draft_prob = random.of({double(NAN), -0.5, 1.5});
            node.path_prob = (parent < 0 ? 1.0 : nodes[parent].path_prob) * node.draft_prob;
            nodes.push_back(node);
        }
        const int64_t resolution = random.of<int64_t>({16, 100, 4096});
        for (int64_t i = 0; i <= resolution; i++) bin_of.push_back(i * (bins - 1) / resolution);
        for (int64_t i = 0; i < sources * depths * kinds * bins; i++)
            table.push_back(0.95 * random.uniform());
        if (random.chance(0.2)) std::fill(table.begin(), table.end(), 0.25);  // ties
        tokens = double(batch);
        sunk = 0.5 * random.uniform();
        const double slope = random.of({0.001, 0.01, 0.05, 0.2});
        const int64_t count = random.chance(0.8) ? 200 : random.between(1, 20);
        for (int64_t i = 0; i < count; i++)
            verify.push_back(1 + slope * double(i) + 0.01 * random.uniform());
        limit = random.chance(0.6) ? INFINITY : sunk + 1 + slope * double(random.below(20));
        least = random.chance(0.7) ? 0 : random.below(count);
        const double price = random.of({0.001, 0.01, 0.1});
        for (size_t i = 0; i <= nodes.size(); i++)
            level_seconds.push_back(price * (1 + 0.1 * double(i)) + 0.001 * random.uniform());
        room = int64_t(nodes.size()) + random.below(5);
        ints.assign(5 * room + 1, -9);
        floats.assign(3 * room + 1, NAN);
        for (size_t i = 0; i < nodes.size(); i++) {
            const Node& n = nodes[i];
            const int64_t values[] = {n.owner, n.token, n.parent, n.depth, n.source};
            for (int row = 0; row < 5; row++) ints[row * room + i] = values[row];
            floats[i] = n.draft_prob;
            floats[room + i] = n.path_prob;
        }
    }
    Trees trees() { return {int64_t(nodes.size()), batch, room, ints.data(), floats.data()}; }
    Rule rule(int64_t levels, const Choice& expand, const Choice& keep) const {
        const Calibration calibration{calibrated ? table.data() : nullptr,
                                      bin_of.data(),
                                      int64_t(bin_of.size()) - 1,
                                      bins,
                                      depths,
                                      kinds};
        return {levels,      limits.data(), kind.data(), ends.data(), int64_t(ends.size()),
                calibration, expand,        keep};
    }
    Costs costs() const {
        return {tokens,
                sunk,
                limit,
                level_seconds.data(),
                verify.data(),
                int64_t(level_seconds.size()),
                int64_t(verify.size())};
    }
    // Seconds until now: of the levels whose children are there.
    double drafted() const {
        double seconds = sunk;
        for (int64_t level = 1; level < int64_t(nodes.size()); level++) {
            int64_t width = 0;
            for (size_t i = 0; i < nodes.size(); i++) {
                bool expanded = false;
                for (const Node& n : nodes) expanded |= n.parent == int64_t(i) && n.source == 0;
                width += expanded && nodes[i].depth == level;
            }
            if (width) seconds += level_seconds[width];
        }
        return seconds;
    }

    bool siblings(size_t a, size_t b) const {
        return nodes[a].parent == nodes[b].parent && nodes[a].owner == nodes[b].owner;
    }
    // Calibrated probabilities; siblings' sum to 1 at most.
    void score() {
        if (!calibrated) {
            for (Node& n : nodes) n.accept_prob = n.path_prob;
            return;
        }
        Doubles given;
        for (const Node& n : nodes) {
            double p = std::isnan(n.draft_prob) ? 0.0 : std::clamp(n.draft_prob, 0.0, 1.0);
            int64_t bin = bin_of[int64_t(p * double(bin_of.size() - 1))];
            int64_t level = std::min(n.depth, depths) - 1;
            given.push_back(
                table[((n.source * depths + level) * kinds + kind[n.owner]) * bins + bin]);
        }
        for (size_t i = 0; i < nodes.size(); i++) {
            double sum = 0;
            for (size_t j = 0; j < nodes.size(); j++)
                if (siblings(i, j)) sum += given[j];
            const double above = nodes[i].parent < 0 ? 1.0 : nodes[nodes[i].parent].accept_prob;
            nodes[i].accept_prob = above * given[i] / std::max(sum, 1.0);
        }
    }
    bool ends_answer(const Node& n) const {
        return std::find(ends.begin(), ends.end(), n.token) != ends.end();
    }
    bool behind_end(const Node& n) const {
        for (int64_t at = n.parent; at >= 0; at = nodes[at].parent)
            if (ends_answer(nodes[at])) return true;
        return false;
    }
    std::vector<int64_t> useful() const {
        std::vector<int64_t> list;
        for (size_t i = 0; i < nodes.size(); i++)
            if (nodes[i].depth <= limits[nodes[i].owner] && !behind_end(nodes[i]))
                list.push_back(int64_t(i));
        return by_value(list);
    }
    std::vector<int64_t> expandable(int64_t level) const {
        std::vector<int64_t> list;
        for (size_t i = 0; i < nodes.size(); i++) {
            const Node& n = nodes[i];
            bool proposed = false;  // it or a sibling, by the model drafter
            for (size_t j = 0; j < nodes.size(); j++)
                proposed |= siblings(i, j) && nodes[j].source == 0;
            if (n.depth == level && level < limits[n.owner] && !ends_answer(n) && !behind_end(n)
                && proposed)
                list.push_back(int64_t(i));
        }
        return by_value(list);
    }
    std::vector<int64_t> by_value(std::vector<int64_t> list) const {
        std::stable_sort(list.begin(), list.end(), [&](int64_t a, int64_t b) {
            return nodes[a].accept_prob > nodes[b].accept_prob;
        });
        return list;
    }
    Doubles gains(const std::vector<int64_t>& list) const {
        Doubles values;
        for (int64_t i : list) values.push_back(nodes[i].accept_prob);
        return values;
    }
    // The most tokens per second with the largest of `gains`, after `spent` seconds; and how many
    // of them.
    // near is set where sums in another order could decide otherwise.
    double best_rate(Doubles values, double spent, int64_t fewest, int64_t* size,
                     bool* near = nullptr) const {
        std::sort(values.begin(), values.end(), std::greater<double>());
        double best = -2, second = -2, sum = tokens;
        for (size_t n = 0; n <= values.size() && n < verify.size(); n++) {
            if (n) sum += values[n - 1];
            const double total = spent + verify[n], rate = n && total > limit ? -1.0 : sum / total;
            if (int64_t(n) < fewest) continue;
            second = std::max(second, std::min(rate, best));
            if (rate <= best) continue;
            best = rate;
            *size = int64_t(n);
        }
        if (near) *near = best - second < 1e-12;
        return best;
    }
};

std::vector<int64_t> sorted(std::vector<int64_t> list) {
    std::sort(list.begin(), list.end());
    return list;
}

// The first `count` of each request in a ranked list.
std::vector<int64_t> best_of_each(const Case& c, const std::vector<int64_t>& list, int64_t count) {
    std::vector<int64_t> best;
    for (int64_t request = 0; request < c.batch; request++) {
        int64_t left = count;
        for (int64_t i : list)
            if (c.nodes[i].owner == request && left-- > 0) best.push_back(i);
    }
    return sorted(best);
}

// A node's place in a topology, or -1.
int64_t place_of(const Case& c, const Choice& topology, int64_t node) {
    const Node& n = c.nodes[node];
    const int64_t above = n.parent < 0 ? 0 : place_of(c, topology, n.parent);
    int64_t rank = 0;
    for (size_t i = 0; i < c.nodes.size(); i++) {
        const double other = c.nodes[i].draft_prob;
        const bool tie = other == n.draft_prob || (std::isnan(other) && std::isnan(n.draft_prob));
        const bool larger =
            other > n.draft_prob || (!std::isnan(other) && std::isnan(n.draft_prob));
        rank += c.siblings(i, node) && (larger || (tie && int64_t(i) < node));
    }
    return above < 0 || rank >= topology.ranks ? -1 : topology.next[above * topology.ranks + rank];
}

// 1 plus the mean over the paths of some kept nodes of the probabilities along each, or plus their
// sum over nodes. paths: how many there are.
double length_of(const Case& c, const std::vector<int64_t>& kept, bool mean, int64_t* paths) {
    double along = 0, sum = 0;
    *paths = 0;
    for (int64_t leaf : kept) {
        sum += c.nodes[leaf].accept_prob;
        bool is_leaf = true;
        for (int64_t other : kept) is_leaf &= c.nodes[other].parent != leaf;
        if (!is_leaf) continue;
        ++*paths;
        for (int64_t i = leaf; i >= 0; i = c.nodes[i].parent) along += c.nodes[i].accept_prob;
    }
    if (!mean) return 1 + sum;
    return *paths ? 1 + along / double(*paths) : 1;
}

// What the published rule keeps of the nodes down to a level.
std::vector<int64_t> marginal(const Case& c, const Choice& part, int64_t last) {
    std::vector<int64_t> kept;
    for (int64_t request = 0; request < c.batch; request++) {
        std::vector<int64_t> mine;
        for (int64_t level = 1; level <= last; level++)
            for (int64_t i : c.useful()) {  // ranked
                const Node& n = c.nodes[i];
                const auto is_in = [&](int64_t node) {
                    return std::find(mine.begin(), mine.end(), node) != mine.end();
                };
                if (n.owner != request || n.depth != level) continue;
                if (int64_t(mine.size()) >= part.count || (n.parent >= 0 && !is_in(n.parent)))
                    continue;
                int64_t paths;
                const double length = length_of(c, mine, part.mean_over_paths, &paths);
                const double spent = part.spent[mine.size()];
                mine.push_back(i);
                length_of(c, mine, part.mean_over_paths, &paths);
                const double gain = n.accept_prob / (part.mean_over_paths ? double(paths) : 1.0);
                if (spent > 0 && part.alpha * gain * spent <= length * part.step[mine.size()])
                    mine.pop_back();
            }
        kept.insert(kept.end(), mine.begin(), mine.end());
    }
    return sorted(kept);
}

// The nodes at their best rate; near is set where sums in another order could decide otherwise.
std::vector<int64_t> look_ahead(const Case& c, const Choice& part, int64_t level, bool* near) {
    const std::vector<int64_t> frontier = c.expandable(level);
    const Doubles present = c.gains(c.useful());
    const double sunk = c.drafted();
    const double* below = part.below + (level - 1) * RANKS;
    int64_t size, width = 0;
    double best = c.best_rate(present, sunk, 0, &size), next_best = -1;
    for (int64_t w = 0; w < part.width_count; w++) {
        const int64_t wanted = std::min(part.widths[w], int64_t(frontier.size()));
        if (!wanted || (w && wanted == std::min(part.widths[w - 1], int64_t(frontier.size()))))
            continue;
        Doubles all = present;
        for (int64_t i = 0; i < wanted; i++)
            for (int64_t j = 0; j < RANKS; j++)
                all.push_back(below[j] * c.nodes[frontier[i]].accept_prob);
        const double rate = c.best_rate(all, sunk + c.level_seconds[wanted], 0, &size);
        next_best = std::max(next_best, std::min(rate, best));
        if (rate > best) {
            best = rate;
            width = wanted;
        }
    }
    *near = best - next_best < 1e-12;
    return sorted({frontier.begin(), frontier.begin() + width});
}

struct Parts {  // what the parts of a rule point to
    std::vector<int64_t> widths, next;
    Doubles below, spent, step;
    int64_t levels = 6;

    Choice choice(Random& random, const Case& c, int32_t kind) {
        Choice part{};
        part.kind = kind;
        part.mean_over_paths = random.chance(0.5);
        part.count = random.between(1, 6);
        part.costs = c.costs();
        part.ranks = random.between(1, 3);
        part.alpha = random.uniform();
        for (int64_t w = random.between(1, 2); w < 30; w += random.between(1, 6))
            widths.push_back(w);
        for (int64_t i = 0; i < levels * RANKS; i++)
            below.push_back(random.of({0.3, 0.9}) * random.uniform());
        next.assign(9 * part.ranks, -1);
        for (int64_t place = 1; place < 9; place++)
            next[random.below(place) * part.ranks + random.below(part.ranks)] = place;
        const double offset = random.of({0.0, 0.2});
        for (int64_t n = 0; n <= part.count; n++) {
            spent.push_back(offset + 0.05 * double(n));
            step.push_back(0.1 * random.uniform());
        }
        part.widths = widths.data();
        part.width_count = int64_t(widths.size());
        part.below = below.data();
        part.next = next.data();
        part.spent = spent.data();
        part.step = step.data();
        return part;
    }
};

std::vector<int64_t> to_keep(const Case& c, const Choice& part, bool* near) {
    const std::vector<int64_t> nodes = c.useful();
    if (part.kind == BEST) return best_of_each(c, nodes, part.count);
    if (part.kind == MARGINAL_RATIO) return marginal(c, part, 100);
    if (part.kind == TOPOLOGY) {
        std::vector<int64_t> inside;
        for (int64_t i : nodes)
            if (place_of(c, part, i) >= 0) inside.push_back(i);
        return sorted(inside);
    }
    int64_t size = 0;
    const int64_t fewest =
        std::min({part.count, int64_t(nodes.size()), int64_t(c.verify.size()) - 1});
    c.best_rate(c.gains(nodes), c.drafted(), fewest, &size, near);
    return sorted({nodes.begin(), nodes.begin() + size});
}

std::vector<int64_t> to_expand(const Case& c, const Choice& part, int64_t level, bool* near) {
    const std::vector<int64_t> nodes = c.expandable(level);
    if (part.kind == BEST) return best_of_each(c, nodes, part.count);
    if (part.kind == RATE) return look_ahead(c, part, level, near);
    std::vector<int64_t> inside;
    const std::vector<int64_t> kept =
        part.kind == MARGINAL_RATIO ? marginal(c, part, level) : std::vector<int64_t>();
    for (int64_t i : nodes) {
        if (part.kind == MARGINAL_RATIO) {
            if (std::find(kept.begin(), kept.end(), i) != kept.end()) inside.push_back(i);
            continue;
        }
        const int64_t place = place_of(c, part, i);
        bool inner = false;
        for (int64_t rank = 0; place >= 0 && rank < part.ranks; rank++)
            inner |= part.next[place * part.ranks + rank] >= 0;
        if (inner) inside.push_back(i);
    }
    return sorted(inside);
}

void one(uint64_t seed) {
    Random random(seed);
    Case c(random);
    c.score();
    Parts expanding, keeping;
    const Choice expand = expanding.choice(random, c, int32_t(random.below(4)));
    Choice keep = keeping.choice(random, c, int32_t(random.below(4)));
    if (keep.kind == RATE) keep.count = c.least;
    const Rule rule = c.rule(random.between(1, 6), expand, keep);
    const Trees trees = c.trees();
    std::vector<int64_t> out(c.nodes.size() + 1, -7);
    const auto compare = [&](const char* name, int64_t count,
                             const std::vector<int64_t>& expected) {
        if (!check::same(name, int64_t(expected.size()), count)) return;
        for (int64_t i = 0; i < count; i++) check::same(check::at(name, i), expected[i], out[i]);
    };
    check::begin("selection", seed,
                 "nodes " + std::to_string(c.nodes.size()) + ", batch " + std::to_string(c.batch)
                     + ", expand " + std::to_string(expand.kind) + ", keep "
                     + std::to_string(keep.kind));
    bool near = false;
    const int64_t kept = smart_select(&rule, &trees, out.data());
    const std::vector<int64_t> right = to_keep(c, keep, &near);
    if (!near) compare("kept", kept, right);
    for (size_t i = 0; i < c.nodes.size(); i++)
        check::near(check::at("accept_prob", i), c.nodes[i].accept_prob, c.floats[2 * c.room + i],
                    1e-12);
    const int64_t level = random.between(1, 4);
    const int64_t found = smart_frontier(&rule, &trees, level, out.data());
    if (level >= rule.levels) {
        check::same("levels are over", 0, found);
        return;
    }
    near = false;
    const std::vector<int64_t> expected = to_expand(c, expand, level, &near);
    if (!near) compare("to expand", found, expected);
}

}  // namespace

void test_selection() {
    for (uint64_t seed = 1; seed <= check::seeds(3000); seed++) one(seed);
}
