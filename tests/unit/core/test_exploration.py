"""Explorations: runs of a few rounds, paid for by what they lose."""

from __future__ import annotations

from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.exploration import OVERDRAFT, RUN, Exploration


def pay(exploration: Exploration, rounds: int, loss: float, size: int = 4) -> list[bool]:
    """So many rounds of a run, each losing a part of a plain one: whether the run has ended."""
    return [exploration.observe(size, loss, 1.0) for _ in range(rounds)]


def test_the_next_run_waits_until_the_last_one_is_earned_again() -> None:
    exploration = Exploration(0.01)
    exploration.begin(4)
    pay(exploration, RUN, 0.5)
    assert exploration.wait(4) == RUN * 0.5 / 0.01
    for _ in range(HORIZON):
        exploration.observe_best(4)
    assert exploration.wait(4) == RUN * 0.5 / 0.01 - HORIZON


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


def test_an_expensive_run_of_many_requests_does_not_silence_a_lone_one() -> None:
    exploration = Exploration(0.01)
    for _ in range(HORIZON):
        exploration.observe_best(1)
    exploration.begin(32)
    pay(exploration, RUN, 15.0, size=32)
    assert exploration.wait(32) == 3000
    assert exploration.wait(1) == 0
