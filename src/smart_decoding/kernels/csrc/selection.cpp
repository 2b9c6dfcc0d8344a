// Which nodes are expanded and which are verified, as a TreeRule says. core/selection.py is the
// reference, and runs without a compiler; as dozens of numpy calls on a few dozen nodes it takes as
// long as a level of the drafter. Sums and products are taken in numpy's order: the same bits, so
// that ties fall alike.

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>
#include <vector>

#include "trees.h"

namespace [[gnu::visibility("hidden")]] smart {

typedef std::vector<int64_t> Nodes;

constexpr int RANKS = 4;  // forecast children of a node (core/selection.py)

// ------------------------------------------------------------------------------ choosing a number

// Whether a probability comes before another: the larger one; no number comes last.
static bool before(double a, double b) { return a > b || (std::isnan(b) && !std::isnan(a)); }

// The most tokens per second over how many of the sorted `gains` are verified (core/selection.py).
struct Best {
    int64_t size = -1;
    double rate = 0;

    Best(const std::vector<double>& gains, const Costs& costs, double sunk, int64_t least = 0) {
        double sum = 0;
        least = std::min({least, int64_t(gains.size()), costs.verify_count - 1});
        for (int64_t n = 0; n <= int64_t(gains.size()) && n < costs.verify_count; n++) {
            if (n) sum += gains[n - 1];
            const double total = sunk + costs.verify[n];
            const double value = n && total > costs.limit ? -1.0 : (costs.tokens + sum) / total;
            if (n < least || (size >= 0 && value <= rate)) continue;
            size = n;
            rate = value;
        }
    }
};

// Seconds of a further level.
static double seconds_of(const Costs& costs, int64_t width) {
    return costs.levels[std::min(width, costs.level_count - 1)];
}

// Looks below ever wider frontiers.
struct LookAhead {
    const Choice& part;
    double sunk;
    std::vector<double> present;          // what there is to gain now, largest first
    const std::vector<double>& frontier;  // the same of the nodes to expand
    int64_t most;                         // gains that count

    LookAhead(const Choice& part_, double sunk_, std::vector<double> present_,
              const std::vector<double>& frontier_)
        : part(part_), sunk(sunk_), present(std::move(present_)), frontier(frontier_) {
        std::sort(present.begin(), present.end(), std::greater<double>());
        const Costs& costs = part.costs;
        most = costs.verify_count - 1;
        while (most > 0 && sunk + costs.verify[most] > costs.limit) most--;
    }

    // The `most` largest of two sorted lists, into `out`.
    void merge(const std::vector<double>& a, const std::vector<double>& b,
               std::vector<double>& out) const {
        out.clear();
        for (size_t i = 0, j = 0; int64_t(out.size()) < most && (i < a.size() || j < b.size());)
            out.push_back(j == b.size() || (i < a.size() && a[i] >= b[j]) ? a[i++] : b[j++]);
    }

    // How many to expand: 0 where nothing deeper beats stopping. below: [RANKS].
    int64_t width(const double* below) const {
        double rate = Best(present, part.costs, sunk).rate;
        int64_t best = 0;
        std::vector<double> added, forecast, merged, all;
        int64_t expanded = 0;
        for (int64_t w = 0; w < part.width_count; w++) {
            const int64_t wanted = std::min(part.widths[w], int64_t(frontier.size()));
            if (wanted == expanded) continue;
            added.clear();
            for (; expanded < wanted; expanded++)
                for (int64_t rank = 0; rank < RANKS; rank++)
                    added.push_back(frontier[expanded] * below[rank]);
            std::sort(added.begin(), added.end(), std::greater<double>());
            merge(forecast, added, merged);
            forecast.swap(merged);
            merge(present, forecast, all);
            const double value = Best(all, part.costs, sunk + seconds_of(part.costs, wanted)).rate;
            if (value <= rate) continue;
            rate = value;
            best = wanted;
        }
        return best;
    }
};

// --------------------------------------------------------------------------------- choosing nodes

// A round's trees, scored, as a rule sees them.
struct Selection {
    const Rule& rule;
    const Trees& trees;
    std::vector<char> behind;  // whether a node lies below an end token

    Selection(const Rule& rule_, const Trees& trees_)
        : rule(rule_), trees(trees_), behind(trees_.nodes, 0) {
        if (rule.end_count)
            for (int64_t i = 0; i < trees.nodes; i++) {
                const int64_t above = parent(trees, i);
                if (above >= 0) behind[i] = behind[above] || ends_answer(above);
            }
        score();
    }

    Nodes frontier(int64_t level) const {
        const Choice& part = rule.expand;
        if (level >= rule.levels) return {};
        Nodes nodes = expandable(level);
        if (nodes.empty()) return nodes;
        if (part.kind == BEST) return best_per_owner(nodes, part.count);
        if (part.kind == RATE) return look_ahead(nodes, level);
        Nodes inside;
        if (part.kind == TOPOLOGY) {
            const Nodes place = places(part);
            for (int64_t i : nodes)
                if (place[i] >= 0 && has_children(part, place[i])) inside.push_back(i);
        } else {
            const Nodes kept = marginal(part, level);
            std::set_intersection(nodes.begin(), nodes.end(), kept.begin(), kept.end(),
                                  std::back_inserter(inside));
        }
        return inside;
    }

    Nodes select() const {
        const Choice& part = rule.keep;
        if (part.kind == MARGINAL_RATIO) return marginal(part, INT64_MAX);
        Nodes nodes = useful();
        if (part.kind == BEST) return best_per_owner(nodes, part.count);
        if (part.kind == RATE) {
            nodes = ranked(nodes);
            nodes.resize(Best(gains(nodes), part.costs, drafted(part.costs), part.count).size);
            std::sort(nodes.begin(), nodes.end());
            return nodes;
        }
        const Nodes place = places(part);
        Nodes inside;
        for (int64_t i : nodes)
            if (place[i] >= 0) inside.push_back(i);
        return inside;
    }

private:
    bool ends_answer(int64_t node) const {
        return std::find(rule.ends, rule.ends + rule.end_count, token(trees, node))
               != rule.ends + rule.end_count;
    }

    // A node's parent among all roots and then all nodes: siblings share it.
    int64_t slot(int64_t node) const {
        const int64_t above = parent(trees, node);
        return above < 0 ? owner(trees, node) : trees.batch + above;
    }

    int64_t deepest() const {
        int64_t most = 0;
        for (int64_t i = 0; i < trees.nodes; i++) most = std::max(most, depth(trees, i));
        return most;
    }

    // Sets accept_prob.
    void score() const {
        const int64_t count = trees.nodes;
        if (!rule.calibration.table) {
            for (int64_t i = 0; i < count; i++) accept_prob(trees, i) = path_prob(trees, i);
            return;
        }
        std::vector<double> product(count + 1), sum(trees.batch + count, 0.0);
        for (int64_t i = 0; i < count; i++) sum[slot(i)] += product[i] = calibrated(i);
        for (int64_t i = 0; i < count; i++) product[i] /= std::max(sum[slot(i)], 1.0);
        product[count] = 1.0;  // the root's
        // By pointer doubling, as path_products of core/calibration.py: the same products.
        Nodes above(count + 1, count), further(count + 1);
        for (int64_t i = 0; i < count; i++)
            if (parent(trees, i) >= 0) above[i] = parent(trees, i);
        std::vector<double> nearer;
        for (int64_t reach = 1, most = deepest(); reach < most; reach *= 2) {
            if (reach > 1) {
                for (int64_t i = 0; i <= count; i++) further[i] = above[above[i]];
                above.swap(further);
            }
            nearer = product;
            for (int64_t i = 0; i <= count; i++) product[i] *= nearer[above[i]];
        }
        for (int64_t i = 0; i < count; i++) accept_prob(trees, i) = product[i];
    }

    // Probability that a node is accepted where its parent is.
    double calibrated(int64_t i) const {
        const Calibration& c = rule.calibration;
        const double p = std::fmin(std::fmax(draft_prob(trees, i), 0.0), 1.0);
        int64_t cell = source(trees, i) * c.depths + std::min(depth(trees, i), c.depths) - 1;
        cell = (cell * c.kinds + rule.kind[owner(trees, i)]) * c.bins;
        return c.table[cell + c.bin_of[int64_t(p * double(c.resolution))]];
    }

    std::vector<double> gains(const Nodes& nodes) const {
        std::vector<double> found;
        for (int64_t i : nodes) found.push_back(accept_prob(trees, i));
        return found;
    }

    // Those that could ever be emitted.
    Nodes useful() const {
        Nodes nodes;
        for (int64_t i = 0; i < trees.nodes; i++)
            if (depth(trees, i) <= rule.limits[owner(trees, i)] && !behind[i]) nodes.push_back(i);
        return nodes;
    }

    // [batch + nodes] the roots and nodes that the model drafter has expanded.
    std::vector<char> of_expanded() const {
        std::vector<char> found(trees.batch + trees.nodes, 0);
        for (int64_t i = 0; i < trees.nodes; i++)
            if (source(trees, i) == 0) found[slot(i)] = 1;
        return found;
    }

    // The nodes of a level that a model can draft below: it has a state above children of nodes
    // that it expanded, whoever proposed them.
    Nodes expandable(int64_t level) const {
        const std::vector<char> by_model = of_expanded();
        Nodes nodes;
        for (int64_t i = 0; i < trees.nodes; i++) {
            if (depth(trees, i) != level || level >= rule.limits[owner(trees, i)]) continue;
            if (!behind[i] && by_model[slot(i)] && !ends_answer(i)) nodes.push_back(i);
        }
        return nodes;
    }

    // Seconds of the round so far.
    double drafted(const Costs& costs) const {
        const std::vector<char> by_model = of_expanded();
        std::vector<int64_t> width(deepest() + 1, 0);
        for (int64_t i = 0; i < trees.nodes; i++)
            if (by_model[trees.batch + i]) width[depth(trees, i)]++;
        double sum = 0;
        for (size_t level = 1; level < width.size(); level++)
            if (width[level]) sum += seconds_of(costs, width[level]);
        return costs.sunk + sum;
    }

    // By falling probability, ties to the lower index, as `ranked` of core/selection.py: the lowest
    // bits of a probability mean nothing, and carry the index.
    Nodes ranked(const Nodes& nodes) const {
        const int64_t count = int64_t(nodes.size());
        int64_t mask = 1;
        while (mask < std::max<int64_t>(count - 1, 1)) mask = 2 * mask + 1;
        Nodes keys(count);
        for (int64_t i = 0; i < count; i++)
            keys[i] = ((bits(1.0) - bits(accept_prob(trees, nodes[i]))) & ~mask) | i;
        std::sort(keys.begin(), keys.end());
        for (int64_t& key : keys) key = nodes[key & mask];
        return keys;
    }

    static int64_t bits(double x) {
        int64_t found;
        memcpy(&found, &x, sizeof(found));
        return found;
    }

    // The `count` surest of each request, ties to the lower index.
    Nodes best_per_owner(Nodes nodes, int64_t count) const {
        std::stable_sort(nodes.begin(), nodes.end(), [&](int64_t a, int64_t b) {
            return before(accept_prob(trees, a), accept_prob(trees, b));
        });
        Nodes taken(trees.batch, 0), best;
        for (int64_t i : nodes)
            if (taken[owner(trees, i)]++ < count) best.push_back(i);
        std::sort(best.begin(), best.end());
        return best;
    }

    Nodes look_ahead(const Nodes& nodes, int64_t level) const {
        const Choice& part = rule.expand;
        Nodes order = ranked(nodes);
        const std::vector<double> frontier = gains(order);
        const LookAhead ahead(part, drafted(part.costs), gains(useful()), frontier);
        order.resize(ahead.width(part.below + (level - 1) * RANKS));
        std::sort(order.begin(), order.end());
        return order;
    }

    static bool has_children(const Choice& part, int64_t place) {
        const int64_t* next = part.next + place * part.ranks;
        return std::any_of(next, next + part.ranks, [](int64_t child) { return child >= 0; });
    }

    // [nodes] each node's place in a topology, or -1.
    Nodes places(const Choice& part) const {
        Nodes order(trees.nodes), place(trees.nodes, -1), rank(trees.nodes);
        std::iota(order.begin(), order.end(), 0);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return slot(a) != slot(b) ? slot(a) < slot(b)
                                      : before(draft_prob(trees, a), draft_prob(trees, b));
        });
        for (int64_t i = 1; i < trees.nodes; i++)
            if (slot(order[i]) == slot(order[i - 1])) rank[order[i]] = rank[order[i - 1]] + 1;
        for (int64_t i = 0; i < trees.nodes; i++) {  // parents come before their children
            const int64_t above = parent(trees, i) < 0 ? 0 : place[parent(trees, i)];
            if (above >= 0 && rank[i] < part.ranks)
                place[i] = part.next[above * part.ranks + rank[i]];
        }
        return place;
    }

    // What MarginalRatio has kept of one request: nodes, root-to-leaf paths, the sum of path_prob
    // along each of these, and over nodes.
    struct KeptTree {
        int64_t nodes = 0, paths = 0;
        double path_sum = 0.0, node_sum = 0.0;

        double length(bool mean_over_paths) const {
            if (!mean_over_paths) return 1.0 + node_sum;
            return paths ? 1.0 + path_sum / double(paths) : 1.0;
        }
    };

    // The nodes that MarginalRatio keeps, down to a level.
    Nodes marginal(const Choice& part, int64_t last) const {
        Nodes order, kept;
        for (int64_t i : useful())
            if (depth(trees, i) <= last) order.push_back(i);
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
            return depth(trees, a) != depth(trees, b)
                       ? depth(trees, a) < depth(trees, b)
                       : before(accept_prob(trees, a), accept_prob(trees, b));
        });
        std::vector<KeptTree> of_request(trees.batch);
        std::vector<char> inside(trees.nodes, 0), inner(trees.nodes, 0);
        std::vector<double> down(trees.nodes, 0.0);  // path_prob from the root to a node, summed
        for (int64_t i : order) {
            KeptTree& tree = of_request[owner(trees, i)];
            const int64_t above = parent(trees, i);
            if (tree.nodes >= part.count || (above >= 0 && !inside[above])) continue;
            const bool new_path = above < 0 || inner[above];
            const double p = accept_prob(trees, i);
            const double gain = part.mean_over_paths ? p / double(tree.paths + new_path) : p;
            const double spent = part.spent[tree.nodes];
            const double length = tree.length(part.mean_over_paths);
            if (spent != 0 && !(part.alpha * gain * spent > length * part.step[tree.nodes + 1]))
                continue;
            tree.nodes++;
            tree.paths += new_path;
            down[i] = (above < 0 ? 0.0 : down[above]) + p;
            tree.path_sum += new_path ? down[i] : p;
            tree.node_sum += p;
            inside[i] = 1;
            if (above >= 0) inner[above] = 1;
            kept.push_back(i);
        }
        std::sort(kept.begin(), kept.end());
        return kept;
    }
};

}  // namespace smart

using namespace smart;

extern "C" {

int64_t smart_frontier(const Rule* rule, const Trees* t, int64_t level, int64_t* out) {
    const Nodes nodes = Selection(*rule, *t).frontier(level);
    std::copy(nodes.begin(), nodes.end(), out);
    return int64_t(nodes.size());
}

int64_t smart_select(const Rule* rule, const Trees* t, int64_t* out) {
    const Nodes nodes = Selection(*rule, *t).select();
    std::copy(nodes.begin(), nodes.end(), out);
    return int64_t(nodes.size());
}
}
