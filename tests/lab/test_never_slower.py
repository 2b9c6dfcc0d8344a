"""Worlds drawn at random: what is counted in them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from smart_decoding.cli.main import main
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies.off import Off
from smart_lab.__main__ import LAB
from smart_lab.ablations import BUMPS, NOWHERE
from smart_lab.never_slower import World, measured, played
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace, write_trace

if TYPE_CHECKING:
    pass

COST = CostModel.from_table({1: {1: 10.0, 8: 12.0, 64: 60.0}}, {1: 0.5, 64: 3.0})
SIZES = (1, 2, 4)
RECORDING = synthetic(3.0, answers=8, length=24, context=50)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(RECORDING, {}, (), COST)


def worlds(count: int) -> list[World]:
    return [World.drawn(seed, ["here"], SIZES, RECORDING) for seed in range(count)]


def test_plain_decoding_is_itself_in_every_world(trace: Trace) -> None:
    for world in worlds(12):
        found = measured(trace, {"here": COST}, "off", world)
        assert [found["ratio"], found["window"]] == pytest.approx([1.0, 1.0])
        for slower in found["requests"].values():
            assert np.array(slower) == pytest.approx(1.0)


def test_worlds_differ_and_come_again() -> None:
    first = worlds(40)
    assert first == worlds(40)
    assert {world.size for world in first} == set(SIZES)
    assert {world.closed for world in first} == {False, True}
    assert {world.neighbour > 0 for world in first} == {False, True}
    assert {world.damage > 0 for world in first} == {False, True}
    assert {world.bump[0] for world in first} == {*BUMPS, NOWHERE}
    reads = [world.prompts for world in first if world.prompts.chunk]
    assert {prompts.chunk for prompts in reads} == {64, 256}
    assert all(0.6 <= prompts.share <= 0.9 for prompts in reads)
    assert {world.closed for world in first if world.prompts.chunk} == {False, True}


def test_a_good_head_gains_and_a_bad_one_loses_little(trace: Trace) -> None:
    good = World(3, "here", 1, False, (1.0, 1.0), 0.0, 96, 0.0)
    bad = replace(good, damage=1.0)
    assert measured(trace, {"here": COST}, "smart", good)["ratio"] > 1.3
    assert 0.8 < measured(trace, {"here": COST}, "smart", bad)["ratio"] < 1.0


def test_the_command(trace, tmp_path, capsys):
    """N-grams of other prompts are refused; figures can be kept."""
    path, figures = tmp_path / "t.smart", tmp_path / "f.json"
    write_trace(path, trace)
    command = ["never-slower", str(path), "--machines", "zen4", "--batch-sizes", "1,2"]
    assert main([*command, "--worlds", "3", "--processes", "1", "--json", str(figures)], LAB) == 0
    out = capsys.readouterr().out
    assert "with prompts" in out
    rows = json.loads(figures.read_text())["smart"]
    assert [row["seed"] for row in rows] == [0, 1, 2]
    assert all(min(row["requests"]["all rounds"]) > 0 for row in rows)
    assert all(row["figures"]["seconds"] for row in rows)
    assert main([*command, "--ngrams", str(path)], LAB) == 2
    assert "same prompts" in capsys.readouterr().err


@pytest.mark.parametrize("closed", [False, True])
def test_what_a_queue_leaves_unfinished_is_no_gain(trace, closed):
    """Plain answers end together, and drafted ones apart: a queue runs dry in their midst."""
    world = World(3, "here", 4, closed, (1.0, 1.0), 0.0, 16, 0.0)
    ratio = measured(trace, {"here": COST}, "chain:length=1", world)["ratio"]
    recording = world.recording(trace.recording)
    ours, plain = (
        played(policy, recording, COST, world)
        for policy in (trace.policy("chain", COST, length=1), Off())
    )
    known = plain.seconds if closed else ours.equivalents
    assert ratio == pytest.approx(known.sum() / ours.seconds.sum())
    assert (ours.equivalents.sum() < 0.98 * plain.seconds.sum()) != closed
