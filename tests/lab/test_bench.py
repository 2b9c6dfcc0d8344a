"""The options of the laboratory's `bench`, and what it adds to a run of `smart bench`."""

from __future__ import annotations

import argparse

import pytest

from smart_decoding.bench.options import parse_setting
from smart_decoding.cli.bench import options_of
from smart_decoding.errors import ConfigError
from smart_lab import bench_command
from smart_lab.bench import LabBench
from smart_lab.options import LAB_PRESETS, LabArm, LabOptions, command_of


def asked_by(words: str) -> LabOptions:
    parser = argparse.ArgumentParser()
    bench_command.add_arguments(parser)
    found = options_of(parser.parse_args(words.split()), LabOptions, LAB_PRESETS)
    assert isinstance(found, LabOptions)
    return found


def test_presets_fill_in_what_is_not_given() -> None:
    quick, full = asked_by("--quick"), asked_by("--full")
    assert quick.time_limit is not None
    assert quick.time_limit <= 150
    assert 1 in quick.batch_sizes
    assert full.batch_sizes == (1, 2, 4, 8, 16, 32)
    assert (full.temperature, full.sampled) == (0.0, 0.8)
    assert full.load
    assert full.compares_policies
    assert len(full.all_tasks) == 5
    assert full.time_limit is not None
    assert full.time_limit <= 3600
    assert asked_by("--limit 3 --full --batch-sizes 1,4").batch_sizes == (1, 4)
    assert asked_by("") == LabOptions()


def test_load_alone_replaces_the_blocks() -> None:
    assert asked_by("").compares_policies
    assert not asked_by("--load 0.5").compares_policies
    assert asked_by("--load 0.5 --blocks").compares_policies


def test_parts_come_in_their_order_with_their_shares() -> None:
    bench = LabBench.__new__(LabBench)
    bench.options = asked_by("--full")
    parts = {name: part.share for name, part in bench.parts().items()}
    assert parts == {
        "runs": 0.56,
        "sampled_runs": 0.11,
        "suite_runs": 0.06,
        "variant_runs": 0.07,
        "load": 0.1,
        "replayed": 0.1,
    }
    assert list(parts) == ["runs", "sampled_runs", "suite_runs", "variant_runs", "load", "replayed"]


def test_the_command_says_what_was_asked() -> None:
    told = command_of(
        asked_by("--tune-eagle2 3 --tune-paper --suites long,edit --limit 2 --variants all_levels")
    )
    assert told.startswith("python -m smart_lab bench --model ")
    for words in (
        "--tune-eagle2 3",
        "--tune-paper",
        "--suites long,edit",
        "--limit 2",
        "--variants all_levels",
    ):
        assert words in told


def test_a_variant_is_of_smart_and_known() -> None:
    arm = parse_setting("smart:variant=all_levels", LabArm)
    assert arm.label == "smart(variant=all_levels)"
    assert arm.policy_options == {}
    options = LabOptions(policy_options=("smart:variant=all_levels",))
    assert options.speculation(arm) == {"policy": "smart"}
    for wrong in ("smart:variant=nothing", "chain:variant=all_levels"):
        with pytest.raises(ConfigError, match="unknown variant"):
            LabOptions(policies=("off", wrong.split(":")[0]), policy_options=(wrong,))
