"""What `robustness` says of a case."""

from __future__ import annotations

import math
from typing import Any

import pytest

from smart_decoding.bench.blocks import Answer, Block, Counts
from smart_lab.cycles import Measurement
from smart_lab.robustness import _figures, line_of


def row(cycles: int, speed: float = 1.0) -> dict[str, Any]:
    """A row of blocks of 100 tokens, `smart` at `speed` of plain decoding."""

    def block(seconds: float) -> Block:
        return Block("code", 1, Counts(100, seconds, rounds=9), {0: Answer([1], 1)}, 100, seconds)

    found = Measurement(cycles=[{"off": block(1.0), "smart": block(1 / speed)}] * cycles)
    believed = {"estimated_speedup": 1.5, "plain_predicted_seconds": 1.01}
    shared = {"case": "a bad head", "batch_size": 1, "arrivals": "queue", "believed": believed}
    return {**shared, **_figures(found)}


@pytest.mark.parametrize("cycles", [0, 1])
def test_too_few_blocks_are_not_judged(cycles: int) -> None:
    line = line_of(row(cycles, speed=0.5))
    assert f"too few blocks to judge ({cycles}): raise --seconds" in line
    assert "BELOW" not in line
    assert cycles or "nan" not in line


@pytest.mark.parametrize(("speed", "verdict"), [(0.98, "BELOW 0.99"), (1.2, "ok")])
def test_two_blocks_are_judged(speed: float, verdict: str) -> None:
    found = row(2, speed)
    assert math.isclose(found["end_to_end"], speed)
    assert line_of(found).endswith(f"  {verdict}")


def test_what_requests_pay_is_their_time_per_token_over_plain_decodings() -> None:
    def block(times: list[float]) -> Block:
        answers = {i: Answer([1, 2], seconds) for i, seconds in enumerate(times)}
        return Block("code", 4, Counts(100, 1.0, rounds=9), answers, 100, 1.0)

    cycle = {"off": block([1.0, 2.0, 1.0, math.nan]), "smart": block([0.5, 2.0, 1.5, 1.0])}
    found = _figures(Measurement(cycles=[cycle] * 2))["requests"]
    assert found["within"] == pytest.approx(2 / 3)
    assert found["slowest"] == 1.5
    assert found["mean_speedup"] == pytest.approx((2 + 1 + 1 / 1.5) / 3)
