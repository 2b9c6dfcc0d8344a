"""A fixed number of tokens in a row, as in the first speculative decoders (Leviathan et al., Chen
et al.)."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.policies.common import (
    TokenIds,
    depth_limits,
    expandable,
    require_int,
    useful,
)
from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, StatelessPolicy
from smart_decoding.core.tree import DraftTrees, IntArray


class Chain(StatelessPolicy):
    """Drafts and verifies the drafter's first choice, `length` levels deep, for every request."""

    name = "chain"

    def __init__(self, length: int = 3, eos_token_ids: TokenIds = ()) -> None:
        self.length = require_int("length", length, 1, 64)
        self.eos = frozenset(eos_token_ids)

    def plan(self, batch: BatchState) -> DraftPlan:
        """As many levels as the longest request may use."""
        limits = depth_limits(batch)
        levels = min(self.length, int(limits.max(initial=0)))
        return DraftPlan(True, levels, children=1, width=int((limits > 1).sum())) if levels else OFF

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        """The only node of each request that can go on."""
        if level >= plan.levels:
            return None
        nodes = expandable(trees, level, depth_limits(batch), self.eos)
        return nodes if len(nodes) else None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        """All of them."""
        useful_ = useful(trees, depth_limits(batch), self.eos)
        return np.flatnonzero(useful_ & (trees.depth <= self.length))
