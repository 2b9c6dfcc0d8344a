"""Lengths of chains: chosen for the most tokens per second, at costs and acceptance that are found
out on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import pytest
from chain_world import World

from smart_decoding.integrations.chain_costs import StepCosts
from smart_decoding.integrations.chains import Chains, Step

STEPS = 1000


def cpu(batch: int, drafts: int, levels: int) -> float:
    """Rows are dear, as measured on two cores."""
    return 0.008 + 0.0008 * (batch + drafts) + 0.002 * levels


def gpu(batch: int, drafts: int, levels: int) -> float:
    """Rows are free up to 64."""
    return 0.010 + 0.0002 * max(batch + drafts - 64, 0) + 0.001 * levels


def ratio(worlds: list[World], policy: Callable[[], Chains], lengths: Iterable[int]) -> float:
    """Mean over worlds: the policy's tokens per second over those of the best fixed length, known
    by oracle."""
    found = [
        w.run(STEPS, policy()) / max(w.run(STEPS, None, fixed=k) for k in lengths) for w in worlds
    ]
    return sum(found) / len(found)


@pytest.mark.parametrize("cost", [cpu, gpu])
@pytest.mark.parametrize("accept", [0.1, 0.4, 0.9])
@pytest.mark.parametrize(("batch", "least"), [(1, 0.955), (4, 0.97), (16, 0.98)])
def test_never_far_below_the_better_of_plain_and_fixed(
    cost: Callable[..., float], accept: float, batch: int, least: float
) -> None:
    worlds = [World([accept] * batch, cost, hits=0.7, seed=seed) for seed in (0, 1)]
    assert ratio(worlds, lambda: Chains(range(5), model=False), (0, 4)) > least


@pytest.mark.parametrize(("accept", "batch"), [(0.1, 4), (0.8, 1), (0.8, 4), (0.8, 16), (0.5, 16)])
def test_a_draft_model_is_given_the_best_length(accept: float, batch: int) -> None:
    worlds = [World([accept] * batch, cpu, longest=6, model=True, seed=seed) for seed in (0, 1)]
    assert ratio(worlds, lambda: Chains(range(7), model=True), range(5)) > 0.95


def test_only_the_requests_whose_drafts_are_good_get_rows() -> None:
    world = World([0.95, 0.05, 0.05, 0.95, 0.05, 0.05, 0.05, 0.05], cpu)
    policy = Chains(range(5), model=False)
    rate = world.run(STEPS, policy)
    good = sum(world.verified_by[i] for i in (0, 3)) / 2
    bad = sum(world.verified_by[i] for i in (1, 2, 4, 5, 6, 7)) / 6
    assert good > 8 * bad
    assert rate > 1.1 * max(world.run(STEPS, None), world.run(STEPS, None, fixed=4))


def test_it_comes_back_when_the_drafter_becomes_good_again() -> None:
    policy = Chains(range(5), model=False)
    batch = 4
    World([0.02] * batch, cpu).run(800, policy)
    on_before = policy.counters.steps_on
    assert on_before < 150
    assert policy.counters.steps_off > 600
    World([0.95] * batch, cpu, seed=1).run(600, policy)
    assert policy.counters.steps_on - on_before > 300


def test_a_stopped_process_goes_on_exploring() -> None:
    policy = Chains(range(5), model=False)
    world = World([0.9] * 4, cpu)
    world.run(300, policy)
    policy.take_exploring()
    policy.observe(Step(4, 0, {}, exploring=True), 60.0)
    before = policy.counters.explorations
    world.run(1000, policy)
    assert policy.counters.explorations > before


def test_nothing_is_verified_beyond_what_a_request_may_still_say() -> None:
    policy = Chains(range(5), model=False)
    for _ in range(8):
        policy.observe(Step(2, 0, {}), 0.01)
    assert all(policy.trim(["a", "b"], [4, 4], [True, True], [0, -1]) == [0, 0] for _ in range(3))
    kept = policy.trim(["a", "b"], [4, 4], [True, True], [2, 0])
    assert kept[0] <= 2
    assert kept[1] == 0


def test_nothing_is_verified_before_plain_steps_are_known() -> None:
    policy = Chains(range(5), model=True)
    assert policy.length(["a"]) == 0
    assert policy.trim(["a"], [4], [True], [9]) == [0]


def test_a_step_of_nobody_drafts_nothing() -> None:
    policy = Chains(range(5), model=True)
    World([0.9] * 2, cpu, model=True).run(100, policy)
    assert policy.length([]) == 0
    assert policy.trim([], [], [], []) == []


def test_two_policies_told_the_same_choose_the_same() -> None:
    first = Chains(range(5), model=True)
    second = Chains(range(5), model=True)
    World([0.7, 0.2], cpu, model=True).run(300, first)
    World([0.7, 0.2], cpu, model=True).run(300, second)
    assert vars(first.counters) == vars(second.counters)


def test_requests_that_are_gone_are_forgotten() -> None:
    policy = Chains(range(5), model=False)
    World([0.9] * 3, gpu).run(50, policy)
    policy.forget({"r1.0": None})
    assert list(policy.acceptance.requests) == ["r1.0"]


def test_step_costs_are_found_within_a_few_per_cent() -> None:
    costs = StepCosts()
    random = np.random.default_rng(0)
    for _ in range(400):
        batch = int(random.choice([1, 4, 16]))
        plain = random.random() < 0.3
        drafts, levels = (0, 0) if plain else (int(random.integers(0, 4 * batch + 1)), 2)
        noise = float(np.exp(0.05 * random.standard_normal()))
        costs.observe(batch, drafts, levels, cpu(batch, drafts, levels) * noise)
    for batch in (1, 4, 16):
        assert costs.plain(batch) == pytest.approx(cpu(batch, 0, 0), rel=0.05)
        predicted = costs.plain(batch) + float(np.dot(costs.extra(batch), [1, 2 * batch, 2]))
        assert predicted == pytest.approx(cpu(batch, 2 * batch, 2), rel=0.06)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), 0.0, -1.0])
def test_absurd_times_teach_nothing(seconds: float) -> None:
    costs = StepCosts()
    for _ in range(8):
        costs.observe(2, 0, 0, 0.01)
    before = costs.plain(2), costs.extra(2)
    costs.observe(2, 0, 0, seconds)
    costs.observe(2, 4, 1, seconds)
    assert (costs.plain(2), costs.extra(2)) == before


def test_one_odd_step_moves_little() -> None:
    costs = StepCosts()
    for _ in range(50):
        costs.observe(2, 0, 0, 0.01)
    costs.observe(2, 0, 0, 10.0)
    assert costs.plain(2) < 0.0105


def test_a_slow_start_is_forgotten() -> None:
    """The first steps with drafts compile and allocate: ten times too slow, they must not keep
    drafting off."""
    costs = StepCosts()
    for _ in range(8):
        costs.observe(4, 0, 0, cpu(4, 0, 0))
    for _ in range(3):
        costs.observe(4, 6, 0, 10 * cpu(4, 6, 0))
    for _ in range(30):
        costs.observe(4, 6, 0, cpu(4, 6, 0))
    fixed, per_draft, _ = costs.extra(4)
    assert costs.plain(4) + fixed + 6 * per_draft < 1.1 * cpu(4, 6, 0)
