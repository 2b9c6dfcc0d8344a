"""`smart tune vllm`, with a fake in place of the engine's process: what it measures and writes."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest

from smart_decoding.cli import main as cli
from smart_decoding.cli import tune
from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.integrations.tuning import vllm
from smart_decoding.integrations.vllm.measure import Measured

from .test_vllm_schedule import KEPT, PIECEWISE


class FakeProcess:
    """A fake of vLLM's process: three tokens are best at batch 1, none at batch 4."""

    started: ClassVar[list[dict[str, Any]]] = []  # arguments

    def __init__(self, arguments: dict[str, Any]) -> None:
        speculative = arguments["speculative_config"]
        self.length = speculative["num_speculative_tokens"] if speculative else 0
        self.scheduled = "num_speculative_tokens_per_batch_size" in (speculative or {})
        self.started.append(arguments)

    def __exit__(self, *error: object) -> None:
        pass

    def ready(self) -> str:
        return "0.32.0"

    def run(self, prompts: list[str], max_tokens: int) -> dict[str, Any]:
        seconds = 1.0 - 0.1 * self.length if len(prompts) == 1 else 1.0 + 0.1 * self.length
        if self.scheduled and len(prompts) == 4:  # nothing is drafted, but the drafter is there
            seconds = 1.02
        drafted = 10 if self.length else 0
        return {
            "seconds": seconds,
            "tokens": max_tokens * len(prompts),
            "prompt_tokens": 36 * len(prompts),
            "drafted": drafted,
            "accepted": drafted // 2,
        }


COMMAND = (
    "tune vllm a-model --lengths 1,3 --batch-sizes 1,4 --blocks 2 --check "
    """--engine-args '{"dtype": "float32"}'"""
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The fakes in vLLM's place; the arguments that it was asked to resolve."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "load_task", lambda task: [f"{task} {n}" for n in range(30)])
    monkeypatch.setattr(FakeProcess, "started", [])
    monkeypatch.setattr(vllm, "Measured", FakeProcess)
    monkeypatch.setattr(vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(vllm, "resolved", lambda given: calls.append(given) or PIECEWISE)
    return calls


def test_the_command_measures_each_length_and_writes_schedule_and_reasons(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "schedule.json"
    assert cli.main([*shlex.split(COMMAND), "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["num_speculative_tokens_per_batch_size"] == [[1, 1, 3], [2, 4, 0]]
    assert written["num_speculative_tokens"] == 3
    assert written["method"] == "ngram"
    configs = [arguments["speculative_config"] for arguments in FakeProcess.started]
    lengths = [config and config["num_speculative_tokens"] for config in configs]
    assert lengths == [None, 1, 3, None, 3]  # each is loaded once for all batch sizes
    assert configs[-1] == written
    assert all(arguments["dtype"] == "float32" for arguments in FakeProcess.started)
    reasons = json.loads((tmp_path / "schedule.reasons.json").read_text())
    of_three = [each for each in reasons["tried"] if each["mode"] == "ngram of 3 tokens"]
    assert [each["load"] for each in of_three] == [1, 4]
    assert [each["seconds"] for each in of_three[1]["blocks"].values()] == [1.3, 1.3]
    assert reasons["checked"]["1"][0] == pytest.approx(1 / 0.7)
    assert reasons["checked"]["4"][0] == pytest.approx(1 / 1.02)
    schedule = asked[0]["speculative_config"]["num_speculative_tokens_per_batch_size"]
    assert schedule[0] == [1, 1, 3]
    assert asked[0]["dtype"] == "float32"
    shown, warned = capsys.readouterr()
    assert warned.startswith("warning: with a schedule vLLM 0.32.0 takes CUDA graphs PIECEWISE")
    assert [f"warning: {text}" for text in reasons["warnings"]] == warned.splitlines()[:1]
    assert "batch 1 to 1: 3 tokens  <- batch 1: plain 128.0 tok/s, 3 tokens 1.43" in shown
    assert "50 % accepted" in shown
    assert "With one request at once ngram of 3 tokens is 1.43 times as fast" in shown
    assert "2 to 4: no tokens" in shown
    assert "from four requests on leave speculation off" in shown
    assert "cannot run here: Adaptive verification requires full CUDA graphs." in shown
    assert reasons["adaptive_verification"] in shown
    assert "batch 4, with the schedule: 0.98 (0.98–0.98) × plain" in shown


def test_together_all_engines_take_turns(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[int] = []
    run = FakeProcess.run

    def noted(self: FakeProcess, prompts: list[str], tokens: int) -> dict[str, Any]:
        order.extend([self.length] * (tokens == 128 and len(prompts) == 1))
        return run(self, prompts, tokens)

    monkeypatch.setattr(FakeProcess, "run", noted)
    words = [*shlex.split(COMMAND), "--together", "--output", str(tmp_path / "out.json")]
    words.remove("--check")
    assert cli.main(words) == 0
    assert order[:3] == [0, 1, 3]
    assert set(order[3:]) == {0, 3}  # the slower half dropped out


@pytest.mark.parametrize(("given", "context"), [([], 100), (["--context", "500"], 500)])
def test_where_adaptive_verification_can_run_its_profile_gets_the_context(
    given: list[str],
    context: int,
    tmp_path: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """That of the prompts measured, 36 tokens and half of 128, or the one that is named."""
    monkeypatch.setattr(vllm, "resolved", lambda arguments: {**KEPT, "no_adaptive": None})
    output = ["--output", str(tmp_path / "schedule.json")]
    assert cli.main([*shlex.split(COMMAND), *given, *output]) == 0
    shown = capsys.readouterr().out
    assert '"enable_adaptive_verification": true' in shown
    assert f"VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN={context}. " in shown


def test_where_nothing_pays_nothing_is_written(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "schedule.json"
    words = shlex.split("tune vllm m --lengths 1,3 --batch-sizes 4 --blocks 2 --check")
    assert cli.main([*words, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "start vLLM without --speculative-config" in shown
    assert "To draft and verify a token costs" in shown
    assert not output.exists()
    assert (tmp_path / "schedule.reasons.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
            "without num_speculative_tokens",
        ),
        (["--speculative-config", '{"method": "suffix"}'], "no schedule of several lengths"),
        (["--batch-sizes", "1,1000"], "too few"),
        (["--blocks", "0"], "--blocks"),
        (["--context", "0"], "--context"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_is_loaded(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["tune", "vllm", "m", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_a_network_general_prompts_are_asked(
    tmp_path: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def offline(task: str) -> list[str]:
        if task != "general":
            raise DownloadError("no network")
        return ["a", "b", "c", "d"]

    monkeypatch.setattr(tune, "load_task", offline)
    words = shlex.split("tune vllm m --lengths 1 --batch-sizes 4 --blocks 2")
    assert cli.main([*words, "--output", str(tmp_path / "out.json")]) == 0
    assert "smart: only general prompts: no network" in capsys.readouterr().err


def test_on_a_terminal_a_bar_tells_the_time_that_is_left(
    tmp_path: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tune, "on_terminal", lambda: True)
    words = shlex.split("tune vllm m --lengths 1 --batch-sizes 4 --blocks 2 --time-limit 600")
    assert cli.main([*words, "--output", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().err
    assert "0%|" in shown
    assert "left at most, 4 requests at once, 1 of 4: defaults" in shown


def test_without_vllm_it_says_where_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vllm, "find_spec", lambda name: None)
    assert cli.main(["tune", "vllm", "m"]) == 2
    assert "vLLM's environment" in capsys.readouterr().err


def test_a_process_that_dies_between_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a reader of our output that had gone: nothing was said."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with Measured({"speculative_config": None}) as engine:
        engine._process.wait(10)
        with pytest.raises(ModelError, match="ended with code 1"):
            engine.run(["a"], 1)
