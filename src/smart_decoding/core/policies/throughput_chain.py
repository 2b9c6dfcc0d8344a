"""SGLang's `throughput_aware`: one chain length for the whole batch, by mean acceptance and
measured costs; never plain."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies.base import StatelessPolicy, require_int, token_array
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Beam, KeepBest

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import BatchState, Round, TokenIds

MEMORY = 0.995  # per tested draft of a depth: older ones fade


class ThroughputChain(StatelessPolicy):
    """A chain of 1 to `max_length` tokens, the one with the most expected tokens per second."""

    name = "throughput_chain"

    def __init__(
        self, cost: CostModel | None = None, max_length: int = 8, eos_token_ids: TokenIds = ()
    ) -> None:
        self.cost: CostModel = cost or CostModel.default()
        self.max_length = require_int("max_length", max_length, 1, 64)
        self._ends = token_array(eos_token_ids)
        # By depth: drafts tested and accepted, each starting from an acceptance of 0.7.
        self._tested = [1.0] * self.max_length
        self._accepted = [0.7] * self.max_length

    def plan(self, batch: BatchState) -> TreeRule | None:
        """As many levels as are best, and as the longest request may use."""
        limits = batch.limits
        levels = min(self._best(batch), int(limits.max(initial=0)))
        if not levels:
            return None
        return TreeRule(levels, 1, limits, self._ends, Beam(1), KeepBest(levels))

    def _best(self, batch: BatchState) -> int:
        size = batch.size
        context = batch.mean_context
        first = float(self.cost.first_seconds(size, batch.catch_up_rows, context))
        drafted = self.cost.overhead_seconds + first
        level = float(self.cost.draft_seconds(size, context))
        verify = self.cost.verify_seconds(
            size, [size * (1 + length) for length in range(1, self.max_length + 1)], context
        )
        pairs = zip(self._accepted, self._tested, strict=True)
        survival = itertools.accumulate((a / t for a, t in pairs), float.__mul__)
        rates = [
            (1.0 + expected) / (drafted + level * further + float(seconds))
            for further, (expected, seconds) in enumerate(
                zip(itertools.accumulate(survival), verify, strict=True)
            )
        ]
        return 1 + max(range(self.max_length), key=rates.__getitem__)

    def observe(self, round: Round) -> None:
        """Counts what was accepted, depth by depth."""
        if round.rule is None:
            return
        nodes, chosen = round.observed()
        depths = round.trees.depth[nodes].tolist()
        for depth, hit in zip(depths, chosen.tolist(), strict=True):
            if depth <= self.max_length:
                self._tested[depth - 1] = MEMORY * self._tested[depth - 1] + 1.0
                self._accepted[depth - 1] = MEMORY * self._accepted[depth - 1] + hit
