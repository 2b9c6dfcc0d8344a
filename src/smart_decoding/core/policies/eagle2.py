"""EAGLE-2's tree (Li et al. 2024; also MSD): a beam by cumulative draft probability, re-ranked to a
fixed size."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.policies.common import (
    TokenIds,
    best_per_owner,
    depth_limits,
    expandable,
    require_int,
    useful,
)
from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, StatelessPolicy
from smart_decoding.core.tree import DraftTrees, IntArray


class Eagle2(StatelessPolicy):
    """Per request: `top_k` children per node, a beam of `top_k` nodes per level, the best
    `total_tokens` - 1 verified.

    As in the public code `depth` counts the levels after the first (depth 7: 8 levels) and
    `total_tokens` the root."""

    name = "eagle2"

    def __init__(
        self, depth: int = 7, top_k: int = 10, total_tokens: int = 60, eos_token_ids: TokenIds = ()
    ) -> None:
        self.depth = require_int("depth", depth, 0, 64)
        self.top_k = require_int("top_k", top_k, 1, 256)
        self.total_tokens = require_int("total_tokens", total_tokens, 2, 4096)
        self.eos = frozenset(eos_token_ids)

    def plan(self, batch: BatchState) -> DraftPlan:
        """As many levels as the longest request may use."""
        limits = depth_limits(batch)
        levels = min(self.depth + 1, int(limits.max(initial=0)))
        if not levels:
            return OFF
        width = self.top_k * int((limits > 1).sum())
        return DraftPlan(True, levels, children=self.top_k, width=width)

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        """The `top_k` best nodes of each request."""
        if level >= plan.levels:
            return None
        nodes = expandable(trees, level, depth_limits(batch), self.eos)
        if not len(nodes):
            return None
        return best_per_owner(trees, nodes, trees.path_prob[nodes], self.top_k)

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        """The best nodes of each request, by the product of draft probabilities."""
        nodes = np.flatnonzero(useful(trees, depth_limits(batch), self.eos))
        return best_per_owner(trees, nodes, trees.path_prob[nodes], self.total_tokens - 1)
