"""What a model's catching up is charged with, by the rounds that it serves."""

from __future__ import annotations

import numpy as np
import pytest

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies.smart import Smart
from smart_decoding.core.prediction import Mode, Shape
from smart_decoding.core.realised import CatchingUp
from smart_decoding.core.rule import NO_NODES
from smart_decoding.core.tree import DraftTrees

COST = CostModel.from_table({8: {8: 0.1, 64: 0.1}}, {1: 0.001, 8: 0.008, 1200: 1.2})


def test_before_anything_is_known_all_that_is_held_is_read_once() -> None:
    rows = CatchingUp()
    assert rows.rounds(8, 150, 8 * 150, 24) == pytest.approx(24 / 8)
    assert rows.rounds(8, 1200, 8 * 150, 24) == pytest.approx(24)
    assert rows.rounds(8, 10, 8 * 150, 24) == 1.0
    assert rows.rounds(8, 0, 0, 24) == 24


def test_what_is_observed_weighs_as_its_rounds_and_belief_fades() -> None:
    rows = CatchingUp()
    rows.rounds(8, 150, 1200, 24)
    mean = 1200 / 24
    for seen, each in enumerate((900, 0, 60), 25):
        rows.observe(8, each)
        mean += (each - mean) / seen
    assert rows.rounds(8, 150, 1200, 24) == pytest.approx(150 / mean)
    assert rows.rounds(2, 150, 1200, 24) == pytest.approx(150 / (1200 / 24))  # another bucket
    for _ in range(20 * HORIZON):
        rows.observe(8, 15)
    assert rows.rounds(8, 150, 1200, 24) == pytest.approx(10.0)
    assert rows.rounds(8, 1200, 1200, 24) == 24  # no more than there are


def test_who_never_missed_anything_pays_little_the_first_time() -> None:
    rows = CatchingUp()
    for _ in range(HORIZON):
        rows.observe(1, 0)
    assert rows.rounds(1, 150, 150, 24) == 24


def batch_of(size: int, waiting: int, context: int = 150) -> BatchState:
    each = np.full(size, context)
    return BatchState(each, np.full(size, 100), np.zeros(size), np.ones(size, bool), 0, waiting)


def rate(policy: Smart, batch: BatchState) -> float:
    """As the policy is asked: by its kept predictions."""
    return policy.predict(Shape.of(batch, batch.limits)).rates[Mode.MODEL]


def draft(policy: Smart, batch: BatchState, explores: bool = False) -> None:
    """A round of the model that catches up, of which nothing came."""
    nodes = DraftTrees.empty(batch.size)
    empty = np.full(batch.size, 5)
    round = Round(batch, None, nodes, NO_NODES, NO_NODES, empty)
    round.rule = policy.plan(batch)
    round.level_widths = [batch.size + batch.catch_up_rows]
    round.level_seconds = [0.01]
    round.verify_rows, round.verify_seconds = batch.size, 0.1
    policy.learned.observe(round, 0.0, explores)
    policy.cost = COST  # nothing is kept


def test_one_prompt_among_many_serves_until_the_next_one_comes() -> None:
    """For eight requests a prompt of 150 rows costs its eighth of the rounds: as much a round as
    eight prompts at once."""
    nothing, one, all_of_them = (rate(Smart(COST), batch_of(8, n)) for n in (8, 158, 1208))
    assert nothing > 1.1 * one
    assert one == pytest.approx(all_of_them, rel=0.02)


@pytest.mark.parametrize("order", [(8, 158), (158, 8)])
def test_a_kept_prediction_is_not_one_of_other_rows(order: tuple[int, int]) -> None:
    policy = Smart(COST)
    for waiting in order:
        assert rate(policy, batch_of(8, waiting)) == rate(Smart(COST), batch_of(8, waiting))


def test_what_a_models_rounds_had_to_read_is_learned() -> None:
    """Where three quarters of a prompt come in each round; of explorations nothing is."""
    prompt = batch_of(8, 158)
    seen, explored = Smart(COST), Smart(COST)
    before = rate(seen, prompt)
    for _ in range(HORIZON):
        draft(seen, batch_of(8, 8 + 110))
        draft(explored, batch_of(8, 8 + 110), explores=True)
    assert rate(explored, prompt) == pytest.approx(before)
    assert rate(seen, prompt) < 0.95 * before


def test_a_lone_long_answer_shares_a_stretch_among_its_rounds() -> None:
    nothing, stretch = (rate(Smart(COST), batch_of(1, n, context=8000)) for n in (1, 101))
    assert nothing > stretch > 0.95 * nothing


def test_the_rows_of_any_round_are_not_missed() -> None:
    policy = Smart(COST)
    for _ in range(3):
        draft(policy, batch_of(8, 8))
    assert policy.learned.catching_up.rounds(8, 150, 1200, 24) == 24
