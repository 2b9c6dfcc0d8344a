"""No run of eight words of a benchmark prompt is in what training starts from."""

from __future__ import annotations

import pytest

from smart_decoding.measuring.tasks import load_task, ngrams
from smart_decoding.training.seeds import TEXTS


def test_ngrams() -> None:
    assert ngrams("A b, c D!", 3) == {("a", "b", "c"), ("b", "c", "d")}
    assert ngrams("one two", 3) == set()


@pytest.mark.model
@pytest.mark.parametrize("task", ["code", "maths", "general"])
def test_seeds_share_nothing_with_the_benchmark(task: str) -> None:
    built = (text.format(topic) for text in TEXTS["tasks"] for topic in TEXTS["topics"])
    seeds = [*TEXTS["openings"], *built]
    taught = set().union(*map(ngrams, seeds))
    assert not any(ngrams(prompt) & taught for prompt in load_task(task))
