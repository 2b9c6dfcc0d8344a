"""`smart vllm-config` and the scheduler's options, without vLLM: schedules, files, refusals."""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from smart_decoding.cli import main as cli
from smart_decoding.cli import vllm_config as cli_vllm
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.vllm import options, seams
from smart_decoding.integrations.vllm.measure import Measured
from smart_decoding.integrations.vllm.schedule import (
    Line,
    Timing,
    choose,
    schedule,
    speculative_config,
    warnings,
)


def timings(plain: float, **others: float) -> dict[int, Timing]:
    """Three blocks of 100 tokens, each a little slower than the one before; others by length, as
    k1, k2, ..."""
    drift = (1.0, 1.1, 1.2)
    found = {0: Timing([plain * d for d in drift], 100)}
    for name, seconds in others.items():
        found[int(name[1:])] = Timing([seconds * d for d in drift], 100, drafted=50, accepted=20)
    return found


def test_the_fastest_length_is_chosen_and_the_reason_says_by_how_much() -> None:
    choice = choose(1, timings(1.0, k1=0.95, k4=0.8, k2=0.85))
    assert choice.length == 4
    assert choice.ratios[4][0] == pytest.approx(1.25)
    assert choice.ratios[4][1] == pytest.approx(0.0, abs=1e-9)
    assert "batch 1" in choice.reason
    assert "4 tokens 1.25" in choice.reason
    assert "40 % accepted" in choice.reason


def test_what_does_not_pay_is_off() -> None:
    assert (
        choose(8, timings(1.0, k1=0.99, k4=1.5)).length == 0
    )  # 1 % is no gain: it is within the error of any run


def test_sizes_between_two_measured_ones_go_to_the_nearer_and_equal_lines_are_one() -> None:
    found = [
        choose(1, timings(1.0, k4=0.7)),
        choose(4, timings(1.0, k4=0.8)),
        choose(16, timings(1.0, k4=0.95, k1=0.9)),
        choose(64, timings(1.0, k4=1.9)),
    ]
    lines = schedule(found)
    assert [line.entry() for line in lines] == [[1, 7, 4], [8, 31, 1], [32, 64, 0]]
    assert lines[0].reason.count("plain") == 2


def test_the_option_is_the_one_that_vllm_takes() -> None:
    lines = [Line(1, 3, 4, ""), Line(4, 16, 0, "")]
    assert speculative_config({"method": "ngram"}, lines) == {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "num_speculative_tokens_per_batch_size": [[1, 3, 4], [4, 16, 0]],
    }
    assert speculative_config({"method": "ngram"}, [Line(1, 16, 0, "")]) is None


class Engine:
    """A stand-in for the engine's process: three tokens are best at batch 1, none at batch 4."""

    started: ClassVar[list[dict[str, Any]]] = []  # arguments

    def __init__(self, arguments) -> None:
        speculative = arguments["speculative_config"]
        self.length = speculative["num_speculative_tokens"] if speculative else 0
        self.scheduled = "num_speculative_tokens_per_batch_size" in (speculative or {})
        self.started.append(arguments)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def ready(self) -> str:
        return "0.32.0"

    def run(self, prompts, max_tokens):
        seconds = 1.0 - 0.1 * self.length if len(prompts) == 1 else 1.0 + 0.1 * self.length
        if self.scheduled and len(prompts) == 4:  # nothing is drafted, but the drafter is there
            seconds = 1.02
        tokens = max_tokens * len(prompts)
        prompt_tokens = 36 * len(prompts)
        return {
            "seconds": seconds,
            "tokens": tokens,
            "prompt_tokens": prompt_tokens,
            "drafted": 10,
            "accepted": 5,
        }


def test_a_process_that_dies_between_answers_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was taken for a reader of our output that had gone: nothing was said."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with Measured({"speculative_config": None}) as engine:
        engine._process.wait(10)
        with pytest.raises(ConfigError, match="ended with code 1"):
            engine.run(["a"], 1)


# What vLLM makes of a schedule.
KEPT = {
    "vllm": "0.32.0",
    "scheduled": True,
    "graphs": ["FULL_AND_PIECEWISE", "FULL_AND_PIECEWISE"],
    "all_passes": False,
    "no_adaptive": "Adaptive verification requires full CUDA graphs.",
}
PIECEWISE = {**KEPT, "graphs": ["FULL_AND_PIECEWISE", "PIECEWISE"]}


@pytest.mark.parametrize(
    ("resolved", "messages"),
    [
        (KEPT, []),
        ({**KEPT, "scheduled": False}, ["ignores a schedule"]),
        ({**KEPT, "all_passes": True}, ["VLLM_USE_V2_MODEL_RUNNER=0"]),
        (PIECEWISE, ["49548"]),
        ({**PIECEWISE, "scheduled": False}, ["ignores a schedule", "49548"]),
    ],
)
def test_what_a_schedule_costs_is_said(resolved: dict[str, Any], messages: list[str]) -> None:
    found = warnings(resolved)
    assert len(found) == len(messages)
    assert all(message in text for message, text in zip(messages, found, strict=True))


COMMAND = (
    "vllm-config a-model --lengths 1,3 --batch-sizes 1,4 --blocks 2 "
    """--engine-args '{"dtype": "float32"}' --check"""
)


def test_the_command_measures_each_length_and_writes_schedule_and_reasons(
    tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr(Engine, "started", [])
    monkeypatch.setattr(cli_vllm, "Measured", Engine)
    monkeypatch.setattr(cli_vllm, "find_spec", lambda name: object())
    calls = []
    monkeypatch.setattr(
        cli_vllm, "resolved", lambda arguments: calls.append(arguments) or PIECEWISE
    )
    output = tmp_path / "schedule.json"
    assert cli.main([*shlex.split(COMMAND), "--output", str(output)]) == 0
    written = json.loads(output.read_text())
    assert written["num_speculative_tokens_per_batch_size"] == [[1, 1, 3], [2, 4, 0]]
    assert written["num_speculative_tokens"] == 3
    assert written["method"] == "ngram"
    configs = [arguments["speculative_config"] for arguments in Engine.started]
    lengths = [config and config["num_speculative_tokens"] for config in configs]
    assert lengths == [None, 1, 3, None, 3]
    assert configs[-1] == written
    assert all(arguments["dtype"] == "float32" for arguments in Engine.started)
    reasons = json.loads((tmp_path / "schedule.reasons.json").read_text())
    assert reasons["measured"]["4"]["3"]["seconds"] == pytest.approx([1.3, 1.3])
    assert "batch 1: plain" in reasons["lines"][0]["reason"]
    assert reasons["checked"]["1"][0] == pytest.approx(1 / 0.7)
    assert reasons["checked"]["4"][0] == pytest.approx(1 / 1.02)
    assert calls[0]["speculative_config"]["num_speculative_tokens_per_batch_size"][0] == [1, 1, 3]
    assert calls[0]["dtype"] == "float32"
    shown, warned = capsys.readouterr()
    assert warned.startswith("warning: with a schedule vLLM 0.32.0 takes CUDA graphs PIECEWISE")
    assert [f"warning: {text}" for text in reasons["warnings"]] == warned.splitlines()
    assert "2 to 4: no tokens" in shown
    assert "cannot run here: Adaptive verification requires full CUDA graphs." in shown
    assert reasons["adaptive_verification"] in shown
    assert "batch 4, with the schedule: 0.98 ± 0.00 × plain" in shown


@pytest.mark.parametrize(("given", "context"), [([], 100), (["--context", "500"], 500)])
def test_where_adaptive_verification_can_run_its_profile_gets_the_context(
    tmp_path, monkeypatch, capsys, given: list[str], context: int
) -> None:
    """That of the prompts measured, 36 tokens and half of 128, or the one that is named."""
    monkeypatch.setattr(cli_vllm, "Measured", Engine)
    monkeypatch.setattr(cli_vllm, "find_spec", lambda name: object())
    monkeypatch.setattr(cli_vllm, "resolved", lambda arguments: {**KEPT, "no_adaptive": None})
    output = ["--output", str(tmp_path / "schedule.json")]
    assert cli.main([*shlex.split(COMMAND), *given, *output]) == 0
    shown = capsys.readouterr().out
    assert '"enable_adaptive_verification": true' in shown
    assert f"VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN={context}. " in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
            "without num_speculative_tokens",
        ),
        (["--speculative-config", '{"method": "suffix"}'], "no schedule of several lengths"),
        (["--batch-sizes", "1,100"], "too few"),
        (["--blocks", "0"], "--blocks"),
        (["--context", "0"], "--context"),
    ],
)
def test_wrong_arguments_are_one_line_before_anything_is_loaded(arguments, message, capsys) -> None:
    assert cli.main(["vllm-config", "m", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_vllm_it_says_where_to_install_it(monkeypatch, capsys) -> None:
    monkeypatch.setattr(cli_vllm, "find_spec", lambda name: None)
    assert cli.main(["vllm-config", "m"]) == 2
    assert "vLLM's environment" in capsys.readouterr().err


def test_prompts_are_lines_of_text_or_json(tmp_path) -> None:
    path = tmp_path / "prompts"
    path.write_text('one\n\n{"prompt": "two"}\n')
    assert cli_vllm.read_prompts(path) == ["one", "two"]
    path.write_text('{"text": "two"}\n')
    with pytest.raises(ConfigError, match="line 1"):
        cli_vllm.read_prompts(path)


def test_importing_the_integration_imports_no_vllm() -> None:
    code = (
        "import sys, smart_decoding.integrations.vllm as ours, smart_decoding.cli.vllm_config; "
        "assert not {'vllm', 'torch'} & set(sys.modules); print(*sorted(ours.__all__))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.split() == ["SmartAsyncScheduler", "SmartScheduler"], run.stderr


# --- the scheduler's refusals ---


def stock(**speculative: object) -> SimpleNamespace:
    """A scheduler of vLLM's, as far as it is read before it runs."""
    method = {
        "method": "ngram",
        "parallel_drafting": False,
        "enable_adaptive_verification": False,
    }
    config = SimpleNamespace(
        additional_config={},
        compilation_config=SimpleNamespace(
            cudagraph_capture_sizes=[], cudagraph_mode=None, max_cudagraph_capture_size=0
        ),
        parallel_config=SimpleNamespace(data_parallel_size=1, distributed_executor_backend="mp"),
        scheduler_config=SimpleNamespace(async_scheduling=False, max_num_seqs=16),
        speculative_config=SimpleNamespace(**method | speculative),
        use_v2_model_runner=False,
    )
    return SimpleNamespace(vllm_config=config, dynamic_sd_lookup=None, num_spec_tokens=4)


NAMES = [
    *seams.ATTRIBUTES,
    *(f"vllm_config.speculative_config.{name}" for name in seams.SPECULATIVE),
]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_gone_is_named(name: str) -> None:
    scheduler = stock()
    assert seams.missing_attributes(scheduler) == []
    owner, _, last = name.rpartition(".")
    delattr(seams.find(scheduler, owner) if owner else scheduler, last)
    assert f"scheduler.{name}" in seams.missing_attributes(scheduler)
    options.reason_for_stock(scheduler, options.Options())  # raises nothing


def test_classes_that_are_gone_are_named() -> None:
    """Without vLLM that is all of them."""
    part = seams.SCHEDULER
    members = [f"{place}.{name}" for place, names in part.classes.items() for name in names]
    methods = [f"{p}({', '.join(n)})" for p, n in (*part.replaced.items(), *part.called.items())]
    assert seams.missing(part) == [*members, *methods]


def test_members_and_parameters_are_found_where_they_are(monkeypatch) -> None:
    class Sampler:
        def __init__(self, sampler: object) -> None:
            self.sampler = sampler

        def forward(self, logits: object, more: object = None) -> None: ...

    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(Sampler=Sampler))
    members = {"stand_in:Sampler": ("forward", "sampler", "other")}
    assert seams.missing(seams.Seams(members)) == ["stand_in:Sampler.other"]
    method = "stand_in:Sampler.forward"
    for called, replaced, gone in (
        (("logits",), None, []),
        (None, ("logits", "more"), []),
        (("other",), None, ["stand_in:Sampler.forward(other)"]),
        (None, ("logits",), ["stand_in:Sampler.forward(logits)"]),  # vLLM may give it more
    ):
        part = seams.Seams(
            {},
            replaced={} if replaced is None else {method: replaced},
            called={} if called is None else {method: called},
        )
        assert seams.missing(part) == gone


def test_nothing_to_choose_means_stock_behaviour() -> None:
    def reason(scheduler: object, **given: bool) -> str | None:
        return options.reason_for_stock(scheduler, options.Options(**given))

    plain = stock()
    assert reason(plain) is None
    plain.vllm_config.speculative_config = None
    assert "speculative-config" in str(reason(plain))
    assert "medusa" in str(reason(stock(method="medusa")))
    assert "at once" in str(reason(stock(parallel_drafting=True)))
    assert "suffix" in str(reason(stock(method="suffix")))
    assert "on the device" in str(reason(stock(enable_adaptive_verification=True)))
    assert "off" in str(reason(stock(), enabled=False))


def test_data_parallel_and_the_wrong_class_are_refused() -> None:
    options.refuse_layout(1, "mp")
    with pytest.raises(ConfigError, match="data_parallel_size=2"):
        options.refuse_layout(2, None)
    with pytest.raises(ConfigError, match="external_launcher"):
        options.refuse_layout(1, "external_launcher")
    options.refuse_class(False, False)
    options.refuse_class(None, True)  # a version that does not say
    with pytest.raises(ConfigError, match="SmartAsyncScheduler"):
        options.refuse_class(True, False)
    with pytest.raises(ConfigError, match=r"vllm\.SmartScheduler"):
        options.refuse_class(False, True)


@pytest.mark.parametrize(
    "given",
    [
        {"smart": {"unknown": 1}},
        {"smart": {"shortcuts": True}},
        {"smart": 3},
        {"smart": {"metrics_port": True}},
        {"smart": {"exploration_budget": 2}},
    ],
)
def test_unknown_and_wrong_options_are_refused(given) -> None:
    with pytest.raises(ConfigError):
        options.read_options(given)


def test_options_are_read_and_other_plugins_left_alone() -> None:
    assert options.read_options({"other": 1}) == options.Options()
    assert (
        options.read_options(
            {"smart": {"metrics_port": 9400, "exploration_budget": 0}}
        ).metrics_port
        == 9400
    )
