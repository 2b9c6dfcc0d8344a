"""Who runs when, and what a run's figures are of: by counting, without an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

import pytest

from smart_decoding.bench.blocks import Answer, Block, Counts
from smart_decoding.bench.cycles import AGAIN, _due, _in_turns
from smart_decoding.bench.summary import end_to_end_speedup, summarise

LABELS = ["off", "smart", "chain"]


def test_each_contestant_begins_as_often_on_each_task() -> None:
    for task in range(2):
        begins = Counter(_due(LABELS, turn, task)[0] for turn in range(6))
        assert begins == dict.fromkeys(LABELS, 2)
    assert all(sorted(_due(LABELS, turn, 0)) == sorted(LABELS) for turn in range(3))


def test_the_baseline_runs_twice_in_every_third_cycle_of_each_task() -> None:
    labels = ["off", AGAIN]
    for task in range(3):
        assert sum(AGAIN in _due(labels, turn, task) for turn in range(6)) == 2


def test_every_other_turn_goes_the_other_way() -> None:
    order: list[str] = []

    def rounds(label: str, count: int) -> Generator[int, None, Block]:
        for _ in range(count):
            order.append(label)
            yield 4
        return Block("code", 4, Counts())

    blocks = {"a": rounds("a", 4), "b": rounds("b", 4), "c": rounds("c", 2)}
    found = _in_turns(blocks, 4, lambda: False)
    assert found is not None
    assert set(found) == {"a", "b", "c"}
    assert "".join(order) == "cba" + "abc" + "ba" + "ab"


def block(task: str, tokens: int, seconds: float, tpots: list[float]) -> Block:
    answers = {i: Answer([1] * 10, tpot) for i, tpot in enumerate(tpots)}
    counts = Counts(rounds=tokens, tokens=tokens, seconds=seconds)
    return Block(task, 1, counts, answers, tokens, 2 * seconds)


def test_the_worst_request_is_the_one_that_lost_most() -> None:
    pair = (block("code", 30, 10.0, [0.2, 0.6, 0.1]), block("code", 30, 20.0, [0.4, 0.4, 0.4]))
    assert summarise([pair])[-1]["worst_tpot_ratio"] == pytest.approx(1.5)


def test_a_speedup_end_to_end_is_a_ratio_of_seconds() -> None:
    """Blocks weigh by the baseline's tokens: 100 tokens in 10 for 20 s, 300 in 30 for 30."""
    pairs = [
        (block("code", 100, 5.0, [0.1]), block("code", 100, 10.0, [0.1])),
        (block("maths", 300, 15.0, [0.1]), block("maths", 300, 15.0, [0.1])),
    ]
    assert end_to_end_speedup(pairs).value == pytest.approx(50 / 40)


def test_tasks_of_different_speedup_do_not_widen_an_interval() -> None:
    code = (block("code", 100, 5.0, [0.1]), block("code", 100, 10.0, [0.1]))
    maths = (block("maths", 100, 10.0, [0.1]), block("maths", 100, 10.0, [0.1]))
    pooled = summarise([code, maths] * 4)[-1]
    bounds = (pooled["speedup"], pooled["speedup_low"], pooled["speedup_high"])
    assert bounds == pytest.approx((4 / 3,) * 3)
