// CPU kernels: what a small decoder needs so that one token costs no more than reading its weights once.
//
// Weights are bf16 (or fp32); sums are fp32. What a linear layer reads is fp32, or bf16 where the CPU multiplies pairs of
// bf16 (AVX512-BF16: half the instructions for a row). Each output is summed in one fixed order that depends neither
// on how many rows the forward has nor on where a key lies in memory: a row's result is bitwise the same alone, in a
// batch, in a chunk of a prompt and as a node of a draft tree.
//
// Compiled at first use by native/build.py with -O3 -march=native -fopenmp; plain C interface, called through ctypes.

#include "attention.h"
#include "abi.h"
#include "linear.h"
#include "sampling.h"

// Attention of all rows over the keys and values of one layer, by a whole team. q: [rows, ldq].
template <class T, int HD, class O>
static void attend_blocks(const Layer& l, const Rows& in, const std::vector<Block>& blocks, const float* q, int64_t ldq, const T* kc,
                          const T* vc, int64_t pages, O* out) {
    const int kv = l.kv_heads, heads = l.heads / kv, items = int(blocks.size()) * kv, team = omp_get_num_threads();
    const int64_t plane = pages * HD * PAGE, ldo = int64_t(l.heads) * HD;
    auto item = [&](int i) {
        const Block& block = blocks[i / kv];
        int64_t h = i % kv;
        return Item<T>{block, kc + h * plane, vc + h * plane, in.block_tables + in.block_table_start[block.group], h * heads * HD};
    };
    #pragma omp for schedule(dynamic, 1)  // contexts differ; a thread's next item is most likely the one a team further
    for (int i = 0; i < items; i++) {
        if constexpr (PAIRED<T, HD>) attend_pairs<HD>(in, item(i), item(std::min(i + team, items - 1)), heads, q, ldq, out, ldo);
        else attend<T, HD>(in, item(i), heads, q, ldq, out, ldo);
    }
}

// What follows attention in a layer: x += attention w^T, then the gated part. `room` and `ffn` are scratch.
template <class W>
static void finish_layer(const Layer& l, int rows, const Input<W>* attention, float* x, Input<W>* room, Input<W>* ffn) {
    int64_t d = l.hidden, width = int64_t(l.heads) * l.head_dim;
    linear_rows(attention, width, rows, (const W*)l.output, d, width, l.output_bias, x, d, true, l.hint);
    #pragma omp barrier
    rms_norm_rows(x, l.post_norm, l.eps, rows, d, room);
    #pragma omp barrier
    gated_rows(room, rows, (const W*)l.gate_up, l.ffn, d, ffn, l.hint);
    #pragma omp barrier
    linear_rows(ffn, l.ffn, rows, (const W*)l.down, d, l.ffn, nullptr, x, d, true, l.hint);
    #pragma omp barrier
}

// One layer, run by a whole team.
template <class W, class T, int HD>
static void layer_run(const Layer& l, const Rows& in, const std::vector<Block>& blocks, const float* input, float* x, T* kc, T* vc,
                      int64_t pages, const Workspace& s) {
    int rows = in.rows, heads = l.heads, kv = l.kv_heads;
    int64_t d = l.hidden, qkv_width = int64_t(heads + 2 * kv) * HD;
    Input<W> *room = (Input<W>*)s.normed, *attention = (Input<W>*)s.attention, *ffn = (Input<W>*)s.ffn;
    const Input<W>* normed = room;
    if (input) normed = rounded(input, rows, l.input, room);
    else {
        rms_norm_rows(x, l.input_norm, l.eps, rows, d, room);
        #pragma omp barrier
    }
    linear_rows(normed, l.input, rows, (const W*)l.qkv, qkv_width, l.input, l.qkv_bias, s.qkv, qkv_width, false, l.hint);
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int r = 0; r < rows; r++)
        rope_and_store<T, HD>(in, r, s.qkv + r * qkv_width, heads, kv, l.q_norm, l.k_norm, l.eps, kc, vc, pages);
    attend_blocks<T, HD>(l, in, blocks, s.qkv, qkv_width, kc, vc, pages, attention);
    finish_layer<W>(l, rows, attention, x, room, ffn);
}

// `count` layers one after another, by a whole team; after aux_layers[0], aux_layers[1], ... of them, x is copied next to each other into
// `aux_hidden`.
template <class W, class T, int HD>
static void run_layers(const Layer* layers, int count, const Rows& in, const std::vector<Block>& blocks, const float* input, float* x,
                       T* kc, T* vc, int64_t pages, const Workspace& s, const int32_t* aux_layers, int aux_count, float* aux_hidden) {
    int64_t plane = layers[0].kv_heads * pages * HD * PAGE, d = layers[0].hidden;
    for (int i = 0, tap = 0; i < count; i++) {
        layer_run<W, T, HD>(layers[i], in, blocks, i ? nullptr : input, x, kc + i * plane, vc + i * plane, pages, s);
        if (tap == aux_count || aux_layers[tap] != i + 1) continue;
        #pragma omp for schedule(static) nowait
        for (int r = 0; r < in.rows; r++) memcpy(aux_hidden + (int64_t(r) * aux_count + tap) * d, x + r * d, d * sizeof(float));
        tap++;
    }
}

template <class W, class T, int HD>
static void layers_run(const Layer* layers, int count, const Rows& in, const float* input, float* x, T* kc, T* vc, int64_t pages,
                       const Workspace& s, int threads) {
    const std::vector<Block> blocks = blocks_of<T, HD>(in, layers[0].heads / layers[0].kv_heads);
    #pragma omp parallel num_threads(threads)
    run_layers<W, T, HD>(layers, count, in, blocks, input, x, kc, vc, pages, s, nullptr, 0, nullptr);
}

template <class W> static void embedding_row(const void* packed, const void* table, int64_t d, int64_t token, float* out) {
    if (packed) unpack_row((const W*)packed, d, token, out);
    else for (int64_t i = 0; i < d; i++) out[i] = to_f32(((const W*)table)[token * d + i]);
}

template <class W>
static void linear_run(const float* x, int rows, const W* w, int64_t n, int64_t k, const float* norm, float eps,
                       const float* bias, float* scratch, float* y, int64_t ldy, int add, int hint, int64_t* best, int threads) {
    Input<W>* room = (Input<W>*)scratch;
    std::vector<Maxima> found(best ? size_t(rows) * threads : 0);
    #pragma omp parallel num_threads(threads)
    {
        const Input<W>* input = room;
        if (norm) {
            rms_norm_rows(x, norm, eps, rows, k, room);
            #pragma omp barrier
        } else input = rounded(x, rows, k, room);
        Maxima* mine = best ? &found[omp_get_thread_num() * rows] : nullptr;
        linear_rows(input, k, rows, w, n, k, bias, y, ldy, add, hint, mine);
    }
    for (int r = 0; best && r < rows; r++) best[r] = first_of(&found[r], threads, rows);
}

template <class T>
static void move_kv(T* k, T* v, int64_t planes, int64_t pages, int head_dim, const int32_t* from, const int32_t* to, int count) {
    const Order order(sizeof(T), head_dim);
    for (int64_t p = 0; p < planes; p++, k += pages * PAGE * head_dim, v += pages * PAGE * head_dim)
        for (int i = 0; i < count; i++) {
            order.copy_key(k, to[i], k, from[i]);
            order.copy_value(v, to[i], v, from[i]);
        }
}

// ------------------------------------------------------------------------------------------------------------ draft head

// Workspace memory that is kept, since large blocks are costly to allocate anew.
struct Pool {
    std::vector<float> block;
    size_t used = 0;
    explicit Pool(size_t floats) : block(floats) {}
    void begin(size_t floats) {  // anew, with room for as many
        if (block.size() < floats) *this = Pool(floats + floats / 4);
        used = 0;
    }
    template <class V> V* take(int64_t count) {
        V* p = (V*)(block.data() + used);
        used += (count * sizeof(V) + 63) / 64 * 16;
        return p;
    }
};

template <class W, class T, int HD>
static void forward_run(const Model& m, const Rows& in, const Pass& p, int threads) {
    const Layer& l = m.layers[0];
    int64_t rows = in.rows, wanted = p.wanted ? p.wanted_count : rows, d = l.hidden, width = int64_t(l.heads) * HD;
    int64_t qkv_width = width + 2 * int64_t(l.kv_heads) * HD;
    static thread_local Pool kept(0);
    Pool& pool = kept;
    pool.begin(rows * (2 * d + qkv_width + width + l.ffn) + wanted * d + 256);
    float* x = pool.take<float>(rows * d);
    Workspace s{pool.take<float>(rows * d), pool.take<float>(rows * qkv_width), pool.take<float>(rows * width),
              pool.take<float>(rows * l.ffn)};
    Input<W>* normed = pool.take<Input<W>>(wanted * d);
    std::vector<Maxima> found(wanted * threads);
    const std::vector<Block> blocks = blocks_of<T, HD>(in, l.heads / l.kv_heads);
    #pragma omp parallel num_threads(threads)
    {
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < rows; r++) {
            if (p.embeddings && p.embeddings[r]) memcpy(x + r * d, p.embeddings[r], d * sizeof(float));
            else embedding_row<W>(m.embedding, m.table, d, p.token[r], x + r * d);
        }
        run_layers<W, T, HD>(m.layers, m.layer_count, in, blocks, nullptr, x, (T*)m.keys, (T*)m.values, m.pages, s, p.aux_layers, p.aux_count,
                             p.aux_hidden);
        #pragma omp for schedule(static)
        for (int64_t r = 0; r < wanted; r++)
            rms_norm_row(x + (p.wanted ? p.wanted[r] : r) * d, m.final_norm, m.eps, d, normed + r * d);
        linear_rows(normed, d, wanted, (const W*)m.output, m.vocab, d, nullptr, p.logits, m.vocab, false, m.hint,
                    &found[omp_get_thread_num() * wanted]);
    }
    for (int64_t r = 0; r < wanted; r++) p.best[r] = first_of(&found[r], threads, wanted);
}

#if defined(__AVX512VNNI__)
// y = x w^T for pairs of rows, the high and the low halves of 16 bits with 32768 added, times `step` of each pair and `scale`.
__attribute__((noinline)) static void byte_rows(const uint8_t* x, int rows, const int8_t* w, int64_t n, int64_t k, const float* scale,
                        const int32_t* sums, const float* step, float* y) {
    gemm<INTO_CACHES>(x, k, rows, w, n, k, [=](int row, int64_t column, vf left, vf right) {
        vi a = (vi)left, b = (vi)right;
        bool low = row & 1;  // comes after the high half
        if (!low) { a -= 128 * loadu<vi>(sums + column); b -= 128 * loadu<vi>(sums + column + VW); }
        float factor = low ? step[row / 2] : 256 * step[row / 2];
        vf first = __builtin_convertvector(a, vf) * loadu<vf>(scale + column) * factor;
        vf second = __builtin_convertvector(b, vf) * loadu<vf>(scale + column + VW) * factor;
        store_columns(y + row / 2 * n, column, n, first, second, low);
    });
}

// [wanted, count] logits of x [wanted, hidden] with 8-bit weights. x is rounded to 16 bits, whose halves are two rows of
// 8 bits. normed [hidden] is this thread's.
static void byte_outputs(const Head& h, const float* x, int wanted, float* normed, void* room, float* step, float* logits) {
    int64_t d = h.layer.hidden, n = h.outputs_count;
    #pragma omp for schedule(static)
    for (int r = 0; r < wanted; r++) {
        rms_norm_row(x + r * d, h.final_norm, h.layer.eps, d, normed);
        float top = 1e-30f;
        for (int64_t i = 0; i < d; i++) top = std::max(top, std::fabs(normed[i]));
        step[r] = top / 32767;
        uint8_t *high = (uint8_t*)room + 2 * r * d, *low = high + d;
        for (int64_t i = 0; i < d; i++) {
            int32_t value = int32_t(normed[i] * (32767 / top) + 32768.5f);
            high[i] = value >> 8;
            low[i] = value;
        }
    }
    byte_rows((const uint8_t*)room, 2 * wanted, (const int8_t*)h.outputs, n, d, h.scale, h.sums, step, logits);
}
#else
// [wanted, count] logits of x [wanted, hidden] with 8-bit weights.
static void byte_outputs(const Head& h, const float* x, int wanted, float*, void* room, float*, float* logits) {
    int64_t d = h.layer.hidden, n = h.outputs_count;
    float* normed = (float*)room;
    rms_norm_rows(x, h.final_norm, h.layer.eps, wanted, d, normed);
    #pragma omp barrier
    gemm<INTO_CACHES>(normed, d, wanted, (const int8_t*)h.outputs, n, d, [=, &h](int row, int64_t column, vf left, vf right) {
        left *= loadu<vf>(h.scale + column);
        right *= loadu<vf>(h.scale + column + VW);
        store_columns(logits + row * n, column, n, left, right, false);
    });
}
#endif

// What a draft head's rows pass through. Of `part` rows at a time: their inputs, features and keys beside values; of the
// `wanted` ones, in order of `place` [rows] (-1: nobody asks): inputs, queries and what follows them.
template <class W>
struct DraftRoom {
    Input<W> *room, *asked, *attention, *ffn;
    float *g, *kv, *q, *normed, *step, *logits;
    const int32_t* place;
};

// Keys and values are the columns behind those of queries, from a panel's first one on.
template <int HD>
struct DraftColumns {
    int64_t q_width, first, width;

    explicit DraftColumns(const Layer& l)
        : q_width(int64_t(l.heads) * HD), first(q_width / PANEL * PANEL), width(q_width + 2 * l.kv_heads * HD - first) {}
};

// Rows [first, end) from features and tokens to keys and values; of the wanted ones inputs and residuals are left.
template <class W, class T, int HD>
static void draft_part(const Head& h, const Rows& in, const Level& v, const DraftRoom<W>& b, int first, int end, float* line,
                       T* kc, T* vc, int64_t pages) {
    const Layer& l = h.layer;
    const DraftColumns<HD> columns(l);
    int64_t d = l.hidden, read = h.aux_count * d;
    if (v.first) {
        #pragma omp for schedule(static)
        for (int r = first; r < end; r++)
            for (int t = 0; t < h.aux_count; t++) {
                const float* tap = v.features[r] + t * d;
                Input<W>* to = b.room + (r - first) * read + t * d;
                if (h.aux_norm) rms_norm_row(tap, h.aux_norm, l.eps, d, to);
                else for (int64_t i = 0; i < d; i++) from_f32(tap[i], to + i);
            }
        linear_rows(b.room, read, end - first, (const W*)h.fc, d, read, h.fc_bias, b.g, d, false);
        #pragma omp barrier
    }
    #pragma omp for schedule(static)
    for (int r = first; r < end; r++) {
        const float* features = v.first ? b.g + (r - first) * d : v.features[r];
        const float* embedding = line;
        if (v.embeddings && v.embeddings[r]) embedding = v.embeddings[r];
        else embedding_row<W>(h.embedding, h.table, d, v.token[r], line);
        Input<W>* to = b.room + (r - first) * 2 * d;
        rms_norm_row(embedding, h.input_norm, l.eps, d, to);
        rms_norm_row(features, h.hidden_norm, l.eps, d, to + d);
        if (b.place[r] < 0) continue;
        memcpy(b.asked + b.place[r] * 2 * d, to, 2 * d * sizeof(*to));
        float* x = v.out + b.place[r] * d;
        if (h.norm_before_residual) rms_norm_row(features, h.hidden_norm, l.eps, d, x);
        else memcpy(x, features, d * sizeof(float));
    }
    const W* weight = (const W*)l.qkv + columns.first * 2 * d;
    const float* bias = l.qkv_bias ? l.qkv_bias + columns.first : nullptr;
    linear_rows(b.room, 2 * d, end - first, weight, columns.width, 2 * d, bias, b.kv, columns.width, false);
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int r = first; r < end; r++) {
        float* keys = b.kv + (r - first) * columns.width + columns.q_width - columns.first;
        rope_and_store<T, HD>(in, r, keys, 0, l.kv_heads, nullptr, l.k_norm, l.eps, kc, vc, pages);
    }
}

// The wanted rows, from inputs to the best children. `asking`, `blocks`: as attention sees them.
template <class W, class T, int HD>
static void draft_asked(const Head& h, const Rows& in, const Level& v, const DraftRoom<W>& b, const Rows& asking,
                        const std::vector<Block>& blocks, float* line, T* kc, T* vc, int64_t pages) {
    const Layer& l = h.layer;
    int wanted = asking.rows;
    int64_t d = l.hidden, q_width = int64_t(l.heads) * HD, n = h.outputs_count;
    linear_rows(b.asked, 2 * d, wanted, (const W*)l.qkv, q_width, 2 * d, l.qkv_bias, b.q, q_width, false);
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int r = 0; r < in.rows; r++)
        if (b.place[r] >= 0)
            rope_and_store<T, HD>(in, r, b.q + b.place[r] * q_width, l.heads, 0, l.q_norm, nullptr, l.eps, (T*)nullptr, (T*)nullptr, 0);
    attend_blocks<T, HD>(l, asking, blocks, b.q, q_width, kc, vc, pages, b.attention);
    finish_layer<W>(l, wanted, b.attention, v.out, b.room, b.ffn);
    if (h.scale) byte_outputs(h, v.out, wanted, line, b.normed, b.step, b.logits);
    else {
        rms_norm_rows(v.out, h.final_norm, l.eps, wanted, d, b.room);
        #pragma omp barrier
        linear_rows(b.room, d, wanted, (const W*)h.outputs, n, d, nullptr, b.logits, n, false);
    }
    #pragma omp barrier
    #pragma omp for schedule(static)
    for (int r = 0; r < wanted; r++) {
        int64_t* ids = v.tokens + int64_t(r) * v.k;
        top_row(b.logits + r * n, n, v.k, v.scale ? v.scale[r] : 1.0f, v.keys ? v.keys[r] : 0, h.tokens, ids, line);
        for (int j = 0; j < v.k; j++) {
            ids[j] = h.tokens[ids[j]];
            v.probs[int64_t(r) * v.k + j] = line[j];
        }
    }
}

// Rows that wait are taken in parts, as thousands may: the scratch memory of all of them would be new to the process, and
// the first use of a page costs more than all work on it. Rows that nobody asks leave keys and values only.
template <class W, class T, int HD>
static void draft_run(const Head& h, const Rows& in, const Level& v, T* kc, T* vc, int64_t pages, int threads) {
    constexpr int PART = 256;
    const Layer& l = h.layer;
    const DraftColumns<HD> columns(l);
    const int rows = in.rows, wanted = v.first ? in.requests : rows, part = std::min(rows, PART);
    int64_t d = l.hidden, q_width = columns.q_width, n = h.outputs_count;
    int64_t wide = std::max(v.first ? h.aux_count * d : 0, 2 * d), room_rows = std::max(part, wanted);
    static thread_local Pool pool(0);
    pool.begin(size_t(room_rows) * (wide + d + columns.width) + size_t(wanted) * (2 * q_width + l.ffn + n + 3 * d + 1) + 256);
    std::vector<int32_t> place(rows), query_start_loc(in.requests + 1), context_len(wanted), ancestors_start(in.requests + 1);
    DraftRoom<W> b = {
        .room = pool.take<Input<W>>(room_rows * wide),
        .asked = pool.take<Input<W>>(wanted * 2 * d),
        .attention = pool.take<Input<W>>(wanted * q_width),
        .ffn = pool.take<Input<W>>(int64_t(wanted) * l.ffn),
        .g = pool.take<float>(part * d),
        .kv = pool.take<float>(part * columns.width),
        .q = pool.take<float>(wanted * q_width),
        .normed = pool.take<float>(wanted * d),
        .step = pool.take<float>(wanted),
        .logits = pool.take<float>(wanted * n),
        .place = place.data(),
    };
    // What attends: the wanted rows only.
    Rows asking = in;
    for (int r = 0; r < rows; r++) place[r] = v.first ? -1 : r;
    if (v.first) {
        for (int i = 0; i < in.requests; i++) {
            int last = in.query_start_loc[i + 1] - 1;
            place[last] = query_start_loc[i] = i;
            context_len[i] = in.context_len[last];
        }
        query_start_loc[in.requests] = asking.rows = in.requests;
        asking.query_start_loc = query_start_loc.data();
        asking.context_len = context_len.data();
        asking.ancestors_start = ancestors_start.data();
    }
    const std::vector<Block> blocks = blocks_of<T, HD>(asking, l.heads / l.kv_heads);
    #pragma omp parallel num_threads(threads)
    {
        std::vector<float> line(std::max<int64_t>(d, v.k));
        for (int first = 0; first < rows; first += part)
            draft_part<W, T, HD>(h, in, v, b, first, std::min(first + part, rows), line.data(), kc, vc, pages);
        draft_asked<W, T, HD>(h, in, v, b, asking, blocks, line.data(), kc, vc, pages);
    }
}

extern "C" {

int smart_enable() { return !enable_tiles(); }

int smart_vector_width() { return VW; }
int smart_page() { return PAGE; }
int smart_pass_rows(int is_bf16) { return TILES && is_bf16 ? PASS : MAX_ROWS; }
int smart_attends_by_pairs(int is_bf16, int head_dim) { return Order(is_bf16 ? sizeof(bf16) : sizeof(float), head_dim).pairs; }

// Reads memory as weights are read, prefetched to `hint`.
float smart_read(const float* x, int64_t bytes, int hint, int threads) {
    float total = 0;
    #pragma omp parallel num_threads(threads) reduction(+ : total)
    {
        int64_t count = bytes / sizeof(float) / PANEL, team = omp_get_num_threads(), me = omp_get_thread_num();
        vf low = {}, high = {};
        with_hint(hint, [&](auto to) {
            for (int64_t i = count * me / team; i < count * (me + 1) / team; i++) {
                Ahead ahead = {(const char*)(x + i * PANEL) + AHEAD, 4 * PANEL};
                prefetch<to, 4 * PANEL>(ahead);
                low += loadu<vf>(x + i * PANEL);
                high += loadu<vf>(x + i * PANEL + VW);
            }
        });
        low += high;
        for (int j = 0; j < VW; j++) total += low[j];
    }
    return total;
}

int smart_rounds_inputs() { return sizeof(Input<bf16>) == 2; }  // does bf16 mean bf16 inputs of linear layers, too?
int64_t smart_packed_rows(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

void smart_pack(const void* w, int64_t n, int64_t k, void* out, int is_bf16) {
    if (is_bf16) pack_panels((const bf16*)w, n, k, (bf16*)out);
    else pack_panels((const float*)w, n, k, (float*)out);
}

// w [n, k] in 8 bits, k a multiple of 4: w[i] is about scale[i] * its integers, whose sum is sums[i]. All three have
// packed_rows(n) rows.
void smart_pack_bytes(const float* w, int64_t n, int64_t k, int8_t* out, float* scale, int32_t* sums) {
    for (int64_t p = 0; p < smart_packed_rows(n); p++) {
        float top = 0;
        for (int64_t i = 0; p < n && i < k; i++) top = std::max(top, std::fabs(w[p * k + i]));
        scale[p] = top / 127;
        sums[p] = 0;
        int8_t* panel = out + p / PANEL * PANEL * k + p % PANEL * 4;
        for (int64_t i = 0; i < k; i++) {
            int value = top > 0 ? int(std::lrint(w[p * k + i] / top * 127)) : 0;
            sums[p] += value;
            panel[i / 4 * 4 * PANEL + i % 4] = int8_t(value);
        }
    }
}

// y[rows, n] (+)= rms_norm(x) w^T + bias; norm and bias may be null; scratch: [rows, k]; best [rows], if not null: the first
// index of each row's maximum, as in smart_argmax (without y, if `add`); y may be null then.
void smart_linear(const float* x, int rows, const void* w, int64_t n, int64_t k, int is_bf16, const float* norm, float eps,
                  const float* bias, float* scratch, float* y, int64_t ldy, int add, int hint, int64_t* best, int threads) {
    if (is_bf16) linear_run(x, rows, (const bf16*)w, n, k, norm, eps, bias, scratch, y, ldy, add, hint, best, threads);
    else linear_run(x, rows, (const float*)w, n, k, norm, eps, bias, scratch, y, ldy, add, hint, best, threads);
}

// Rows `index` of a packed weight [n, k] as fp32 [count, k].
void smart_unpack(const void* w, int64_t k, int is_bf16, const int64_t* index, int count, float* out) {
    for (int r = 0; r < count; r++) {
        if (is_bf16) unpack_row((const bf16*)w, k, index[r], out + r * k);
        else unpack_row((const float*)w, k, index[r], out + r * k);
    }
}

// Layers in place on x [rows, hidden]. q, k and v read rms_norm(x), the first one's `input` [rows, input] if given.
int smart_layers(const Layer* l, int count, const Rows* in, const float* input, float* x, void* kc, void* vc, int64_t pages,
                 const Workspace* s, int w_bf16, int kv_bf16, int threads) {
#define RUN(HD)                                                                                                     \
    case HD:                                                                                                        \
        if (w_bf16 && kv_bf16)                                                                                      \
            layers_run<bf16, bf16, HD>(l, count, *in, input, x, (bf16*)kc, (bf16*)vc, pages, *s, threads);              \
        else if (!w_bf16 && !kv_bf16)                                                                               \
            layers_run<float, float, HD>(l, count, *in, input, x, (float*)kc, (float*)vc, pages, *s, threads);          \
        else return 2;                                                                                              \
        return 0;
    switch (l->head_dim) { RUN(16) RUN(32) RUN(64) RUN(96) RUN(128) }
#undef RUN
    return 1;
}

int smart_forward(const Model* m, const Rows* in, const Pass* pass, int threads) {
#define RUN(HD)                                                                                     \
    case HD:                                                                                        \
        if (m->w_bf16 && m->kv_bf16) forward_run<bf16, bf16, HD>(*m, *in, *pass, threads);          \
        else if (!m->w_bf16 && !m->kv_bf16) forward_run<float, float, HD>(*m, *in, *pass, threads); \
        else return 2;                                                                              \
        return 0;
    switch (m->layers->head_dim) { RUN(16) RUN(32) RUN(64) RUN(96) RUN(128) }
#undef RUN
    return 1;
}

// See `draft_run`. Returns nonzero where the kernels do not serve the head.
int smart_draft(const Head* h, const Rows* in, const Level* v, void* kc, void* vc, int64_t pages, int w_bf16, int kv_bf16,
                int threads) {
#define RUN(HD)                                                                                                     \
    case HD:                                                                                                        \
        if (w_bf16 && kv_bf16) draft_run<bf16, bf16, HD>(*h, *in, *v, (bf16*)kc, (bf16*)vc, pages, threads);              \
        else if (!w_bf16 && !kv_bf16) draft_run<float, float, HD>(*h, *in, *v, (float*)kc, (float*)vc, pages, threads);   \
        else return 2;                                                                                              \
        return 0;
    switch (h->layer.head_dim) { RUN(16) RUN(32) RUN(64) RUN(96) RUN(128) }
#undef RUN
    return 1;
}

// Moves committed tree nodes to their final places: for every layer and head, slot from[i] -> to[i], in order.
void smart_move_kv(void* kc, void* vc, int64_t planes, int64_t pages, int head_dim, int bytes, const int32_t* from,
                   const int32_t* to, int count) {
    if (bytes == 2) move_kv((uint16_t*)kc, (uint16_t*)vc, planes, pages, head_dim, from, to, count);
    else move_kv((float*)kc, (float*)vc, planes, pages, head_dim, from, to, count);
}

// The k largest scores x * scale of each row, largest first, ties by index, and what each weighs in the softmax.
// keys (may be null): sampling noise is added to the scores of the rows whose key is not 0, and their probabilities are
// the softmax of the k noisy scores. tokens [n]: token ids, which the noise depends on.
void smart_top_k(const float* x, int rows, int64_t n, int k, const float* scale, const uint64_t* keys, const int64_t* tokens,
                 int64_t* ids, float* probs, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++)
        top_row(x + r * n, n, k, scale[r], keys ? keys[r] : 0, tokens, ids + int64_t(r) * k, probs + int64_t(r) * k);
}

// Draws a token for each of `count` rows of n logits: the argmax of row * scale + noise among entries of at least `kept`, which top-k
// raises (k of 1 to n - 1; 0 or more than that cuts nothing), and of at least the maximum + `below`. A negative k asks for no more
// than `best`. best: the first maximum, -1 if it is not finite, or if a row that is drawn from has a NaN. drawn: the token, -1 where
// others come so near that rounding decides.
void smart_draw(const Draw* draws, int64_t count, int64_t n, int64_t* best, double* kept, int64_t* drawn, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t r = 0; r < count; r++) {
        const Draw& d = draws[r];
        best[r] = d.k >= 0 && has_nan(d.row, n) ? -1 : first_maximum(d.row, n);
        kept[r] = best[r] >= 0 && d.k > 0 && d.k < n ? std::max(d.floor, double(kth_largest(d.row, n, d.k))) : d.floor;
    }
    int64_t parts = (threads + count - 1) / count, size = (n + parts - 1) / parts;
    std::vector<Noisy> found(count * parts);
    #pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t part = 0; part < count * parts; part++) {
        int64_t r = part / parts, first = part % parts * size;
        const Draw& d = draws[r];
        if (best[r] < 0 || d.k < 0) continue;
        float floor = std::max(kept[r], d.row[best[r]] + d.below);
        uint64_t key = noise_key(d.seed, d.sample, d.position);
        found[part] = noisy_best(d.row, first, std::min(n, first + size), best[r], d.scale, floor, key);
    }
    for (int64_t r = 0; r < count; r++) {
        Noisy all;
        for (int64_t part = r * parts; part < (r + 1) * parts; part++) all.add(found[part]);
        bool coarse = best[r] >= 0 && std::abs(draws[r].row[best[r]] * draws[r].scale) > LARGE;
        drawn[r] = all.score - all.second > NEAR && !coarse ? all.token : -1;
    }
}

// The sum of exp((entry - best) * scale) over the entries of at least `floor`, and over those of them beyond `value`.
void smart_mass(const float* row, int64_t n, float best, float scale, float floor, float value, double* all_and_above) {
    double all = 0, above = 0;
    for (int64_t first = 0; first < n; first += 4096) {  // floats sum up to so many well enough
        vf sums = {}, higher = {};
        int64_t i = first, end = std::min(n, first + 4096);
        for (; i + VW <= end; i += VW) {
            vf x = loadu<vf>(row + i), weight = vexp<vf, vi>((x - best) * scale);
            weight = x >= floor ? weight : vf{};
            sums += weight;
            higher += x > value ? weight : vf{};
        }
        for (int j = 0; j < VW; j++) all += sums[j], above += higher[j];
        for (; i < end; i++) {
            double weight = row[i] >= floor ? std::exp((row[i] - best) * scale) : 0.0;
            all += weight;
            if (row[i] > value) above += weight;
        }
    }
    all_and_above[0] = all, all_and_above[1] = above;
}

void smart_rms_norm(const float* x, const float* weight, float eps, int rows, int64_t d, float* out, int64_t ldo) {
    for (int r = 0; r < rows; r++) rms_norm_row(x + r * d, weight, eps, d, out + r * ldo);
}

void smart_argmax(const float* x, const int64_t* which, int rows, int64_t n, int64_t* out, int threads) {
    #pragma omp parallel for num_threads(threads) schedule(static)
    for (int r = 0; r < rows; r++) out[r] = first_maximum(x + which[r] * n, n);
}
}
