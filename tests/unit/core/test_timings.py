"""What rounds took, until costs are corrected by it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.costs import CostModel, DraftSample, VerifySample
from smart_decoding.core.policies.smart.state import Timings
from smart_decoding.core.tree import DraftTrees

NONE = np.zeros(0, np.int64)


def a_round(size: int, rows: int, seconds: float, widths: list[int], waiting: int = 0) -> Round:
    batch = BatchState(
        np.full(size, 100),
        np.full(size, 50),
        np.zeros(size),
        np.ones(size, bool),
        catch_up_rows=waiting,
    )
    trees = DraftTrees.empty(size)
    levels = [0.001 * width for width in widths]
    return Round(batch, None, trees, NONE, NONE, NONE, widths, levels, rows, seconds)


def test_means_of_forwards_that_are_alike() -> None:
    timings = Timings()
    timings.add(a_round(2, 8, 1.0, [5, 3, 3], waiting=3))
    timings.add(a_round(2, 11, 4.0, [5, 2], waiting=3))
    timings.add(a_round(2, 40, 9.0, []))
    samples = timings.take()
    assert samples[0] == VerifySample(2, 9.5, 100, 2.5)
    assert samples[1] == DraftSample(2, 100, pytest.approx(0.005), 3)
    assert samples[2] == DraftSample(pytest.approx(8 / 3), 100, pytest.approx(0.008 / 3))
    assert samples[3] == VerifySample(2, 40, 100, 9.0)
    assert len(samples) == 4
    assert not timings.take()


def test_experts_are_a_mean() -> None:
    timings = Timings()
    for rows, experts in ((8, 30.0), (11, 36.0)):
        timings.add(replace(a_round(2, rows, 1.0, []), experts=experts))
    assert timings.take() == [VerifySample(2, 9.5, 100, 1.0, experts=33.0)]


def test_plain_rounds_count_each() -> None:
    timings = Timings()
    for _ in range(5):
        timings.add(a_round(2, 2, 1.0, []))
    assert timings.take() == [VerifySample(2, 2, 100, 1.0, 5)]


def test_a_heavy_tail_counts_in_full() -> None:
    """One forward of ten takes twice as long: what they take is the mean, not what most take."""
    rng = np.random.default_rng(0)
    cost = CostModel.from_table({1: {1: 1.0, 16: 1.0}})
    timings = Timings()
    found = []
    for index in range(4000):
        timings.add(a_round(1, 8, 2.0 if rng.random() < 0.1 else 1.0, []))
        if index % 8 == 7:
            for sample in timings.take():
                cost = cost.corrected(sample)
            found.append(float(cost.verify_seconds(1, 8, 100)))
    assert np.mean(found[100:]) == pytest.approx(1.1, rel=0.015)
