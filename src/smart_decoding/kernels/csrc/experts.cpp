// Mixtures of experts: a router's choice for each row, and one list of work for all panels of the
// experts that any row has.
//
// An expert's rows share its panels as the rows of a dense layer do, so that each of their sums has
// the same bits in any company. What its experts yield is added to a row in the order of their
// numbers. Experts that no row has are not read.

#include "experts.h"

#include <vector>

namespace [[gnu::visibility("hidden")]] smart {

// The most probable experts of a row, of equal ones the first, in the order of their numbers, and
// their weights; behind them the shared one. logits: of the router, which are lost.
static void choose_experts(const Layer& l, float* logits, int32_t* expert, float* weight) {
    const float most = *std::max_element(logits, logits + l.experts);
    float sum = 0, chosen = 0;
    for (int e = 0; e < l.experts; e++) sum += logits[e] = std::exp(logits[e] - most);
    for (int count = 0; count < l.per_token; count++) {
        const int best = int(std::max_element(logits, logits + l.experts) - logits);
        int at = count;
        for (; at && expert[at - 1] > best; at--) {
            expert[at] = expert[at - 1];
            weight[at] = weight[at - 1];
        }
        expert[at] = best;
        weight[at] = logits[best];
        chosen += logits[best];
        logits[best] = -1;  // less than any other
    }
    for (int j = 0; j < l.per_token; j++) weight[j] /= l.normalised ? chosen : sum;
    if (!l.shared) return;
    expert[l.per_token] = l.experts;
    weight[l.per_token] = 1 / (1 + std::exp(-logits[l.experts]));
}

// Which rows each expert has. A place is one of a row's experts: [rows, of_row].
struct ExpertRows {
    std::vector<int32_t> expert;  // those that any row has, ascending
    std::vector<int32_t> start;   // [expert.size() + 1] of their rows in `row`
    std::vector<int32_t> row;     // ascending for each expert
    std::vector<int32_t> slot;    // [places] where in `row` each is

    void sort(int networks, int of_row, int rows, const int32_t* chosen) {
        const int places = rows * of_row;
        std::vector<int32_t> next(networks + 1);
        for (int i = 0; i < places; i++) next[chosen[i] + 1]++;
        expert.clear();
        start.clear();
        for (int e = 0; e < networks; e++) {
            if (next[e + 1]) {
                expert.push_back(e);
                start.push_back(next[e]);
            }
            next[e + 1] += next[e];
        }
        start.push_back(places);
        row.resize(places);
        slot.resize(places);
        for (int i = 0; i < places; i++) {
            slot[i] = next[chosen[i]]++;
            row[slot[i]] = i / of_row;
        }
    }

    int count(int64_t i) const { return start[i + 1] - start[i]; }

    // The rows of x [rows, d] that expert number i of these has, one after another.
    const float* gather(int64_t i, const float* x, int64_t d, std::vector<float>& memory) const {
        if (count(i) == 1) return x + row[start[i]] * d;
        if (int64_t(memory.size()) < count(i) * d) memory.resize(count(i) * d);
        for (int j = 0; j < count(i); j++)
            memcpy(memory.data() + j * d, x + row[start[i] + j] * d, d * sizeof(float));
        return memory.data();
    }
};

// Calls `run(i, panels)` for the experts, by number, whose panels a thread takes; each has `each`.
template <class Run>
static void for_panels(int64_t experts, int64_t each, Run&& run) {
    Items items(experts * each);
    for (int64_t item = items.next(); item < items.count;) {
        const int64_t i = item / each;
        Panels panels(items, i * each, each, item);
        run(i, panels);
        item = panels.after();
    }
}

// to += x * by.
static inline void add_scaled(const float* x, float by, int64_t d, float* to) {
    const int64_t whole = d - d % VW;
    for (int64_t i = 0; i < whole; i += VW)
        storeu(to + i, loadu<vf>(to + i) + loadu<vf>(x + i) * by);
    for (int64_t i = whole; i < d; i++) to[i] += x[i] * by;
}

template <class W>
void add_experts(const Layer& l, int rows, const Workspace& workspace, float* x) {
    float* const normed = workspace.normed;
    const int networks = l.experts + l.shared, of_row = l.per_token + l.shared;
    const int64_t d = l.hidden, width = l.ffn, places = int64_t(rows) * of_row;
    float *logits = workspace.mixture, *weight = logits + int64_t(rows) * networks;
    int32_t* chosen = (int32_t*)(weight + places);
    float* outputs = weight + 2 * places;
    linear_rows<W>(normed, rows, l.router, networks, d, l.router_bias, logits, networks, false,
                   l.hint);
    barrier();
#pragma omp for schedule(static) nowait
    for (int r = 0; r < rows; r++)
        choose_experts(l, logits + int64_t(r) * networks, chosen + r * of_row, weight + r * of_row);
    barrier();
    static thread_local ExpertRows of;
    static thread_local std::vector<float> gathered;
    of.sort(networks, of_row, rows, chosen);
    const int64_t experts = int64_t(of.expert.size());
    if (workspace.awake && !omp_get_thread_num()) *workspace.awake += experts - l.shared;
    for_panels(experts, gated_panels_of(width), [&](int64_t i, Panels& panels) {
        const int64_t e = of.expert[i];
        const float* read = of.gather(i, normed, d, gathered);
        gated_panels<W>(l, e, l.expert_gate_up[e], read, of.count(i),
                        workspace.ffn + of.start[i] * width, panels);
    });
    barrier();
    for_panels(experts, panels_of(d), [&](int64_t i, Panels& panels) {
        const int64_t e = of.expert[i];
        const float* bias = l.down_bias ? l.down_bias + e * d : nullptr;
        linear_panels<W>(workspace.ffn + of.start[i] * width, of.count(i), l.expert_down[e], d,
                         width, bias, outputs + of.start[i] * d, d, false, l.hint, nullptr, panels);
    });
    barrier();
#pragma omp for schedule(static) nowait
    for (int r = 0; r < rows; r++) {
        float* total = normed + r * d;
        std::fill_n(total, d, 0.0f);
        for (int j = r * of_row; j < (r + 1) * of_row; j++)
            add_scaled(outputs + of.slot[j] * d, weight[j], d, total);
        if (l.ffn_norm) rms_norm_row(total, l.ffn_norm, l.eps, d, total);
        add_scaled(total, 1.0f, d, x + r * d);
    }
    barrier();
}

template void add_experts<bf16>(const Layer&, int, const Workspace&, float*);
template void add_experts<float>(const Layer&, int, const Workspace&, float*);

}  // namespace smart
