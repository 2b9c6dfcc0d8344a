// Draft heads: from hidden states and tokens to the best children, by one team of threads.

#include <vector>

#include "attention.h"
#include "layers.h"
#include "rows.h"
#include "sampling.h"

namespace [[gnu::visibility("hidden")]] smart {

// ----------------------------------------------------------------------------------- 8-bit outputs

// x [d] in 16 bits with 32768 added, the high and the low halves apart. Returns what a step is
// worth.
static inline float round_to_16_bits(const float* x, int64_t d, uint8_t* high, uint8_t* low) {
    float top = 1e-30f;
    for (int64_t i = 0; i < d; i++) top = std::max(top, std::fabs(x[i]));
    for (int64_t i = 0; i < d; i++) {
        int32_t value = int32_t(x[i] * (32767 / top) + 32768.5f);
        high[i] = uint8_t(value >> 8);
        low[i] = uint8_t(value);
    }
    return top / 32767;
}

// y = x w^T for pairs of rows, the high and the low halves of 16 bits, times the `step` of each
// pair and `scale`.
template <class W>
__attribute__((noinline)) static void byte_rows(const Input<W>* x, int rows, const W* w, int64_t n,
                                                int64_t k, const float* scale, const int32_t* sums,
                                                const float* step, float* y) {
    Items items(panels_of(n));
    Panels panels(items);
    gemm<INTO_CACHES>(x, k, rows, w, k, panels, [=](int row, int64_t column, vf left, vf right) {
        vi a = (vi)left, b = (vi)right;
        const bool low = row & 1;  // comes after the high half
        if (!low) {
            a -= 128 * loadu<vi>(sums + column);
            b -= 128 * loadu<vi>(sums + column + VW);
        }
        const float factor = low ? step[row / 2] : 256 * step[row / 2];
        vf first = __builtin_convertvector(a, vf) * loadu<vf>(scale + column) * factor;
        vf second = __builtin_convertvector(b, vf) * loadu<vf>(scale + column + VW) * factor;
        store_columns(y + row / 2 * n, column, n, first, second, low);
    });
}

// ------------------------------------------------------------------------------------ the children

// From states [wanted, hidden] to the best children, by a whole team.
template <class W>
struct Ranking {
    const Head& head;
    const Level& level;
    const int wanted;
    const int64_t d, n;
    const float* norm;  // of the states; null: the output matrix reads them as they are
    // Workspace: what the output matrix reads, what that is in bytes, and logits.
    float *inputs, *halves, *step, *logits;

    Ranking(const Head& h, const Level& v, int wanted_)
        : head(h),
          level(v),
          wanted(wanted_),
          d(h.layers->hidden),
          n(h.outputs_count),
          norm(h.feeds_back_normed ? nullptr : h.final_norm) {}

    int64_t floats() const { return wanted * (2 * d + n + 1) + 64; }
    void take(WorkspaceMemory& memory) {
        inputs = memory.take<float>(wanted * d);
        halves = memory.take<float>(wanted * d);
        step = memory.take<float>(wanted);
        logits = memory.take<float>(wanted * n);
    }

    // line: [max(hidden, k)] this thread's.
    void run(float* line) const {
        if (head.scale)
            byte_logits<int8_t>(line);
        else
            plain_logits();
        barrier();
#pragma omp for schedule(static) nowait
        for (int r = 0; r < wanted; r++) find_children(r, line);
    }

private:
    void plain_logits() const {
        if (norm) rms_norm_rows(level.out, norm, head.layers->eps, wanted, d, inputs);
        barrier();
        linear_rows<W>(norm ? inputs : level.out, wanted, head.outputs, n, d, nullptr, logits, n,
                       false);
    }

    void read_row(int r, float* to) const {
        if (norm)
            rms_norm_row(level.out + r * d, norm, head.layers->eps, d, to);
        else
            memcpy(to, level.out + r * d, d * sizeof(float));
    }

    // With 8-bit weights. Where CPUs multiply bytes, states are rounded to 16 bits, whose halves
    // are two rows of bytes.
    template <class B>
    void byte_logits(float* line) const {
        Input<B>* read = (Input<B>*)halves;
        if constexpr (std::is_same_v<Input<B>, uint8_t>) {
#pragma omp for schedule(static) nowait
            for (int r = 0; r < wanted; r++) {
                read_row(r, line);
                step[r] = round_to_16_bits(line, d, read + 2 * r * d, read + (2 * r + 1) * d);
            }
            barrier();
            byte_rows(read, 2 * wanted, (const B*)head.outputs.panels, n, d, head.scale, head.sums,
                      step, logits);
        } else {
#pragma omp for schedule(static) nowait
            for (int r = 0; r < wanted; r++) read_row(r, read + r * d);
            barrier();
            Items items(panels_of(n));
            Panels panels(items);
            gemm<INTO_CACHES>(read, d, wanted, (const B*)head.outputs.panels, d, panels,
                              [this](int row, int64_t column, vf left, vf right) {
                                  left *= loadu<vf>(head.scale + column);
                                  right *= loadu<vf>(head.scale + column + VW);
                                  store_columns(logits + row * n, column, n, left, right, false);
                              });
        }
    }

    void find_children(int r, float* line) const {
        int64_t* ids = level.tokens + int64_t(r) * level.k;
        const float scale = level.scale ? level.scale[r] : 1.0f;
        top_k_row(logits + r * n, n, level.k, scale, level.keys ? level.keys[r] : 0, head.tokens,
                  ids, line);
        for (int j = 0; j < level.k; j++) {
            ids[j] = head.tokens[ids[j]];
            level.probs[int64_t(r) * level.k + j] = line[j];
        }
    }
};

// --------------------------------------------------------------------------------------- a level

// Rows that wait are taken in parts, as thousands may: the workspace of all of them would be new to
// the process, and the first use of a page costs more than all work on it.
constexpr int PART_ROWS = 256;

// The last row of each request.
static std::vector<int32_t> last_rows(const Rows& in) {
    std::vector<int32_t> rows(in.requests);
    for (int i = 0; i < in.requests; i++) rows[i] = in.query_start_loc[i + 1] - 1;
    return rows;
}

// One level of a head, by a whole team: `run` on each thread. In the last layer a row that nobody
// asks for leaves its keys and values and does nothing else.
template <class W>
struct DraftLevel {
    const Head& head;
    const Rows& in;
    const Level& level;
    const Layer &first_layer, &last_layer;
    const bool all_wanted;
    const RowVectors lasts;
    const Rows wanted;
    const KvCache<W> cache;
    const KvColumns columns;
    const int64_t d;
    const int part;  // rows taken at once: all, where a layer before the last one runs
    const DeltaRows recurrent;
    const std::vector<QueryBlock> blocks, wanted_blocks;
    Ranking<W> ranking;
    Workspace workspace{};

    // Workspace. Of a part's rows: what fc or a layer reads, the states that enter a layer, and
    // keys beside values.
    float *inputs, *x, *kv;
    float* wanted_inputs;  // of the wanted rows, what EAGLE-3's first layer reads

    DraftLevel(const Head& h, const Rows& in_, const Level& v, const KvCache<W>& cache_,
               WorkspaceMemory& memory)
        : head(h),
          in(in_),
          level(v),
          first_layer(*h.layers),
          last_layer(h.layers[h.layer_count - 1]),
          all_wanted(!v.first || in_.rows == in_.requests),
          lasts(all_wanted ? RowVectors() : RowVectors(in_, last_rows(in_))),
          wanted(all_wanted ? in_ : lasts.view(in_)),
          cache(cache_),
          columns(last_layer),
          d(first_layer.hidden),
          part(all_wanted || h.layer_count > 1 ? in_.rows : std::min(in_.rows, PART_ROWS)),
          recurrent(in_, nullptr, 0),
          blocks(query_blocks<W>(h.layer_count > 1 ? in_ : Rows{}, first_layer)),
          wanted_blocks(query_blocks<W>(wanted, first_layer)),
          ranking(h, v, wanted.rows) {
        const LayerFloats floats(h.layers, h.layer_count);
        const int64_t rows = h.layer_count > 1 ? in.rows : wanted.rows;
        const int64_t widest = std::max<int64_t>(h.fused ? 0 : h.aux_count, 2) * d;
        memory.begin(part * (widest + d + columns.width) + wanted.rows * 2 * d
                     + rows * floats.of_row() + ranking.floats() + 256);
        inputs = memory.take<float>(part * widest);
        x = all_wanted ? level.out : memory.take<float>(part * d);
        wanted_inputs = all_wanted ? inputs : memory.take<float>(wanted.rows * 2 * d);
        kv = memory.take<float>(all_wanted ? 0 : part * columns.width);
        floats.take(memory, rows, workspace);
        ranking.take(memory);
    }

    void run() const {
        std::vector<float> line(std::max<int64_t>(d, level.k));
        Forward<W> forward{in, blocks, recurrent, workspace, cache, {nullptr, 0, 0, nullptr}};
        for (int first = 0; first < in.rows; first += part) {
            const int end = std::min(first + part, in.rows);
            read_rows(first, end, line.data());
            for (const Layer* l = &first_layer; l < &last_layer; l++)
                run_layer<W>(*l, forward, input_of(*l, inputs, x), x);
            if (!all_wanted) leave_keys(first, end, forward.cache);
        }
        Forward<W> asked{wanted,     wanted_blocks, recurrent,
                         workspace,  forward.cache, {nullptr, 0, 0, nullptr},
                         !all_wanted};
        run_layer<W>(last_layer, asked, input_of(last_layer, wanted_inputs, level.out), level.out);
        if (head.feeds_back_normed) {
            rms_norm_rows(level.out, head.final_norm, first_layer.eps, wanted.rows, d, level.out);
            barrier();
        }
        ranking.run(line.data());
    }

private:
    // What q, k and v of a layer read; null: the norm of x.
    const float* input_of(const Layer& l, const float* pairs, const float* states) const {
        if (l.input_norm) return nullptr;
        return head.fused ? states : pairs;
    }

    // The states of rows [first, end) that enter the first layer, into x, and what it reads.
    void read_rows(int first, int end, float* line) const {
        if (head.fused || level.first) {
            const int64_t width = head.fused ? 2 * d : head.aux_count * d;
#pragma omp for schedule(static) nowait
            for (int r = first; r < end; r++) read_row(r, inputs + (r - first) * width);
            barrier();
            linear_rows<W>(inputs, end - first, head.fc, d, width, head.fc_bias, x, d, false);
            barrier();
        }
#pragma omp for schedule(static) nowait
        for (int r = first; r < end; r++) {
            float* states = x + (r - first) * d;
            if (!head.fused)
                pair(r, states, inputs + (r - first) * 2 * d, line);
            else if (const float* given = picture(r))
                memcpy(states, given, d * sizeof(float));
        }
        barrier();
    }

    // What fc reads of a row.
    void read_row(int r, float* to) const {
        if (!head.fused) return read_aux_hidden(level.features[r], to);
        read_embedding(r, to);
        if (level.first)
            read_aux_hidden(level.features[r], to + d);
        else
            memcpy(to + d, level.features[r], d * sizeof(float));
        if (head.input_norm) rms_norm_row(to, head.input_norm, first_layer.eps, d, to);
        if (head.hidden_norm) rms_norm_row(to + d, head.hidden_norm, first_layer.eps, d, to + d);
    }

    // Aux hidden states [aux_count, hidden].
    void read_aux_hidden(const float* from, float* to) const {
        const int64_t width = head.aux_count * d, step = head.aux_together ? width : d;
        if (!head.aux_norm) memcpy(to, from, width * sizeof(float));
        for (int64_t at = 0; head.aux_norm && at < width; at += step)
            rms_norm_row(from + at, head.aux_norm + at, head.aux_eps, step, to + at);
    }

    const float* picture(int r) const { return level.embeddings ? level.embeddings[r] : nullptr; }

    void read_embedding(int r, float* out) const {
        if (const float* given = picture(r))
            memcpy(out, given, d * sizeof(float));
        else
            embedding_row<W>(head.embedding, head.table, d, level.token[r], out);
    }

    // EAGLE-3: [norm(embedding) ; norm(features)] of a row. states: fc's features, from then on the
    // residual.
    void pair(int r, float* states, float* to, float* line) const {
        const float* features = level.first ? states : level.features[r];
        read_embedding(r, line);
        rms_norm_row(line, head.input_norm, first_layer.eps, d, to);
        rms_norm_row(features, head.hidden_norm, first_layer.eps, d, to + d);
        if (head.norm_before_residual) features = to + d;
        if (features != states) memcpy(states, features, d * sizeof(float));
    }

    // The last layer's keys and values of rows [first, end). Of the wanted ones, states and inputs
    // are kept.
    void leave_keys(int first, int end, const KvCache<W>& to) const {
        const int rows = end - first;
        const Layer& l = last_layer;
#pragma omp for schedule(static) nowait
        for (int i = 0; i < wanted.rows; i++) {
            const int64_t at = in.query_start_loc[i + 1] - 1 - first;
            if (at < 0 || at >= rows) continue;
            memcpy(level.out + i * d, x + at * d, d * sizeof(float));
            if (!head.fused)
                memcpy(wanted_inputs + i * 2 * d, inputs + at * 2 * d, 2 * d * sizeof(float));
        }
        const float* read = input_of(l, inputs, x);
        if (!read) {
            barrier();
            rms_norm_rows(x, l.input_norm, l.eps, rows, d, inputs);
            barrier();
            read = inputs;
        }
        store_keys<W>(l, in, first, end, read, kv, to);
    }
};

}  // namespace smart

using namespace smart;

extern "C" int32_t smart_draft_level(const Head* h, const Rows* in, const Level* v, void* keys,
                                     void* values, int64_t pages, int32_t w_bf16, int32_t kv_bf16,
                                     int32_t threads) {
    return dispatch_types(*h->layers, w_bf16, kv_bf16, [&](auto* type) {
        typedef std::remove_pointer_t<decltype(type)> W;
        static thread_local WorkspaceMemory memory;
        const DraftLevel<W> level(*h, *in, *v, {(W*)keys, (W*)values, pages}, memory);
        run_team(threads, [&] { level.run(); });
    });
}
