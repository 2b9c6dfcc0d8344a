// What the layers of a target and of a draft head have in common.

#pragma once
#include "abi.h"
#include "attention.h"
#include "delta.h"
#include "experts.h"
#include "workspace.h"

namespace [[gnu::visibility("hidden")]] smart {

// What a layer's output matrix reads of a row.
static inline int64_t mixed_width(const Layer& l) {
    return l.delta ? DeltaSizes(*l.delta).values : int64_t(l.heads) * l.head_dim;
}

// And what the products that its q, k, v and gates come from have of one.
static inline int64_t products_width(const Layer& l) {
    if (l.delta) return DeltaSizes(*l.delta).channels + mixed_width(l);
    return mixed_width(l) * (l.gated ? 2 : 1) + 2 * int64_t(l.kv_heads) * l.head_dim;
}

// Floats of a row in the parts of a Workspace that layers of attention and networks use.
struct LayerFloats {
    int64_t hidden, products, mixed = 0, ffn = 0, mixture = 0;

    LayerFloats(const Layer* layers, int count) : hidden(layers->hidden), products(layers->hidden) {
        for (const Layer* l = layers; l < layers + count; l++) {
            products = std::max(products, products_width(*l));
            mixed = std::max(mixed, mixed_width(*l));
            ffn = std::max(ffn, ffn_floats(*l));
            mixture = std::max(mixture, mixture_floats(*l));
        }
    }

    int64_t of_row() const { return hidden + products + mixed + ffn + mixture; }
    void take(WorkspaceMemory& memory, int64_t rows, Workspace& to) const {
        to.normed = memory.take<float>(rows * hidden);
        to.qkv = memory.take<float>(rows * products);
        to.attention = memory.take<float>(rows * mixed);
        to.ffn = memory.take<float>(rows * ffn);
        to.mixture = memory.take<float>(rows * mixture);
    }
};

// What the layers of a forward have in common.
template <class W>
struct Forward {
    const Rows& in;
    const std::vector<QueryBlock>& blocks;
    const DeltaRows& recurrent;
    const Workspace& workspace;
    KvCache<W> cache;     // of the next layer with attention
    DeltaMemory memory;   // of the next layer with linear attention
    bool stored = false;  // the rows' keys and values lie in the cache already
};

// One layer, by a whole team, each thread with its own `forward`. q, k and v read the norm of x, or
// `input`.
template <class W>
void run_layer(const Layer& l, Forward<W>& forward, const float* input, float* x);

// Keys and values are the columns of products behind those of queries, from a panel's first one on.
struct KvColumns {
    int64_t first, begin, width;

    explicit KvColumns(const Layer& l) {
        const int64_t q_width = int64_t(l.heads) * l.head_dim;
        first = q_width / PANEL * PANEL;
        begin = q_width - first;
        width = begin + 2 * int64_t(l.kv_heads) * l.head_dim;
    }
};

// Only keys and values of rows [first, end), into the cache, by a whole team. read: what q, k and v
// read of them; kv: workspace of so many columns.
template <class W>
static void store_keys(const Layer& l, const Rows& in, int first, int end, const float* read,
                       float* kv, const KvCache<W>& to) {
    const KvColumns columns(l);
    const Weight weight = columns_from<W>(l.qkv, columns.first, l.input);
    const float* bias = l.qkv_bias ? l.qkv_bias + columns.first : nullptr;
    linear_rows<W>(read, end - first, weight, columns.width, l.input, bias, kv, columns.width,
                   false, l.hint);
    barrier();
#pragma omp for schedule(static) nowait
    for (int r = first; r < end; r++) {
        float* keys = kv + (r - first) * columns.width + columns.begin;
        rope_and_store(l, in, r, keys, 0, l.kv_heads, to);
    }
    barrier();
}

// x += input w^T + bias, or if there is a norm what it makes of that. `added` [rows, hidden] is
// workspace.
template <class W>
static void add_linear(const Layer& l, int rows, const float* input, int64_t k, const Weight& w,
                       const float* bias, const float* norm, float* x, float* added) {
    const int64_t d = l.hidden;
    linear_rows<W>(input, rows, w, d, k, bias, norm ? added : x, d, !norm, l.hint);
    barrier();
    if (!norm) return;
    add_norm_rows(added, norm, l.eps, rows, d, x);
    barrier();
}

// What attention adds to x, and the norm of that, by a whole team. `normed` [rows, hidden] and,
// with norms of what is added, `added` [rows, hidden] are workspace.
template <class W>
static void add_attention(const Layer& l, int rows, const float* attention, float* x, float* normed,
                          float* added) {
    add_linear<W>(l, rows, attention, mixed_width(l), l.output, l.output_bias, l.attention_norm, x,
                  added);
    rms_norm_rows(x, l.post_norm, l.eps, rows, l.hidden, normed);
    barrier();
}

// What the one network of a layer adds to x, likewise. `ffn` [rows, ffn] is workspace.
template <class W>
static void add_network(const Layer& l, int rows, const float* normed, float* x, float* ffn,
                        float* added) {
    Items items(gated_panels_of(l.ffn));
    Panels panels(items);
    gated_panels<W>(l, 0, l.gate_up, normed, rows, ffn, panels);
    barrier();
    add_linear<W>(l, rows, ffn, l.ffn, l.down, l.down_bias, l.ffn_norm, x, added);
}

// The embedding of a token, from packed weights or from a plain table.
template <class W>
static void embedding_row(const Weight& packed, const void* table, int64_t d, int64_t token,
                          float* out) {
    if (!table) return unpack_row<W>(packed, d, token, out);
    for (int64_t i = 0; i < d; i++) out[i] = to_f32(((const W*)table)[token * d + i]);
}

}  // namespace smart
