"""Rests: how long they last, and that none of their rounds is forgotten."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.costs import CostModel
from smart_decoding.core.exploration import Backoff
from smart_decoding.core.policies.smart import Smart
from smart_decoding.core.tree import DraftTrees


def plain_round(size: int) -> Round:
    none = np.zeros(0, np.int64)
    ones = np.ones(size, np.int64)
    batch = BatchState(100 * ones, 100 * ones, np.zeros(size), np.ones(size, np.bool_))
    trees = DraftTrees.empty(size)
    return Round(batch, None, trees, none, none, ones, verify_rows=size, verify_seconds=0.01)


def test_lasts_for_its_rounds_and_its_batch() -> None:
    backoff = Backoff()
    assert not backoff.goes_on(4)
    backoff.begin(2, 4)
    assert [backoff.goes_on(5) for _ in range(3)] == [True, True, False]
    backoff.begin(9, 4)
    assert not backoff.goes_on(8)
    assert not backoff.goes_on(4)


def test_no_round_of_a_rest_is_forgotten() -> None:
    """Whatever cuts it short: every round is counted by the time the policy asks again."""
    dear = CostModel.from_table({1: {1: 10.0, 64: 640.0}}, {1: 100.0})
    policy = Smart(dear, exploration_budget=0.0)
    for sizes in range(1, 40):
        size = sizes % 7 + 1
        for _ in range(sizes):
            now = plain_round(size)
            assert policy.plan(now.batch) is None
            policy.observe(now)
    policy.plan(plain_round(64).batch)
    assert policy.statistics.verified.total() == sum(range(1, 40))
