"""Who runs when: by counting, without an engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator

from smart_decoding.bench.blocks import Block, Counts
from smart_decoding.bench.cycles import in_turns, rotated

LABELS = ["off", "smart", "chain"]


def test_each_contestant_begins_as_often_on_each_task() -> None:
    tasks = 2
    for task in range(tasks):
        begins = Counter(rotated(LABELS, turn * tasks + task, tasks)[0] for turn in range(6))
        assert begins == dict.fromkeys(LABELS, 2)
    assert all(sorted(rotated(LABELS, number, 1)) == sorted(LABELS) for number in range(3))


def test_every_other_turn_goes_the_other_way() -> None:
    order: list[str] = []

    def rounds(label: str, count: int) -> Generator[int, None, Block]:
        for _ in range(count):
            order.append(label)
            yield 4
        return Block("code", 4, Counts())

    blocks = {"a": rounds("a", 4), "b": rounds("b", 4), "c": rounds("c", 2)}
    found = in_turns(blocks, 4, lambda: False)
    assert found is not None
    assert set(found) == {"a", "b", "c"}
    assert "".join(order) == "cba" + "abc" + "ba" + "ab"
