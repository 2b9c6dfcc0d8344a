"""The exact choice and the plan against brute force, on arbitrary cost tables."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from smart_decoding.core.lookahead import LookAhead, LookAheadCosts

from smart_decoding.core.calibration import DEPTHS, KINDS
from smart_decoding.core.choice import best_rates, best_size, ranked
from smart_decoding.core.cost import CostModel
from smart_decoding.core.forecast import FREE, RANKS
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.base import BatchState, DraftPlan
from smart_decoding.core.policies.catch_up import MAX_ROUNDS
from smart_decoding.core.policies.forecaster import WIDTHS
from smart_decoding.core.policies.modes import BEGIN_SPEEDUP, CLEARLY_WORSE
from smart_decoding.core.tree import DraftTrees

SEEDS = st.integers(0, 2**32 - 1)


def state(size: int, rng: np.random.Generator | None = None, **more) -> BatchState:
    remaining = np.full(size, 50) if rng is None else rng.integers(1, 5, size)
    temperature = np.zeros(size) if rng is None else rng.choice([0.0, 1.0], size)
    may = np.ones(size, bool) if rng is None else rng.random(size) < 0.9
    return BatchState(np.full(size, 40), remaining, temperature, may, **more)


def any_table(rng: np.random.Generator, rows: int) -> dict[int, float]:
    """A staircase, or noise: nothing smooth, monotone or convex about it."""
    if rng.random() < 0.5:
        return {r: float(s) for r, s in enumerate(rng.uniform(0.5, 4.0, rows), 1)}
    steps = np.cumsum(rng.choice([0.0, 0.0, 0.7], rows)) + rng.uniform(0.5, 3)
    return {r: float(s) for r, s in enumerate(steps, 1)}


def random_trees(rng: np.random.Generator, batch: int, nodes: int) -> DraftTrees:
    trees = DraftTrees.empty(batch)
    for _ in range(nodes):
        owner = int(rng.integers(batch))
        parent = int(rng.choice([-1, *trees.nodes_of(owner)]))
        prob = rng.choice(
            [0.5, 1.0, rng.random()]
        )  # ties between siblings, and of children with parents
        trees.append([owner], [int(rng.integers(50))], [parent], [prob])
    return trees


def prefix_closed_subsets(trees: DraftTrees, allowed: np.ndarray):
    for kept in itertools.chain.from_iterable(
        itertools.combinations(np.flatnonzero(allowed).tolist(), n) for n in range(len(trees) + 1)
    ):
        if all(trees.parent[node] < 0 or trees.parent[node] in kept for node in kept):
            yield list(kept)


@given(SEEDS, st.integers(1, 3), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_select_is_the_brute_force_optimum(seed: int, batch: int, nodes: int) -> None:
    rng = np.random.default_rng(seed)
    cost = CostModel.from_table(
        {b: any_table(rng, 40) for b in (1, 2, 3)}, {1: float(rng.random()), 9: 2.0}
    )
    slowdown = float(rng.choice([1.0, 1.5, 3.0, math.inf]))
    policy = make_policy("smart", cost=cost, max_round_slowdown=slowdown, exploration_budget=0.0)
    now = state(batch, rng)
    policy.plan(now)
    prepared, forecast = policy._prepared(now)
    prepared.sunk = float(rng.choice([0.0, rng.random()]))
    trees = random_trees(rng, batch, nodes)
    kept = policy.select(DraftPlan(True, 3), now, trees)

    limits = np.where(now.may_speculate, now.remaining - 1, 0)
    most = math.inf if batch == 1 else slowdown * forecast.plain

    def value(subset: list[int]) -> float:
        seconds = prepared.sunk + float(cost.verify_seconds(batch, batch + len(subset), 40))
        if subset and seconds > most:
            return -1.0
        return (batch + trees.accept_prob[subset].sum()) / seconds

    best = max(
        value(subset) for subset in prefix_closed_subsets(trees, trees.depth <= limits[trees.owner])
    )
    trees.take(kept)
    assert (trees.depth[kept] <= limits[trees.owner[kept]]).all()
    assert value(kept.tolist()) == pytest.approx(best, rel=1e-9)


def naive_forecast(policy, now: BatchState, drafting: int) -> dict:
    """Each option's value by the definition: grow one request's tree, repeat it, try every size."""
    children = policy.forecast.children(np.bincount(now.kind, minlength=KINDS) / now.size)
    price = policy.cost.draft_seconds
    regular, whole = (
        float(price(now.size + n, 40))
        for n in (min(now.catch_up_rows, now.size), now.catch_up_rows)
    )
    # What is beyond one row each is shared.
    first = regular + (whole - regular) / min(MAX_ROUNDS, 50 // 2)
    values = {}

    def best(gains: list[float], sunk: float) -> float:
        gains = sorted(gains * drafting, reverse=True)
        plain = float(policy.cost.verify_seconds(now.size, now.size, 40))
        most = math.inf if now.size == 1 else policy.forecaster.max_round_slowdown * plain
        found = [now.size / (sunk + plain)]
        for n in range(1, len(gains) + 1):
            seconds = sunk + float(policy.cost.verify_seconds(now.size, now.size + n, 40))
            found += [(now.size + sum(gains[:n])) / seconds] if seconds <= most else []
        return max(found)

    if now.has_free:
        values[0, 0] = best(policy.forecast.free.tolist(), policy.cost.overhead_seconds)
    for wide in WIDTHS if now.has_model else ():
        frontier = [1.0]
        gains = []
        sunk = policy.cost.overhead_seconds + first
        for level in range(1, policy.max_levels + 1):
            new = [p * float(c) for p in frontier for c in children[min(level, DEPTHS) - 1]]
            gains += new
            sunk += float(price(wide * drafting, 40)) if level > 1 else 0.0
            values[level, wide] = best(gains, sunk)
            frontier = sorted(new, reverse=True)[:wide]
    return values


@given(SEEDS, st.integers(1, 3))
@example(5636, 3)
@settings(max_examples=12, deadline=None)
def test_plan_is_the_brute_force_optimum_of_its_forecasts(seed: int, batch: int) -> None:
    rng = np.random.default_rng(seed)
    cost = CostModel.from_table(
        {1: any_table(rng, 30)}, {1: 0.1 * rng.random(), 9: 0.3}, overhead_seconds=0.01
    )
    policy = make_policy(
        "smart", cost=cost, max_levels=3, exploration_budget=0.0, max_round_slowdown=2.0
    )
    policy.forecast.free = np.sort(rng.random(FREE))[::-1] * 0.5
    bias = policy.forecaster.bias[batch.bit_length()] = float(rng.normal() * 0.1)
    extras = {
        "has_free": bool(rng.integers(2)),
        "has_model": bool(rng.integers(4)),
        "catch_up_rows": int(rng.integers(60)),
    }
    now = state(batch, **extras)
    forecast = policy.predict(now)
    expected = naive_forecast(policy, now, batch)
    assert forecast.values == pytest.approx(expected, rel=1e-9)
    plain = batch / float(cost.verify_seconds(batch, batch, 40))
    worth = {o: v * (math.exp(bias) if o[0] else 1.0) for o, v in expected.items()}
    plan = policy.plan(now)
    best = max(worth, key=worth.get, default=None)
    if best is None or worth[best] <= BEGIN_SPEEDUP * plain:
        # Burn-in: nothing was tried yet, and the model is, if that nearly pays.
        best = max((option for option in worth if option[0]), key=worth.get, default=None)
        best = None if best is None or worth[best] <= CLEARLY_WORSE * plain else best
    if best is None:
        assert not plan.speculate
    else:
        assert plan.speculate
        assert bool(plan.levels) == bool(best[0])
        assert plan.width == best[1] * batch


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_look_ahead_is_the_best_of_its_options(seed: int) -> None:
    rng = np.random.default_rng(seed)
    children = np.sort(rng.dirichlet(np.ones(RANKS + 1), DEPTHS)[:, :RANKS], axis=1)[:, ::-1]
    present = rng.random(5)
    frontier = np.sort(rng.random(4))[::-1]
    widths = (1, 2, 4)
    ahead = 2
    level = 1
    sunk = 0.2
    prices = rng.random(3) * 0.5
    curve = rng.uniform(1, 3, 64)
    look = LookAhead(children)
    columns = LookAhead.columns(5, 4, ahead)
    costs = LookAheadCosts(1, sunk, prices, curve[: columns + 1], math.inf)
    chosen = look.width(present, frontier, widths, level, ahead, costs)

    def rate(gains, seconds):
        gains = np.sort(gains)[::-1]
        return max((1 + gains[:n].sum()) / (seconds + curve[n]) for n in range(len(gains) + 1))

    best, width = rate(present, sunk), 0
    for further in (1, 2):
        for w, price in zip(widths, prices, strict=True):
            below = [f * c for f in frontier[:w] for c in children[1, :4]]
            if further == 2:
                below += [f * children[1, 0] * c for f in frontier[:w] for c in children[2, :4]]
            value = rate(np.concatenate((present, below)), sunk + further * price)
            if value > best + 1e-12:
                best, width = value, w
    assert chosen == width


@given(SEEDS, st.integers(1, 300))
@settings(max_examples=40, deadline=None)
def test_ranked_is_a_stable_sort(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    prob = rng.choice([0.0, 1.0, 0.5, 1e-300, *rng.random(5)], size)
    np.testing.assert_array_equal(ranked(prob), np.argsort(-prob, kind="stable"))


@given(SEEDS)
@settings(max_examples=30, deadline=None)
def test_best_rates_is_best_size_for_every_row(seed: int) -> None:
    rng = np.random.default_rng(seed)
    gains = rng.random((4, 7))
    seconds = rng.uniform(0.5, 3, 8)
    sunk = rng.random(4)
    rates = best_rates(np.sort(-gains, axis=1), 2, sunk, seconds, 2.5)
    expected = [
        best_size(np.sort(g)[::-1], 2, float(s), seconds, 2.5)[1]
        for g, s in zip(gains, sunk, strict=True)
    ]
    np.testing.assert_allclose(rates, expected)
