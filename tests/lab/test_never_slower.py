"""Worlds drawn at random: what is counted in them."""

from __future__ import annotations

import itertools
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
from smart_lab.never_slower import World, measured, played, report
from smart_lab.replay import Prompts, Walk
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace, write_trace

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round

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


def test_a_closed_batch_ends_before_the_next_begins(trace: Trace) -> None:
    walk = Walk(trace.recording, 4, closed=True)
    sizes = []
    while walk.running:
        sizes.append(len(walk.answer))
        fast = np.where(walk.answer % 2, 3, 1)
        walk.advance(np.minimum(fast, walk.left), True)
    assert sizes[0] == 4
    assert 2 in sizes
    assert sizes.count(4) < len(sizes)
    assert [b for a, b in itertools.pairwise(sizes) if b > a] == [4]


def test_a_report_has_a_line_for_each_batch_size(trace: Trace) -> None:
    rows = [measured(trace, {"here": COST}, "smart", world) for world in worlds(6)]
    lines = report(rows).splitlines()
    assert [line.split()[1] for line in lines if line.startswith("batch ")] == sorted(
        {str(row["size"]) for row in rows}, key=int
    )
    assert [line.split()[1] for line in lines if line.startswith("all ")][-1] == "6"
    assert "estimated / real speedup" in lines[-3]
    assert "of their plain time per token" in lines[-1]


class Watching(Off):
    """Plain decoding that remembers what it was asked and told."""

    def __init__(self) -> None:
        self.planned: list[int] = []
        self.rounds: list[Round] = []

    def plan(self, batch):
        self.planned.append(batch.prefill_rows)
        return super().plan(batch)

    def observe(self, round):
        self.rounds.append(round)


@pytest.mark.parametrize("closed", [False, True])
def test_rounds_with_prompts_reach_the_policy_at_their_own_price(trace, closed, monkeypatch):
    """They take 0.75 of what the table says of their rows, and are not planned."""
    monkeypatch.setattr("smart_lab.never_slower.noisy", lambda seconds, rng: seconds)
    world = World(3, "here", 4, closed, (1.0, 1.0), 0.0, 16, 0.0, prompts=Prompts(64, 0.75))
    policy = Watching()
    found = played(policy, world.recording(trace.recording), COST, world)
    mixed = [r for r in policy.rounds if r.batch.prefill_rows]
    assert len(mixed) > 10
    assert set(policy.planned) == {0}
    for round in mixed:
        size, rows = round.batch.size, round.verify_rows
        assert round.rule is None
        assert 1 <= size < 4
        assert 0 < rows - size == round.batch.prefill_rows <= 64
        own, all_rows = COST.verify_seconds(size, [size, rows], 0.0).tolist()
        assert round.verify_seconds == pytest.approx(0.25 * own + 0.75 * all_rows)
    # a round that has prompts only is nobody's, but takes its time
    assert len(found.seconds) > len(policy.rounds)
    assert found.seconds.sum() > sum(r.verify_seconds for r in policy.rounds)


def test_a_queue_reads_each_prompt_once_beside_the_other_answers(trace):
    walk = Walk(trace.recording, 3, chunk=20)
    read, sizes = 0, []
    while walk.running:
        size, rows = len(walk.answer), walk.prompt_rows
        assert size + len(walk.reading) == 3
        read += rows
        sizes.append((size, rows))
        walk.advance(np.minimum(1 + np.arange(size) * (rows == 0), walk.left), False)
    begun = len(trace.recording.answers) - len(walk.reading)
    assert read == 50 * begun + sum(50 - left for _, left in walk.reading)
    assert sizes[:8] == [(0, 20), (0, 20), (0, 20), (1, 20), (1, 20), (2, 20), (2, 20), (2, 10)]
    assert any(size == 2 and rows for size, rows in sizes[8:])


@pytest.mark.parametrize("where", BUMPS)
def test_a_table_is_wrong_for_some_rows_only(where):
    world = World(3, "here", 4, False, (1.0, 1.0), 0.0, 16, 0.0, bump=(where, 0.2))
    rows = np.array([4, 6, 8, 16, 32, 200])
    wrong = world.assumed(COST).verify_seconds(4, rows, 0.0) / COST.verify_seconds(4, rows, 0.0)
    expected = {
        "around the batch size": [1.2, 1.1, 1.03, 1.0, 1.0, 1.0],
        "beyond twice the batch": [1.0, 1.01, 1.1, 1.2, 1.2, 1.2],
        "beyond four times the batch": [1.0, 1.0, 1.0, 1.1, 1.2, 1.2],
    }
    assert wrong == pytest.approx(expected[where], abs=0.005)


def test_what_is_believed_of_rounds_with_prompts_is_told_apart(trace):
    """A table that overstates them by a third is found out, whatever `smart` learns."""
    world = World(3, "here", 2, False, (1.0, 1.0), 0.0, 16, 0.0, prompts=Prompts(64, 0.75))
    found = measured(trace, {"here": COST}, "smart", world)["figures"]
    assert {"model", "with prompts"} <= set(found["seconds"])
    assert found["seconds"]["model"] == pytest.approx(1.0, abs=0.1)
    assert found["tokens"]["with prompts"] == 1.0
    assert found["tokens"]["model"] == pytest.approx(1.0, abs=0.3)
