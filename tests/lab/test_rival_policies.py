"""vLLM's and SGLang's ways with chains, by their definitions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import make_policy
from smart_decoding.core.selection import is_data
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_lab.rival_policies import MEMORY, RIVAL_POLICIES

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.rule import TreeRule

ROWS = [1.0, 1.02, 1.04, 1.3, 1.32, 1.34, 2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 4.0, 4.1, 4.2, 4.3]


def state(remaining: list[int], may: list[bool] | None = None, **more) -> BatchState:
    size = len(remaining)
    may_speculate = np.ones(size, bool) if may is None else np.array(may)
    return BatchState(np.full(size, 50), np.array(remaining), np.zeros(size), may_speculate, **more)


def likely(
    policy: Policy, batch: BatchState, conditional: ArrayLike
) -> tuple[TreeRule, DraftTrees]:
    """Chains of the policy's length; conditional: draft_prob [levels] or [levels, batch]."""
    rule = policy.plan(batch)
    assert rule is not None
    trees = DraftTrees.empty(batch.size)
    parent = np.full(batch.size, ROOT)
    for level in range(1, rule.levels + 1):
        first = len(trees)
        owner = np.arange(batch.size) if level == 1 else trees.owner[parent]
        prob = np.broadcast_to(np.asarray(conditional)[level - 1], batch.size)[owner]
        trees.append(owner, np.full(len(parent), 5), parent, prob)
        parent = rule.frontier(trees, level)
        assert level == rule.levels or len(parent) == len(trees) - first  # nobody stops early
    return rule, trees


def stairs(size: int) -> CostModel:
    """Verification in stairs, at `size` requests."""
    return CostModel.from_table(
        {size: {size + i: s for i, s in enumerate(ROWS)}}, {1: 0.05, 64: 0.2}, 0.01
    )


def test_pooled_chain_prunes_to_the_best_rate_of_all_chains_together() -> None:
    cost = stairs(3)
    policy = make_policy("pooled_chain", cost=cost, length=4)
    batch = state([20, 20, 20])
    counts = set()
    for seed in range(12):
        conditional = np.random.default_rng(seed).uniform(0.2, 1.0, (4, 3))
        rule, trees = likely(policy, batch, conditional)
        assert len(trees) == 12  # always in full
        kept = rule.select(trees)
        levels = float(cost.first_seconds(3, 0, 50.0)) + 3 * float(cost.draft_seconds(3, 50.0))
        sunk = cost.overhead_seconds + levels

        def value(depths: Sequence[int], trees: DraftTrees = trees, sunk: float = sunk) -> float:
            nodes = [
                node
                for owner, depth in enumerate(depths)
                for node in trees.nodes_of(owner)
                if trees.depth[node] <= depth
            ]
            seconds = sunk + float(cost.verify_seconds(3, 3 + len(nodes), 50.0))
            return (3 + float(trees.accept_prob[nodes].sum())) / seconds

        mine = [int((trees.owner[kept] == owner).sum()) for owner in range(3)]
        best = max(value(depths) for depths in itertools.product(range(5), repeat=3))
        assert value(mine) == pytest.approx(best, rel=1e-9)
        counts.add(len(kept))
    assert len(counts) > 1


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_throughput_chain_takes_the_best_length(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    table = {size * rows: float(s) for rows, s in enumerate(rng.uniform(0.5, 4.0, 9), 1)}
    cost = CostModel.from_table({size: table}, {1: 0.05, 64: float(rng.uniform(0.06, 0.5))})
    policy = make_policy("throughput_chain", cost=cost, max_length=6)
    batch = state([20] * size)
    tested, accepted = np.ones(6), np.full(6, 0.7)
    right = rng.random(6)
    for _ in range(int(rng.integers(40))):
        rule, trees = likely(policy, batch, [0.5] * 6)
        lengths = [next((d for d in range(6) if rng.random() > right[d]), 6) for _ in range(size)]
        depth = trees.depth
        after = np.where(depth < np.array(lengths)[trees.owner] + 1, 5, -1)
        after[depth == np.array(lengths)[trees.owner]] = 9  # the target's own token
        root_next = np.where(np.array(lengths) > 0, 5, 9)
        for owner in range(size):  # what is tested: the accepted ones, and the first that is not
            for level in range(1, min(lengths[owner] + 1, rule.levels) + 1):
                tested[level - 1] = MEMORY * tested[level - 1] + 1
                hit = level <= lengths[owner]
                accepted[level - 1] = MEMORY * accepted[level - 1] + hit
        policy.observe(Round(batch, rule, trees, np.arange(len(trees)), after, root_next))

    def rate(length: int) -> float:
        survival = np.cumprod(accepted / tested)
        seconds = float(cost.first_seconds(size, 0, 50.0))
        seconds += (length - 1) * float(cost.draft_seconds(size, 50.0))
        seconds += float(cost.verify_seconds(size, size * (1 + length), 50.0))
        return (1 + float(survival[:length].sum())) / seconds

    rule = policy.plan(batch)
    assert rule is not None
    assert rate(rule.levels) == pytest.approx(max(map(rate, range(1, 7))), rel=1e-9)
    _, trees = likely(policy, batch, [0.5] * 6)
    assert rule.select(trees).tolist() == list(range(size * rule.levels))  # all of it, for all


@pytest.mark.parametrize("name", RIVAL_POLICIES)
def test_they_are_rules_that_the_engine_drafts_by(name: str) -> None:
    policy = make_policy(name, {"eos_token_ids": (3,), "cost": stairs(2)})
    rule = policy.plan(state([20, 20]))
    assert rule is not None
    assert is_data(rule)
    assert policy.plan(state([1, 1])) is None
    assert policy.plan(state([9, 9], [False, False])) is None
