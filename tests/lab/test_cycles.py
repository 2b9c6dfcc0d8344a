"""What the laboratory adds to a measurement: noise, figures by task, JSON and a deadline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import worlds

from smart_decoding.bench.blocks import Answer, Block, Counts
from smart_decoding.errors import CapacityError
from smart_decoding.files import write_json
from smart_lab.bench_command import everything
from smart_lab.cycles import AGAIN, due, measure, rows_of
from smart_lab.provenance import provenance
from smart_lab.summary import end_to_end_speedup, summarise

FIELDS = {
    "policy",
    "batch_size",
    "task",
    "tokens_per_s",
    "speedup",
    "speedup_low",
    "speedup_high",
    "tokens_per_round",
    "rows_per_round",
    "controller_share",
    "tpot_ms",
    "identical",
}


def runs_of(**limits: Any) -> list[dict[str, Any]]:
    clock = worlds.Clock()
    bad = worlds.RuleDrafter(clock, good=False, seconds=0.25)
    engines = {
        "off": worlds.engine(clock),
        AGAIN: worlds.engine(clock),
        "smart": worlds.engine(clock, "chain", worlds.RuleDrafter(clock, seconds=0.25), length=2),
        "chain(length=1)": worlds.engine(clock, "chain", bad, length=1),
    }
    tasks = {"code": worlds.prompts("code", 6, 0, 60), "maths": worlds.prompts("maths", 3, 6, 60)}
    return rows_of(measure(engines, tasks, 2, clock=clock, **limits), 2)


def terminal(runs: list[dict[str, Any]]) -> str:
    return everything({"provenance": {"plain_torch": None}, "runs": runs})


def test_each_policy_has_figures_by_task_and_over_all() -> None:
    by = {(run["policy"], run["task"]): run for run in runs_of()}
    assert {*by} == {
        (policy, task)
        for policy in ("off", "smart", "chain(length=1)")
        for task in ("code", "maths", "all")
    }
    assert by["off", "all"]["speedup"] == 1.0
    assert by["off", "all"]["noise"] == pytest.approx(1.0)
    good, bad = by["smart", "all"], by["chain(length=1)", "all"]
    assert good["speedup"] == pytest.approx(3 / 1.5, rel=0.02)
    assert good["blocks"] == 5
    assert good["prompts"] == 9
    assert bad["smart_over"] == pytest.approx(2 * 1.25, rel=0.03)
    assert bad["smart_over_low"] <= bad["smart_over"] <= bad["smart_over_high"]
    assert not any("smart_over" in run for key, run in by.items() if key[0] != "chain(length=1)")
    assert all(run["identical"] and run["differing_prompts"] == 0 for run in by.values())


def test_a_deadline_keeps_complete_cycles_and_says_so() -> None:
    runs = runs_of(deadline=500.0)
    assert all(run["partial"] for run in runs)
    assert 1 <= runs[0]["blocks"] < 5
    assert terminal(runs).startswith("Partial: the time limit")
    with pytest.raises(CapacityError, match="too short"):
        runs_of(deadline=0.0)


def test_json_has_the_documented_form(tmp_path: Path) -> None:
    runs = runs_of()
    assert all(set(run) >= FIELDS for run in runs)
    origin = provenance("smart bench", 0, {"model": "rule"}, "rule")
    file = tmp_path / "results.json"
    write_json(file, {"provenance": origin, "runs": runs})
    read = json.loads(file.read_text())
    assert set(read) == {"provenance", "runs"}
    known = {
        "command",
        "commit",
        "time",
        "versions",
        "hardware",
        "weights",
        "head",
        "seed",
        "plain_torch",
    }
    assert set(read["provenance"]) == known
    assert {"cpu", "cores", "flags", "cpu_kernels"} <= set(read["provenance"]["hardware"])
    assert read["runs"][0]["speedup"] == 1.0


def test_the_baseline_runs_twice_in_every_third_cycle_of_each_task() -> None:
    labels, tasks = ["off", AGAIN], 3
    for task in range(tasks):
        assert sum(AGAIN in due(labels, turn * tasks + task, tasks) for turn in range(6)) == 2


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
