"""Mixtures by replay: routers, what their experts cost, and what pricing them brings."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest

from smart_decoding.cli.main import main
from smart_lab.__main__ import LAB
from smart_lab.experts import (
    LAYERS,
    MODELS,
    ROUTERS,
    Case,
    Router,
    rates,
)
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace, write_trace

MIXTURE = MODELS["gpt-oss-20b"]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(synthetic(3.0, answers=16, length=60, context=50), {})


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_chooses_as_many_experts_each_time_and_the_same_ones_again(name: str) -> None:
    routers = [Router(MIXTURE, ROUTERS[name]) for _ in range(2)]
    for at, branch in itertools.product((0, 1, 5), ((), (3,), (3, 4))):
        found = [router.experts(2, at, branch) for router in routers]
        assert np.array_equal(*found)
        assert found[0].sum(axis=1).tolist() == [MIXTURE.per_row] * LAYERS


def test_pricing_experts_is_worth_more_than_rows_of_one_token(trace: Trace) -> None:
    names = ("smart", "one token", "chain:length=3")
    found = rates(trace, Case("qwen3-30b-a3b", "independent", 4), names)
    assert found["smart"] > 0.98
    assert found["smart"] > found["one token"]
    assert found["smart"] > found["chain:length=3"]


def test_the_command_prints_a_line_for_each_case(
    trace: Trace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_trace(tmp_path / "answers.smart", trace)
    command = ["experts", str(tmp_path / "answers.smart"), "smart", "--batch-sizes", "1"]
    assert main([*command, "--processes", "1"], LAB) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(MODELS) * len(ROUTERS)
    assert "qwen3-30b-a3b, correlated, batch 1" in lines[2]
