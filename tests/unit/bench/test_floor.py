"""On a GPU speedups are also taken over what reading memory takes, and those are quoted where plain
decoding is slow."""

from __future__ import annotations

import math
import time
from typing import Any

import pytest
import torch
from measured import results, run_of

from smart_decoding.bench import limits, report
from smart_decoding.bench.limits import Sizes, near_floor, over_floor, rated
from smart_decoding.bench.results import headline

SIZES = Sizes(weights=1_000_000_000, kv=1000, item=2)  # 2 GB, and 2 kB a token of context
LIMITS = {"gb_per_s": 1000.0, "gflop_per_s": 1e5}
GPU = torch.device("cuda")


def runs_at(plain_ms: float, batch: int = 4, context: float = 1000.0) -> list[dict[str, Any]]:
    """Plain decoding whose rounds take so long, and `smart` at 1.8 times its speed."""
    rate = 1e3 * batch / plain_ms
    shared = {"context_tokens": context, "verify_ms": plain_ms}
    return [
        run_of("off", batch, "all", 1.0, 1.0, 1.0, **shared | {"tokens_per_s": rate}),
        run_of("smart", batch, "all", 1.8, 1.7, 1.9, **shared | {"tokens_per_s": 1.8 * rate}),
    ]


def test_what_counts_is_the_memory_that_is_read() -> None:
    plain, smart = over_floor(runs_at(4.016), SIZES, 1000.0)
    assert plain["floor_ms"] == pytest.approx(2.008)  # 4 * 1000 tokens of 2 kB beside 2 GB
    assert plain["plain_ms"] == pytest.approx(4.016)
    assert plain["floor_speedup"] == pytest.approx(0.5)
    assert smart["floor_speedup"] == pytest.approx(0.9)
    assert smart["floor_speedup_low"] == pytest.approx(0.85)
    assert smart["floor_speedup_high"] == pytest.approx(0.95)
    assert headline(smart) == "floor_speedup"


def test_near_its_floor_plain_decoding_is_what_to_compare_with() -> None:
    limit = 1.15 * 2.008 + 1.0
    assert near_floor(limit, 2.008)
    assert not near_floor(limit + 1e-3, 2.008)
    for run in over_floor(runs_at(limit - 1e-3), SIZES, 1000.0):
        assert run["headline"] == headline(run) == "speedup"
        assert run["floor_speedup"] < run["speedup"]


def test_each_task_has_its_own_floor_and_what_has_none_stays_as_it_is() -> None:
    long = [run | {"task": "long"} for run in runs_at(10.0, context=1e5)]
    unknown = run_of("smart", 4, "code", 1.1, 1.0, 1.2)
    odd = [run | {"task": "odd"} for run in runs_at(10.0, context=math.nan)]
    short = runs_at(10.0)
    found = over_floor([*short, *long, unknown, *odd], SIZES, 1000.0)
    assert found[2]["floor_ms"] == pytest.approx(2.8)
    assert found[0]["floor_ms"] == pytest.approx(2.008)
    assert found[4:] == [unknown, *odd]


def test_on_a_cpu_there_is_none() -> None:
    runs = runs_at(5.0)
    assert all("floor_ms" not in run for run in rated(runs, SIZES, LIMITS, torch.device("cpu")))
    (plain, _) = rated(runs, SIZES, LIMITS, GPU)
    assert plain["floor_ms"] == pytest.approx(2.008)
    assert plain["gb_share"] == pytest.approx(2.008 / 5.0)


@pytest.mark.parametrize("slow", [True, False])
def test_a_report_prints_both_and_quotes_one(slow: bool) -> None:
    runs = rated(runs_at(5.0 if slow else 3.0), SIZES, LIMITS, GPU)
    data = {**results(), "runs": runs}
    text = report.everything(data)
    over = 1.8 * 2.008 / (5.0 if slow else 3.0)
    assert "over floor" in text
    assert f"{over:.2f} (" in text
    assert "1.80 (1.70-1.90)" in text
    warning = "Batch 4: plain decoding takes 5.0 ms a round, reading memory once 2.0 ms."
    assert (warning in text) == slow


def test_without_a_gpu_a_report_has_no_such_column() -> None:
    assert "over floor" not in report.everything(results())


def test_limits_are_measured_however_long_the_first_call_takes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "SECONDS", 0.02)
    calls: list[None] = []

    def slow_at_first() -> None:
        time.sleep(0.0 if calls else 0.06)
        calls.append(None)

    seconds = limits._best(slow_at_first, lambda: None, 2)
    assert 0 < seconds < 0.03
    assert len(calls) >= 3
