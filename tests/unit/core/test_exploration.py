"""Explorations: runs of a few rounds, paid for by what they lose."""

from __future__ import annotations

from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.exploration import OVERDRAFT, RUN, Exploration


def pay(exploration: Exploration, rounds: int, loss: float, size: int = 4) -> list[bool]:
    """So many rounds of a run, each losing a part of a plain one: whether the run has ended."""
    return [exploration.observe(size, loss, 1.0) for _ in range(rounds)]


def test_a_run_has_as_many_rounds_as_it_was_begun_for() -> None:
    exploration = Exploration(0.01)
    exploration.begin(4)
    assert pay(exploration, RUN, 0.5) == [False] * (RUN - 1) + [True]
    exploration.begin(4)
    assert pay(exploration, RUN, 0.5) == [False] * (RUN - 1) + [True]
    assert exploration.left == 0
    assert exploration.count == 2


def test_the_next_run_waits_until_the_last_one_is_earned_again() -> None:
    exploration = Exploration(0.01)
    exploration.begin(4)
    pay(exploration, RUN, 0.5)
    assert exploration.wait(4) == RUN * 0.5 / 0.01
    for _ in range(HORIZON):
        exploration.observe_best(4)
    assert exploration.wait(4) == RUN * 0.5 / 0.01 - HORIZON


def test_rounds_that_follow_a_run_are_paid_for_once() -> None:
    exploration = Exploration(0.01)
    exploration.begin(4)
    pay(exploration, RUN + 2, 0.5)
    assert exploration.left == 0
    assert exploration.count == 1
    assert exploration.seconds == (RUN + 2) * 0.5


def test_a_run_that_gained_is_followed_by_another() -> None:
    exploration = Exploration(0.01)
    exploration.begin(4)
    pay(exploration, RUN, -0.5)
    assert exploration.left == RUN
    pay(exploration, RUN, 0.5)
    assert exploration.left == 0
    assert exploration.count == 2


def test_a_run_is_earned_before_it_begins() -> None:
    exploration = Exploration(0.01)
    rounds = 200 - 2 * HORIZON
    assert exploration.wait(4, 2.0) == rounds
    for _ in range(rounds):
        assert exploration.wait(4, 2.0) > 0
        exploration.observe_best(4)
    exploration.begin(4, 2.0)
    pay(exploration, RUN, 1.5)  # a plain round more than expected
    assert exploration.wait(4, 2.0) == 300


def test_what_was_earned_for_long_is_not_spent_at_once() -> None:
    exploration = Exploration(0.01)
    for _ in range(1000):
        exploration.observe_best(4)
    exploration.begin(4, 1.0)
    pay(exploration, RUN, 0.5)
    assert exploration.wait(4, 1.0) == 100


def test_a_cheap_run_leaves_what_an_expensive_one_needs() -> None:
    exploration = Exploration(0.01)
    for _ in range(10 * HORIZON):
        if exploration.wait(4, 0.02) <= 0:
            exploration.begin(4, 0.02)
            pay(exploration, RUN, 0.01)
        exploration.observe_best(4)
    assert exploration.wait(4, 2.0) <= HORIZON


def test_what_is_reported_behind_a_run_begins_no_other_one() -> None:
    exploration = Exploration(0.01)
    exploration.begin(4)
    exploration.stop()
    pay(exploration, 1, -0.5)
    assert exploration.left == 0
    assert exploration.count == 1


def test_a_lone_request_may_spend_before_it_has_earned() -> None:
    exploration = Exploration(0.01)
    for _ in range(HORIZON):
        exploration.observe_best(1)
        exploration.observe_best(4)
    assert exploration.wait(1, OVERDRAFT) == 0
    assert exploration.wait(4, OVERDRAFT) > 1000
    exploration.begin(1, OVERDRAFT / 2)
    pay(exploration, RUN, OVERDRAFT / 4, size=1)
    for _ in range(3 * HORIZON):
        exploration.observe_best(1)
    assert exploration.wait(1, OVERDRAFT / 2) == 0
    assert exploration.wait(1, OVERDRAFT / 2 + 3) > 0


def test_no_price_is_beyond_reach() -> None:
    exploration = Exploration(0.01)
    for _ in range(100 * HORIZON):
        exploration.observe_best(4)
    assert exploration.wait(4, 1e9) == 0


def test_an_expensive_run_of_many_requests_does_not_silence_a_lone_one() -> None:
    exploration = Exploration(0.01)
    for _ in range(HORIZON):
        exploration.observe_best(1)
    exploration.begin(32)
    pay(exploration, RUN, 15.0, size=32)
    assert exploration.wait(32) == 3000
    assert exploration.wait(1) == 0
