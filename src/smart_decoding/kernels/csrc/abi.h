// Everything that Python and the kernels exchange: structures and functions in plain C.
//
// This file is the one description of both sides. kernels/abi.py reads it and makes the ctypes of
// it; when a library is loaded, the sizes and offsets that its compiler chose (smart_layout) are
// compared with what Python made. So keep to what abi.py reads: `struct NAME { TYPE a, b; TYPE* c;
// };` and prototypes, with // comments.

#pragma once
#include <stdint.h>

#if defined(__cplusplus)
extern "C" {
#endif

// ----------------------------------------------------------------------------------------- weights

// How weights are stored; quants as in GGUF files, of which BF16_ROWS are what no format is kept
// of.
enum { BF16_ROWS, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K, Q5_K, Q6_K, IQ4_NL, MXFP4 };

// When inputs of quants are rounded to 8 bits: where drafts alone depend on it, wherever that is
// faster.
enum { NEVER, ALWAYS, IF_FASTER };

struct Strip {  // as many rows of a quantised weight as a vector has lanes; see quants.h
    const uint8_t* data;
    int64_t format;
};

struct Weight {  // [n, k], packed: bf16 or fp32 panels, or two strips of each panel
    const void* panels;
    const struct Strip* strips;  // or null
    int64_t in_bytes;            // of strips, packed so: when inputs are rounded to 8 bits
};

// ---------------------------------------------------------------------------- what a forward reads

struct Rows {  // the rows (tokens) of a forward; each request has one at least
    int32_t rows, requests;
    const int32_t* query_start_loc;  // [requests + 1] first row of each request
    // [requests] where the request's block table begins in `block_tables`
    const int32_t* block_table_start;
    const int32_t* block_tables;  // one after another
    // [rows] page * PAGE + offset where the row's own key and value are stored
    const int32_t* slot_mapping;
    // [rows] positions 0 .. context_len - 1 are read through the block table
    const int32_t* context_len;
    const int32_t* ancestors_start;  // [rows + 1] offsets into `ancestors`
    // slots of the positions from context_len on: ancestors in the tree, then itself
    const int32_t* ancestors;
    const int64_t* position;  // [rows]
    const float* cosine;      // [positions, angles]
    const float* sine;
    int64_t angles;  // head_dim / 2 for each kind of layer that rotates by its own
    // [requests] the slots of their recurrent states, -1: they have none; or null: all have none
    const int64_t* states;
};

// Linear attention by the gated delta rule, in place of a layer's attention: a state [key_dim,
// value_dim] for each value head. Of value heads, as many as there are for each key head lie next
// to each other; tiled: the first ones of all key heads come first, then the second ones. Channels:
// 2 key_heads key_dim + value_heads value_dim, of q, k and v.
struct Delta {
    int32_t key_heads, value_heads, key_dim, value_dim;
    int32_t kernel, tiled;     // kernel: inputs of the convolution
    const float* convolution;  // [kernel, channels], of the oldest input first
    // [value_heads] what the exponents of decay are multiplied with, negative, and their bias
    const float *decay, *bias;
    const float* norm;    // [value_dim] of each head's output
    struct Weight rates;  // [2 value_heads, hidden]: of decay, then of learning
};

struct Layer {
    // input: width that q, k and v read (2 hidden in EAGLE-3)
    int32_t hidden, input, heads, kv_heads, head_dim, ffn;
    int32_t hint;     // where weights are prefetched to
    int32_t window;   // positions that a row sees, its own the last of them; 0: all
    int32_t angle;    // the first of its own among the rotary angles of a position
    int32_t gelu;     // gates go through GELU (by tanh) in place of SiLU
    int32_t clamped;  // or are clamped: see gated_panels in linear.h
    // Attention's outputs are multiplied by the sigmoid of gates, whose rows follow those of v.
    int32_t gated;
    // Of a mixture: how many experts, of `ffn` gates each, how many of them a row has, and whether
    // their probabilities are divided by their sum. experts = 0: one network.
    // shared: one more network behind the experts', for all rows; the router's last output says, by
    // its sigmoid, how much of it is added
    int32_t experts, per_token, normalised, shared;
    float eps;
    // all but post_norm may be null
    const float *input_norm, *q_norm, *k_norm, *qkv_bias, *output_bias, *post_norm;
    const float *attention_norm, *ffn_norm;  // of what both add to x
    const float* sinks;                      // [heads] one more score each, without a value
    // Of the one network, or of all experts: [experts, packed rows of gate_up], [experts, hidden].
    const float *gate_up_bias, *down_bias;
    const float* router_bias;  // [experts]
    struct Weight qkv, output;
    struct Weight gate_up, down;                        // of the one network; a mixture has
    struct Weight router;                               // [experts + shared, hidden], and
    const struct Weight *expert_gate_up, *expert_down;  // [experts + shared]
    // null: attention. Otherwise qkv is [channels + value_heads value_dim, hidden], gates last.
    const struct Delta* delta;
};

struct Workspace {
    float* normed;     // [rows, max(hidden, input)]
    float* qkv;        // [rows, (heads + 2 kv_heads) head_dim], and [rows, hidden] has room
    float* attention;  // [rows, heads head_dim]
    float* ffn;        // [rows, ffn]; of a mixture [rows, networks of a row, ffn]
    float* mixture;    // null without experts, else as much as mixture_floats says
    int64_t* awake;    // null, or the sum of the experts that rows had in each layer
    float* delta;      // null without linear attention, else see delta.h
};

// Columns of a state that lie next to each other; the last ones of a head are filled up to them.
enum { COLUMNS = 16 };

// Recurrent states of requests. A slot's state is that before its waiting rows: accepted ones,
// which the next forward of its request computes first. So it is read and written once a forward.
struct States {
    int64_t slots, layers, room;  // layers: with linear attention; room: for waiting rows
    float* states;                // [slots, layers, value_heads, blocks, key_dim, COLUMNS]
    // [slots, layers, kernel - 1 + room, channels + 2 value_heads] the convolution's last inputs,
    // then what waiting rows read, their rates last
    float* inputs;
    int32_t* waiting;  // [slots] how many rows wait
};

struct Model {  // a whole target, from token ids to logits
    const struct Layer* layers;
    struct Weight embedding, output;
    const void* table;  // plain embeddings in place of packed ones, or null
    const float* final_norm;
    void *keys, *values;
    int64_t vocab, pages;
    int32_t layer_count, hint, w_bf16, kv_bf16;
    float eps, embedding_scale;
    const struct States* states;  // null: it has no linear attention
};

struct Pass {  // one forward of a target: what it reads beside its rows, and what it leaves
    const int64_t* token;  // [rows]
    // null, or [rows] multimodal embedding in place of the token's, where not null
    const float* const* embeddings;
    const int64_t* wanted;  // [wanted_count] rows whose logits are wanted, or null: all
    // after aux_layers[0], aux_layers[1], ... layers the states are copied to `aux_hidden`
    const int32_t* aux_layers;
    float* aux_hidden;  // [rows, aux_count, hidden]
    float* logits;      // [wanted_count, vocab], or null
    int64_t* best;      // [wanted_count] their first maxima, -1 where that is not finite
    int64_t* experts;   // null, or how many experts rows had, summed over layers
    int32_t wanted_count, aux_count;
    // null, or [layers of States, tree nodes' rows, channels + 2 value_heads] for smart_advance
    float* nodes;
};

// ------------------------------------------------------------------------------------- draft heads

// EAGLE-3: the first layer reads [norm(embedding) ; norm(features)], beside the features as the
// residual, and fc makes features of aux hidden states. Fused (EAGLE-1/2): fc makes the first
// layer's input of [embedding ; features], where features are one layer's states; an embedding that
// is given stands for all of that (MSD's pictures).
struct Head {
    const struct Layer* layers;
    // Null where there is none. aux_norm: [aux_count hidden] of aux hidden states, with aux_eps: of
    // each, or `aux_together` of all that fc reads; input_norm and hidden_norm: of embeddings and
    // features; final_norm: before the output matrix.
    const float *aux_norm, *fc_bias, *input_norm, *hidden_norm, *final_norm;
    struct Weight fc, embedding;
    const void* table;      // plain embeddings in place of packed ones, or null
    struct Weight outputs;  // [outputs_count, hidden] packed: bytes where `scale` is not null
    const float* scale;     // of smart_pack_bytes
    const int32_t* sums;
    const int64_t* tokens;  // [outputs_count]
    int64_t outputs_count;
    int32_t layer_count, aux_count;  // aux_count: states that fc reads
    // fused: fc reads [embedding ; features] at every step; feeds_back_normed: deeper levels read
    // what the output matrix reads, not what enters final_norm
    int32_t norm_before_residual, fused, aux_together, feeds_back_normed;
    float aux_eps;
};

// A level of a head. The first one reads aux hidden states and is wanted for the last row of each
// request only; other rows leave nothing but their keys and values. Deeper ones read earlier
// outputs, and all rows are wanted.
struct Level {
    int32_t first, k;
    const int64_t* token;            // [rows]
    const float* const* features;    // [rows]
    const float* const* embeddings;  // as in Pass
    float* out;                      // [wanted, hidden] what deeper levels read
    // [wanted] on the logits, and the keys of the noise: see smart_top_k
    const float* scale;
    const uint64_t* keys;
    int64_t* tokens;  // [wanted, k] the best children, best first
    double* probs;
};

// ------------------------------------------------------------------------- verification of a round

struct Draw {  // of a token; see smart_draw
    const float* row;
    int64_t seed, sample, position, k;
    double scale, below, top_p;
};

struct Round {
    int64_t requests, nodes, room;
    const int64_t* root;      // [requests] their last tokens
    const int64_t* length;    // [requests] positions of these
    const int64_t* position;  // [requests] the same as rotary embeddings take them
    // [requests] how the token after each root is drawn, but for its row; or null: all are first
    // maxima, and no logits are needed
    const struct Draw* draws;
    const int32_t* const* pages;  // [requests] block tables, with room for the nodes
    const int64_t* trees;         // owner, token, parent, depth: [4, room] (core/tree.py)
    const int64_t* kept;          // [nodes] which of the trees' nodes are verified, ascending
    int64_t hidden, kv_heads, head_dim;
    const float *cosine, *sine;  // [positions, angles], as in Rows
    int64_t angles;
    const int64_t* states;  // as in Rows
    // What comes of it. Nodes count as they do in `kept`. [requests + nodes] the target's token
    // after each root and each accepted node, else -1
    int64_t* after;
    // [requests + nodes] the accepted tokens and the bonus token, request after request
    int64_t* emitted;
    int64_t* path;      // [nodes] the accepted nodes, request after request
    int64_t* accepted;  // [requests] how many
    // [requests] row of the root in `aux_hidden`; those of accepted nodes follow it
    int64_t* first;
    double* seconds;  // [3] of the forward, of drawing tokens, and of moving keys
};

// --------------------------------------------------------------------------------- selecting nodes

struct Trees {  // core/tree.py: its two blocks
    int64_t nodes, batch, room;
    int64_t* ints;   // [5, room] owner, token, parent, depth, source
    double* floats;  // [3, room] draft_prob, path_prob, accept_prob
};

struct Calibration {  // core/calibration.py
    // [source, depth, kind, bin] probability of acceptance given the parent's, for all sources
    // there are; null: accept_prob is path_prob
    const double* table;
    const int64_t* bin_of;  // [resolution + 1] bin of a draft probability
    int64_t resolution, bins, depths, kinds;
};

struct Costs {  // RoundCosts in core/selection.py
    double tokens, sunk, limit;
    const double *levels, *verify;
    int64_t level_count, verify_count;
};

enum { BEST, RATE, TOPOLOGY, MARGINAL_RATIO };

// What to expand or what to verify: a part of core/selection.py, whose fields have the same names.
struct Choice {
    int32_t kind;  // BEST: Beam, KeepBest; RATE: LookAhead, BestRate; TOPOLOGY; MARGINAL_RATIO
    int32_t mean_over_paths;
    int64_t count;  // width of Beam, count of KeepBest, least of BestRate, budget of MarginalRatio
    struct Costs costs;
    const int64_t* widths;  // [width_count]
    const double* below;    // [levels, RANKS]
    int64_t width_count;
    const int64_t* next;  // [places, ranks]
    int64_t ranks;
    double alpha;
    const double *spent, *step;  // [budget + 1]
};

struct Rule {  // TreeRule in core/rule.py
    int64_t levels;
    const int64_t* limits;  // [batch] deepest useful node
    const uint8_t* kind;    // [batch] of the calibration
    const int64_t* ends;    // [end_count] tokens that end an answer
    int64_t end_count;
    struct Calibration calibration;
    struct Choice expand, keep;
};

// What drafts, and how smart_draft runs it: a head, or else a model, in which case levels have
// neither features nor `out`. A head's outputs of the round lie in `out` of the first level: those
// of the roots, then those of the expanded nodes.
struct Drafter {
    const struct Head* head;
    const struct Model* model;
    const int64_t* tokens;  // [vocab] of the model
    // where expanded nodes' keys go, and how many there can be
    int64_t first_slot, slots;
    const float* scale;     // [batch] on the logits, or null,
    const uint64_t* noise;  // and [batch, levels] keys of the noise: see smart_top_k
    void *keys, *values;    // the head's
    int64_t pages;
    int32_t w_bf16, kv_bf16, threads;
    int64_t* expanded;  // [levels] out: nodes run at each level,
    double* seconds;    // and its duration
    double* choosing;   // out: seconds of all the rest
};

// --------------------------------------------------------------------------------------- functions
// Those that return int32_t status: nonzero where the kernels do not serve the model.

// Asks the operating system for what this variant needs (AMX's registers). Nonzero: it cannot be
// used.
int32_t smart_enable();
// The layout of the structures as this library's compiler laid them out; see abi.py.
const char* smart_layout();
int32_t smart_vector_width();  // lanes of float
int32_t smart_page();          // positions of a KV page
// Rows that share a pass over a weight: one more costs a step.
int32_t smart_pass_rows(const struct Weight* w, int32_t is_bf16);
int32_t smart_rounds_inputs();     // are inputs rounded to bf16 for products in bf16?
int32_t smart_multiplies_bytes();  // can quants be multiplied with inputs in 8 bits (Weight)?
// Do keys and values of a page lie in pairs?
int32_t smart_attends_by_pairs(int32_t is_bf16, int32_t head_dim);

// Reads memory as weights are read, prefetched to `hint`.
float smart_read(const float* x, int64_t bytes, int32_t hint, int32_t threads);

int64_t smart_packed_rows(int64_t n);
void smart_pack(const void* w, int64_t n, int64_t k, void* out, int32_t is_bf16);
// w [n, k] in 8 bits, k a multiple of 4: w[i] is about scale[i] * its integers, whose sum is
// sums[i]; all have packed_rows(n).
void smart_pack_bytes(const float* w, int64_t n, int64_t k, int8_t* out, float* scale,
                      int32_t* sums);
// Bytes of a strip of row length k; 0 where k is not whole blocks of the format.
int64_t smart_strip_bytes(int64_t format, int64_t k);
// Fills strips whose memory is there. rows: [count, lanes of float] where each of their rows begins
// in a file (BF16_ROWS: in memory), null: a row of zeros; in_bytes: for Weight's, not of BF16_ROWS,
// whole panels, of each of which the second strip's memory follows the first one's.
void smart_pack_quants(const struct Strip* strips, int64_t count, const void* const* rows,
                       int64_t k, int32_t in_bytes);
// Rows `index` of a packed weight [n, k] as fp32 [count, k].
void smart_unpack(const struct Weight* w, int64_t k, int32_t is_bf16, const int64_t* index,
                  int32_t count, float* out);

// y[rows, n] (+)= rms_norm(x) w^T + bias; norm and bias may be null; scratch: [rows, k]; best
// [rows], if not null: the first index of each row's maximum, as in smart_argmax (without y, if
// `add`); y may be null then.
void smart_linear(const float* x, int32_t rows, const struct Weight* w, int64_t n, int64_t k,
                  int32_t is_bf16, const float* norm, float eps, const float* bias, float* scratch,
                  float* y, int64_t ldy, int32_t add, int32_t hint, int64_t* best, int32_t threads);
void smart_rms_norm(const float* x, const float* weight, float eps, int32_t rows, int64_t d,
                    float* out, int64_t ldo);

// Layers in place on x [rows, hidden]. q, k and v read rms_norm(x), the first one's `input` [rows,
// input] if given.
int32_t smart_layers(const struct Layer* layers, int32_t count, const struct Rows* in,
                     const float* input, float* x, void* keys, void* values, int64_t pages,
                     const struct Workspace* workspace, int32_t w_bf16, int32_t kv_bf16,
                     int32_t threads);
int32_t smart_forward(const struct Model* m, const struct Rows* in, const struct Pass* pass,
                      int32_t threads);
// pass: its aux layers, and memory for `aux_hidden`, and for all rows' `logits` where tokens are
// drawn. Returns -1 where rounding would decide a token: then the forward is all that was done.
int32_t smart_round(const struct Model* m, const struct Round* r, const struct Pass* pass,
                    int32_t threads);
// Accepted nodes of a forward wait for the next one. nodes: of its Pass, of `count` rows. states:
// [requests] slots; path: the accepted ones, numbered among tree nodes' rows, request after
// request, and accepted [requests]: how many.
void smart_advance(const struct Model* m, const float* nodes, int64_t count, int64_t requests,
                   const int64_t* states, const int64_t* path, const int64_t* accepted,
                   int32_t threads);
// One level. keys, values: the head's.
int32_t smart_draft_level(const struct Head* h, const struct Rows* in, const struct Level* v,
                          void* keys, void* values, int64_t pages, int32_t w_bf16, int32_t kv_bf16,
                          int32_t threads);
// Moves committed tree nodes to their final places: for every layer and head, slot from[i] ->
// to[i], in order.
void smart_move_kv(void* keys, void* values, int64_t planes, int64_t pages, int32_t head_dim,
                   int32_t bytes, const int32_t* from, const int32_t* to, int32_t count);

// First index of the largest entry of the rows `which` of x [rows, n]; -1 where it is not finite.
void smart_argmax(const float* x, const int64_t* which, int32_t rows, int64_t n, int64_t* out,
                  int32_t threads);
// The k largest scores x * scale of each row, largest first, ties by index, and what each weighs in
// the softmax. keys (may be null): sampling noise is added to the scores of the rows whose key is
// not 0, and their probabilities are the softmax of the k noisy scores. tokens [n]: token ids,
// which the noise depends on.
void smart_top_k(const float* x, int32_t rows, int64_t n, int32_t k, const float* scale,
                 const uint64_t* keys, const int64_t* tokens, int64_t* ids, float* probs,
                 int32_t threads);
// Draws a token for each of `count` rows of n logits: the argmax of row * scale + noise among the
// nucleus, the entries with less than top_p of the probability above them. It is one of those that
// are at least the maximum + `below`, and among the k largest entries and their equals (k of 1 to
// n - 1; 0 or more than that cuts nothing).
// A negative k asks for no more than `best`. best: the first maximum, -1 if it is not finite, or if
// a row that is drawn from has a NaN. drawn: the token, -1 where rounding would decide.
void smart_draw(const struct Draw* draws, int64_t count, int64_t n, int64_t* best, int64_t* drawn,
                int32_t threads);

// The nodes of `level` to expand next, ascending, into `out` [nodes]; returns how many. Scores.
int64_t smart_frontier(const struct Rule* rule, const struct Trees* t, int64_t level, int64_t* out);
// The nodes to verify, ascending, into `out` [nodes]; returns how many. Scores.
int64_t smart_select(const struct Rule* rule, const struct Trees* t, int64_t* out);
// Drafts a round as the rule says into trees that hold what free drafters propose: the first level
// (`first` and `v`, whose tokens and probs are [batch, k]), then what smart_frontier says, level by
// level. `kept` [room] receives what smart_select says, `kept_count` how many that are. A child
// that is there already stays one node, of source 0 and with the larger draft_prob. Returns the
// levels run, or -1 where the kernels do not serve the head or model.
int64_t smart_draft(const struct Drafter* g, const struct Rule* rule, const struct Rows* first,
                    const struct Level* v, struct Trees* t, int64_t* kept, int64_t* kept_count);

#if defined(__cplusplus)
}
#endif
