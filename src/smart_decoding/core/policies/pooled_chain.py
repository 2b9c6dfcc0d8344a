"""vLLM's adaptive verification (PR 47808): every request is drafted a full chain, and what is
verified of all chains together is what yields the most tokens per profiled second."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies.base import StatelessPolicy, require_int, token_array
from smart_decoding.core.rule import Scores, TreeRule
from smart_decoding.core.selection import Beam, BestRate, RoundCosts

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import BatchState, Round, TokenIds


class PooledChain(StatelessPolicy):
    """Chains of `length` for all, pruned by survival, which is calibrated online; never plain."""

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
        """As many levels as the longest request may use."""
        keep = BestRate(self._costs(batch, batch.size * self.length))
        scores = Scores(self.calibration, batch.kind)
        return TreeRule.of(batch, self.length, 1, self._ends, Beam(1), keep, scores)

    def _costs(self, batch: BatchState, nodes: int) -> RoundCosts:
        """Profiled seconds at this batch size and context."""
        size = batch.size
        context = batch.mean_context
        first = float(self.cost.first_seconds(size, batch.catch_up_rows, context))
        levels = self.cost.draft_seconds(np.arange(size + 1), context)
        verify = self.cost.verify_curve(size, size, nodes + 1, context)
        return RoundCosts(size, self.cost.overhead_seconds + first, levels, verify)

    def observe(self, round: Round) -> None:
        """Learns survival."""
        if round.rule is not None and len(round.trees):
            nodes, chosen = round.observed()
            self.calibration.observe(round.trees, nodes, chosen, round.batch.kind)
