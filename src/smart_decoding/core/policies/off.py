"""Plain decoding: the baseline that every speedup is a ratio to."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, StatelessPolicy
from smart_decoding.core.tree import DraftTrees, IntArray


class Off(StatelessPolicy):
    """Never drafts."""

    name = "off"

    def plan(self, batch: BatchState) -> DraftPlan:
        """Plain decoding."""
        return OFF

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        """Nothing to expand."""
        return None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        """Nothing to verify."""
        return np.zeros(0, np.int64)
