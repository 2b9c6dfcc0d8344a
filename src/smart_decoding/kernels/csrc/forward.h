// What kernels.cpp and controller.cpp both know: the rows of a forward, and a level of a draft head.

#pragma once
#include <cstdint>

struct Rows {                    // what attention must know of the rows of a forward
    int32_t rows, groups;        // groups: runs of consecutive rows of one request
    const int32_t* group_row;    // [groups + 1] first row of each group
    const int32_t* group_pages;  // [groups] offset of the request's block table in `pages`
    const int32_t* pages;        // block tables, one after another
    const int32_t* slot;         // [rows] page * PAGE + offset where the row's own key and value are stored
    const int32_t* direct;       // [rows] positions 0 .. direct-1 are read through the block table
    const int32_t* extra_at;     // [rows + 1] offsets into `extra`
    const int32_t* extra;        // slots of the positions direct, direct + 1, ... (ancestors in the tree, then itself)
    const int64_t* position;     // [rows]
    const float* cosine;         // [positions, head_dim / 2]
    const float* sine;
};

struct Layer;  // kernels.cpp
struct Head;

// A whole target, from token ids to logits.
struct Model {
    const Layer* layers;
    const void *embedding, *table;  // packed or plain, the other is null
    const void* output;             // packed
    const float* final_norm;
    void *keys, *values;
    int64_t vocab, pages;
    int32_t count, hint, w_bf16, kv_bf16;  // count: of layers
    float eps;
};

// One forward: what it reads beside its rows, and what it leaves.
struct Pass {
    const int64_t* token;          // [rows]
    const float* const* inserts;   // null, or [rows] the embedding in place of the token's, where not null
    const int64_t* wanted;         // [wanted_count] rows whose logits are wanted, or null: all
    const int32_t* taps;           // after taps[0], taps[1], ... layers the states are copied to `tapped`
    float* tapped;                 // [rows, tap_count, hidden]
    float* logits;                 // [wanted_count, vocab], or null
    int64_t* best;                 // [wanted_count] their first maxima, -1 where that is not finite
    int32_t wanted_count, tap_count;
};

// Runs a model. Returns nonzero where the kernels do not serve it.
extern "C" int smart_forward(const Model* m, const Rows* in, const Pass* pass, int threads);

extern "C" void smart_move_kv(void* kc, void* vc, int64_t planes, int64_t pages, int head_dim, int bytes, const int32_t* from,
                              const int32_t* to, int count);

// One level. The first one reads taps and is wanted for the last row of each group only; other rows leave nothing but
// their keys and values. Deeper ones read earlier outputs, all rows are wanted.
struct Level {
    int32_t first, k;
    const int64_t* token;          // [rows]
    const float* const* features;  // [rows]
    const float* const* inserts;   // null, or [rows] the embedding in place of the token's, where not null
    float* out;                    // [wanted, hidden] what deeper levels read
    const float* scale;            // [wanted] on the logits, and the keys of the noise: see smart_top_k
    const uint64_t* keys;
    int64_t* tokens;  // [wanted, k] the best children, best first
    double* probs;
};

// Runs a level. kc, vc: the head's keys and values. Returns nonzero where the kernels do not serve the head.
extern "C" int smart_draft(const Head* h, const Rows* in, const Level* v, void* kc, void* vc, int64_t pages, int w_bf16, int kv_bf16,
                           int threads);
