"""The loop detector against a direct search, and what must not count as a loop."""

import random

import pytest

from smart_decoding.engine.loops import (
    MAX_PERIOD,
    MIN_REPETITIONS,
    MIN_TOKENS,
    LoopDetector,
    loop_start,
)


def direct_search(tokens):
    """By definition: the first end, then the shortest period, then back to the second repetition's
    start."""
    for end in range(1, len(tokens) + 1):
        for period in range(1, MAX_PERIOD + 1):
            size = max(MIN_REPETITIONS * period, MIN_TOKENS)
            if size <= end and all(
                tokens[i] == tokens[i - period] for i in range(end - size + period, end)
            ):
                return end - size + period
    return None


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 9, 50, MAX_PERIOD])
def test_a_block_counts_from_its_third_repetition_and_24_tokens_on(period):
    prefix = list(range(1000, 1037))
    block = list(range(period))
    size = max(MIN_REPETITIONS * period, MIN_TOKENS)
    looping = prefix + (block * (size // period + 2))[:size]
    assert loop_start(looping[:-1]) is None
    assert loop_start(looping) == loop_start(looping + block * 3) == len(prefix) + period


@pytest.mark.parametrize("period", [1, 30, MAX_PERIOD])
def test_a_caller_may_ask_for_longer_loops(period):
    tokens = [7, 8, 9, *(list(range(100, 100 + period)) * 400)[:400]]
    assert loop_start(tokens, 400) == 3 + period
    assert loop_start(tokens[:-1], 400) is None
    assert loop_start(tokens) == 3 + period


@pytest.mark.parametrize("seed", range(30))
def test_agrees_with_a_direct_search(seed):
    rng = random.Random(seed)
    tokens = [rng.randrange(4) for _ in range(30)]
    block = [rng.randrange(3) for _ in range(rng.randint(1, 12))]
    tokens += block * rng.randint(1, 8) + [rng.randrange(2) for _ in range(60)]
    assert loop_start(tokens) == direct_search(tokens)


def test_the_detector_stays_true_and_keeps_its_start():
    detector = LoopDetector()
    answers = [detector.push(5) for _ in range(30)] + [detector.push(6)]
    assert answers == [False] * (MIN_TOKENS - 1) + [True] * (31 - MIN_TOKENS + 1)
    assert detector.start == 1
