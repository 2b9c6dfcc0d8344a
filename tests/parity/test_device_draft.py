"""A round whose levels are chosen where they are drafted, on a "GPU" that is a CPU: the trees that
the host would draft by the same widths, and plain decoding's answers."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from smart_decoding.core.rule import NO_NODES, TreeRule
from smart_decoding.core.selection import Beam, Fixed, KeepBest, LookAhead, MarginalRatio
from smart_decoding.core.tree import merge

from .test_drafting import (
    SCRATCH,
    Source,
    by_level,
    free_trees,
    head_of,
    random_round,
    waiting,
    with_free,
)
from .test_graphs import with_graphs
from .test_published_heads import LAYOUTS
from .test_selection import copy_of

if TYPE_CHECKING:
    from pathlib import Path

    from smart_decoding.core.tree import DraftTrees
    from smart_decoding.models.heads.eagle_head import EagleHead

ROOM = 16 * SCRATCH


def on_device(name: str, folder: Path) -> Source:
    source = head_of(name, folder, native=False)
    drafter: Any = source.drafter()
    as_on_a_gpu(drafter._head)
    return source


def as_on_a_gpu(head: EagleHead) -> None:
    """The head's levels read rows as a GPU's kernels do, in recordings, and choose there."""
    levels: Any = head.levels
    with_graphs(levels)
    levels.device_chooses = True


def both_of(trees: DraftTrees, other: DraftTrees) -> DraftTrees:
    merge(trees, other, 0)
    return trees


def check(
    source: Source, temperatures: tuple[float, ...], rule: TreeRule, free: list[DraftTrees]
) -> DraftTrees:
    """The host drafts the same by the same widths, level by level, and merges it; returns it."""
    fixed = Fixed.before(rule)
    assert fixed is not None
    drafter = with_free(source, [copy_of(trees) for trees in free], ROOM)
    mine = waiting(drafter, source.width, temperatures)
    whole = drafter.draft(mine, rule, lambda: False)
    other = with_free(source, [], ROOM)
    requests = waiting(other, source.width, temperatures)
    trees, _, expanded = by_level(other, requests, replace(rule, expand=fixed))
    expected = functools.reduce(both_of, [*map(copy_of, free), trees])
    assert np.array_equal(
        whole.trees.ints[:, : len(whole.trees)], expected.ints[:, : len(expected)]
    )
    ours, plain = (each.floats[:2, : len(each)] for each in (whole.trees, expected))
    np.testing.assert_allclose(ours, plain, rtol=1e-3, atol=1e-6)
    assert whole.kept.tolist() == rule.select(whole.trees).tolist()
    assert len(whole.level_seconds) == len(whole.widths)
    assert all(ran >= live for ran, live in zip(whole.widths[1:], expanded, strict=False))
    assert drafter.pending_rows(mine) == other.pending_rows(requests)
    return whole.trees


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_device_expands_what_the_host_would(name: str, tmp_path: Path) -> None:
    source = on_device(name, tmp_path)
    rng = np.random.default_rng(len(name))
    levels = merged = 0
    for seed in range(12):
        temperatures = [(0.0,), (0.0, 0.8, 1.2), (0.8, 0.8)][seed % 3]
        rule = random_round(rng, ("beam", "look_ahead")[seed % 2], "best_rate", len(temperatures))
        if isinstance(rule.expand, LookAhead):
            first = np.sort(rng.random(8))[::-1]
            expand = replace(rule.expand, first=first, requests=len(temperatures))
            rule = replace(rule, expand=expand)
        trees = check(source, temperatures, rule, [])
        free = free_trees(rng, trees)
        both = check(source, temperatures, rule, [free])
        levels += int(trees.depth.max(initial=1)) - 1
        merged += int(np.count_nonzero(both.source == 0)) < len(both) < len(trees) + len(free)
    assert levels > 5
    assert merged > 3


def test_there_is_no_more_than_there_is_room_for(tmp_path: Path) -> None:
    source = on_device("eagle3", tmp_path)
    rule = TreeRule(5, 4, np.full(3, 9), NO_NODES, Beam(3), KeepBest(9))
    found = []
    for slots in (0, 2, 10, 20, ROOM):
        drafter = with_free(source, [], slots)
        requests = waiting(drafter, source.width, (0.0, 0.0, 0.0))
        whole = drafter.draft(requests, rule, lambda: False)
        assert len(whole.trees) == 4 * (3 + sum(whole.widths[1:]))
        found.append(whole.widths[1:])
    assert found == [[], [], [9], [9, 9], [9, 9, 9, 9]]


def test_other_rules_are_followed_level_by_level(tmp_path: Path) -> None:
    drafter = on_device("eagle3", tmp_path).drafter()
    ratio = MarginalRatio(0.8, np.ones(9), np.ones(9))
    rule = TreeRule(3, 2, np.array([9]), NO_NODES, Beam(1), KeepBest(9))
    assert drafter.follows(rule)
    assert not drafter.follows(replace(rule, expand=ratio))
