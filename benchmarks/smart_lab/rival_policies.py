"""Policies of other engines, for comparison alone: the laboratory's commands register them beside
the product's.

Needed by `bench --tune-chains` and `ablate "pooled_chain tuned"`: the chains in docs/results.md.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import POLICIES
from smart_decoding.core.policies.base import StatelessPolicy, require_int, token_array
from smart_decoding.core.rule import Scores, TreeRule
from smart_decoding.core.selection import Beam, BestRate, KeepBest, RoundCosts

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.policies.base import TokenIds

MEMORY = 0.995  # per tested draft of a depth: older ones fade


class PooledChain(StatelessPolicy):
    """vLLM's adaptive verification (PR 47808): every request is drafted a full chain of `length`,
    and what is verified of all chains together is what yields the most tokens per profiled second.
    Survival is calibrated online; never plain."""

    name = "pooled_chain"

    def __init__(
        self,
        cost: CostModel | None = None,
        calibration: Calibration | None = None,
        length: int = 3,
        eos_token_ids: TokenIds = (),
    ) -> None:
        self.cost: CostModel = cost or CostModel.default()
        self.calibration = calibration or Calibration()
        self.length = require_int("length", length, 1, 64)
        self._ends = token_array(eos_token_ids)

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Plan as many levels as the longest request may use."""
        keep = BestRate(self._costs(batch, batch.size * self.length))
        scores = Scores(self.calibration, batch.kind)
        return TreeRule.of(batch.limits, self.length, 1, self._ends, Beam(1), keep, scores)

    def _costs(self, batch: BatchState, nodes: int) -> RoundCosts:
        """Profiled seconds at this batch size and context."""
        size = batch.size
        context = batch.mean_context
        first = float(self.cost.first_seconds(size, batch.catch_up_rows, context))
        levels = self.cost.draft_seconds(np.arange(size + 1), context)
        verify = self.cost.verify_curve(size, size, nodes + 1, context)
        return RoundCosts(size, self.cost.overhead_seconds + first, levels, verify)

    def observe(self, round: Round) -> None:
        """Learn survival."""
        if round.rule is not None and len(round.trees):
            nodes, chosen = round.observed()
            self.calibration.observe(round.trees, nodes, chosen, round.batch.kind)


class ThroughputChain(StatelessPolicy):
    """SGLang's `throughput_aware`: one chain length for the whole batch, 1 to `max_length`, the one
    with the most expected tokens per second by mean acceptance and measured costs; never plain."""

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
        """Plan the best number of levels, at most as many as the longest request may use."""
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
        """Count what was accepted, depth by depth."""
        if round.rule is None:
            return
        nodes, chosen = round.observed()
        depths = round.trees.depth[nodes].tolist()
        for depth, hit in zip(depths, chosen.tolist(), strict=True):
            if depth <= self.max_length:
                self._tested[depth - 1] = MEMORY * self._tested[depth - 1] + 1.0
                self._accepted[depth - 1] = MEMORY * self._accepted[depth - 1] + hit


RIVAL_POLICIES: dict[str, type[Any]] = {cls.name: cls for cls in (PooledChain, ThroughputChain)}


def register() -> None:
    """Let `make_policy` and the options of this process know them by name."""
    POLICIES.update(RIVAL_POLICIES)
