// The rows of a forward that the kernels lay out themselves: see Rows.

#pragma once
#include <vector>

#include "abi.h"

namespace [[gnu::visibility("hidden")]] smart {

struct RowVectors {
    std::vector<int32_t> query_start_loc{0}, block_table_start, slot_mapping, context_len,
        ancestors_start{0}, ancestors;
    std::vector<int64_t> position, token;

    RowVectors() = default;
    // Some rows of a forward as one of their own. which: their numbers, ascending.
    RowVectors(const Rows& in, const std::vector<int32_t>& which) {
        auto next = which.begin();
        for (int32_t i = 0; i < in.requests; i++) {
            const auto first = next;
            for (; next < which.end() && *next < in.query_start_loc[i + 1]; next++) {
                slot_mapping.push_back(in.slot_mapping[*next]);
                context_len.push_back(in.context_len[*next]);
                position.push_back(in.position[*next]);
                ancestors.insert(ancestors.end(), in.ancestors + in.ancestors_start[*next],
                                 in.ancestors + in.ancestors_start[*next + 1]);
                ancestors_start.push_back(int32_t(ancestors.size()));
            }
            if (next == first) continue;
            query_start_loc.push_back(int32_t(next - which.begin()));
            block_table_start.push_back(in.block_table_start[i]);
        }
    }

    // As a forward reads them. in: block tables and rotary tables.
    Rows view(Rows in) const {
        in.rows = int32_t(position.size());
        in.requests = int32_t(block_table_start.size());
        in.query_start_loc = query_start_loc.data();
        in.block_table_start = block_table_start.data();
        in.slot_mapping = slot_mapping.data();
        in.context_len = context_len.data();
        in.ancestors_start = ancestors_start.data();
        in.ancestors = ancestors.data();
        in.position = position.data();
        return in;
    }
};

}  // namespace smart
