"""`smart tune vllm`, with a fake in place of the engine's process: what it measures and writes."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import Mock

import pytest

from smart_decoding.cli import main as cli
from smart_decoding.cli import tune
from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.integrations.tuning import vllm
from smart_decoding.integrations.vllm import measure
from smart_decoding.integrations.vllm.measure import Measured

from .test_vllm_schedule import KEPT, PIECEWISE


class FakeProcess:
    """A fake of vLLM's process: three tokens are best at batch 1, none at batch 4."""

    started: ClassVar[list[dict[str, Any]]] = []  # arguments
    answered: ClassVar[list[tuple[bool, int, list[str]]]] = []  # is it checked, load, prompts

    def __init__(self, arguments: dict[str, Any]) -> None:
        speculative = arguments["speculative_config"]
        self.length = speculative["num_speculative_tokens"] if speculative else 0
        self.scheduled = "num_speculative_tokens_per_batch_size" in (speculative or {})
        self.started.append(arguments)

    def __exit__(self, *error: object) -> None:
        pass

    def ready(self) -> str:
        return "0.32.0"

    def run(self, prompts: list[str], max_tokens: int, load: int) -> dict[str, Any]:
        self.answered.append((self.scheduled, load, prompts))
        seconds = 1.0 - 0.1 * self.length if load == 1 else 1.0 + 0.1 * self.length
        if self.scheduled and load == 4:  # nothing is drafted, but the drafter is there
            seconds = 1.02
        drafted = 10 if self.length else 0
        return {
            "seconds": seconds,
            "tokens": max_tokens * load,
            "prompt_tokens": 36,
            "answer_tokens": max_tokens,
            "drafted": drafted,
            "accepted": drafted // 2,
        }


COMMAND = (
    "tune vllm a-model --lengths 1,3 --batch-sizes 1,4 --check "
    """--engine-args '{"dtype": "float32"}'"""
)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The fakes in vLLM's place; the arguments that it was asked to resolve."""
    calls: list[dict[str, Any]] = []
    monkeypatch.setattr(tune, "load_task", lambda task: [f"{task} {n}" for n in range(30)])
    for name in ("started", "answered"):
        monkeypatch.setattr(FakeProcess, name, [])
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
    assert lengths[:3] == [None, 1, 3]  # in the race each is loaded once for all batch sizes
    assert lengths[3:11] == [None, 3, 3, None, None, 3, 3, None]  # a verdict: 4 pairs of new ones
    assert all(config in (None, written) for config in configs[11:])  # --check: 4 pairs, too
    assert len(lengths) == 19
    assert all(arguments["dtype"] == "float32" for arguments in FakeProcess.started)
    reasons = json.loads((tmp_path / "schedule.reasons.json").read_text())
    of_three = [each for each in reasons["tried"] if each["mode"] == "ngram of 3 tokens"]
    assert [each["load"] for each in of_three] == [1, 4]
    assert [each["seconds"] for each in of_three[1]["blocks"].values()] == [1.3]
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
    output = tmp_path / "old.json"  # of an earlier run, and not to be checked as this one's
    old = {"method": "ngram", "num_speculative_tokens": 3}
    old["num_speculative_tokens_per_batch_size"] = [[1, 4, 3]]  # type: ignore[assignment]
    output.write_text(json.dumps(old))
    words = shlex.split("tune vllm m --lengths 1,3 --batch-sizes 4 --check")
    assert cli.main([*words, "--output", str(output)]) == 0
    shown = capsys.readouterr().out
    assert "with the schedule:" not in shown
    assert "checked" not in json.loads((tmp_path / "old.reasons.json").read_text())
    assert not any(checked for checked, *_ in FakeProcess.answered)
    output = tmp_path / "schedule.json"
    assert cli.main([*words, "--output", str(output)]) == 0
    assert "start vLLM without --speculative-config" in shown
    assert "To draft and verify a token costs" in shown
    assert not output.exists()
    assert (tmp_path / "schedule.reasons.json").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, ModelError])
def test_a_check_that_is_broken_off_leaves_the_reasons(
    error: type[BaseException],
    tmp_path: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tune, "_checked", Mock(side_effect=error("plain vLLM ended")))
    output = tmp_path / "schedule.json"
    cli.main([*shlex.split(COMMAND), "--output", str(output)])
    assert json.loads((tmp_path / "schedule.reasons.json").read_text())["choices"]


def test_a_check_asks_other_prompts_than_those_that_chose_the_schedule(
    tmp_path: Path, asked: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "load_task", lambda task: [f"{task} {n}" for n in range(99)])
    assert cli.main([*shlex.split(COMMAND), "--output", str(tmp_path / "schedule.json")]) == 0
    for load in (1, 4):
        asked_of = [each for each in FakeProcess.answered if each[2] != ["Hello"]]
        blocks = [(checked, set(of)) for checked, at, of in asked_of if at == load]
        first = [checked for checked, _ in blocks].index(True)
        checks = set().union(*(of for checked, of in blocks if checked))
        assert checks
        assert not checks & set().union(*(of for _, of in blocks[: first - 1]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
            "without num_speculative_tokens",
        ),
        (["--speculative-config", '{"method": "suffix"}'], "no schedule of several lengths"),
        (["--batch-sizes", "1,1000"], "too few"),
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
        return [f"prompt {number}" for number in range(8)]

    monkeypatch.setattr(tune, "load_task", offline)
    words = shlex.split("tune vllm m --lengths 1 --batch-sizes 4 ")
    assert cli.main([*words, "--output", str(tmp_path / "out.json")]) == 0
    assert "smart: only general prompts: no network" in capsys.readouterr().err


def test_lines_tell_what_is_measured_and_how_much_is_done(
    tmp_path: Path, asked: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split("tune vllm m --lengths 1 --batch-sizes 4 --time-limit 600")
    assert cli.main([*words, "--output", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().err
    assert re.search(r"^smart: \d+ %, 4 requests at once, verdict, pair 1: defaults", shown, re.M)


def test_the_time_limit_ends_a_process_in_the_middle_of_an_answer(
    tmp_path: Path,
    asked: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It held only between blocks, of which one may take minutes."""
    python, alive = tmp_path / "python", tmp_path / "alive"
    code = "import json, os, sys, time; print(json.dumps(dict(ready=0)), flush=True); "
    code += f"open({str(alive)!r}, 'w').write(str(os.getpid())); time.sleep(100)"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -c "{code}"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(vllm, "Measured", Measured)
    began = time.monotonic()
    words = shlex.split("tune vllm m --lengths 1 --batch-sizes 4 --time-limit 3")
    assert cli.main([*words, "--output", str(tmp_path / "out.json")]) == 2
    assert time.monotonic() - began < 30
    assert "nothing was measured: the time limit was too short" in capsys.readouterr().err
    with pytest.raises(ProcessLookupError):
        os.kill(int(alive.read_text()), 0)


class FakeEngine:
    """A fake of vLLM's LLMEngine: each step gives all requests a token, and answers end as
    `lengths` says."""

    def __init__(self, lengths: dict[str, int]) -> None:
        self.lengths = lengths
        self.running: dict[str, int] = {}
        self.at_once: list[int] = []

    def add_request(self, name: str, prompt: dict[str, list[int]], params: object) -> None:
        assert prompt["prompt_token_ids"]
        self.running[name] = 0

    def step(self) -> list[Any]:
        self.at_once.append(len(self.running))
        found = []
        for name in list(self.running):
            self.running[name] += 1
            finished = self.running[name] == self.lengths[name]
            answer = SimpleNamespace(token_ids=[7] * self.running[name])
            found.append(SimpleNamespace(request_id=name, outputs=[answer], finished=finished))
            if finished:
                del self.running[name]
        return found

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.running[name]

    def has_unfinished_requests(self) -> bool:
        return bool(self.running)


def test_vllm_answers_to_their_ends_while_the_batch_is_full() -> None:
    """A token behind an end is one that nobody wants, and easily drafted."""
    lengths = {"a": 3, "b": 9, "c": 4, "d": 5, "e": 90}
    engine = FakeEngine(lengths)
    prompts = {name: [1] * 6 for name in lengths}
    found = measure.answered(engine, prompts, None, 2)
    # c begins after 3 steps, d after 7, e after 9; after 12, when d ends, there is none.
    assert engine.at_once == [2] * 12
    assert found["tokens"] == 24
    assert found["prompt_tokens"] == 6
    assert found["answer_tokens"] == 24 / 5
    assert not engine.running


def test_vllm_runs_in_the_users_environment() -> None:
    """Not with what this package sets for itself, and the process does not set it either."""
    code = "import os, sys; from smart_decoding.integrations.vllm import measure; "
    code += "measure._resolve = lambda _: {'seen': os.environ.get('GOMP_SPINCOUNT')}; "
    code += "measure.main(['--resolve', '{}'])"
    own = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, seen in (({}, None), ({"GOMP_SPINCOUNT": "77"}, "77")):
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env={**own, **given}, capture_output=True, text=True)
        assert json.loads(done.stdout) == {"seen": seen}, done.stderr


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
            engine.run(["a"], 1, 1)
