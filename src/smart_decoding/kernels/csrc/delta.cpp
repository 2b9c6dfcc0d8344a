// Linear attention by the gated delta rule (Yang et al. 2025, arXiv 2412.06464): of each row
//
//     S <- keep S;  delta = learn (v - S^T k);  S <- S + k delta^T;  out = S^T q
//
// with a head's state S [key_dim, value_dim]. Its columns are independent: a thread takes COLUMNS
// of them and walks through all rows of a request. A prompt's rows change the block of the state
// where it lies. A tree's nodes go depth first, by one block for each depth, and leave the state as
// it is. Each row goes through the same operations in the same order in any company, so its bits
// tell neither what was drafted nor how a prompt was cut.
//
// A row's outer product is added while the next one is multiplied with the state, so that a block
// is read once for each row. S^T q after that sum is keep (S^T q) + (k q) delta before it.

#include "delta.h"

namespace [[gnu::visibility("hidden")]] smart {

// -------------------------------------------------------------------------------------- the rows

DeltaRows::DeltaRows(const Rows& in, const States* states, int kernel) : all(in.rows) {
    if (!states) return;
    for (int g = 0; g < in.requests; g++) {
        Request r{};
        r.slot = in.states ? in.states[g] : -1;
        r.row = in.query_start_loc[g];
        r.fresh = r.slot < 0 || in.context_len[r.row] == 1;
        r.waiting = r.fresh ? 0 : states->waiting[r.slot];
        r.first_waiting = all;
        all += r.waiting;
        requests.push_back(r);
    }
    request.resize(all);
    window.resize(int64_t(all) * kernel);
    number.assign(in.rows, -1);
    int32_t node = 0;
    for (int g = 0; g < in.requests; g++) {
        Request& r = requests[g];
        const int32_t end = in.query_start_loc[g + 1];
        std::fill_n(request.begin() + r.first_waiting, r.waiting, g);
        std::fill(request.begin() + r.row, request.begin() + end, g);
        for (int32_t i = 0; i < r.waiting; i++)
            begin(r.first_waiting + i, r, i, past(kernel - 1 + i), kernel);
        int32_t row = r.row;
        for (; row < end && in.ancestors_start[row] == in.ancestors_start[row + 1]; row++)
            if (row == r.row)
                begin(row, r, r.waiting, row, kernel);
            else
                follow(row, row - 1, row, kernel);
        r.committed = row - r.row;
        while (row < end) number[row++] = node++;
        add_nodes(in, r, end, kernel);
    }
}

void DeltaRows::begin(int32_t row, const Request& r, int32_t before, int32_t own, int kernel) {
    int32_t* inputs = &window[int64_t(row) * kernel];
    for (int i = 0; i + 1 < kernel; i++) inputs[i] = r.fresh ? NOTHING : past(before + i);
    inputs[kernel - 1] = own;
}

void DeltaRows::follow(int32_t row, int32_t parent, int32_t own, int kernel) {
    int32_t* inputs = &window[int64_t(row) * kernel];
    std::copy_n(&window[int64_t(parent) * kernel] + 1, kernel - 1, inputs);
    inputs[kernel - 1] = own;
}

void DeltaRows::add_nodes(const Rows& in, Request& r, int32_t end, int kernel) {
    const int32_t root = r.row + r.committed - 1, count = end - root;
    std::vector<int32_t> child(count, -1), next(count, -1), last(count, -1);  // from the root on
    for (int32_t row = root + 1; row < end; row++) {
        const int32_t* path = in.ancestors + in.ancestors_start[row];
        const int32_t depth = in.ancestors_start[row + 1] - in.ancestors_start[row];
        int32_t parent = root;
        if (depth > 1)
            for (parent = row - 1; in.slot_mapping[parent] != path[depth - 2];) parent--;
        follow(row, parent, row, kernel);
        int32_t& before = last[parent - root];
        (before < 0 ? child[parent - root] : next[before]) = row - root;
        before = row - root;
        deepest = std::max(deepest, depth);
    }
    r.first_node = int32_t(nodes.size());
    std::vector<Node> ahead;
    if (child[0] >= 0) ahead.push_back({child[0], 1, true});
    while (!ahead.empty()) {
        const Node node = ahead.back();
        ahead.pop_back();
        nodes.push_back({root + node.row, node.depth, node.first});
        if (next[node.row] >= 0) ahead.push_back({next[node.row], node.depth, false});
        if (child[node.row] >= 0) ahead.push_back({child[node.row], node.depth + 1, true});
    }
    r.end_node = int32_t(nodes.size());
}

void DeltaRows::finish(const States& states) const {
    for (const Request& r : requests)
        if (r.slot >= 0) states.waiting[r.slot] = 0;
}

// -------------------------------------------------------------------------------- a block's walk

// What a row adds to a block: keep S + k delta^T.
struct Outer {
    static constexpr int VECTORS = COLUMNS / VW;

    float keep;
    const float* k;
    vf delta[VECTORS];
};

// Sums that go on at once, so that none waits for the one before.
constexpr int SUMS = Outer::VECTORS < 4 ? 4 / Outer::VECTORS : 1;
static_assert(COLUMNS % VW == 0);

// A pass over a block, which may lie in one place before and after. ADDS: adds a row's outer
// product. READS: multiplies what is there then with k and q of the next row. key_dim is whole
// SUMS. ahead: a block to be fetched meanwhile.
template <bool ADDS, bool READS, bool FETCHES>
static inline void pass(const float* from, float* to, int64_t key_dim, const Outer& outer,
                        const float* k, const float* q, vf* found, vf* out, const float* ahead) {
    constexpr int V = Outer::VECTORS;
    vf of_k[SUMS][V] = {}, of_q[SUMS][V] = {};
    for (int64_t i = 0; i < key_dim; i += SUMS) {
        for (int part = 0; part < SUMS; part++)
            for (int v = 0; v < V; v++) {
                const int64_t at = (i + part) * COLUMNS + v * VW;
                vf s = loadu<vf>(from + at);
                if constexpr (ADDS) {
                    s *= outer.keep;
                    finish_product(s);
                    s += outer.delta[v] * outer.k[i + part];
                    storeu(to + at, s);
                }
                if constexpr (READS) {
                    of_k[part][v] += s * k[i + part];
                    of_q[part][v] += s * q[i + part];
                }
            }
        if constexpr (FETCHES)
            for (int part = 0; part < SUMS; part++)
                __builtin_prefetch(ahead + (i + part) * COLUMNS, 1, INTO_L2);
    }
    if constexpr (READS)
        for (int v = 0; v < V; v++) {
            found[v] = of_k[0][v];
            out[v] = of_q[0][v];
            for (int part = 1; part < SUMS; part++) {
                found[v] += of_k[part][v];
                out[v] += of_q[part][v];
            }
        }
}

// One layer's recurrence, by a whole team.
struct Recurrence {
    const Delta& w;
    const DeltaSizes sizes;
    const DeltaRows& rows;
    const int count;  // rows of the forward
    const DeltaMemory& memory;
    // Workspace. products: [count, channels + values], of q, k, v and of gates; rates: [count, 2
    // value_heads]. mixed: [all, stride] what the convolution makes of q, k and v, which are
    // normed. keep, learn: [all, value_heads]; qk: [all, key_heads] products of q and k.
    const float *products, *rates;
    float *mixed, *keep, *learn, *qk;
    float* out;  // [count, values]
    float eps;

    Recurrence(const Layer& l, const DeltaRows& rows_, int count_, const Workspace& workspace,
               const DeltaMemory& memory_)
        : w(*l.delta),
          sizes(w),
          rows(rows_),
          count(count_),
          memory(memory_),
          products(workspace.qkv),
          rates(workspace.delta),
          out(workspace.attention),
          eps(l.eps) {
        const int64_t all = rows.all;
        keep = workspace.delta + int64_t(count) * 2 * w.value_heads;
        learn = keep + all * w.value_heads;
        qk = learn + all * w.value_heads;
        mixed = qk + all * w.key_heads;  // the last: columns that fill a block are read behind it
    }

    void run() const {
        mix();
        keep_nodes();
        barrier();
        keep_inputs();
        walk();
        barrier();
        finish();
        barrier();
    }

private:
    int64_t product_width() const { return sizes.channels + sizes.values; }

    float* past(const DeltaRows::Request& r) const {
        const States& s = *memory.states;
        const int64_t place = r.slot * s.layers + memory.layer;
        return s.inputs + place * (w.kernel - 1 + s.room) * sizes.inputs;
    }

    // What a row's convolution read or reads, null: zeros.
    const float* source(int32_t row, int tap) const {
        const int32_t at = rows.window[int64_t(row) * w.kernel + tap];
        if (at >= 0) return products + at * product_width();
        if (at == DeltaRows::NOTHING) return nullptr;
        return past(rows.requests[rows.request[row]]) - (at + 1) * sizes.inputs;
    }

    // ------------------------------------------------------------ what comes before the state

    void mix() const {
        const int64_t items = int64_t(rows.all) * w.key_heads;
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < items; item++)
            mix_head(int32_t(item / w.key_heads), item % w.key_heads);
    }

    // q, k and v of a row's key head, normed, and what its value heads keep and learn.
    void mix_head(int32_t row, int64_t head) const {
        const bool waits = row >= count;  // then only the state is asked for
        const int64_t dim = w.key_dim;
        float *to = mixed + row * sizes.stride, *q = to + head * dim, *k = q + sizes.keys;
        convolve(row, sizes.keys + head * dim, dim);
        normalise(k, 1.0f);
        if (!waits) {
            convolve(row, head * dim, dim);
            normalise(q, 1.0f / std::sqrt(float(dim)));
            qk[row * w.key_heads + head] = dot(q, k);
        }
        const float* rate =
            waits ? source(row, w.kernel - 1) + sizes.channels : rates + row * 2 * w.value_heads;
        for (int64_t i = 0; i < sizes.each; i++) {
            const int64_t h = sizes.value_head(head, i), at = row * w.value_heads + h;
            convolve(row, 2 * sizes.keys + h * w.value_dim, w.value_dim);
            keep[at] = std::exp(w.decay[h] * softplus(rate[h] + w.bias[h]));
            learn[at] = 1.0f / (1.0f + std::exp(-rate[w.value_heads + h]));
        }
    }

    static float softplus(float x) {
        return std::max(x, 0.0f) + std::log1p(std::exp(-std::fabs(x)));
    }

    // Channels from `first` on, after SiLU. Inputs before a request's first row are zeros.
    void convolve(int32_t row, int64_t first, int64_t channels) const {
        const float* inputs[MOST_INPUTS];
        int oldest = 0;
        for (int tap = 0; tap < w.kernel; tap++) {
            inputs[tap] = source(row, tap);
            if (!inputs[tap]) oldest = tap + 1;
        }
        float* to = mixed + row * sizes.stride;
        const int64_t whole = first + channels - channels % VW;
        for (int64_t i = first; i < whole; i += VW) {
            vf sum = {};
            for (int tap = oldest; tap < w.kernel; tap++)
                sum += loadu<vf>(w.convolution + tap * sizes.channels + i)
                       * loadu<vf>(inputs[tap] + i);
            storeu(to + i, sum / (1.0f + vexp(-sum)));
        }
        for (int64_t i = whole; i < first + channels; i++) {
            float sum = 0;
            for (int tap = oldest; tap < w.kernel; tap++)
                sum += w.convolution[tap * sizes.channels + i] * inputs[tap][i];
            to[i] = sum / (1.0f + std::exp(-sum));
        }
    }

    float dot(const float* a, const float* b) const {
        const int64_t whole = w.key_dim - w.key_dim % VW;
        vf sums = {};
        for (int64_t i = 0; i < whole; i += VW) sums += loadu<vf>(a + i) * loadu<vf>(b + i);
        float sum = sum_in_order(sums);
        for (int64_t i = whole; i < w.key_dim; i++) sum += a[i] * b[i];
        return sum;
    }

    // x / |x| * by
    void normalise(float* x, float by) const {
        const float scale = by / std::sqrt(dot(x, x) + 1e-6f);
        for (int64_t i = 0; i < w.key_dim; i++) x[i] *= scale;
    }

    // ---------------------------------------------------------------------- what is remembered

    void keep_nodes() const {
        if (!memory.nodes) return;
#pragma omp for schedule(static) nowait
        for (int row = 0; row < count; row++) {
            if (rows.number[row] < 0) continue;
            float* to = memory.nodes + rows.number[row] * sizes.inputs;
            memcpy(to, products + row * product_width(), sizes.channels * sizeof(float));
            memcpy(to + sizes.channels, rates + int64_t(row) * 2 * w.value_heads,
                   2 * w.value_heads * sizeof(float));
        }
    }

    // The convolution's last inputs, when all have read those before.
    void keep_inputs() const {
#pragma omp for schedule(static) nowait
        for (size_t g = 0; g < rows.requests.size(); g++) {
            const DeltaRows::Request& r = rows.requests[g];
            if (r.slot < 0) continue;
            // What moves within them moves towards their beginning.
            for (int i = 0; i + 1 < w.kernel; i++) {
                const float* from = source(r.row + r.committed - 1, i + 1);
                float* to = past(r) + i * sizes.inputs;
                if (from)
                    memcpy(to, from, sizes.channels * sizeof(float));
                else
                    std::fill_n(to, sizes.channels, 0.0f);
            }
        }
    }

    // ------------------------------------------------------------------------------- the state

    void walk() const {
        static thread_local CacheLines kept;  // [deepest + 1] blocks
        const size_t lines = (rows.deepest + 1) * sizes.block * sizeof(float) / sizeof(CacheLine);
        if (kept.size() < lines) kept.resize(lines);
        const int64_t each = w.value_heads * sizes.blocks;
        Items items(int64_t(rows.requests.size()) * each);
        for (int64_t item; (item = items.next()) < items.count;)
            walk_block(rows.requests[item / each], item % each, (float*)kept.data());
    }

    // Of a row, what its key and value say of a block, from the sums `found` and `out`; the outer
    // product that it adds is returned.
    Outer rule(int32_t row, int64_t head, int64_t column, const vf* found, vf* sum) const {
        const int64_t key_head = sizes.key_head(head), at = row * w.value_heads + head;
        const float* mine = mixed + row * sizes.stride;
        Outer outer;
        outer.keep = keep[at];
        outer.k = mine + sizes.keys + key_head * w.key_dim;
        const float* v = mine + 2 * sizes.keys + head * w.value_dim + column;
        for (int i = 0; i < Outer::VECTORS; i++) {
            outer.delta[i] = (loadu<vf>(v + i * VW) - found[i] * outer.keep) * learn[at];
            if (row >= count) continue;
            sum[i] = sum[i] * outer.keep + outer.delta[i] * qk[row * w.key_heads + key_head];
        }
        return outer;
    }

    void put(int32_t row, int64_t head, int64_t column, const vf* sum) const {
        float* to = out + row * sizes.values + head * w.value_dim + column;
        const int64_t left = std::min<int64_t>(COLUMNS, w.value_dim - column);
        for (int i = 0; i < Outer::VECTORS; i++)
            for (int64_t j = i * VW; j < std::min<int64_t>(left, (i + 1) * VW); j++)
                to[j] = sum[i][j - i * VW];
    }

    // scratch: this thread's; its first block is the state of rows that have none.
    void walk_block(const DeltaRows::Request& r, int64_t item, float* scratch) const {
        const int64_t head = item / sizes.blocks, column = item % sizes.blocks * COLUMNS;
        const int64_t key_head = sizes.key_head(head), dim = w.key_dim;
        const States& s = *memory.states;
        float* state = scratch;
        if (r.slot >= 0)
            state =
                s.states + (r.slot * s.layers + memory.layer) * sizes.state + item * sizes.block;
        if (r.fresh) std::fill_n(state, sizes.block, 0.0f);
        auto keys = [&](int32_t row) {
            return mixed + row * sizes.stride + sizes.keys + key_head * dim;
        };
        vf found[Outer::VECTORS], sum[Outer::VECTORS];
        Outer outer{};
        for (int32_t i = -r.waiting; i < r.committed; i++) {
            const int32_t row = i < 0 ? r.first_waiting + r.waiting + i : r.row + i;
            const float* k = keys(row);
            if (i == -r.waiting)
                pass<false, true, true>(state, state, dim, outer, k, k - sizes.keys, found, sum,
                                        state + sizes.block);
            else
                pass<true, true, false>(state, state, dim, outer, k, k - sizes.keys, found, sum,
                                        nullptr);
            outer = rule(row, head, column, found, sum);
            if (i >= 0) put(row, head, column, sum);
        }
        pass<true, false, false>(state, state, dim, outer, nullptr, nullptr, nullptr, nullptr,
                                 nullptr);
        if (r.first_node < r.end_node) walk_nodes(r, head, column, state, scratch);
    }

    // The state below a node of depth d lies in block d of the scratch, from when its first child
    // has come.
    void walk_nodes(const DeltaRows::Request& r, int64_t head, int64_t column, float* state,
                    float* scratch) const {
        static thread_local std::vector<Outer> kept;
        if (int64_t(kept.size()) <= rows.deepest) kept.resize(rows.deepest + 1);
        Outer* outer = kept.data();
        const int64_t dim = w.key_dim;
        auto below = [&](int32_t depth) { return depth ? scratch + depth * sizes.block : state; };
        vf found[Outer::VECTORS], sum[Outer::VECTORS];
        for (int32_t i = r.first_node; i < r.end_node; i++) {
            const auto [row, depth, first] = rows.nodes[i];
            const float* q = mixed + row * sizes.stride + sizes.key_head(head) * dim;
            const float* k = q + sizes.keys;
            if (first && depth > 1)
                pass<true, true, false>(below(depth - 2), below(depth - 1), dim, outer[depth - 1],
                                        k, q, found, sum, nullptr);
            else
                pass<false, true, false>(below(depth - 1), nullptr, dim, outer[depth], k, q, found,
                                         sum, nullptr);
            outer[depth] = rule(row, head, column, found, sum);
            put(row, head, column, sum);
        }
    }

    // --------------------------------------------------------------- what comes after the state

    // Each head's output, normed, times SiLU of its gates.
    void finish() const {
        const int64_t items = int64_t(count) * w.value_heads;
#pragma omp for schedule(static) nowait
        for (int64_t item = 0; item < items; item++) {
            const int64_t row = item / w.value_heads, head = item % w.value_heads;
            float* x = out + item * w.value_dim;
            rms_norm_row(x, w.norm, eps, w.value_dim, x);
            gate(x, products + row * product_width() + sizes.channels + head * w.value_dim);
        }
    }

    void gate(float* x, const float* gates) const {
        const int64_t whole = w.value_dim - w.value_dim % VW;
        for (int64_t i = 0; i < whole; i += VW) {
            const vf g = loadu<vf>(gates + i);
            storeu(x + i, loadu<vf>(x + i) * (g / (1.0f + vexp(-g))));
        }
        for (int64_t i = whole; i < w.value_dim; i++)
            x[i] *= gates[i] / (1.0f + std::exp(-gates[i]));
    }
};

template <class W>
void add_delta(const Layer& l, const DeltaRows& rows, int count, const Workspace& workspace,
               const DeltaMemory& memory) {
    const Delta& w = *l.delta;
    linear_rows<W>(workspace.normed, count, w.rates, 2 * w.value_heads, l.hidden, nullptr,
                   workspace.delta, 2 * w.value_heads, false, l.hint);
    barrier();
    Recurrence(l, rows, count, workspace, memory).run();
}

template void add_delta<bf16>(const Layer&, const DeltaRows&, int, const Workspace&,
                              const DeltaMemory&);
template void add_delta<float>(const Layer&, const DeltaRows&, int, const Workspace&,
                               const DeltaMemory&);

}  // namespace smart

using namespace smart;

extern "C" {

void smart_advance(const Model* m, const float* nodes, int64_t count, int64_t requests,
                   const int64_t* states, const int64_t* path, const int64_t* accepted,
                   int32_t threads) {
    const States& s = *m->states;
    const Delta& w = *delta_of(m->layers, m->layer_count);
    const DeltaSizes sizes(w);
    const int64_t slot_rows = w.kernel - 1 + s.room;
#pragma omp parallel for num_threads(threads)
    for (int64_t layer = 0; layer < s.layers; layer++) {
        const int64_t* next = path;
        for (int64_t i = 0; i < requests; next += accepted[i++])
            for (int64_t j = 0; states[i] >= 0 && j < accepted[i]; j++)
                memcpy(s.inputs
                           + ((states[i] * s.layers + layer) * slot_rows + w.kernel - 1 + j)
                                 * sizes.inputs,
                       nodes + (layer * count + next[j]) * sizes.inputs,
                       sizes.inputs * sizeof(float));
    }
    for (int64_t i = 0; i < requests; i++)
        if (states[i] >= 0) s.waiting[states[i]] = int32_t(accepted[i]);
}
}
