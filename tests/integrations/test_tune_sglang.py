"""`smart tune sglang` with a fake of its server: tiers and costs that the plug-in reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.cli import main as cli
from smart_decoding.cli import tune as cli_tune
from smart_decoding.integrations.sglang.costs import TierCosts
from smart_decoding.integrations.tuning import sglang

from .told import trial_as_told

FAKE = Path(__file__).with_name("fake_sglang_server.py")


@pytest.fixture
def tune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the command in an environment whose Python starts the fake."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nshift 2\nexec {sys.executable} -S {FAKE} "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sglang, "find_spec", lambda name: object())
    monkeypatch.setattr(sglang.busy, "trial", trial_as_told)
    monkeypatch.setattr(cli_tune, "load_task", lambda task: [f"{task} {n}" for n in range(30)])

    def run(*words: str) -> int:
        usual = ["tune", "sglang", "m", "--speculative-draft-model-path", "head"]
        usual += ["--max-concurrency", "1,8", "--max-tokens", "32"]
        return cli.main([*usual, "--output", str(tmp_path / "costs.json"), *words])

    return run


def test_tiers_and_costs_are_written(
    tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--steps", "1,3") == 0
    shown = capsys.readouterr().out
    assert "With one request at once drafts of 1 step is" in shown
    assert "from eight requests on leave speculation off" in shown
    costs = TierCosts.load(tmp_path / "costs.json")
    assert list(costs.seconds) == [1, 8]
    assert costs.seconds[1].seconds[0] == pytest.approx(0.004, rel=0.5)
    assert costs.seconds[8].rows[:2] == (0, 1)
    plain, drafting, *_ = costs.seconds[8].seconds
    assert 2.0 < drafting / plain < 3.0  # 2.6
    assert costs.tokens(3) == 4  # chains
    tiers = json.loads((tmp_path / "costs.steps.json").read_text())
    assert tiers["1"]["candidate_steps"] == [0, 1, 3]
    assert tiers["8"]["candidate_steps"] == [0]
    start = shown.splitlines()[-1]
    assert start.startswith(f"SMART_SGLANG_COSTS={tmp_path}/costs.json python -m sglang.launch")
    assert "--speculative-algorithm EAGLE3 --speculative-draft-model-path head" in start
    assert "--speculative-num-steps 3 --speculative-num-draft-tokens 4" in start
    assert "--page-size" not in start
    assert start.endswith(
        f"--speculative-adaptive --speculative-adaptive-config {tmp_path}/costs.steps.json"
    )


def test_one_number_of_steps_that_pays_is_drafted(tune: Any, tmp_path: Path) -> None:
    """It has no race, only a verdict."""
    assert tune("--steps", "1", "--max-concurrency", "1") == 0
    tiers = json.loads((tmp_path / "costs.steps.json").read_text())
    assert tiers["1"]["candidate_steps"] == [0, 1]


def test_trees_have_nodes(tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--nodes", "1=2,3=6", "--speculative-eagle-topk", "2", "--max-concurrency", "1")
    assert tune(*words) == 0
    assert TierCosts.load(tmp_path / "costs.json").nodes == {1: 2, 3: 6}
    shown = capsys.readouterr().out
    assert "drafts of 3 steps, 6 nodes" in shown or "of 1 step, 2 nodes" in shown
    assert "--speculative-num-steps 3 --speculative-num-draft-tokens 7" in shown
    assert "--page-size 1 " in shown.splitlines()[-1]


def test_where_nothing_pays_nothing_is_written(
    tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--steps", "6", "--max-concurrency", "8") == 0
    assert "Start SGLang without --speculative-algorithm." in capsys.readouterr().out
    assert not (tmp_path / "costs.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["--speculative-algorithm", "NGRAM"],
        ["--server-args", "--enable-dp-attention --dp 2"],
    ],
)
def test_where_sglang_ignores_its_adaptive_mode_one_size_is_started(
    words: list[str], tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would run the largest size at every load."""
    assert tune("--steps", "1,3", "--max-concurrency", "1", *words) == 0
    shown = capsys.readouterr().out
    assert "--speculative-adaptive" not in shown
    (start,) = (line for line in shown.splitlines() if line.startswith("1 at once: "))
    assert "--speculative-num-steps 1 --speculative-num-draft-tokens 2" in start
    assert not (tmp_path / "costs.json").exists()


def test_without_sglang_it_says_where_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sglang, "find_spec", lambda name: None)
    assert cli.main(["tune", "sglang", "m"]) == 2
    assert "install smart-decoding in SGLang's environment" in capsys.readouterr().err
    assert cli.main(["tune", "sglang"]) == 2
    assert "smart tune sglang MODEL" in capsys.readouterr().err
