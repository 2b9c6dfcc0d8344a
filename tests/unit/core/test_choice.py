"""The parts of a rule against their definitions: the exact choice by brute force, the look-ahead
option by option, on arbitrary cost tables."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.batch import BatchState
from smart_decoding.core.calibration import Calibration
from smart_decoding.core.policies import make_policy
from smart_decoding.core.rule import NO_NODES, Keep, Scores, TreeRule
from smart_decoding.core.selection import (
    RANKS,
    Beam,
    BestRate,
    Fixed,
    KeepBest,
    LookAhead,
    RoundCosts,
    is_data,
    ranked,
)
from smart_decoding.core.tree import ROOT, DraftTrees

SEEDS = st.integers(0, 2**32 - 1)
END = 3


def random_costs(rng: np.random.Generator, batch: int, sizes: int) -> RoundCosts:
    """Stairs, or noise: nothing smooth, monotone or convex about it."""
    verify = rng.uniform(0.5, 4.0, sizes)
    if rng.random() < 0.5:
        verify = np.cumsum(rng.choice([0.0, 0.0, 0.7], sizes)) + rng.uniform(0.5, 3)
    limit = float(rng.choice([math.inf, rng.uniform(0.5, 5.0)]))
    return RoundCosts(batch, float(rng.random()), rng.random(64) * 0.3, verify, limit)


def random_trees(rng: np.random.Generator, batch: int, nodes: int) -> DraftTrees:
    trees = DraftTrees.empty(batch)
    for _ in range(nodes):
        owner = int(rng.integers(batch))
        parent = int(rng.choice([ROOT, *trees.nodes_of(owner)]))
        prob = rng.choice(
            [0.5, 1.0, rng.random()]
        )  # ties between siblings, and of children with parents
        trees.append([owner], [int(rng.integers(12))], [parent], [prob])
    return trees


def rule_of(
    rng: np.random.Generator, batch: int, expand: LookAhead | Beam, keep: Keep, levels: int = 8
) -> TreeRule:
    """Random limits, an end token; the drafter's probabilities as they are, or calibrated."""
    kind = rng.integers(0, 2, batch).astype(np.uint8)
    scores = Scores(Calibration(), kind) if rng.random() < 0.5 else None
    return TreeRule(levels, 8, rng.integers(0, 5, batch), np.array([END]), expand, keep, scores)


def is_useful(rule: TreeRule, trees: DraftTrees, node: int) -> bool:
    above = trees.path(node)[:-1]
    within = trees.depth[node] <= rule.limits[trees.owner[node]]
    return bool(within) and END not in trees.token[above]


def seconds_so_far(costs: RoundCosts, trees: DraftTrees) -> float:
    """Return sunk seconds plus the seconds of each level that was expanded after the first."""
    inner = {int(parent) for parent in trees.parent if parent != ROOT}
    depths = [int(trees.depth[node]) for node in inner]
    width = [depths.count(depth) for depth in range(1, max(depths, default=0) + 1)]
    return costs.sunk + sum(float(costs.levels[w]) for w in width)


def prefix_closed_subsets(trees: DraftTrees, allowed: list[int]) -> Iterator[list[int]]:
    for size in range(len(allowed) + 1):
        for kept in itertools.combinations(allowed, size):
            if all(trees.parent[node] == ROOT or trees.parent[node] in kept for node in kept):
                yield list(kept)


@given(SEEDS, st.integers(1, 3), st.integers(1, 9))
@settings(max_examples=120, deadline=None)
def test_best_rate_is_the_brute_force_optimum(seed: int, batch: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    costs = random_costs(rng, batch, int(rng.integers(1, nodes + 4)))
    least = int(rng.integers(3))
    rule = rule_of(rng, batch, Beam(1), BestRate(costs, least))
    trees = random_trees(rng, batch, nodes)
    kept = rule.select(trees)
    sunk = seconds_so_far(costs, trees)

    def value(subset: list[int]) -> float:
        seconds = sunk + float(costs.verify[len(subset)])
        if subset and seconds > costs.limit:
            return -1.0
        return (batch + float(trees.accept_prob[subset].sum())) / seconds

    allowed = [node for node in range(nodes) if is_useful(rule, trees, node)]
    most = min(len(allowed), len(costs.verify) - 1)
    found = prefix_closed_subsets(trees, allowed)
    best = max(value(subset) for subset in found if min(least, most) <= len(subset) <= most)
    trees.take(kept)  # raises if not prefix-closed
    assert set(kept.tolist()) <= set(allowed)
    assert min(least, most) <= len(kept) <= most
    assert value(kept.tolist()) == pytest.approx(best, rel=1e-9)


@given(SEEDS, st.integers(1, 3), st.integers(1, 12))
@settings(max_examples=120, deadline=None)
def test_look_ahead_is_the_best_of_its_options(seed: int, batch: int, nodes: int) -> None:
    """Each option by the definition: expand the `width` surest nodes, whose children are as
    forecast; or stop."""
    rng = np.random.default_rng(seed)
    costs = random_costs(rng, batch, int(rng.integers(1, 40)))
    below = -np.sort(-rng.random((8, RANKS)) * 0.9, axis=1)
    widths = np.unique(rng.integers(1, 7, 3))
    level = int(rng.integers(1, 3))
    levels = level + int(rng.integers(4))
    rule = rule_of(rng, batch, LookAhead(costs, widths, below), KeepBest(1), levels)
    trees = random_trees(rng, batch, nodes)
    chosen = rule.frontier(trees, level)
    rule.score(trees)
    sunk = seconds_so_far(costs, trees)
    present = [float(trees.accept_prob[n]) for n in range(nodes) if is_useful(rule, trees, n)]
    frontier = [
        node
        for node in np.flatnonzero(trees.depth == level).tolist()
        if is_useful(rule, trees, node)
        and trees.token[node] != END
        and level < rule.limits[trees.owner[node]]
    ]
    if level == levels:
        frontier = []
    gain = sorted((float(trees.accept_prob[node]) for node in frontier), reverse=True)

    def rate(gains: list[float], spent: float) -> float:
        total = np.cumsum([batch, *sorted(gains, reverse=True)])[: len(costs.verify)]
        seconds = spent + costs.verify[: len(total)]
        allowed = [n == 0 or seconds[n] <= costs.limit for n in range(len(total))]
        return float((total / seconds)[allowed].max())

    def of_width(width: int) -> float:
        """The rate of going on with so many nodes."""
        forecast = below[level - 1].tolist()
        gains = present + [p * each for p in gain[:width] for each in forecast]
        return rate(gains, sunk + float(costs.levels[width]))

    options = {w: of_width(w) for w in {min(int(w), len(gain)) for w in widths} if w}
    best = max([rate(present, sunk), *options.values()])
    assert set(chosen.tolist()) <= set(frontier)
    assert (np.diff(chosen) > 0).all()
    if len(chosen):
        assert options[len(chosen)] == pytest.approx(best, rel=1e-9)
        assert options[len(chosen)] > rate(present, sunk)
        surest = np.sort(trees.accept_prob[chosen])[::-1]
        np.testing.assert_allclose(surest, gain[: len(chosen)], rtol=1e-9)
    else:
        assert rate(present, sunk) == pytest.approx(best, rel=1e-9)


@given(SEEDS, st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_what_is_foreseen_is_what_it_expands_if_all_is_as_forecast(seed: int, batch: int) -> None:
    """And what is fixed before the round then expands the same nodes."""
    rng = np.random.default_rng(seed)
    costs = random_costs(rng, batch, 40)
    children = -np.sort(-rng.random((9, RANKS)) * 0.6, axis=1)
    below = children[1:7]
    expand = LookAhead(costs, np.unique(rng.integers(1, 13, 3)), below, children[0], batch)
    rule = TreeRule(7, RANKS, np.full(batch, 99), NO_NODES, expand, KeepBest(1))
    trees = DraftTrees.empty(batch)
    nodes = np.full(batch, ROOT)
    owner = np.arange(batch)
    widths: list[int] = []
    for level in range(6):
        tokens = np.arange(RANKS * len(nodes))
        trees.append(
            owner.repeat(RANKS), tokens, nodes.repeat(RANKS), [*children[level]] * len(nodes)
        )
        nodes = rule.frontier(trees, level + 1)
        if level == 5 or not len(nodes):
            break
        fixed = Fixed.before(rule)
        assert fixed is not None
        assert fixed.frontier(rule, trees, level + 1).tolist() == nodes.tolist()
        owner = trees.owner[nodes]
        widths.append(len(nodes))
    assert expand.foreseen[: level + (level < 5)] == widths


class Mine:
    """A user's own way to prune."""

    def select(self, rule: TreeRule, trees: DraftTrees) -> np.ndarray:
        return np.arange(len(trees))


def test_built_in_rules_are_data_and_a_users_own_is_not() -> None:
    batch = BatchState(np.array([50]), np.array([20]), np.zeros(1), np.ones(1, np.bool_))
    for name in ("chain", "static", "eagle2", "paper", "smart"):
        rule = make_policy(name).plan(batch)
        assert rule is not None
        assert is_data(rule)
    ends = np.zeros(0, np.int64)
    assert not is_data(TreeRule(1, 1, np.array([9]), ends, Beam(1), Mine()))


@given(SEEDS, st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_ranked_is_a_stable_sort(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    prob = rng.choice([0.0, 1.0, 0.5, 1e-300, *rng.random(5)], size)
    np.testing.assert_array_equal(ranked(prob), np.argsort(-prob, kind="stable"))
