"""What requests of a batch pay for each other's drafts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.exploration import MOST, START, Credit

PAIR = ("a", "b")


def test_the_poorest_request_decides() -> None:
    credit = Credit(1.25)
    for _ in range(4):
        credit.observe(PAIR, [3, 1], [3, 1], 1.5)  # one gains much, the other nothing
    assert credit.longest_round(["a"]) == 2
    assert credit.longest_round(PAIR) == credit.longest_round(["b"]) < 1.5


def test_credit_comes_back_in_plain_rounds() -> None:
    credit = Credit(1.25)
    credit.observe(PAIR, [1, 1], [1, 1], 4.0)
    assert credit.longest_round(PAIR) == 0.0
    rounds = credit.recovery(PAIR)
    assert rounds > 1
    for _ in range(rounds):
        credit.observe(PAIR, [1, 1], [1, 1], 1.0)
    assert credit.recovery(PAIR) == 0
    assert credit.longest_round(PAIR) > 1.5


def test_who_sits_a_round_out_keeps_its_credit() -> None:
    credit = Credit(1.25)
    credit.observe(PAIR, [1, 1], [1, 1], 4.0)
    credit.observe(["b"], [1], [1], 1.0)
    assert credit.longest_round(["a"]) == 0.0


def test_ended_requests_are_forgotten_in_the_end() -> None:
    credit = Credit(1.25)
    for number in range(5000):
        credit.observe([number, number + 1], [1, 1], [1, 1], 1.0)
    assert len(credit._known) < 2000


def test_without_a_limit_or_names_nothing_is_lost() -> None:
    assert Credit(math.inf).longest_round(PAIR) == math.inf
    credit = Credit(1.25)
    credit.observe((), [1, 1], [1, 1], 9.0)
    assert credit.longest_round(()) == Credit(1.25).longest_round(PAIR)


@given(
    st.floats(1.0, 8.0),
    st.lists(st.tuples(st.integers(1, 9), st.floats(0.5, 9.0)), max_size=200),
)
def test_no_answer_is_slower_than_the_limit_and_its_first_credit(
    slowdown: float, rounds: list[tuple[int, float]]
) -> None:
    """Rounds may be as long as allowed, whatever a request gains by them."""
    credit = Credit(slowdown)
    waited = 0.0
    tokens = 0
    for count, wish in rounds:
        lasts = max(1.0, min(wish, credit.longest_round(PAIR)))
        credit.observe(PAIR, [count, 9], [count, 9], lasts)
        waited += lasts
        tokens += count
        assert waited <= slowdown * tokens + START + 1e-6


@pytest.mark.parametrize("gain", [2, 9])
def test_old_gains_do_not_count_for_ever(gain: int) -> None:
    credit = Credit(1.25)
    for _ in range(1000):
        credit.observe(PAIR, [gain, gain], [gain, gain], 1.0)
    assert credit._known["a"].credit(1.25) == pytest.approx(MOST)


def test_bad_luck_costs_less_than_a_drafter_that_is_always_wrong() -> None:
    """What is expected of a request counts as it has turned out so far."""
    lucky, wrong = Credit(1.25), Credit(1.25)
    for number in range(40):
        had = 3 if number % 2 else 1
        lucky.observe(PAIR, [had, had], [2, 2], 1.75)
        wrong.observe(PAIR, [1, 1], [2, 2], 1.75)
    assert lucky.longest_round(PAIR) == 2
    assert wrong.longest_round(PAIR) == 0


def test_catching_up_is_shared_by_the_rounds_behind() -> None:
    at_once, shared = Credit(1.25), Credit(1.25)
    at_once.observe(PAIR, [1, 1], [1, 1], 4.0)
    shared.observe(PAIR, [1, 1], [1, 1], 1.0, later=3.0)
    assert shared.longest_round(PAIR) > at_once.longest_round(PAIR) == 0
    credits = []
    for _ in range(10 * HORIZON):  # rounds that pay for themselves
        shared.observe(PAIR, [1, 1], [1, 1], 1.25)
        credits.append(shared._known["a"].credit(1.25))
    assert credits == sorted(credits, reverse=True)
    assert credits[0] - credits[-1] == pytest.approx(3.0, rel=0.1)
    assert shared._later < 0.01
