"""Plain decoding: the baseline that every speedup is a ratio to."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, Round, StatelessPolicy
from smart_decoding.core.tree import DraftTrees, IntArray


class Off(StatelessPolicy):
    """Never drafts."""

    name = "off"

    def plan(self, batch: BatchState) -> DraftPlan:
        return OFF

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        return None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        return np.zeros(0, np.int64)

    def observe(self, round: Round) -> None:
        pass
