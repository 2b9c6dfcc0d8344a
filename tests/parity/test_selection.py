"""Rules followed in C++ against their meaning in numpy: the same nodes, ties included, and the same
bits of every probability."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.calibration import KINDS, Calibration
from smart_decoding.core.rule import NO_NODES, Scores, TreeRule
from smart_decoding.core.selection import (
    RANKS,
    Beam,
    BestRate,
    KeepBest,
    LookAhead,
    MarginalRatio,
    RoundCosts,
    Topology,
    is_data,
)
from smart_decoding.core.tree import DraftTrees
from smart_decoding.kernels.selection import native_selection

if TYPE_CHECKING:
    from smart_decoding.core.rule import Expand, Keep
    from smart_decoding.core.tree import FloatArray, IntArray

pytestmark = pytest.mark.usefixtures("variant")
VERIFY = 400
LEVELS = 6
EXPANDS = ("beam", "look_ahead", "topology", "marginal_ratio")
KEEPS = ("keep_best", "best_rate", "topology", "marginal_ratio")


def probabilities(rng: np.random.Generator, count: int, ties: bool) -> FloatArray:
    if ties:
        return rng.choice([0.0, 0.25, 0.5, 1.0], count)
    return np.sort(rng.dirichlet(np.ones(count)) * rng.random())[::-1]


def random_trees(rng: np.random.Generator, batch: int, sources: int, ties: bool) -> DraftTrees:
    """Levels of which some nodes have children, by drafters with and without a model; a request may
    have none."""
    trees = DraftTrees.empty(batch)
    frontier = [(owner, -1) for owner in range(batch) if rng.random() < 0.9]
    for _ in range(int(rng.integers(1, 5))):
        first = len(trees)
        for owner, parent in frontier:
            k = int(rng.integers(1, 6))
            tokens = rng.choice(20, k, replace=False)
            prob = probabilities(rng, k, ties)
            source = int(rng.integers(sources))
            trees.append([owner] * k, tokens, [parent] * k, prob, source)
        nodes = np.arange(first, len(trees))
        some = np.sort(rng.choice(nodes, min(len(nodes), 6), replace=False))
        frontier = [(int(trees.owner[node]), int(node)) for node in some]
    return trees


def random_costs(rng: np.random.Generator, batch: int) -> RoundCosts:
    count = int(rng.choice([VERIFY, 12]))
    verify = 1.0 + np.cumsum(rng.random(count) * rng.choice([0.0, 0.05, 0.3], count))
    levels = rng.random() * 0.1 + rng.choice([0.0, 0.002, 0.05]) * np.arange(64)
    limit = float(rng.choice([math.inf, 1.5, 3.0]))
    return RoundCosts(float(batch), float(rng.random()), levels, verify, limit)


def random_topology(rng: np.random.Generator) -> Topology:
    ranks = int(rng.integers(1, 5))
    following = np.full((int(rng.integers(1, 20)), ranks), -1, np.int64)
    free = [(0, rank) for rank in range(ranks)]
    for place in range(1, len(following)):
        above, rank = free.pop(int(rng.integers(len(free))))
        following[above, rank] = place
        free += [(place, below) for below in range(ranks)]
    return Topology(following)


def random_ratio(rng: np.random.Generator) -> MarginalRatio:
    budget = int(rng.integers(1, 30))
    spent = rng.choice([0.0, 0.2]) + 0.05 * np.arange(budget + 1)
    step = rng.random(budget + 1) * rng.choice([0.01, 0.1])
    return MarginalRatio(float(rng.random()), spent, step, bool(rng.random() < 0.5))


def random_expand(rng: np.random.Generator, kind: str, batch: int) -> Expand:
    if kind == "look_ahead":
        below = np.sort(rng.random((LEVELS, RANKS)), axis=1)[:, ::-1]
        widths = np.unique(rng.integers(1, 9, 4)) * batch
        return LookAhead(random_costs(rng, batch), widths, below)
    if kind == "topology":
        return random_topology(rng)
    return Beam(int(rng.integers(1, 5))) if kind == "beam" else random_ratio(rng)


def random_keep(rng: np.random.Generator, kind: str, batch: int) -> Keep:
    if kind == "best_rate":
        return BestRate(random_costs(rng, batch), int(rng.choice([0, 0, 2, 500])))
    if kind == "topology":
        return random_topology(rng)
    return KeepBest(int(rng.integers(1, 9))) if kind == "keep_best" else random_ratio(rng)


def random_calibration(rng: np.random.Generator, trees: DraftTrees) -> Calibration:
    calibration = Calibration()
    kind = np.ones(trees.batch, np.uint8)
    for _ in range(3):
        nodes = np.flatnonzero(rng.random(len(trees)) < 0.5)
        calibration.observe(trees, nodes, rng.random(len(nodes)) < 0.5, kind)
    return calibration


def random_rule(rng: np.random.Generator, trees: DraftTrees, expand: str, keep: str) -> TreeRule:
    batch = trees.batch
    scores = None
    if rng.random() < 0.7:
        kind = rng.integers(0, KINDS, batch).astype(np.uint8)
        scores = Scores(random_calibration(rng, trees), kind)
    ends = np.array([3, 7]) if rng.random() < 0.7 else NO_NODES
    limits = rng.integers(0, 7, batch)
    grows = random_expand(rng, expand, batch)
    return TreeRule(LEVELS, 5, limits, ends, grows, random_keep(rng, keep, batch), scores)


def copy_of(trees: DraftTrees) -> DraftTrees:
    same = DraftTrees.with_room(trees.batch, len(trees))
    same.ints[:] = trees.ints[:, : len(trees)]
    same.floats[:] = trees.floats[:, : len(trees)]
    same.set_length(len(trees))
    return same


@pytest.mark.parametrize("expand", EXPANDS)
@pytest.mark.parametrize("keep", KEEPS)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3), st.booleans())
@settings(max_examples=25, deadline=None)
def test_the_same_nodes_are_selected_and_expanded(
    expand: str, keep: str, seed: int, batch: int, sources: int, ties: bool
) -> None:
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, batch, sources, ties)
    rule = random_rule(rng, trees, expand, keep)
    assert is_data(rule)
    other = copy_of(trees)
    native = native_selection()
    kept = native.select(rule, other)
    assert kept.tolist() == rule.select(trees).tolist()
    assert np.array_equal(other.accept_prob, trees.accept_prob)
    for level in range(1, LEVELS + 1):
        expanded = native.frontier(rule, other, level)
        assert expanded.tolist() == rule.frontier(trees, level).tolist()
    assert other.take(kept).batch == batch  # prefix-closed


def test_the_random_rules_do_something() -> None:
    """Every part expands and keeps some nodes and leaves others: the test above tests something."""
    for expand, keep in zip(EXPANDS, KEEPS, strict=True):
        found = set()
        for seed in range(40):
            rng = np.random.default_rng(seed)
            trees = random_trees(rng, 3, 2, ties=False)
            rule = random_rule(rng, trees, expand, keep)
            first = len(rule.expandable(trees, 1))
            found.add(("expanded", 0 < len(rule.frontier(trees, 1)) < first))
            found.add(("kept", 0 < len(rule.select(trees)) < len(trees)))
        assert found >= {("expanded", True), ("kept", True)}, (expand, keep)


def test_a_drafter_that_the_calibration_has_not_seen_gets_room() -> None:
    trees = random_trees(np.random.default_rng(0), 2, 1, ties=False)
    trees.source[:] = 5
    scores = Scores(Calibration(), np.zeros(2, np.uint8))
    rule = TreeRule(1, 5, np.full(2, 9), NO_NODES, Beam(1), KeepBest(3), scores)
    assert len(native_selection().select(rule, trees)) == 6
    assert np.isfinite(trees.accept_prob).all()
    assert len(scores.calibration.prior) == 6


class Last:
    """A user's own parts: the last node."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        return rule.expandable(trees, level)[-1:]

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        return np.flatnonzero(trees.depth == 1)[-1:]


def test_a_users_own_parts_are_called() -> None:
    trees = random_trees(np.random.default_rng(1), 2, 1, ties=False)
    firsts = np.flatnonzero(trees.depth == 1)
    limits = np.full(2, 9)
    native = native_selection()
    for expand, keep in ((Last(), KeepBest(1)), (Beam(1), Last()), (Last(), Last())):
        rule = TreeRule(3, 5, limits, NO_NODES, expand, keep)
        assert not is_data(rule)
        assert native.frontier(rule, trees, 1).tolist() == rule.frontier(trees, 1).tolist()
        assert native.select(rule, trees).tolist() == rule.select(trees).tolist()
    assert native.select(rule, trees).tolist() == [firsts[-1]]


def test_a_forecast_of_too_few_levels_is_refused() -> None:
    trees = random_trees(np.random.default_rng(0), 1, 1, ties=False)
    costs = random_costs(np.random.default_rng(0), 1)
    expand = LookAhead(costs, np.array([1]), np.ones((2, RANKS)))
    rule = TreeRule(4, 5, np.array([9]), NO_NODES, expand, KeepBest(1))
    with pytest.raises(ValueError, match="all levels"):
        native_selection().frontier(rule, trees, 1)
