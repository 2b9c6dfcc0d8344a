// Tiny random models and heads, their caches, and batches of rows, as the kernels take them and as
// plain loops do.

#pragma once
#include <memory>

#include "abi.h"
#include "check.h"
#include "reference.h"

namespace tiny {

using check::Random;
using reference::Doubles;

// What of a kind of weights and cache comes with it: roundings, and how far results may be off.
struct Precision {
    bool bf16;
    reference::Rounds rounds;
    double tolerance;  // relative to the root mean square of a row

    Precision(bool bf16_, int head_dim) : bf16(bf16_) {
        bool pairs = smart_attends_by_pairs(bf16, head_dim);
        rounds = {bf16 && smart_rounds_inputs(), bf16, pairs};
        tolerance = !bf16 ? 1e-4 : rounds.inputs || pairs ? 4e-2 : 1e-2;
    }
};

// Memory as the kernels want weights: plain, or packed.
struct Blob {
    std::vector<uint16_t> bf16;
    std::vector<float> fp32;
    const void* data() const { return bf16.empty() ? (const void*)fp32.data() : bf16.data(); }
    Weight weight() const { return {data(), nullptr, 0}; }
};

inline Blob plain(const std::vector<float>& w, bool bf16) {
    Blob blob;
    if (!bf16)
        blob.fp32 = w;
    else
        for (float x : w) blob.bf16.push_back(reference::to_bf16(x));
    return blob;
}

inline Blob packed(const std::vector<float>& w, int64_t k, bool bf16) {
    const Blob from = plain(w, bf16);
    Blob blob;
    const int64_t n = w.size() / k, size = smart_packed_rows(n) * k;
    if (bf16)
        blob.bf16.resize(size);
    else
        blob.fp32.resize(size);
    smart_pack(from.data(), n, k, (void*)blob.data(), bf16);
    return blob;
}

inline std::vector<float> matrix(Random& random, int64_t n, int64_t k, bool bf16, double gain = 1) {
    std::vector<float> w = random.normals(n * k, gain / std::sqrt(double(k)));
    if (bf16)
        for (float& x : w) x = reference::rounded(x);
    return w;
}

inline std::vector<float> norm(Random& random, int64_t d) {
    std::vector<float> w = random.normals(d, 0.2);
    for (float& x : w) x += 1;
    return w;
}

struct Shape {
    int hidden, input, heads, kv_heads, head_dim, ffn;
    std::string text() const {
        return "hidden " + std::to_string(hidden) + ", heads " + std::to_string(heads) + "/"
               + std::to_string(kv_heads) + ", head_dim " + std::to_string(head_dim) + ", ffn "
               + std::to_string(ffn);
    }
};

inline Shape random_shape(Random& random, int head_dim) {
    const int kv = int(random.between(1, 2)), group = random.of({1, 2, 3, 4, 7});
    Shape shape{random.of({32, 40, 64, 72, 96}), 0, kv * group, kv, head_dim,
                random.of({30, 32, 52, 64, 70})};
    shape.input = shape.hidden;
    return shape;
}

inline const float* pointer(const std::vector<float>& list) {
    return list.empty() ? nullptr : list.data();
}

struct TinyLayer {
    reference::Weights w;
    Blob qkv, output, gate_up, down;
    std::vector<float> gate_up_bias;  // where the rows of gate_up are
    std::vector<float> qkv_bias;      // and those of qkv

    // of_head: heads have plain layers.
    TinyLayer(Random& random, const Shape& s, bool bf16, bool has_input_norm,
              bool of_head = false) {
        const int64_t q = s.heads * s.head_dim, width = q + 2 * s.kv_heads * s.head_dim;
        w = {s.hidden, s.input, s.heads, s.kv_heads, s.head_dim, s.ffn, 1e-5f};
        if (has_input_norm) w.input_norm = norm(random, s.hidden);
        if (random.chance(0.5)) w.q_norm = norm(random, s.head_dim);
        if (random.chance(0.5)) w.k_norm = norm(random, s.head_dim);
        if (random.chance(0.5)) w.qkv_bias = random.normals(width, 0.3);
        if (random.chance(0.3)) w.output_bias = random.normals(s.hidden, 0.3);
        w.post_norm = norm(random, s.hidden);
        if (!of_head) vary(random, s);
        w.qkv = matrix(random, width, s.input, bf16, 1.2);
        w.output = matrix(random, s.hidden, q, bf16, 1.5);
        w.gate = matrix(random, s.ffn, s.hidden, bf16);
        w.up = matrix(random, s.ffn, s.hidden, bf16);
        w.down = matrix(random, s.hidden, s.ffn, bf16);
        if (!of_head && random.chance(0.3)) w.attention_gate = matrix(random, q, s.input, bf16, 2);
        std::vector<float> products = w.qkv;
        products.insert(products.end(), w.attention_gate.begin(), w.attention_gate.end());
        qkv = packed(products, s.input, bf16);
        qkv_bias = w.qkv_bias;
        if (!qkv_bias.empty()) qkv_bias.resize(products.size() / s.input);
        output = packed(w.output, q, bf16);
        gate_up = packed(interleaved(), s.hidden, bf16);
        down = packed(w.down, s.ffn, bf16);
    }
    void vary(Random& random, const Shape& s) {
        if (random.chance(0.3)) w.attention_norm = norm(random, s.hidden);
        if (random.chance(0.3)) w.ffn_norm = norm(random, s.hidden);
        if (random.chance(0.5)) w.window = random.of({1, 3, 16, 17, 64, 70});
        if (random.chance(0.5)) w.angle = s.head_dim / 2;
        w.gelu = random.chance(0.5);
        w.clamped = random.chance(0.3);
        if (random.chance(0.4)) w.sinks = random.normals(s.heads, 2);
        if (random.chance(0.4)) set_biases(random, s);
    }
    // Large enough for gates that are clamped.
    void set_biases(Random& random, const Shape& s) {
        w.gate_bias = random.normals(s.ffn, 4);
        w.up_bias = random.normals(s.ffn, 4);
        w.down_bias = random.normals(s.hidden, 0.3);
        gate_up_bias.assign(interleaved_rows(), 0.0f);
        const int64_t lanes = smart_vector_width();
        for (int64_t row = 0; row < w.ffn; row++) {
            const int64_t to = row / lanes * 2 * lanes + row % lanes;
            gate_up_bias[to] = w.gate_bias[row];
            gate_up_bias[to + lanes] = w.up_bias[row];
        }
    }
    int64_t interleaved_rows() const {
        const int64_t lanes = smart_vector_width();
        return 2 * ((w.ffn + lanes - 1) / lanes) * lanes;
    }
    // Blocks of one vector's rows in turn: gate, up, gate, ...; the last ones filled up.
    std::vector<float> interleaved() const {
        const int64_t lanes = smart_vector_width();
        std::vector<float> out(interleaved_rows() * w.hidden, 0.0f);
        for (int64_t row = 0; row < w.ffn; row++) {
            int64_t to = row / lanes * 2 * lanes + row % lanes;
            std::copy_n(&w.gate[row * w.hidden], w.hidden, &out[to * w.hidden]);
            std::copy_n(&w.up[row * w.hidden], w.hidden, &out[(to + lanes) * w.hidden]);
        }
        return out;
    }
    Layer layer() const {
        return {w.hidden,
                w.input,
                w.heads,
                w.kv_heads,
                w.head_dim,
                w.ffn,
                3,
                w.window,
                w.angle,
                w.gelu,
                w.clamped,
                !w.attention_gate.empty(),
                0,
                0,
                0,
                0,
                w.eps,
                pointer(w.input_norm),
                pointer(w.q_norm),
                pointer(w.k_norm),
                pointer(qkv_bias),
                pointer(w.output_bias),
                w.post_norm.data(),
                pointer(w.attention_norm),
                pointer(w.ffn_norm),
                pointer(w.sinks),
                pointer(gate_up_bias),
                pointer(w.down_bias),
                nullptr,
                qkv.weight(),
                output.weight(),
                gate_up.weight(),
                down.weight(),
                {},
                nullptr,
                nullptr,
                nullptr};
    }
};

// Keys and values of all layers, filled with what must not matter.
struct TinyCache {
    int64_t planes, pages, head_dim;
    bool bf16, pairs;
    Blob k, v;

    TinyCache(Random random, int64_t planes_, int64_t pages_, int head_dim_, bool bf16_)
        : planes(planes_),
          pages(pages_),
          head_dim(head_dim_),
          bf16(bf16_),
          pairs(smart_attends_by_pairs(bf16_, head_dim_)) {
        const int64_t size = planes * pages * head_dim * smart_page();
        k = plain(random.normals(size, 100), bf16);
        v = plain(random.normals(size, 100), bf16);
    }
    void* keys() { return (void*)k.data(); }
    void* values() { return (void*)v.data(); }

    // Where an element lies: a page's keys are [head_dim, PAGE], its values [PAGE, head_dim], or
    // both by pairs of rows.
    int64_t at(int64_t plane, int64_t slot, int64_t row, int64_t column, int64_t width) const {
        const int64_t page = smart_page(), start = (plane * pages + slot / page) * page * head_dim;
        return start + (pairs ? row / 2 * 2 * width + 2 * column + row % 2 : row * width + column);
    }
    float read(const Blob& from, int64_t i) const {
        return bf16 ? reference::from_bf16(from.bf16[i]) : from.fp32[i];
    }
    float key(int64_t plane, int64_t slot, int64_t d) const {
        return read(k, at(plane, slot, d, slot % smart_page(), smart_page()));
    }
    float value(int64_t plane, int64_t slot, int64_t d) const {
        return read(v, at(plane, slot, slot % smart_page(), d, head_dim));
    }
    bool same(const TinyCache& other) const {
        return k.bf16 == other.k.bf16 && v.bf16 == other.v.bf16 && k.fp32 == other.k.fp32
               && v.fp32 == other.v.fp32;
    }
};

struct Rotation {  // of two kinds of layers
    int64_t angles;
    std::vector<float> cosine, sine;
    Rotation(int64_t positions, int64_t head_dim) : angles(head_dim) {
        for (int64_t p = 0; p < positions; p++)
            for (double base : {100.0, 30.0})
                for (int64_t d = 0; d < head_dim / 2; d++) {
                    double angle = double(p) * std::pow(base, -2.0 * double(d) / double(head_dim));
                    cosine.push_back(float(std::cos(angle)));
                    sine.push_back(float(std::sin(angle)));
                }
    }
};

// A batch of rows under construction, request after request.
struct Batch {
    std::vector<int32_t> query_start_loc{0}, block_table_start, block_tables, slot_mapping,
        context_len;
    std::vector<int32_t> ancestors_start{0}, ancestors;
    std::vector<int64_t> position, token;

    void request(const std::vector<int32_t>& pages) {
        block_table_start.push_back(int32_t(block_tables.size()));
        block_tables.insert(block_tables.end(), pages.begin(), pages.end());
        query_start_loc.push_back(query_start_loc.back());
    }
    void row(int64_t token_, int64_t position_, int64_t slot, int64_t sees,
             const std::vector<int32_t>& above = {}) {
        token.push_back(token_);
        position.push_back(position_);
        slot_mapping.push_back(int32_t(slot));
        context_len.push_back(int32_t(sees));
        ancestors.insert(ancestors.end(), above.begin(), above.end());
        ancestors_start.push_back(int32_t(ancestors.size()));
        query_start_loc.back()++;
    }
    int64_t size() const { return int64_t(token.size()); }
    Rows rows(const Rotation& rotation) const {
        return {int32_t(size()),        int32_t(block_table_start.size()),
                query_start_loc.data(), block_table_start.data(),
                block_tables.data(),    slot_mapping.data(),
                context_len.data(),     ancestors_start.data(),
                ancestors.data(),       position.data(),
                rotation.cosine.data(), rotation.sine.data(),
                rotation.angles,        nullptr};
    }
    // Row `r` in a batch of its own.
    Batch alone(int64_t r) const {
        Batch batch;
        int64_t request = 0;
        while (r >= query_start_loc[request + 1]) request++;
        const size_t end = size_t(request) + 1;
        auto first = block_tables.begin() + block_table_start[request];
        auto last = end < block_table_start.size() ? block_tables.begin() + block_table_start[end]
                                                   : block_tables.end();
        batch.request({first, last});
        batch.row(
            token[r], position[r], slot_mapping[r], context_len[r],
            {ancestors.begin() + ancestors_start[r], ancestors.begin() + ancestors_start[r + 1]});
        return batch;
    }
};

// Pages in no order, given out one by one.
struct Pages {
    std::vector<int32_t> free;
    Pages(Random& random, int64_t count) {
        for (int64_t i = 0; i < count; i++) free.push_back(int32_t(i));
        random.shuffle(free);
    }
    std::vector<int32_t> take(int64_t positions) {
        const int64_t count = (positions + smart_page() - 1) / smart_page();
        std::vector<int32_t> pages(free.end() - count, free.end());
        free.resize(free.size() - count);
        return pages;
    }
};

inline int64_t slot_of(const std::vector<int32_t>& pages, int64_t position) {
    return int64_t(pages[position / smart_page()]) * smart_page() + position % smart_page();
}

constexpr int64_t POSITIONS = 512;

struct TinyModel {
    Shape shape;
    Precision precision;
    int64_t vocab;
    std::vector<TinyLayer> layers;
    std::vector<Layer> structs;
    std::vector<float> embedding, output, final_norm;
    bool plain_table;
    float embedding_scale;
    Blob embedding_blob, output_blob;
    Rotation rotation;

    TinyModel(Random& random, const Shape& s, int64_t count, int64_t vocab_, bool bf16,
              int64_t positions = POSITIONS)
        : shape(s), precision(bf16, s.head_dim), vocab(vocab_), rotation(positions, s.head_dim) {
        for (int64_t i = 0; i < count; i++) layers.emplace_back(random, s, bf16, true);
        for (const TinyLayer& layer : layers) structs.push_back(layer.layer());
        embedding = matrix(random, vocab, s.hidden, bf16, std::sqrt(double(s.hidden)));
        output = matrix(random, vocab, s.hidden, bf16, 2);
        final_norm = norm(random, s.hidden);
        plain_table = random.chance(0.5);
        embedding_scale = random.chance(0.5) ? 1.0f : 1.5f;
        embedding_blob = plain_table ? plain(embedding, bf16) : packed(embedding, s.hidden, bf16);
        output_blob = packed(output, s.hidden, bf16);
    }
    // change: from a layer's window, 0 for none, to another.
    template <class F>
    void change_windows(F&& change) {
        for (size_t i = 0; i < layers.size(); i++) {
            layers[i].w.window = change(layers[i].w.window);
            structs[i] = layers[i].layer();
        }
    }
    TinyCache cache(Random random, int64_t pages) const {
        return TinyCache(random, int64_t(layers.size()) * shape.kv_heads, pages, shape.head_dim,
                         precision.bf16);
    }
    Model model(TinyCache& cache) const {
        return {structs.data(),
                plain_table ? Weight{} : embedding_blob.weight(),
                output_blob.weight(),
                plain_table ? embedding_blob.data() : nullptr,
                final_norm.data(),
                cache.keys(),
                cache.values(),
                vocab,
                cache.pages,
                int32_t(layers.size()),
                3,
                precision.bf16,
                precision.bf16,
                1e-5f,
                embedding_scale,
                nullptr};
    }
    Rows rows(const Batch& batch) const { return batch.rows(rotation); }
};

struct Result {
    int32_t status;
    std::vector<float> logits, aux;
    std::vector<int64_t> best;
};

// smart_forward. embeddings: in place of tokens', or empty. wanted: rows, or empty: all. aux:
// layers.
inline Result forward(const TinyModel& m, TinyCache& cache, const Batch& batch, int threads,
                      const std::vector<int32_t>& aux = {}, const std::vector<int64_t>& wanted = {},
                      const std::vector<const float*>& embeddings = {}) {
    const int64_t count = wanted.empty() ? batch.size() : int64_t(wanted.size());
    Result result{0, std::vector<float>(count * m.vocab),
                  std::vector<float>(batch.size() * aux.size() * m.shape.hidden),
                  std::vector<int64_t>(count, -7)};
    const Model model = m.model(cache);
    const Rows rows = m.rows(batch);
    const Pass pass{batch.token.data(),
                    embeddings.empty() ? nullptr : embeddings.data(),
                    wanted.empty() ? nullptr : wanted.data(),
                    aux.data(),
                    result.aux.data(),
                    result.logits.data(),
                    result.best.data(),
                    nullptr,
                    int32_t(count),
                    int32_t(aux.size()),
                    nullptr};
    result.status = smart_forward(&model, &rows, &pass, threads);
    return result;
}

}  // namespace tiny
