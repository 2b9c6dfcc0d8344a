// Draft heads: from hidden states and tokens to the best children. EAGLE-3 of one layer by one team
// of threads, and without work on rows that nobody asks for; all others by the kernels of models.

#include <vector>

#include "attention.h"
#include "layers.h"
#include "sampling.h"
#include "workspace.h"

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

// What fc reads of a row's aux hidden states, [aux_count, hidden].
static void read_aux_hidden(const Head& head, const float* from, float* to) {
    const int64_t d = head.layers->hidden, width = head.aux_count * d;
    const int64_t step = head.aux_together ? width : d;
    if (!head.aux_norm) memcpy(to, from, width * sizeof(float));
    for (int64_t at = 0; head.aux_norm && at < width; at += step)
        rms_norm_row(from + at, head.aux_norm + at, head.aux_eps, step, to + at);
}

// ------------------------------------------------------------------------------ EAGLE-3, one layer

// Keys and values are the columns behind those of queries, from a panel's first one on.
struct DraftColumns {
    int64_t q_width, first, width;

    explicit DraftColumns(const Layer& l) {
        q_width = int64_t(l.heads) * l.head_dim;
        first = q_width / PANEL * PANEL;
        width = q_width + 2 * l.kv_heads * l.head_dim - first;
    }
};

// Rows that wait are taken in parts, as thousands may: the workspace of all of them would be new to
// the process, and the first use of a page costs more than all work on it.
constexpr int PART_ROWS = 256;

// The wanted rows as a forward of their own: they attend, and nothing else does.
struct WantedRows {
    Rows rows;
    std::vector<int32_t> place;  // [in.rows] of each row among the wanted ones, or -1
    std::vector<int32_t> query_start_loc, context_len, ancestors_start;

    WantedRows(const Rows& in, bool only_last) : rows(in), place(in.rows, -1) {
        if (!only_last) {
            for (int r = 0; r < in.rows; r++) place[r] = r;
            return;
        }
        for (int i = 0; i < in.requests; i++) {
            const int last = in.query_start_loc[i + 1] - 1;
            place[last] = i;
            query_start_loc.push_back(i);
            context_len.push_back(in.context_len[last]);
        }
        query_start_loc.push_back(in.requests);
        ancestors_start.assign(in.requests + 1, 0);
        rows.rows = in.requests;
        rows.query_start_loc = query_start_loc.data();
        rows.context_len = context_len.data();
        rows.ancestors_start = ancestors_start.data();
    }
    WantedRows(const WantedRows&) = delete;
};

// One level of a head, by a whole team: `run` on each thread.
template <class W>
struct DraftLevel {
    const Head& head;
    const Layer& layer;
    const Rows& in;
    const Level& level;
    const WantedRows& asking;
    const KvCache<W> cache;
    const DraftColumns columns;
    const int64_t d;
    const std::vector<QueryBlock> blocks;
    Ranking<W> ranking;

    // Workspace. Of a part's rows: what linear layers read, features, and keys beside values.
    float *inputs, *features, *kv;
    // Of the wanted rows: inputs of the layer, queries and what follows them.
    float *wanted_inputs, *q, *attention, *ffn;

    DraftLevel(const Head& h, const Rows& in_, const Level& v, const WantedRows& asking_,
               const KvCache<W>& cache_, WorkspaceMemory& memory)
        : head(h),
          layer(*h.layers),
          in(in_),
          level(v),
          asking(asking_),
          cache(cache_),
          columns(*h.layers),
          d(h.layers->hidden),
          blocks(query_blocks<W>(asking_.rows, *h.layers)),
          ranking(h, v, asking_.rows.rows) {
        const int64_t part = std::min(in.rows, PART_ROWS), wanted = asking.rows.rows;
        const int64_t widest = std::max(v.first ? h.aux_count * d : 0, 2 * d),
                      rows = std::max(part, wanted);
        memory.begin(rows * (widest + d + columns.width)
                     + wanted * (2 * columns.q_width + layer.ffn + 2 * d) + ranking.floats() + 256);
        inputs = memory.take<float>(rows * widest);
        wanted_inputs = memory.take<float>(wanted * 2 * d);
        attention = memory.take<float>(wanted * columns.q_width);
        ffn = memory.take<float>(wanted * layer.ffn);
        features = memory.take<float>(part * d);
        kv = memory.take<float>(part * columns.width);
        q = memory.take<float>(wanted * columns.q_width);
        ranking.take(memory);
    }

    void run() const {
        std::vector<float> line(std::max<int64_t>(d, level.k));
        for (int first = 0; first < in.rows; first += PART_ROWS)
            run_part(first, std::min(first + PART_ROWS, in.rows), line.data());
        run_wanted(line.data());
    }

    // Rows [first, end) to keys and values; of the wanted ones inputs and residuals are left. Rows
    // that nobody asks for leave keys and values only.
    void run_part(int first, int end, float* line) const {
        if (level.first) fuse_aux_hidden(first, end);
#pragma omp for schedule(static) nowait
        for (int r = first; r < end; r++) prepare_row(r, r - first, line);
        barrier();
        const Weight weight = columns_from<W>(layer.qkv, columns.first, 2 * d);
        const float* bias = layer.qkv_bias ? layer.qkv_bias + columns.first : nullptr;
        linear_rows<W>(inputs, end - first, weight, columns.width, 2 * d, bias, kv, columns.width,
                       false);
        barrier();
#pragma omp for schedule(static) nowait
        for (int r = first; r < end; r++) {
            float* keys = kv + (r - first) * columns.width + columns.q_width - columns.first;
            rope_and_store(layer, in, r, keys, 0, layer.kv_heads, cache);
        }
        barrier();
    }

    // The features of the first level: several layers' states side by side through fc.
    void fuse_aux_hidden(int first, int end) const {
        const int64_t width = head.aux_count * d;
#pragma omp for schedule(static) nowait
        for (int r = first; r < end; r++)
            read_aux_hidden(head, level.features[r], inputs + (r - first) * width);
        barrier();
        linear_rows<W>(inputs, end - first, head.fc, d, width, head.fc_bias, features, d, false);
        barrier();
    }

    // [norm(embedding) ; norm(features)] of row `r`, the part's `at`-th.
    void prepare_row(int r, int at, float* line) const {
        const float* row_features = level.first ? features + at * d : level.features[r];
        const float* embedding = line;
        if (level.embeddings && level.embeddings[r])
            embedding = level.embeddings[r];
        else
            embedding_row<W>(head.embedding, head.table, d, level.token[r], line);
        float* to = inputs + at * 2 * d;
        rms_norm_row(embedding, head.input_norm, layer.eps, d, to);
        rms_norm_row(row_features, head.hidden_norm, layer.eps, d, to + d);
        const int place = asking.place[r];
        if (place < 0) return;
        memcpy(wanted_inputs + place * 2 * d, to, 2 * d * sizeof(*to));
        float* x = level.out + place * d;
        if (head.norm_before_residual)
            rms_norm_row(row_features, head.hidden_norm, layer.eps, d, x);
        else
            memcpy(x, row_features, d * sizeof(float));
    }

    // The wanted rows, from inputs to the best children.
    void run_wanted(float* line) const {
        const int wanted = asking.rows.rows;
        const int64_t q_width = columns.q_width;
        linear_rows<W>(wanted_inputs, wanted, layer.qkv, q_width, 2 * d, layer.qkv_bias, q, q_width,
                       false);
        barrier();
#pragma omp for schedule(static) nowait
        for (int r = 0; r < in.rows; r++)
            if (asking.place[r] >= 0)
                rope_and_store(layer, in, r, q + asking.place[r] * q_width, layer.heads, 0, cache);
        barrier();
        attend(layer, asking.rows, blocks, q, q_width, cache, attention);
        add_attention<W>(layer, wanted, attention, level.out, inputs, nullptr);
        add_network<W>(layer, wanted, inputs, level.out, ffn, nullptr);
        ranking.run(line);
    }
};

// ----------------------------------------------------------------------------------- other heads

// A level by the kernels of models, one after another. Returns their status.
template <class W>
struct SteppedLevel {
    const Head& head;
    const Rows& in;
    const Level& level;
    const int threads;
    const int64_t d, rows, wanted, states;
    Ranking<W> ranking;
    float *features, *pairs, *scratch, *x;
    Workspace workspace{};

    static constexpr bool BF16 = sizeof(W) == 2;

    SteppedLevel(const Head& h, const Rows& in_, const Level& v, int threads_,
                 WorkspaceMemory& memory)
        : head(h),
          in(in_),
          level(v),
          threads(threads_),
          d(h.layers->hidden),
          rows(in_.rows),
          wanted(v.first ? in_.requests : in_.rows),
          states(v.first && !h.fused ? h.aux_count * d : d),
          ranking(h, v, int(wanted)) {
        int64_t width = 0, input = 0, attention = 0, ffn = 0, mixture = 0;
        for (const Layer* l = h.layers; l < h.layers + h.layer_count; l++) {
            width = std::max({width, products_width(*l), d});
            input = std::max<int64_t>({input, l->input, d});
            attention = std::max(attention, mixed_width(*l));
            ffn = std::max(ffn, ffn_floats(*l));
            mixture = std::max(mixture, mixture_floats(*l));
        }
        const int64_t widest = std::max(states, 2 * d);
        memory.begin(rows
                         * (states + 2 * d + widest + d + input + width + attention + ffn + mixture)
                     + ranking.floats() + 256);
        features = memory.take<float>(rows * states);
        pairs = memory.take<float>(rows * 2 * d);
        scratch = memory.take<float>(rows * widest);
        x = memory.take<float>(rows * d);
        workspace.normed = memory.take<float>(rows * input);
        workspace.qkv = memory.take<float>(rows * width);
        workspace.attention = memory.take<float>(rows * attention);
        workspace.ffn = memory.take<float>(rows * ffn);
        workspace.mixture = memory.take<float>(rows * mixture);
        ranking.take(memory);
    }

    int32_t run(void* keys, void* values, int64_t pages) {
        for (int64_t r = 0; r < rows; r++) read_features(r);
        const float* input = head.fused ? fuse() : pair();
        if (const int32_t status = smart_layers(head.layers, head.layer_count, &in, input, x, keys,
                                                values, pages, &workspace, BF16, BF16, threads))
            return status;
        for (int64_t i = 0; i < wanted; i++) {
            const int64_t r = level.first ? in.query_start_loc[i + 1] - 1 : i;
            if (head.feeds_back_normed)
                rms_norm_row(x + r * d, head.final_norm, head.layers->eps, d, level.out + i * d);
            else
                memcpy(level.out + i * d, x + r * d, d * sizeof(float));
        }
        run_team(threads, [&] {
            std::vector<float> line(std::max<int64_t>(d, level.k));
            ranking.run(line.data());
        });
        return 0;
    }

private:
    // Features of a row, or the aux hidden states that fc makes them of.
    void read_features(int64_t r) {
        float* to = features + r * states;
        if (level.first)
            read_aux_hidden(head, level.features[r], to);
        else
            memcpy(to, level.features[r], states * sizeof(float));
    }

    const float* picture(int64_t r) const {
        return level.embeddings ? level.embeddings[r] : nullptr;
    }

    void read_embedding(int64_t r, float* out) const {
        if (const float* given = picture(r))
            memcpy(out, given, d * sizeof(float));
        else
            embedding_row<W>(head.embedding, head.table, d, level.token[r], out);
    }

    void linear(const float* from, int64_t k, float* to) {
        smart_linear(from, int32_t(rows), &head.fc, d, k, BF16, nullptr, 0, head.fc_bias, scratch,
                     to, d, 0, INTO_CACHES, nullptr, threads);
    }

    // The states that enter the first layer, into x. It reads them as they are in EAGLE-1/2,
    // through a norm of its own in others (null).
    const float* fuse() {
        for (int64_t r = 0; r < rows; r++) {
            float* of = pairs + r * 2 * d;
            read_embedding(r, of);
            memcpy(of + d, features + r * d, d * sizeof(float));
            if (head.input_norm) rms_norm_row(of, head.input_norm, head.layers->eps, d, of);
            if (head.hidden_norm)
                rms_norm_row(of + d, head.hidden_norm, head.layers->eps, d, of + d);
        }
        linear(pairs, 2 * d, x);
        for (int64_t r = 0; r < rows; r++)
            if (const float* given = picture(r)) memcpy(x + r * d, given, d * sizeof(float));
        if (head.layers->input_norm) return nullptr;
        memcpy(features, x, rows * d * sizeof(float));
        return features;
    }

    // EAGLE-3: the residual into x; what the first layer reads is returned.
    const float* pair() {
        const float eps = head.layers->eps;
        if (level.first)
            linear(features, states, x);
        else
            memcpy(x, features, rows * d * sizeof(float));
        for (int64_t r = 0; r < rows; r++) {
            float *of = pairs + r * 2 * d, *normed = of + d;
            read_embedding(r, of);
            rms_norm_row(of, head.input_norm, eps, d, of);
            rms_norm_row(x + r * d, head.hidden_norm, eps, d, normed);
            if (head.norm_before_residual) memcpy(x + r * d, normed, d * sizeof(float));
        }
        return pairs;
    }
};

}  // namespace smart

using namespace smart;

extern "C" int32_t smart_draft_level(const Head* h, const Rows* in, const Level* v, void* keys,
                                     void* values, int64_t pages, int32_t w_bf16, int32_t kv_bf16,
                                     int32_t threads) {
    int32_t status = 0;
    const int32_t refused = dispatch_types(*h->layers, w_bf16, kv_bf16, [&](auto* type) {
        typedef std::remove_pointer_t<decltype(type)> W;
        static thread_local WorkspaceMemory memory;
        if (h->fused || h->layer_count > 1 || h->feeds_back_normed) {
            status = SteppedLevel<W>(*h, *in, *v, threads, memory).run(keys, values, pages);
            return;
        }
        const WantedRows asking(*in, v->first);
        const DraftLevel<W> level(*h, *in, *v, asking, KvCache<W>{(W*)keys, (W*)values, pages},
                                  memory);
        run_team(threads, [&] { level.run(); });
    });
    return refused ? refused : status;
}
