// Which nodes to expand and which to verify, against plain loops of the same mathematics
// (core/policies/chooser.py).

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
    double draft_prob, accept_prob;
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

    explicit Case(Random& random) {
        batch = random.between(1, 4);
        kinds = random.between(1, 4);
        sources = random.between(1, 3);
        bins = random.between(1, 20);
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
                      0};
            if (random.chance(0.03))
                node.draft_prob = random.of({double(NAN), -0.5, 1.5, 0.0, 1.0});
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
        room = int64_t(nodes.size()) + random.below(5);
        ints.assign(5 * room + 1, -9);
        floats.assign(3 * room + 1, NAN);
        for (size_t i = 0; i < nodes.size(); i++) {
            const Node& n = nodes[i];
            const int64_t values[] = {n.owner, n.token, n.parent, n.depth, n.source};
            for (int row = 0; row < 5; row++) ints[row * room + i] = values[row];
            floats[i] = n.draft_prob;
        }
    }
    Trees trees() {
        return {int64_t(nodes.size()), batch,       room,        ints.data(),         floats.data(),
                limits.data(),         kind.data(), ends.data(), int64_t(ends.size())};
    }
    Calibration calibration() const {
        return {table.data(),  int64_t(table.size()),
                bin_of.data(), int64_t(bin_of.size()) - 1,
                bins,          depths,
                kinds};
    }
    Costs costs() const { return {tokens, sunk, limit, verify.data(), int64_t(verify.size())}; }

    bool siblings(size_t a, size_t b) const {
        return nodes[a].parent == nodes[b].parent && nodes[a].owner == nodes[b].owner;
    }
    // Calibrated probabilities; siblings' sum to 1 at most.
    void score() {
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
    double best_rate(Doubles values, double spent, int64_t fewest, int64_t* size) const {
        std::sort(values.begin(), values.end(), std::greater<double>());
        double best = -2, sum = tokens;
        for (size_t n = 0; n <= values.size() && n < verify.size(); n++) {
            if (n) sum += values[n - 1];
            const double total = spent + verify[n], rate = n && total > limit ? -1.0 : sum / total;
            if (int64_t(n) < fewest || rate <= best) continue;
            best = rate;
            *size = int64_t(n);
        }
        return best;
    }
};

void compare_choice(const Case& c, const Choice& choice, const std::vector<int64_t>& kept) {
    const std::vector<int64_t> nodes = c.useful();
    int64_t size = -1;
    const double rate =
        c.best_rate(c.gains(nodes), c.sunk, std::min(c.least, int64_t(nodes.size())), &size);
    if (!check::same("chosen nodes", size, choice.count)) return;
    check::near("rate", rate, choice.rate, 1e-12);
    std::vector<int64_t> expected(nodes.begin(), nodes.begin() + size);
    double sum = 0;
    for (int64_t i : expected) sum += c.nodes[i].accept_prob;
    check::near("expected", sum, choice.expected, 1e-12);
    std::sort(expected.begin(), expected.end());
    for (int64_t i = 0; i < size; i++) check::same(check::at("kept", i), expected[i], kept[i]);
}

void one(uint64_t seed) {
    Random random(seed);
    Case c(random);
    check::begin("selection", seed,
                 "nodes " + std::to_string(c.nodes.size()) + ", batch " + std::to_string(c.batch));
    if (c.least >= int64_t(c.verify.size())) c.least = int64_t(c.verify.size()) - 1;
    c.score();
    Trees trees = c.trees();
    const Calibration calibration = c.calibration();
    const Costs costs = c.costs();
    std::vector<int64_t> kept(c.nodes.size() + 1, -7), out(kept);
    Choice choice{-1, -1, -1};

    check::same("status", 0,
                smart_select(&trees, &calibration, &costs, 0, c.least, kept.data(), &choice));
    for (size_t i = 0; i < c.nodes.size(); i++)
        check::near(check::at("accept_prob", i), c.nodes[i].accept_prob, c.floats[2 * c.room + i],
                    1e-12);
    compare_choice(c, choice, kept);

    const int64_t reach = random.between(1, 3), level = random.between(1, 4);
    Doubles below(reach * RANKS), level_seconds(c.nodes.size() + 1);
    for (double& x : below) x = random.of({0.3, 0.9}) * random.uniform();
    const double price = random.of({0.001, 0.01, 0.1});
    for (size_t i = 0; i < level_seconds.size(); i++)
        level_seconds[i] = price * (1 + 0.1 * double(i)) + 0.001 * random.uniform();
    std::vector<int64_t> widths;
    for (int64_t w = random.between(1, 2); w < 30; w += random.between(1, 6)) widths.push_back(w);
    const bool scored = random.chance(0.5);
    const int64_t found = smart_frontier(
        &trees, &calibration, &costs, scored, level, below.data(), reach, widths.data(),
        int64_t(widths.size()), level_seconds.data(), out.data(), c.least, kept.data(), &choice);
    const std::vector<int64_t> frontier = c.expandable(level);
    const Doubles present = c.gains(c.useful());
    int64_t size, best_width = 0;
    const double stopping = c.best_rate(present, c.sunk, 0, &size);
    double best = stopping, next_best = -1;
    for (int64_t ahead = 1; ahead <= reach; ahead++) {
        int64_t before = 0;
        for (int64_t width : widths) {
            width = std::min(width, int64_t(frontier.size()));
            if (width <= before) continue;
            before = width;
            Doubles all = present;
            for (int64_t i = 0; i < width; i++)
                for (int64_t j = 0; j < ahead * RANKS; j++)
                    all.push_back(below[j] * c.nodes[frontier[i]].accept_prob);
            const double rate =
                c.best_rate(all, c.sunk + double(ahead) * level_seconds[width], 0, &size);
            if (rate > best) {
                next_best = best;
                best = rate;
                best_width = width;
            } else
                next_best = std::max(next_best, rate);
        }
    }
    if (best - next_best < 1e-12 && best_width)
        return;  // too near to be told apart by sums in another order
    if (!check::same("width", best_width, found)) return;
    std::vector<int64_t> expected(frontier.begin(), frontier.begin() + best_width);
    std::sort(expected.begin(), expected.end());
    for (int64_t i = 0; i < best_width; i++)
        check::same(check::at("to expand", i), expected[i], out[i]);
    if (!best_width) compare_choice(c, choice, kept);
}

// A drafter that the table does not know.
void unseen() {
    for (uint64_t seed = 1; seed <= check::seeds(20); seed++) {
        Random random(seed + 40000);
        Case c(random);
        check::begin("selection, unseen drafter", seed, "");
        if (c.nodes.empty()) continue;
        c.ints[4 * c.room + random.below(c.nodes.size())] = c.sources;
        Trees trees = c.trees();
        const Calibration calibration = c.calibration();
        const Costs costs = c.costs();
        std::vector<int64_t> kept(c.nodes.size()), out(kept);
        Choice choice;
        const int64_t width = 1;
        const Doubles below(RANKS, 0.5), seconds(2, 0.1);
        check::same("select", -1,
                    smart_select(&trees, &calibration, &costs, 0, 0, kept.data(), &choice));
        check::same("frontier", -1,
                    smart_frontier(&trees, &calibration, &costs, 0, 1, below.data(), 1, &width, 1,
                                   seconds.data(), out.data(), 0, kept.data(), &choice));
    }
}

}  // namespace

void test_selection() {
    for (uint64_t seed = 1; seed <= check::seeds(3000); seed++) one(seed);
    unseen();
}
