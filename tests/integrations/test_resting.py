"""A draft model that does not pay rests, passes left out, and one that pays is not disturbed."""

from __future__ import annotations

import pytest
from chain_world import World

from smart_decoding.integrations.chains import Chains
from smart_decoding.integrations.resting import REST

STEPS = 5000


def dear(batch: int, drafts: int, levels: int) -> float:
    """A draft model at half the cost of its target: without it, with its first pass, with one pass for each token."""
    return 0.008 + 0.0004 * (batch + drafts) + 0.004 * max(levels, 0 if levels == REST else 1)


def run(accept: float, batch: int, policy: Chains, seed: int) -> tuple[float, float, float]:
    """Tokens per second under the policy, of the best fixed length, and without a draft model."""
    world = World([accept] * batch, dear, longest=3, model=True, life=150, rests=True, seed=seed)
    rate = world.run(STEPS, policy)
    return rate, max(world.run(STEPS, None, fixed=k) for k in (1, 2, 3)), world.run(STEPS, None, fixed=REST)


@pytest.mark.parametrize("batch", [1, 4, 16])
@pytest.mark.parametrize("accept", [0.1, 0.4, 0.9])
def test_never_far_below_the_better_of_no_draft_model_and_a_fixed_length(accept: float, batch: int) -> None:
    found = [run(accept, batch, Chains(range(4), model=True), seed) for seed in (0, 1)]
    assert sum(ours / max(fixed, none) for ours, fixed, none in found) / len(found) > 0.97


def test_it_rests_nearly_always_where_it_does_not_pay_and_listens_now_and_then() -> None:
    policy = Chains(range(4), model=True)
    run(0.1, 4, policy, 0)
    counters = policy.counters
    assert 0.93 * STEPS < counters.rests < STEPS
    assert sum(counters.lengths.values()) + counters.rests == STEPS


def test_it_comes_back_with_requests_that_suit_it() -> None:
    policy = Chains(range(4), model=True, probe_budget=0.05)
    run(0.1, 2, policy, 0)
    assert policy.rests.asleep
    before = policy.counters.rests
    policy.forget({})
    run(0.9, 2, policy, 1)
    assert not policy.rests.asleep and policy.counters.rests - before < STEPS / 2


def test_nothing_rests_where_the_engine_cannot() -> None:
    policy = Chains(range(4), model=True)
    World([0.1] * 4, dear, longest=3, model=True).run(500, policy)
    assert policy.counters.rests == 0
