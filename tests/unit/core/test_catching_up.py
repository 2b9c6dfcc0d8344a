"""What a model's catching up is charged with, by the rounds that it serves."""

from __future__ import annotations

import numpy as np
import pytest

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.cost import CostModel
from smart_decoding.core.forecast import Forecast
from smart_decoding.core.learned import Learned
from smart_decoding.core.policies.base import BatchState
from smart_decoding.core.prediction import Mode, Shape, predict
from smart_decoding.core.realised import CatchingUp
from smart_decoding.core.running import HORIZON


def test_before_anything_is_known_all_that_is_held_is_read_once() -> None:
    rows = CatchingUp()
    assert rows.of(8, 8 * 150, 24) == pytest.approx(8 * 150 / 24)
    assert rows.of(1, 150, 30) == pytest.approx(5.0)
    assert rows.of(1, 3, 30) == 1.0


def test_what_is_observed_weighs_as_its_rounds() -> None:
    rows = CatchingUp()
    for each in (900, 0, 60):
        rows.observe(8, each)
    assert rows.of(8, 1200, 24) == pytest.approx((1200 + 960) / (24 + 3))
    assert rows.of(2, 1200, 24) == pytest.approx(1200 / 24)  # another bucket
    for _ in range(20 * HORIZON):
        rows.observe(8, 10)
    assert rows.of(8, 1200, 24) == pytest.approx((1200 + 10 * HORIZON) / (24 + HORIZON))


def batch_of(size: int, waiting: int) -> BatchState:
    each = np.full(size, 150)
    return BatchState(each, np.full(size, 100), np.zeros(size), np.ones(size, bool), 0, waiting)


def rate(learned: Learned, batch: BatchState) -> float:
    return predict(Shape.of(batch, batch.limits), learned, 8, 2.0).rates[Mode.MODEL]


def test_one_prompt_among_many_serves_until_the_next_one_comes() -> None:
    """For eight requests a prompt of 150 rows costs its eighth of the rounds: as much a round as
    eight prompts at once."""
    cost = CostModel.from_table({8: {8: 0.1, 64: 0.1}}, {1: 0.001, 8: 0.008, 1200: 1.2})
    calibration = Calibration()
    learned = Learned(cost, calibration, Forecast(calibration))
    nothing, one, all_of_them = (rate(learned, batch_of(8, n)) for n in (8, 8 + 150, 8 + 1200))
    assert nothing > one == pytest.approx(all_of_them, rel=0.02)
    for _ in range(HORIZON):  # where three quarters of a prompt come in each round
        learned.catching_up.observe(8, 110)
    assert rate(learned, batch_of(8, 8 + 150)) < 0.9 * one
    assert rate(learned, batch_of(8, 8)) == pytest.approx(nothing)
