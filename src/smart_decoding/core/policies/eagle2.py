"""EAGLE-2's tree (Li et al. 2024; also MSD): a beam by cumulative draft probability, re-ranked to a
fixed size."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.core.policies.base import StatelessPolicy, require_int, token_array
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Beam, KeepBest

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState
    from smart_decoding.core.policies.base import TokenIds


class Eagle2(StatelessPolicy):
    """Drafts for each request `top_k` children per node, with a beam of `top_k` nodes per level,
    and verifies the best `total_tokens` - 1 nodes.

    As in the public code, `depth` counts the levels after the first (depth 7: 8 levels) and
    `total_tokens` counts the root."""

    name = "eagle2"

    def __init__(
        self, depth: int = 7, top_k: int = 10, total_tokens: int = 60, eos_token_ids: TokenIds = ()
    ) -> None:
        self.depth = require_int("depth", depth, 0, 64)
        self.top_k = require_int("top_k", top_k, 1, 256)
        self.total_tokens = require_int("total_tokens", total_tokens, 2, 4096)
        self._ends = token_array(eos_token_ids)

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the rule, with as many levels as the longest request may use."""
        beam = Beam(self.top_k)
        keep = KeepBest(self.total_tokens - 1)
        return TreeRule.of(batch.limits, self.depth + 1, self.top_k, self._ends, beam, keep)
