"""What a model's catching up is charged with, by the rounds that its requests stay."""

from __future__ import annotations

import numpy as np
import pytest

from smart_decoding.core.batch import BatchState
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies.smart import Mode, Shape, Smart

COST = CostModel.from_table({8: {8: 0.1, 64: 0.1}}, {1: 0.001, 8: 0.008, 1200: 1.2})


def batch_of(size: int, waiting: int, context: int = 150) -> BatchState:
    each = np.full(size, context)
    return BatchState(each, np.full(size, 100), np.zeros(size), np.ones(size, bool), 0, waiting)


def rate(policy: Smart, batch: BatchState) -> float:
    """Return the policy's own prediction, which it may have kept."""
    return policy.predict(Shape.of(batch, batch.limits)).rates[Mode.MODEL]


def test_every_row_that_was_missed_costs_its_share() -> None:
    """Eight requests stay for 32 rounds and more: a prompt of 150 rows adds 150 / 32 to each."""
    nothing, one, all_of_them = (1 / rate(Smart(COST), batch_of(8, n)) for n in (8, 158, 1208))
    assert one > nothing
    assert all_of_them - nothing == pytest.approx(8 * (one - nothing), rel=0.05)


@pytest.mark.parametrize("order", [(8, 158), (158, 8)])
def test_a_kept_prediction_is_not_one_of_other_rows(order: tuple[int, int]) -> None:
    policy = Smart(COST)
    for waiting in order:
        assert rate(policy, batch_of(8, waiting)) == rate(Smart(COST), batch_of(8, waiting))


def test_a_lone_long_answer_shares_a_stretch_among_its_rounds() -> None:
    nothing, stretch = (rate(Smart(COST), batch_of(1, n, context=8000)) for n in (1, 101))
    assert nothing > stretch > 0.95 * nothing
