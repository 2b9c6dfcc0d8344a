"""Explorations: runs of a few rounds, paid for by what they lose."""

from __future__ import annotations

from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.exploration import RUN, STARTING_BUDGET, Exploration


def pay(exploration: Exploration, rounds: int, loss: float) -> list[bool]:
    """So many rounds of a run, each losing a part of a plain one: whether the run has ended."""
    return [exploration.observe(loss, 1.0) for _ in range(rounds)]


def test_a_run_has_as_many_rounds_as_it_was_begun_for() -> None:
    exploration = Exploration(0.01)
    exploration.begin()
    assert pay(exploration, RUN, 0.5) == [False] * (RUN - 1) + [True]
    exploration.begin(7)
    assert pay(exploration, 7, 0.5) == [False] * 6 + [True]
    assert exploration.left == 0
    assert exploration.count == 2


def test_the_next_run_waits_until_the_last_one_is_earned_again() -> None:
    exploration = Exploration(0.01)
    exploration.begin()
    pay(exploration, RUN, 0.5)
    assert exploration.wait == RUN * 0.5 / 0.01
    for _ in range(HORIZON):
        exploration.observe_best()
    assert exploration.wait == RUN * 0.5 / 0.01 - HORIZON


def test_rounds_that_follow_a_run_are_paid_for_once() -> None:
    exploration = Exploration(0.01)
    exploration.begin()
    pay(exploration, RUN + 2, 0.5)
    assert exploration.left == 0
    assert exploration.count == 1
    assert exploration.seconds == (RUN + 2) * 0.5


def test_a_run_that_gained_is_followed_by_another() -> None:
    exploration = Exploration(0.01)
    exploration.begin()
    pay(exploration, RUN, -0.5)
    assert exploration.left == RUN
    pay(exploration, RUN, 0.5)
    assert exploration.left == 0
    assert exploration.count == 2


def test_what_an_option_needs_first_is_earned_before() -> None:
    exploration = Exploration(0.01)
    assert exploration.affords(STARTING_BUDGET)
    assert not exploration.affords(STARTING_BUDGET + 1)
    for _ in range(100):
        exploration.observe_best()
    assert exploration.affords(STARTING_BUDGET + 0.99)
    exploration.begin(price=STARTING_BUDGET)
    assert not exploration.affords(2.0)
    pay(exploration, RUN, 0.5)  # is owed all the same
    assert exploration.wait == RUN * 0.5 / 0.01


def test_less_is_lent_where_more_requests_wait() -> None:
    exploration = Exploration(0.01)
    assert exploration.affords(STARTING_BUDGET / 4, size=4)
    assert not exploration.affords(STARTING_BUDGET / 4 + 1, size=4)
    exploration.begin(price=STARTING_BUDGET / 8, size=4)
    assert exploration.affords(STARTING_BUDGET / 2)
    assert not exploration.affords(STARTING_BUDGET / 2 + 1)
    for _ in range(100):
        exploration.observe_best()
    assert exploration.affords(
        1.0 + STARTING_BUDGET / 8 - 0.01, size=4
    )  # what is earned is each request's


def test_no_price_is_beyond_reach() -> None:
    exploration = Exploration(0.01)
    for _ in range(100 * HORIZON):
        exploration.observe_best()
    assert exploration.affords(1e9)
