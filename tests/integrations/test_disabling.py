"""A draft model that does not pay is disabled, and one that pays is left alone."""

from __future__ import annotations

import pytest
from chain_world import World

from smart_decoding.core.exploration import RUN
from smart_decoding.core.running import HORIZON
from smart_decoding.integrations.chains import Chains, Step
from smart_decoding.integrations.disabling import DISABLED, NEWCOMERS_RUN

STEPS = 5000


def dear(batch: int, drafts: int, levels: int) -> float:
    """A draft model at half the cost of its target: without it, with its first pass, with one pass
    for each token."""
    return 0.008 + 0.0004 * (batch + drafts) + 0.004 * max(levels, 0 if levels == DISABLED else 1)


def world_of(accept: float, batch: int, seed: int) -> World:
    return World([accept] * batch, dear, longest=3, model=True, life=150, disables=True, seed=seed)


def run(accept: float, batch: int, policy: Chains, seed: int) -> tuple[float, float, float]:
    """Tokens per second under the policy, of the best fixed length, and without a draft model."""
    world = world_of(accept, batch, seed)
    rate = world.run(STEPS, policy)
    return (
        rate,
        max(world.run(STEPS, None, fixed=k) for k in (1, 2, 3)),
        world.run(STEPS, None, fixed=DISABLED),
    )


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("accept", [0.1, 0.4, 0.9])
def test_never_far_below_the_better_of_no_draft_model_and_a_fixed_length(
    accept: float, batch: int
) -> None:
    found = [run(accept, batch, Chains(range(4), model=True), seed) for seed in (0, 1)]
    assert sum(ours / max(fixed, none) for ours, fixed, none in found) / len(found) > 0.97


def test_it_is_disabled_nearly_always_where_it_does_not_pay_and_observed_now_and_then() -> None:
    policy = Chains(range(4), model=True)
    world_of(0.1, 4, 0).run(STEPS, policy)
    counters = policy.counters
    assert 0.93 * STEPS < counters.rests < STEPS
    assert sum(counters.lengths.values()) + counters.rests == STEPS


def test_it_comes_back_with_requests_that_suit_it() -> None:
    policy = Chains(range(4), model=True, exploration_budget=0.05)
    world_of(0.1, 2, 0).run(STEPS, policy)
    assert policy.switch.disabled
    before = policy.counters.rests
    policy.forget({})
    world_of(0.9, 2, 1).run(STEPS, policy)
    assert not policy.switch.disabled
    assert policy.counters.rests - before < 0.7 * STEPS


def test_nothing_is_disabled_where_the_engine_cannot() -> None:
    policy = Chains(range(4), model=True)
    World([0.1] * 4, dear, longest=3, model=True).run(500, policy)
    assert policy.counters.rests == 0


def test_nobody_is_drafted_for_who_has_missed_something() -> None:
    """Once enabled again: a long answer lives on with what it has lost."""
    policy = Chains(range(4), model=True)
    World([0.9] * 2, dear, longest=3, model=True, disables=True).run(300, policy)
    assert not policy.switch.disabled
    assert policy.length(["r0.0", "r1.0"]) > 0
    policy.switch.miss(["r0.0", "r1.0"])
    assert policy.length(["r0.0", "r1.0"]) == DISABLED
    assert policy.length(["r0.0", "r1.0", "new"]) != DISABLED


def test_newcomers_are_drafted_for_within_the_budget() -> None:
    policy = Chains(range(4), model=True, exploration_budget=0.01)
    seconds = STEPS * dear(4, 0, DISABLED)
    world_of(0.1, 4, 0).run(STEPS, policy)
    assert policy.counters.explorations > 20
    assert 0 < policy.exploration.seconds < 0.01 * seconds + NEWCOMERS_RUN * dear(4, 0, 1)


def test_long_answers_that_have_missed_something_do_not_keep_it_drafting_for_nothing() -> None:
    policy = Chains(range(4), model=True)
    World([0.1] * 4, dear, longest=3, model=True, life=2000, disables=True).run(STEPS, policy)
    policy.forget({})
    world = World([0.9] * 4, dear, longest=3, model=True, life=2000, disables=True, seed=2)
    disabled = world.run(2 * STEPS, None, fixed=DISABLED)
    # Enabled for newcomers, while the others have nothing of it: what that costs comes back later.
    assert world.run(2 * STEPS, policy) > 1.05 * disabled


def test_an_exploration_in_a_step_that_prefills_is_paid_for_all_the_same() -> None:
    policy = Chains(range(5), model=False)
    World([0.9] * 4, dear).run(300, policy)
    for _ in range(4 * RUN):  # whatever is left of a run, and two more
        policy.observe(Step(4, 0, {}, clean=False, exploring=True), 0.5)
    lost = 4 * RUN * (1 - 4 / policy.costs.plain(4) / policy._rate)
    assert policy.exploration.left == 0
    assert HORIZON < 0.5 * lost / policy.exploration.budget < policy.exploration.wait
