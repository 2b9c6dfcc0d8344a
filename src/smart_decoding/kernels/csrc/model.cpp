// The layers of a model and its forward.
//
// What a small decoder needs so that one token costs no more than reading its weights once: one
// team of threads runs all layers, and what lies between them stays in caches.

#include "attention.h"
#include "layers.h"
#include "workspace.h"

namespace [[gnu::visibility("hidden")]] smart {

// One layer, by a whole team. q, k and v read the norm of x, or `input`.
template <class W>
static void run_layer(const Layer& l, const Rows& in, const std::vector<QueryBlock>& blocks,
                      const float* input, float* x, const KvCache<W>& cache,
                      const Workspace& workspace) {
    const int64_t d = l.hidden, qkv_width = int64_t(l.heads + 2 * l.kv_heads) * l.head_dim;
    float *normed = workspace.normed, *qkv = workspace.qkv, *attention = workspace.attention;
    if (!input) {
        rms_norm_rows(x, l.input_norm, l.eps, in.rows, d, normed);
        barrier();
    }
    linear_rows<W>(input ? input : normed, in.rows, l.qkv, qkv_width, l.input, l.qkv_bias, qkv,
                   qkv_width, false, l.hint);
    barrier();
#pragma omp for schedule(static) nowait
    for (int r = 0; r < in.rows; r++)
        rope_and_store(l, in, r, qkv + r * qkv_width, l.heads, l.kv_heads, cache);
    barrier();
    attend(l, in, blocks, qkv, qkv_width, cache, attention);
    add_attention<W>(l, in.rows, attention, x, normed, qkv);
    if (l.experts)
        add_experts<W>(l, in.rows, workspace, x);
    else
        add_network<W>(l, in.rows, normed, x, workspace.ffn, qkv);
}

// Where hidden states are copied to between layers.
struct AuxHidden {
    const int32_t* layers;  // after how many layers
    int count;
    float* out;  // [rows, count, hidden]
};

// `count` layers one after another, by a whole team. cache: the first layer's; those of others
// follow it.
template <class W>
static void run_layers(const Layer* layers, int count, const Rows& in,
                       const std::vector<QueryBlock>& blocks, const float* input, float* x,
                       KvCache<W> cache, const Workspace& workspace, const AuxHidden& aux) {
    const int64_t d = layers->hidden,
                  layer_size = layers->kv_heads * cache.pages * layers->head_dim * PAGE;
    for (int i = 0, next = 0; i < count; i++) {
        run_layer<W>(layers[i], in, blocks, i ? nullptr : input, x, cache, workspace);
        cache.keys += layer_size;
        cache.values += layer_size;
        if (next == aux.count || aux.layers[next] != i + 1) continue;
#pragma omp for schedule(static) nowait
        for (int r = 0; r < in.rows; r++)
            memcpy(aux.out + (int64_t(r) * aux.count + next) * d, x + r * d, d * sizeof(float));
        next++;
    }
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

template <class W>
static void forward(const Model& m, const Rows& in, const Pass& pass, int threads) {
    const Layer& l = *m.layers;
    const int64_t rows = in.rows, wanted = pass.wanted ? pass.wanted_count : rows, d = l.hidden;
    const int64_t width = int64_t(l.heads) * l.head_dim,
                  qkv_width = std::max(width + 2 * int64_t(l.kv_heads) * l.head_dim, d);
    int64_t ffn = 0, mixture = 0;
    for (int i = 0; i < m.layer_count; i++) {
        ffn = std::max(ffn, ffn_floats(m.layers[i]));
        mixture = std::max(mixture, mixture_floats(m.layers[i]));
    }
    static thread_local WorkspaceMemory kept;
    WorkspaceMemory& memory = kept;
    memory.begin(rows * (2 * d + qkv_width + width + ffn + mixture) + wanted * d + 256);
    float* x = memory.take<float>(rows * d);
    Workspace workspace;
    workspace.awake = pass.experts;
    if (pass.experts) *pass.experts = 0;
    workspace.normed = memory.take<float>(rows * d);
    workspace.qkv = memory.take<float>(rows * qkv_width);
    workspace.attention = memory.take<float>(rows * width);
    workspace.ffn = memory.take<float>(rows * ffn);
    workspace.mixture = memory.take<float>(rows * mixture);
    float* normed = memory.take<float>(wanted * d);
    std::vector<Maxima> found(wanted * threads);
    const std::vector<QueryBlock> blocks = query_blocks<W>(in, l);
    const KvCache<W> cache{(W*)m.keys, (W*)m.values, m.pages};
    const AuxHidden aux{pass.aux_layers, pass.aux_count, pass.aux_hidden};
    run_team(threads, [&] {
        embed<W>(m, pass, rows, d, x);
        run_layers<W>(m.layers, m.layer_count, in, blocks, nullptr, x, cache, workspace, aux);
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < wanted; r++)
            rms_norm_row(x + (pass.wanted ? pass.wanted[r] : r) * d, m.final_norm, m.eps, d,
                         normed + r * d);
        barrier();
        Maxima* mine = found.data() + omp_get_thread_num() * wanted;
        linear_rows<W>(normed, int(wanted), m.output, m.vocab, d, nullptr, pass.logits, m.vocab,
                       false, m.hint, mine);
    });
    for (int64_t r = 0; r < wanted; r++) pass.best[r] = first_of(&found[r], threads, wanted);
}

}  // namespace smart

using namespace smart;

extern "C" {

int32_t smart_layers(const Layer* layers, int32_t count, const Rows* in, const float* input,
                     float* x, void* keys, void* values, int64_t pages, const Workspace* workspace,
                     int32_t w_bf16, int32_t kv_bf16, int32_t threads) {
    return dispatch_types(*layers, w_bf16, kv_bf16, [&](auto* type) {
        typedef std::remove_pointer_t<decltype(type)> W;
        const KvCache<W> cache{(W*)keys, (W*)values, pages};
        const std::vector<QueryBlock> blocks = query_blocks<W>(*in, *layers);
        run_team(threads, [&] {
            run_layers<W>(layers, count, *in, blocks, input, x, cache, *workspace,
                          AuxHidden{nullptr, 0, nullptr});
        });
    });
}

int32_t smart_forward(const Model* m, const Rows* in, const Pass* pass, int32_t threads) {
    return dispatch_types(*m->layers, m->w_bf16, m->kv_bf16, [&](auto* type) {
        forward<std::remove_pointer_t<decltype(type)>>(*m, *in, *pass, threads);
    });
}
}
