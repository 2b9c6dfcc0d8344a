// What the layers of a target and of a draft head have in common.

#pragma once
#include "abi.h"
#include "linear.h"

namespace [[gnu::visibility("hidden")]] smart {

// What follows attention in a layer, by a whole team: x += attention w^T, then the gated part.
// `normed` [rows, hidden] and `ffn` [rows, ffn] are workspace.
template <class W>
static void finish_layer(const Layer& l, int rows, const Input<W>* attention, float* x,
                         Input<W>* normed, Input<W>* ffn) {
    const int64_t d = l.hidden, width = int64_t(l.heads) * l.head_dim;
    linear_rows<W>(attention, width, rows, l.output, d, width, l.output_bias, x, d, true, l.hint);
    barrier();
    rms_norm_rows(x, l.post_norm, l.eps, rows, d, normed);
    barrier();
    gated_rows<W>(normed, rows, l.gate_up, l.ffn, d, ffn, l.hint);
    barrier();
    linear_rows<W>(ffn, l.ffn, rows, l.down, d, l.ffn, nullptr, x, d, true, l.hint);
    barrier();
}

// The embedding of a token, from packed weights or from a plain table.
template <class W>
static void embedding_row(const Weight& packed, const void* table, int64_t d, int64_t token,
                          float* out) {
    if (!table) return unpack_row<W>(packed, d, token, out);
    for (int64_t i = 0; i < d; i++) out[i] = to_f32(((const W*)table)[token * d + i]);
}

}  // namespace smart
