// A round's verification in one call, where every request takes the target's first maximum: the rows of all trees, the forward,
// the walk down the trees, and the keys of what was accepted. engine/verification.py does the same in Python for all other rounds
// and is the reference; between two forwards caches are cold, and there it takes half a millisecond.

#include <chrono>
#include <numeric>
#include <vector>

#include "abi.h"
#include "vectors.h"

namespace {

struct Built {  // the rows of a round, and where in them the nodes are
    std::vector<int64_t> token, position, node_row;
    std::vector<int32_t> query_start_loc, block_table_start, pages, slot_mapping, context_len, ancestors_start, ancestors;
    std::vector<std::vector<int32_t>> of;  // the nodes of each request
    std::vector<int32_t> parent;           // of each node, among those that are kept, or -1
};

int64_t owner_of(const Round& r, int64_t k) { return r.trees[r.kept[k]]; }
int64_t token_of(const Round& r, int64_t k) { return r.trees[r.room + r.kept[k]]; }
int64_t depth_of(const Round& r, int64_t k) { return r.trees[3 * r.room + r.kept[k]]; }

// Parents among the kept nodes. `kept` is ascending, and so are parents.
void number(const Round& r, Built& b) {
    std::vector<int32_t> place(r.nodes ? r.kept[r.nodes - 1] + 1 : 0, -1);
    b.parent.resize(r.nodes);
    b.of.resize(r.requests);
    for (int64_t k = 0; k < r.nodes; k++) {
        int64_t node = r.kept[k], above = r.trees[2 * r.room + node];
        place[node] = k;
        b.parent[k] = above < 0 ? -1 : place[above];
        b.of[owner_of(r, k)].push_back(k);
    }
}

// A group of rows for each request: its root, its best chain (of first children), its other nodes.
void build(const Round& r, Built& b) {
    number(r, b);
    int64_t rows = r.requests + r.nodes;
    b.token.resize(rows), b.position.resize(rows), b.node_row.resize(r.nodes);
    b.slot_mapping.resize(rows), b.context_len.resize(rows), b.ancestors_start.assign(rows + 1, 0);
    b.query_start_loc = {0};
    for (int64_t i = 0; i < r.requests; i++) {
        int32_t root = b.query_start_loc.back(), size = 1 + b.of[i].size();
        b.query_start_loc.push_back(root + size);
        b.block_table_start.push_back(b.pages.size());
        b.pages.insert(b.pages.end(), r.pages[i], r.pages[i] + (r.length[i] + size + PAGE - 1) / PAGE);
        for (int32_t j = 0; j < size; j++) {
            int64_t at = r.length[i] + j;
            b.slot_mapping[root + j] = r.pages[i][at / PAGE] * PAGE + at % PAGE;
            b.context_len[root + j] = r.length[i] + 1;
        }
        b.token[root] = r.root[i], b.position[root] = r.length[i];
        int32_t tip = -1, chain = 0;
        for (int32_t k : b.of[i])
            if (b.parent[k] == tip) tip = k, b.node_row[k] = root + ++chain;
            else b.node_row[k] = -1;
        for (int32_t k : b.of[i]) {
            if (b.node_row[k] < 0) b.node_row[k] = root + ++chain;
            int64_t row = b.node_row[k];
            b.token[row] = token_of(r, k), b.position[row] = r.length[i] + depth_of(r, k);
            b.ancestors_start[row + 1] = depth_of(r, k);
        }
    }
    std::partial_sum(b.ancestors_start.begin(), b.ancestors_start.end(), b.ancestors_start.begin());
    b.ancestors.resize(b.ancestors_start[rows]);
    for (int64_t k = 0; k < r.nodes; k++) {  // a parent's ancestors are there before its children's
        int32_t *to = &b.ancestors[b.ancestors_start[b.node_row[k]]], above = b.parent[k];
        if (above >= 0) to = std::copy_n(&b.ancestors[b.ancestors_start[b.node_row[above]]], depth_of(r, above), to);
        *to = b.slot_mapping[b.node_row[k]];
    }
}

// Follows the target's tokens down the trees.
void walk(const Round& r, const Built& b, const int64_t* best) {
    std::fill(r.after, r.after + r.requests + r.nodes, -1);
    int64_t *emitted = r.emitted, *path = r.path;
    for (int64_t i = 0; i < r.requests; i++) {
        r.accepted[i] = 0;
        r.first[i] = b.query_start_loc[i];
        *emitted++ = r.after[i] = best[b.query_start_loc[i]];
        int32_t tip = -1;
        for (int32_t k : b.of[i]) {  // children come after their parents; of equal siblings the first one counts
            if (b.parent[k] != tip || token_of(r, k) != emitted[-1]) continue;
            tip = *path++ = k;
            r.accepted[i]++;
            *emitted++ = r.after[r.requests + k] = best[b.node_row[k]];
        }
    }
}

// Moves accepted nodes' keys, and features of `width`, to the places that follow their roots'.
void commit(const Round& r, const Built& b, const Model& m, float* aux_hidden, int64_t width) {
    std::vector<int32_t> from, to;
    const int64_t* path = r.path;
    for (int64_t i = 0; i < r.requests; i++)
        for (int64_t j = 1; j <= r.accepted[i]; j++) {
            int64_t source = b.node_row[*path++], target = b.query_start_loc[i] + j;
            if (source == target) continue;
            from.push_back(b.slot_mapping[source]), to.push_back(b.slot_mapping[target]);
            if (aux_hidden) memcpy(aux_hidden + target * width, aux_hidden + source * width, width * sizeof(float));
        }
    if (!from.empty())
        smart_move_kv(m.keys, m.values, m.layer_count * r.kv_heads, m.pages, r.head_dim, m.kv_bf16 ? 2 : 4, from.data(), to.data(), from.size());
}

}  // namespace

// pass: its aux_layers, and memory for `aux_hidden` and `logits`. Returns nonzero where the kernels do not serve the model.
extern "C" int smart_round(const Model* m, const Round* r, const Pass* pass, int threads) {
    typedef std::chrono::steady_clock clock;
    Built b;
    build(*r, b);
    Rows rows{int32_t(b.token.size()), int32_t(r->requests), b.query_start_loc.data(), b.block_table_start.data(), b.pages.data(), b.slot_mapping.data(),
              b.context_len.data(), b.ancestors_start.data(), b.ancestors.data(), b.position.data(), r->cosine, r->sine};
    std::vector<int64_t> best(rows.rows);
    Pass mine = *pass;
    mine.token = b.token.data(), mine.best = best.data();
    auto start = clock::now();
    if (int status = smart_forward(m, &rows, &mine, threads)) return status;
    auto computed = clock::now();
    walk(*r, b, best.data());
    auto walked = clock::now();
    commit(*r, b, *m, mine.aux_hidden, pass->aux_count * r->hidden);
    r->seconds[0] = std::chrono::duration<double>(computed - start).count();
    r->seconds[1] = std::chrono::duration<double>(clock::now() - walked).count();
    return 0;
}
