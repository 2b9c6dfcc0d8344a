"""`smart tune sglang --bench-serving`: from lines of sglang.bench_serving to the policy's file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from smart_decoding.cli import main as cli
from smart_decoding.integrations.sglang.costs import TierCosts

TUNE = ("tune", "sglang", "--bench-serving")


def measured(path: Path, *loads: tuple[float, float, float | None]) -> str:
    names = ("concurrency", "output_throughput", "accept_length")
    lines = [
        json.dumps({"backend": "sglang", **dict(zip(names, load, strict=True))}) for load in loads
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.fixture
def runs(tmp_path) -> list[str]:
    plain = measured(tmp_path / "plain.jsonl", (0.99, 90.0, None), (15.8, 1000.0, None))
    two = measured(tmp_path / "two.jsonl", (0.98, 98.0, 2.0), (15.9, 795.0, 2.0))
    return [f"0={plain}", f"2={two}"]


def test_a_round_takes_what_its_tokens_took(tmp_path, runs, capsys) -> None:
    output = tmp_path / "costs.json"
    assert cli.main([*TUNE, *runs, "--nodes", "2=6", "--output", str(output)]) == 0
    costs = TierCosts.load(output)
    assert costs.seconds[1].seconds == pytest.approx((0.011, 0.02))
    assert costs.seconds[16].seconds == pytest.approx((0.0158, 0.04))
    assert {curve.rows for curve in costs.seconds.values()} == {(0, 2)}
    assert costs.tokens(2) == 7
    assert "batch 16: 0 steps 15.80 ms, 2 steps 40.00 ms" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "more", "wrong"),
    [
        ('{"concurrency": 1.0, "output_throughput": 90.0}', [], "accept_length"),
        (
            '{"concurrency": 1.0, "output_throughput": 0.0, "accept_length": 2.0}',
            [],
            "must be positive",
        ),
        (
            '{"concurrency": 1.0, "output_throughput": 9.0, "accept_length": 1.0}',
            [],
            "no draft was accepted",
        ),
        (
            '{"concurrency": 0.5, "output_throughput": 9.0, "accept_length": 2.0}',
            [],
            "must be positive",
        ),
        ("", [], "no measurement"),
        ("nonsense", [], "no line of sglang.bench_serving"),
        (
            '{"concurrency": 1.0, "output_throughput": 9.0, "accept_length": 2.0}',
            ["--nodes", "4=6"],
            "nothing of 2",
        ),
        (
            '{"concurrency": 1.0, "output_throughput": 9.0, "accept_length": 2.0}',
            ["--nodes", "2"],
            "STEPS=NODES",
        ),
        (
            '{"concurrency": 8.0, "output_throughput": 9.0, "accept_length": 2.0}',
            [],
            "plain decoding",
        ),
    ],
)
def test_what_the_policy_could_not_use_is_refused(
    tmp_path, runs, capsys, lines, more, wrong
) -> None:
    (tmp_path / "two.jsonl").write_text(lines)
    output = tmp_path / "costs.json"
    assert cli.main([*TUNE, *runs, *more, "--output", str(output)]) == 2
    assert wrong in capsys.readouterr().err
    assert not output.exists()
