"""vLLM's schedules and the scheduler's options, without vLLM: forms, warnings, refusals."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from smart_decoding.errors import ConfigError
from smart_decoding.integrations import seams as shared
from smart_decoding.integrations.vllm import measure, options, seams
from smart_decoding.integrations.vllm.schedule import (
    LengthChoice,
    Line,
    schedule,
    speculative_config,
    warnings,
)


def test_sizes_between_two_measured_ones_go_to_the_nearer_and_equal_lines_are_one() -> None:
    found = [LengthChoice(batch, k, "plain") for batch, k in ((1, 4), (4, 4), (16, 1), (64, 0))]
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


def test_vllm_is_quiet_unless_the_user_wants_its_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_LOGGING_LEVEL", raising=False)
    assert measure.environment()["VLLM_LOGGING_LEVEL"] == "WARNING"
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    assert measure.environment()["VLLM_LOGGING_LEVEL"] == "DEBUG"


def test_importing_the_integration_imports_no_vllm() -> None:
    code = (
        "import sys, smart_decoding.integrations.vllm as ours, smart_decoding.cli.tune; "
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


def test_names_of_modules_that_are_gone_are_named() -> None:
    """Without vLLM that is all of them."""
    tables = (seams.USED, seams.REPLACED)
    names = [f"{module}.{name}" for table in tables for module in table for name in table[module]]
    assert seams.missing() == names


def test_names_and_parameters_are_found_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Output:
        tokens: int

        def update(self, tokens: int, more: object = None) -> None: ...

    monkeypatch.setitem(sys.modules, "stand_in", SimpleNamespace(Output=Output))

    def lacking(name: str, parameters: Any, newer: Any = None) -> list[str]:
        return shared.lacking({"stand_in": {f"Output.{name}": parameters}}, newer)

    assert lacking("tokens", None) == lacking("update", None) == []
    assert lacking("other", None) == ["stand_in.Output.other"]
    assert lacking("update", ("tokens",)) == []  # what follows has a default
    assert lacking("update", ("other",)) == ["stand_in.Output.update"]
    assert lacking("update", ("tokens", "more"), ()) == []
    assert lacking("update", ("tokens",), ()) == ["stand_in.Output.update"]  # it may be given more
    assert lacking("update", ("tokens",), ("more",)) == []


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
