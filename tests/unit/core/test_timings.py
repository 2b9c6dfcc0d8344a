"""What rounds took, until costs are corrected by it."""

from __future__ import annotations

import numpy as np
import pytest

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies.smart.state import Timings
from smart_decoding.core.tree import DraftTrees

NONE = np.zeros(0, np.int64)


def a_round(seconds: float) -> Round:
    """Verifies eight rows of one request."""
    one = np.ones(1, np.int64)
    batch = BatchState(100 * one, 50 * one, np.zeros(1), np.ones(1, bool))
    return Round(batch, None, DraftTrees.empty(1), NONE, NONE, NONE, [], [], 8, seconds)


def test_a_heavy_tail_counts_in_full() -> None:
    """One forward of ten takes twice as long: what they take is the mean, not what most take."""
    rng = np.random.default_rng(0)
    cost = CostModel.from_table({1: {1: 1.0, 16: 1.0}})
    timings = Timings()
    found = []
    for index in range(4000):
        timings.add(a_round(2.0 if rng.random() < 0.1 else 1.0))
        if index % 8 == 7:
            for sample in timings.take():
                cost = cost.corrected(sample)
            found.append(float(cost.verify_seconds(1, 8, 100)))
    assert np.mean(found[100:]) == pytest.approx(1.1, rel=0.015)
