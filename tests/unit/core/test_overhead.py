"""What rounds take beside their forwards."""

from __future__ import annotations

import pytest

from smart_decoding.core.costs import Overhead


def test_a_slow_first_round_of_a_kind_does_not_stop_drafting() -> None:
    """The first round that drafts for many touches memory: it took 190 ms instead of 8."""
    overhead = Overhead(drafting=0.001)
    overhead.observe(32, False, 0.001)
    overhead.observe(32, True, 0.19)
    assert overhead.of(32, True) == pytest.approx(0.004)  # twice of what was believed


def test_what_is_usual_is_learned_from_below_and_from_above() -> None:
    for true in (0.0002, 0.02):
        overhead = Overhead(drafting=0.001)
        overhead.observe(1, False, 0.001)
        for _ in range(200):
            overhead.observe(1, True, true)
        assert overhead.of(1, True) == pytest.approx(true, rel=0.1)
        assert overhead.of(1, False) == pytest.approx(0.001)
