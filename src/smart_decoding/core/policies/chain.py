"""A fixed number of tokens in a row, as in the first speculative decoders (Leviathan et al., Chen
et al.)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from smart_decoding.core.policies.base import StatelessPolicy, require_int, token_array
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Beam, KeepBest

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState
    from smart_decoding.core.policies.base import TokenIds


class Chain(StatelessPolicy):
    """Drafts and verifies the drafter's first choice, `length` levels deep, for every request."""

    name = "chain"

    def __init__(self, length: int = 3, eos_token_ids: TokenIds = ()) -> None:
        self.length = require_int("length", length, 1, 64)
        self._ends = token_array(eos_token_ids)

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the rule, with as many levels as the longest request may use."""
        return TreeRule.of(batch.limits, self.length, 1, self._ends, Beam(1), KeepBest(self.length))
