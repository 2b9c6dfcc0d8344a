// Linear attention by the gated delta rule: a state for each request and head, in place of keys and
// values.

#pragma once
#include "linear.h"

namespace [[gnu::visibility("hidden")]] smart {

constexpr int MOST_INPUTS = 8;  // of a convolution

struct DeltaSizes {
    int64_t each;   // value heads of a key head
    int64_t tiles;  // key heads, where value heads are tiled; else 0
    int64_t keys, values, channels;
    int64_t inputs;  // what is kept of a row: channels, and rates
    // From a row of mixed channels to the next one: an odd number of cache lines. Else a head's
    // parts of all rows would have the same few places in a cache.
    int64_t stride;
    int64_t blocks;  // of a head's columns
    int64_t block, state;

    explicit DeltaSizes(const Delta& w)
        : each(w.value_heads / w.key_heads),
          tiles(w.tiled ? w.key_heads : 0),
          keys(int64_t(w.key_heads) * w.key_dim),
          values(int64_t(w.value_heads) * w.value_dim),
          channels(2 * keys + values),
          inputs(channels + 2 * w.value_heads),
          stride(((channels + 15) / 16 | 1) * 16),
          blocks((w.value_dim + COLUMNS - 1) / COLUMNS),
          block(int64_t(w.key_dim) * COLUMNS),
          state(w.value_heads * blocks * block) {}

    int64_t key_head(int64_t head) const { return tiles ? head % tiles : head / each; }
    int64_t value_head(int64_t key_head, int64_t i) const {
        return tiles ? i * tiles + key_head : key_head * each + i;
    }
};

// That of the first layer that has it; null: none has.
static inline const Delta* delta_of(const Layer* layers, int count) {
    for (int i = 0; i < count; i++)
        if (layers[i].delta) return layers[i].delta;
    return nullptr;
}

// The rows of a forward as recurrences reach them: of each request the waiting ones, the committed
// ones, then the nodes of its tree, depth first.
struct DeltaRows {
    struct Node {
        int32_t row, depth;
        bool first;  // of its parent's children
    };
    struct Request {
        int64_t slot;  // -1: none
        bool fresh;    // it begins with an empty state
        int32_t waiting, first_waiting, row, committed;
        int32_t first_node, end_node;  // in `nodes`
    };

    // Where an input of the convolution lies: a row of this forward, or before these.
    static constexpr int32_t NOTHING = INT32_MIN;
    static constexpr int32_t past(int32_t i) { return -1 - i; }  // i: of a slot's inputs

    int32_t all, deepest = 0;  // rows, those that wait behind the others; the depth of nodes
    std::vector<Request> requests;
    std::vector<Node> nodes;
    std::vector<int32_t> request;  // [all] of each row
    std::vector<int32_t> window;   // [all, kernel] its inputs, its own the last
    std::vector<int32_t> number;   // [rows] of tree nodes' rows, among these; of others -1

    // states: null where nothing is to be laid out.
    DeltaRows(const Rows& in, const States* states, int kernel);

    int64_t kept() const { return int64_t(nodes.size()); }

    // Notes in the states that nothing waits any more.
    void finish(const States& states) const;

private:
    void add_nodes(const Rows& in, Request& request, int32_t end, int kernel);
    void follow(int32_t row, int32_t parent, int32_t own, int kernel);
    // The requests' first rows follow what is past.
    void begin(int32_t row, const Request& request, int32_t before, int32_t own, int kernel);
};

// What of a forward's memory a layer reads and writes.
struct DeltaMemory {
    const States* states;
    int64_t layer;  // among those with linear attention
    int64_t count;  // tree nodes' rows,
    float* nodes;   // and null, or [count, inputs] to be kept of them

    void next(const DeltaSizes& sizes) {
        layer++;
        if (nodes) nodes += count * sizes.inputs;
    }
};

// Floats of Workspace's `delta`. all: of DeltaRows.
static inline int64_t delta_floats(const Delta& w, int64_t rows, int64_t all) {
    const DeltaSizes sizes(w);
    return rows * 2 * w.value_heads + all * (sizes.stride + 2 * w.value_heads + w.key_heads)
           + COLUMNS;
}

// What linear attention makes of each row, [rows, values], into Workspace's `attention`, by a whole
// team, which may read it at once. Workspace's `normed` is read, and `qkv` [rows, channels +
// values] holds its products.
template <class W>
void add_delta(const Layer& l, const DeltaRows& rows, int count, const Workspace& workspace,
               const DeltaMemory& memory);

}  // namespace smart
