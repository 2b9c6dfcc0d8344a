"""Worlds drawn at random: what is counted in them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from smart_decoding.core.costs import CostModel
from smart_lab.never_slower import ClosedWalk, World, measured, report
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace

COST = CostModel.from_table({1: {1: 10.0, 8: 12.0, 64: 60.0}}, {1: 0.5, 64: 3.0})
SIZES = (1, 2, 4)


@pytest.fixture(scope="module")
def trace() -> Trace:
    return Trace(synthetic(3.0, answers=8, length=24, context=50), {}, (), COST)


def worlds(count: int) -> list[World]:
    return [World.drawn(seed, ["here"], SIZES) for seed in range(count)]


def test_plain_decoding_is_itself_in_every_world(trace: Trace) -> None:
    for world in worlds(12):
        found = measured(trace, {"here": COST}, "off", world)
        assert found["ratio"] == found["window"] == pytest.approx(1.0)
        assert found["slowest"] == pytest.approx(1.0)


def test_worlds_differ_and_come_again() -> None:
    first = worlds(40)
    assert first == worlds(40)
    assert {world.size for world in first} == set(SIZES)
    assert {world.closed for world in first} == {False, True}
    assert {world.neighbour > 0 for world in first} == {False, True}
    assert {world.damage > 0 for world in first} == {False, True}


def test_a_good_head_gains_and_a_bad_one_loses_little(trace: Trace) -> None:
    good = World(3, "here", 1, False, (1.0, 1.0), 0.0, 96, 0.0)
    bad = replace(good, damage=1.0)
    assert measured(trace, {"here": COST}, "smart", good)["ratio"] > 1.3
    assert 0.8 < measured(trace, {"here": COST}, "smart", bad)["ratio"] < 1.0


def test_a_closed_batch_ends_before_the_next_begins(trace: Trace) -> None:
    walk = ClosedWalk(trace.recording, 4)
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
    assert len(lines) == 2 + len({row["size"] for row in rows})
    assert lines[-1].split()[:2] == ["all", "6"]
