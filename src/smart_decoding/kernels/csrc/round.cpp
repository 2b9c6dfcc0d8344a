// A round's verification in one call, where tokens are first maxima or drawn by smart_draw: the
// rows of all trees, the forward, the walk down the trees, and the keys of what was accepted.
// engine/verification.py does the same in Python for all other rounds and is the reference; between
// two forwards caches are cold, and there it takes half a millisecond.

#include <algorithm>
#include <chrono>
#include <cstring>
#include <numeric>
#include <vector>

#include "abi.h"
#include "pages.h"
#include "rows.h"

namespace {

using smart::PAGE;

int64_t owner_of(const Round& r, int64_t k) { return r.trees[r.kept[k]]; }
int64_t token_of(const Round& r, int64_t k) { return r.trees[r.room + r.kept[k]]; }
int64_t depth_of(const Round& r, int64_t k) { return r.trees[3 * r.room + r.kept[k]]; }

// The kept nodes of a round by request.
struct KeptNodes {
    std::vector<int32_t> parent;                // of each, among those that are kept, or -1
    std::vector<std::vector<int32_t>> request;  // the nodes of each request

    // `kept` is ascending, and so are parents.
    explicit KeptNodes(const Round& r) : parent(r.nodes), request(r.requests) {
        std::vector<int32_t> place(r.nodes ? r.kept[r.nodes - 1] + 1 : 0, -1);
        for (int64_t k = 0; k < r.nodes; k++) {
            const int64_t node = r.kept[k], above = r.trees[2 * r.room + node];
            place[node] = int32_t(k);
            parent[k] = above < 0 ? -1 : place[above];
            request[owner_of(r, k)].push_back(int32_t(k));
        }
    }
};

// The rows of a round, and where in them the nodes are. For each request: its root, its best chain
// (of first children), its other nodes.
struct RoundRows : smart::RowVectors {
    std::vector<int32_t> node_row, block_tables;

    RoundRows(const Round& r, const KeptNodes& nodes) : node_row(r.nodes) {
        const int64_t rows = r.requests + r.nodes;
        token.resize(rows);
        position.resize(rows);
        slot_mapping.resize(rows);
        context_len.resize(rows);
        ancestors_start.assign(rows + 1, 0);
        for (int64_t i = 0; i < r.requests; i++) {
            add_request(r, i, int32_t(1 + nodes.request[i].size()));
            add_nodes(r, i, nodes);
        }
        std::partial_sum(ancestors_start.begin(), ancestors_start.end(), ancestors_start.begin());
        add_ancestors(r, nodes);
    }

    // The root, and what all `size` rows of a request have in common.
    void add_request(const Round& r, int64_t i, int32_t size) {
        const int32_t root = query_start_loc.back();
        query_start_loc.push_back(root + size);
        block_table_start.push_back(int32_t(block_tables.size()));
        const int64_t pages = (r.length[i] + size + PAGE - 1) / PAGE;
        block_tables.insert(block_tables.end(), r.pages[i], r.pages[i] + pages);
        for (int32_t j = 0; j < size; j++) {
            const int64_t at = r.length[i] + j;
            slot_mapping[root + j] = int32_t(r.pages[i][at / PAGE] * PAGE + at % PAGE);
            context_len[root + j] = int32_t(r.length[i] + 1);
        }
        token[root] = r.root[i];
        position[root] = r.position[i];
    }

    void add_nodes(const Round& r, int64_t i, const KeptNodes& nodes) {
        int32_t last = query_start_loc[i], tip = -1;
        for (int32_t k : nodes.request[i]) {
            const bool in_chain = nodes.parent[k] == tip;
            node_row[k] = in_chain ? ++last : -1;
            if (in_chain) tip = k;
        }
        for (int32_t k : nodes.request[i]) {
            if (node_row[k] < 0) node_row[k] = ++last;
            const int32_t row = node_row[k];
            token[row] = token_of(r, k);
            position[row] = r.position[i] + depth_of(r, k);
            ancestors_start[row + 1] = int32_t(depth_of(r, k));
        }
    }

    // A parent's ancestors are there before its children's.
    void add_ancestors(const Round& r, const KeptNodes& nodes) {
        ancestors.resize(ancestors_start.back());
        for (int64_t k = 0; k < r.nodes; k++) {
            const int32_t above = nodes.parent[k];
            int32_t* to = ancestors.data() + ancestors_start[node_row[k]];
            if (above >= 0)
                to = std::copy_n(ancestors.data() + ancestors_start[node_row[above]],
                                 depth_of(r, above), to);
            *to = slot_mapping[node_row[k]];
        }
    }

    Rows view(const Round& r) const {
        Rows rows{};
        rows.block_tables = block_tables.data();
        rows.cosine = r.cosine;
        rows.sine = r.sine;
        rows.angles = r.angles;
        rows.states = r.states;
        return RowVectors::view(rows);
    }
};

// The node below a request's node `tip`, or its root (-1), that has this token: of equal siblings
// the first one, -1 if there is none.
int32_t child_of(const Round& r, const KeptNodes& nodes, int64_t request, int32_t tip,
                 int64_t token) {
    for (int32_t k : nodes.request[request])
        if (nodes.parent[k] == tip && token_of(r, k) == token) return k;
    return -1;
}

// Replaces the first maxima in `tokens` by what is drawn, down the trees of all requests that draw
// theirs, level by level. False where rounding would decide one.
bool draw_tokens(const Round& r, const KeptNodes& nodes, const RoundRows& rows, const float* logits,
                 int64_t vocab, int32_t threads, int64_t* tokens) {
    std::vector<int32_t> tip(r.requests, -1);
    std::vector<int64_t> asking, best, drawn;
    for (int64_t i = 0; i < r.requests; i++)
        if (r.draws[i].k >= 0) asking.push_back(i);
    for (int64_t depth = 0; !asking.empty(); depth++) {
        std::vector<Draw> draws;
        std::vector<int64_t> at, ahead;
        for (int64_t i : asking) {
            at.push_back(tip[i] < 0 ? rows.query_start_loc[i] : rows.node_row[tip[i]]);
            draws.push_back(r.draws[i]);
            draws.back().row = logits + at.back() * vocab;
            draws.back().position += depth;
        }
        best.resize(asking.size());
        drawn.resize(asking.size());
        smart_draw(draws.data(), int64_t(draws.size()), vocab, best.data(), drawn.data(), threads);
        for (size_t j = 0; j < asking.size(); j++) {
            const int64_t i = asking[j], token = drawn[j];
            if (best[j] >= 0 && token < 0) return false;
            tokens[at[j]] = token;
            tip[i] = child_of(r, nodes, i, tip[i], token);
            if (tip[i] >= 0) ahead.push_back(i);
        }
        asking.swap(ahead);
    }
    return true;
}

// Follows the target's tokens [rows] down the trees. What it says after the last accepted node is
// the bonus token.
void accept(const Round& r, const KeptNodes& nodes, const RoundRows& rows, const int64_t* tokens) {
    std::fill(r.after, r.after + r.requests + r.nodes, -1);
    int64_t *emitted = r.emitted, *path = r.path;
    for (int64_t i = 0; i < r.requests; i++) {
        const int32_t root = rows.query_start_loc[i];
        r.accepted[i] = 0;
        r.first[i] = root;
        *emitted++ = r.after[i] = tokens[root];
        for (int32_t tip = child_of(r, nodes, i, -1, tokens[root]); tip >= 0;) {
            const int64_t token = tokens[rows.node_row[tip]];
            *path++ = tip;
            r.accepted[i]++;
            *emitted++ = r.after[r.requests + tip] = token;
            tip = child_of(r, nodes, i, tip, token);
        }
    }
}

// How many layers have keys and values.
int64_t attention_layers(const Model& m) {
    return std::count_if(m.layers, m.layers + m.layer_count, [](auto& l) { return !l.delta; });
}

// Moves accepted nodes' keys, and aux hidden states of `width`, to the places that follow their
// roots'; and has their rows wait for what is recurrent.
void commit(const Round& r, const RoundRows& rows, const Model& m, const Pass& pass, int64_t width,
            int32_t threads) {
    float* const aux_hidden = pass.aux_hidden;
    std::vector<int32_t> from, to;
    std::vector<int64_t> nodes;  // the accepted ones, among nodes' rows
    const int64_t* path = r.path;
    for (int64_t i = 0; i < r.requests; i++)
        for (int64_t j = 1; j <= r.accepted[i]; j++) {
            const int64_t source = rows.node_row[*path++], target = rows.query_start_loc[i] + j;
            nodes.push_back(source - i - 1);  // roots come before it
            if (source == target) continue;
            from.push_back(rows.slot_mapping[source]);
            to.push_back(rows.slot_mapping[target]);
            if (aux_hidden)
                memcpy(aux_hidden + target * width, aux_hidden + source * width,
                       width * sizeof(float));
        }
    if (m.states && r.states && r.nodes)
        smart_advance(&m, pass.nodes, r.nodes, r.requests, r.states, nodes.data(), r.accepted,
                      threads);
    if (from.empty()) return;
    smart_move_kv(m.keys, m.values, attention_layers(m) * r.kv_heads, m.pages, int32_t(r.head_dim),
                  m.kv_bf16 ? 2 : 4, from.data(), to.data(), int32_t(from.size()));
}

}  // namespace

extern "C" int32_t smart_round(const Model* m, const Round* r, const Pass* pass, int32_t threads) {
    typedef std::chrono::steady_clock clock;
    const auto seconds = [](clock::duration time) {
        return std::chrono::duration<double>(time).count();
    };
    const KeptNodes nodes(*r);
    const RoundRows round_rows(*r, nodes);
    const Rows rows = round_rows.view(*r);
    std::vector<int64_t> tokens(rows.rows);
    Pass mine = *pass;
    mine.token = round_rows.token.data();
    mine.best = tokens.data();
    const auto start = clock::now();
    if (int32_t status = smart_forward(m, &rows, &mine, threads)) return status;
    const auto computed = clock::now();
    r->seconds[0] = seconds(computed - start);
    if (r->draws
        && !draw_tokens(*r, nodes, round_rows, pass->logits, m->vocab, threads, tokens.data()))
        return -1;
    accept(*r, nodes, round_rows, tokens.data());
    const auto walked = clock::now();
    commit(*r, round_rows, *m, mine, pass->aux_count * r->hidden, threads);
    r->seconds[1] = seconds(walked - computed);
    r->seconds[2] = seconds(clock::now() - walked);
    return 0;
}
