"""What levels that are not drafted yet would bring, learned from those that are."""

from __future__ import annotations

import numpy as np
import pytest

from smart_decoding.core.calibration import DEPTHS, KINDS, Calibration
from smart_decoding.core.forecast import Forecast
from smart_decoding.core.tree import ROOT, DraftTrees

GREEDY = np.eye(KINDS)[0]


def sure_chains(batch: int, depth: int, calibration: Calibration) -> DraftTrees:
    """For each request a chain of tokens that the drafter is sure of."""
    trees = DraftTrees.empty(batch)
    owners = np.arange(batch)
    above = np.full(batch, ROOT)
    for _ in range(depth):
        known = len(trees)
        trees.append(owners, owners, above, np.full(batch, 0.95))
        above = np.arange(known, len(trees))
    calibration.score(trees, np.zeros(batch, np.uint8))
    return trees


@pytest.fixture
def calibration() -> Calibration:
    """Confidence is the probability, at every depth."""
    even = Calibration()
    prior = np.repeat(even.prior[:, :1] / 0.9, DEPTHS, axis=1)
    return Calibration(np.minimum(prior, 0.99))


def test_what_was_never_reached_is_believed_to_be_as_the_level_above(
    calibration: Calibration,
) -> None:
    forecast = Forecast(calibration)
    before = forecast.children(GREEDY)
    for _ in range(20):
        forecast.observe(sure_chains(8, 2, calibration))
    after = forecast.children(GREEDY)
    assert (before[:, 0] < 0.7).all()
    assert (after[:, 0] > 0.85).all()
    assert after[2:, 0] == pytest.approx(after[1, 0], rel=0.03)


def test_many_requests_of_a_round_teach_as_much_as_many_rounds_of_one(
    calibration: Calibration,
) -> None:
    together, single = Forecast(calibration), Forecast(calibration)
    together.observe(sure_chains(64, 3, calibration))
    for _ in range(64):
        single.observe(sure_chains(1, 3, calibration))
    assert together.children(GREEDY) == pytest.approx(single.children(GREEDY), abs=0.01)


def test_a_stored_state_is_what_was_believed_and_soon_gives_way(calibration: Calibration) -> None:
    forecast = Forecast(calibration)
    forecast.observe(sure_chains(64, 2, calibration))
    again = Forecast.from_state(forecast.state_dict(), calibration)
    assert again.children(GREEDY) == pytest.approx(forecast.children(GREEDY), abs=0.01)
    unsure = DraftTrees.empty(64)
    unsure.append(np.arange(64), np.arange(64), np.full(64, ROOT), np.full(64, 0.2))
    calibration.score(unsure, np.zeros(64, np.uint8))
    again.observe(unsure)
    assert again.children(GREEDY)[0, 0] < 0.35
