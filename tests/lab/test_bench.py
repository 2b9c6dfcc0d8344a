"""The options of the laboratory's `bench`, and what it adds to a run of `smart bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.bench import runner
from smart_decoding.bench.options import MEAN_PROMPT, parse_setting
from smart_decoding.cli.bench import options_of
from smart_decoding.errors import ConfigError
from smart_lab import bench_command
from smart_lab.options import LabArm, LabOptions, command_of, loaded
from smart_lab.provenance import provenance
from smart_lab.suites import LONG_PROMPT


def asked_by(words: str) -> LabOptions:
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    found = options_of(parser.parse_args(words.split()), LabOptions)
    assert isinstance(found, LabOptions)
    return found


def test_the_command_says_what_was_asked() -> None:
    command = command_of(asked_by("--tune-eagle2 3 --tune-paper --limit 2 --resume run.part"))
    assert command.startswith("python -m smart_lab bench --model ")
    for words in ("--tune-eagle2 3", "--tune-paper", "--limit 2", "--resume run.part"):
        assert words in command
    words = "--draft small --method-option longest=4"
    more = "--quantization int4 --chat-template vicuna --trust-pickle"
    model = "--method draft_model --policies off,eagle2 --policy-options eagle2:depth=2"
    command = command_of(asked_by(f"{model} {words} {more}"))
    for given in (words, more):
        assert given in command


def test_a_variant_is_of_smart_and_known() -> None:
    arm = parse_setting("smart:variant=cheap_costs", LabArm)
    assert arm.label == "smart(variant=cheap_costs)"
    assert arm.policy_options == {}
    options = LabOptions(policy_options=("smart:variant=cheap_costs",))
    assert options.speculation(arm) == {"policy": "smart"}
    for wrong in ("smart:variant=nothing", "chain:variant=cheap_costs"):
        with pytest.raises(ConfigError, match="unknown variant"):
            LabOptions(policies=("off", wrong.split(":")[0]), policy_options=(wrong,))


def test_results_tell_no_folders(tmp_path: Path) -> None:
    """They may tell of a user. What is no file is told as it was asked for."""
    file = tmp_path / "m.gguf"
    file.touch()
    for model, expected in ((str(file), "m.gguf"), ("owner/name", "owner/name")):
        assert f"--model {expected} --" in command_of(LabOptions(model=model))
        assert provenance("", 0, {"model": model}, None)["weights"]["model"] == expected


def test_long_prompts_get_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside every contestant the baseline holds requests once more."""
    monkeypatch.setattr(runner, "LLM", lambda model, **options: options)
    short: Any = loaded(LabOptions(batch_sizes=(64,), max_tokens=10))
    assert short["kv_cache_tokens"] == 64 * (10 + MEAN_PROMPT) * 3
    assert short["max_model_len"] is None
    long: Any = loaded(LabOptions(batch_sizes=(64,), max_tokens=10, tasks=("long",)))
    assert long["kv_cache_tokens"] == 64 * (10 + LONG_PROMPT) * 3
    assert long["max_model_len"] == 10 + LONG_PROMPT
