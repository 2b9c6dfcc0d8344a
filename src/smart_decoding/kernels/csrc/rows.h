// The rows of a forward that the kernels lay out themselves: see Rows.

#pragma once
#include <vector>

#include "abi.h"

namespace [[gnu::visibility("hidden")]] smart {

struct RowVectors {
    std::vector<int32_t> query_start_loc{0}, block_table_start, slot_mapping, context_len,
        ancestors_start{0}, ancestors;
    std::vector<int64_t> position, token;

    // As a forward reads them. in: block tables and rotary tables.
    Rows view(Rows in) const {
        in.rows = int32_t(token.size());
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
