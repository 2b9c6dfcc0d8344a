// The layers of a model and its forward.
//
// What a small decoder needs so that one token costs no more than reading its weights once: one
// team of threads runs all layers, and what lies between them stays in caches.

#include <algorithm>

#include "layers.h"
#include "rows.h"

namespace [[gnu::visibility("hidden")]] smart {

// Attention's outputs times the sigmoid of their gates, by a whole team.
static void gate_rows(const Layer& l, int rows, const float* products, float* attention) {
    const int64_t width = mixed_width(l), all = products_width(l);
#pragma omp for schedule(static) nowait
    for (int r = 0; r < rows; r++) {
        const float* gates = products + r * all + (all - width);
        float* x = attention + r * width;
        for (int64_t i = 0; i < width; i += VW)  // whole vectors, as head dimensions are
            storeu(x + i, loadu<vf>(x + i) / (1.0f + vexp(-loadu<vf>(gates + i))));
    }
    barrier();
}

// Attention of a layer into Workspace's `attention`, by a whole team, from the products in `qkv`.
template <class W>
static void add_softmax(const Layer& l, const Forward<W>& forward) {
    const Rows& in = forward.in;
    const Workspace& workspace = forward.workspace;
    const int64_t width = products_width(l);
    const int kv_heads = forward.stored ? 0 : l.kv_heads;
#pragma omp for schedule(static) nowait
    for (int r = 0; r < in.rows; r++)
        rope_and_store(l, in, r, workspace.qkv + r * width, l.heads, kv_heads, forward.cache);
    barrier();
    attend(l, in, forward.blocks, workspace.qkv, width, forward.cache, workspace.attention);
    if (l.gated) gate_rows(l, in.rows, workspace.qkv, workspace.attention);
}

template <class W>
void run_layer(const Layer& l, Forward<W>& forward, const float* input, float* x) {
    const Rows& in = forward.in;
    const Workspace& workspace = forward.workspace;
    const int64_t d = l.hidden, width = products_width(l);
    float *normed = workspace.normed, *qkv = workspace.qkv;
    if (!input) {
        rms_norm_rows(x, l.input_norm, l.eps, in.rows, d, normed);
        barrier();
    }
    const int64_t columns = forward.stored && !l.gated ? mixed_width(l) : width;  // gates lie last
    linear_rows<W>(input ? input : normed, in.rows, l.qkv, columns, l.input, l.qkv_bias, qkv, width,
                   false, l.hint);
    barrier();
    if (l.delta) {
        add_delta<W>(l, forward.recurrent, in.rows, workspace, forward.memory);
        forward.memory.next(DeltaSizes(*l.delta));
    } else {
        add_softmax<W>(l, forward);
        const int64_t size = l.kv_heads * forward.cache.pages * l.head_dim * PAGE;
        forward.cache.keys += size;
        forward.cache.values += size;
    }
    add_attention<W>(l, in.rows, workspace.attention, x, normed, qkv);
    if (l.experts)
        add_experts<W>(l, in.rows, workspace, x);
    else
        add_network<W>(l, in.rows, normed, x, workspace.ffn, qkv);
}

template void run_layer(const Layer&, Forward<bf16>&, const float*, float*);
template void run_layer(const Layer&, Forward<float>&, const float*, float*);

// Where hidden states are copied to between layers.
struct AuxHidden {
    const int32_t* layers;  // after how many layers
    int count;
    float* out;  // [rows, count, hidden]
};

// `count` layers one after another, by a whole team, each thread with its own `forward`.
template <class W>
static void run_layers(const Layer* layers, int count, Forward<W>& forward, const float* input,
                       float* x, const AuxHidden& aux) {
    const int64_t d = layers->hidden;
    for (int i = 0, next = 0; i < count; i++) {
        run_layer<W>(layers[i], forward, i ? nullptr : input, x);
        if (next == aux.count || aux.layers[next] != i + 1) continue;
#pragma omp for schedule(static) nowait
        for (int r = 0; r < forward.in.rows; r++)
            memcpy(aux.out + (int64_t(r) * aux.count + next) * d, x + r * d, d * sizeof(float));
        next++;
    }
}

// The first layer with attention.
static const Layer& attention_of(const Layer* layers, int count) {
    for (int i = 0; i < count; i++)
        if (!layers[i].delta) return layers[i];
    return *layers;
}

template <class W>
static void scaled_embedding(const Model& m, int64_t d, int64_t token, float* x) {
    embedding_row<W>(m.embedding, m.table, d, token, x);
    for (int64_t i = 0; i < d; i++) x[i] *= m.embedding_scale;
}

// The states that enter the first layer, by a whole team.
template <class W>
static void embed(const Model& m, const Pass& pass, int64_t rows, int64_t d, float* x) {
#pragma omp for schedule(static) nowait
    for (int64_t r = 0; r < rows; r++) {
        if (pass.embeddings && pass.embeddings[r])
            memcpy(x + r * d, pass.embeddings[r], d * sizeof(float));
        else
            scaled_embedding<W>(m, d, pass.token[r], x + r * d);
    }
    barrier();
}

// The rows whose states after the last layer are read: the others of a prompt leave keys and values
// there, and that is all.
struct WantedRows {
    std::vector<int32_t> which;  // ascending; empty where the last layer runs for all
    bool all = true;
    RowVectors vectors;

    WantedRows(const Model& m, const Rows& in, const Pass& pass) {
        const Layer& last = m.layers[m.layer_count - 1];
        const bool read = pass.aux_count && pass.aux_layers[pass.aux_count - 1] == m.layer_count;
        if (!pass.wanted || read || last.delta) return;
        which.assign(pass.wanted, pass.wanted + pass.wanted_count);
        std::sort(which.begin(), which.end());
        which.erase(std::unique(which.begin(), which.end()), which.end());
        all = int64_t(which.size()) == in.rows;
        if (!all) vectors = RowVectors(in, which);
    }
    // Where a row lies.
    int64_t place(int64_t row) const {
        return all ? row : std::lower_bound(which.begin(), which.end(), row) - which.begin();
    }
};

// The last layer for some rows. x: the states of all that enter it; to: theirs. kv is workspace.
template <class W>
static void run_last_layer(const Layer& l, const WantedRows& wanted, Forward<W>& forward,
                           Forward<W>& asked, const float* x, float* to) {
    const int64_t d = l.hidden;
    const Rows& in = forward.in;
    const Workspace& workspace = forward.workspace;
    rms_norm_rows(x, l.input_norm, l.eps, in.rows, d, workspace.normed);
    barrier();
    store_keys<W>(l, in, 0, in.rows, workspace.normed, workspace.qkv, forward.cache);
    if (!asked.in.rows) return;
#pragma omp for schedule(static) nowait
    for (int r = 0; r < asked.in.rows; r++)
        memcpy(to + r * d, x + wanted.which[r] * d, d * sizeof(float));
    barrier();
    asked.cache = forward.cache;
    run_layer<W>(l, asked, nullptr, to);
}

template <class W>
static void forward(const Model& m, const Rows& in, const Pass& pass, int threads) {
    const Layer& l = attention_of(m.layers, m.layer_count);
    const Delta* delta = delta_of(m.layers, m.layer_count);
    const int64_t rows = in.rows, wanted = pass.wanted ? pass.wanted_count : rows, d = l.hidden;
    const DeltaRows recurrent(in, delta ? m.states : nullptr, delta ? delta->kernel : 0);
    const LayerFloats floats(m.layers, m.layer_count);
    const int64_t of_delta = delta ? delta_floats(*delta, rows, recurrent.all) : 0;
    static thread_local WorkspaceMemory kept;
    WorkspaceMemory& memory = kept;
    memory.begin(rows * (d + floats.of_row()) + 2 * wanted * d + of_delta + 256);
    float* x = memory.take<float>(rows * d);
    Workspace workspace;
    workspace.awake = pass.experts;
    if (pass.experts) *pass.experts = 0;
    floats.take(memory, rows, workspace);
    workspace.delta = memory.take<float>(of_delta);
    float* normed = memory.take<float>(wanted * d);
    const WantedRows some(m, in, pass);
    float* last = some.all ? x : memory.take<float>(wanted * d);  // states after the last layer
    const Rows asked = some.vectors.view(in);
    const std::vector<QueryBlock> asked_blocks = query_blocks<W>(some.all ? Rows{} : asked, l);
    std::vector<Maxima> found(wanted * threads);
    const std::vector<QueryBlock> blocks = query_blocks<W>(in, l);
    const AuxHidden aux{pass.aux_layers, pass.aux_count, pass.aux_hidden};
    const Forward<W> forward{in,
                             blocks,
                             recurrent,
                             workspace,
                             {(W*)m.keys, (W*)m.values, m.pages},
                             {m.states, 0, recurrent.kept(), pass.nodes}};
    run_team(threads, [&] {
        embed<W>(m, pass, rows, d, x);
        Forward<W> mine = forward;
        run_layers<W>(m.layers, m.layer_count - !some.all, mine, nullptr, x, aux);
        if (!some.all) {
            Forward<W> theirs{asked,     asked_blocks, recurrent,
                              workspace, mine.cache,   {nullptr, 0, 0, nullptr},
                              true};
            run_last_layer<W>(m.layers[m.layer_count - 1], some, mine, theirs, x, last);
        }
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < wanted; r++)
            rms_norm_row(last + some.place(pass.wanted ? pass.wanted[r] : r) * d, m.final_norm,
                         m.eps, d, normed + r * d);
        barrier();
        Maxima* best = found.data() + omp_get_thread_num() * wanted;
        linear_rows<W>(normed, int(wanted), m.output, m.vocab, d, nullptr, pass.logits, m.vocab,
                       false, m.hint, best);
    });
    for (int64_t r = 0; r < wanted; r++) pass.best[r] = first_of(&found[r], threads, wanted);
    if (delta) recurrent.finish(*m.states);
}

}  // namespace smart

using namespace smart;

extern "C" {

int32_t smart_layers(const Layer* layers, int32_t count, const Rows* in, const float* input,
                     float* x, void* keys, void* values, int64_t pages, const Workspace* workspace,
                     int32_t w_bf16, int32_t kv_bf16, int32_t threads) {
    return dispatch_types(*layers, w_bf16, kv_bf16, [&](auto* type) {
        typedef std::remove_pointer_t<decltype(type)> W;
        const std::vector<QueryBlock> blocks = query_blocks<W>(*in, *layers);
        const DeltaRows none(*in, nullptr, 0);
        const Forward<W> forward{
            *in, blocks, none, *workspace, {(W*)keys, (W*)values, pages}, {nullptr, 0, 0, nullptr}};
        run_team(threads, [&] {
            Forward<W> mine = forward;
            run_layers<W>(layers, count, mine, input, x, AuxHidden{nullptr, 0, nullptr});
        });
    });
}

int32_t smart_forward(const Model* m, const Rows* in, const Pass* pass, int32_t threads) {
    const Layer& l = attention_of(m->layers, m->layer_count);
    return dispatch_types(l, m->w_bf16, m->kv_bf16, [&](auto* type) {
        forward<std::remove_pointer_t<decltype(type)>>(*m, *in, *pass, threads);
    });
}
}
