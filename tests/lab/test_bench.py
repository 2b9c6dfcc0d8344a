"""The options of the laboratory's `bench`, and what it adds to a run of `smart bench`."""

from __future__ import annotations

import argparse

import pytest

from smart_decoding.bench.options import parse_setting
from smart_decoding.cli.bench import options_of
from smart_decoding.errors import ConfigError
from smart_lab import bench_command
from smart_lab.options import LabArm, LabOptions, command_of


def asked_by(words: str) -> LabOptions:
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    found = options_of(parser.parse_args(words.split()), LabOptions)
    assert isinstance(found, LabOptions)
    return found


def test_presets_fill_in_what_is_not_given() -> None:
    quick = asked_by("--quick")
    assert quick.time_limit is not None
    assert quick.time_limit <= 150
    assert 1 in quick.batch_sizes
    assert asked_by("--limit 3 --quick --batch-sizes 1,4").batch_sizes == (1, 4)
    assert asked_by("") == LabOptions()


def test_the_command_says_what_was_asked() -> None:
    command = command_of(asked_by("--tune-eagle2 3 --tune-paper --limit 2 --resume run.part"))
    assert command.startswith("python -m smart_lab bench --model ")
    for words in ("--tune-eagle2 3", "--tune-paper", "--limit 2", "--resume run.part"):
        assert words in command


def test_a_variant_is_of_smart_and_known() -> None:
    arm = parse_setting("smart:variant=all_levels", LabArm)
    assert arm.label == "smart(variant=all_levels)"
    assert arm.policy_options == {}
    options = LabOptions(policy_options=("smart:variant=all_levels",))
    assert options.speculation(arm) == {"policy": "smart"}
    for wrong in ("smart:variant=nothing", "chain:variant=all_levels"):
        with pytest.raises(ConfigError, match="unknown variant"):
            LabOptions(policies=("off", wrong.split(":")[0]), policy_options=(wrong,))
