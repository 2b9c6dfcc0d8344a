"""No run of eight words of a benchmark prompt is in what training starts from."""

from __future__ import annotations

import pytest

from smart_decoding.bench.data import load_task
from smart_decoding.bench.overlap import ngrams, shared
from smart_decoding.training.seeds import OPENINGS, TASKS, TOPICS


def test_ngrams_and_shared() -> None:
    assert ngrams("A b, c D!", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert shared(["one two three four"], ["zero one two three"], 3) == {("one", "two", "three")}
    assert not shared(["one two three four"], ["one two x three four"], 3)


@pytest.mark.model
@pytest.mark.parametrize("task", ["code", "maths", "general", "long", "edit"])
def test_seeds_share_nothing_with_the_benchmark(task: str) -> None:
    seeds = [*OPENINGS, *(text.format(topic) for text in TASKS for topic in TOPICS)]
    assert not shared(load_task(task), seeds)
