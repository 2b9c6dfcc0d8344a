"""Every policy: prefix-closed selections within limits, and each fixed policy's own definition."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.batch import BatchState
from smart_decoding.core.costs import CostModel
from smart_decoding.core.policies import POLICIES, make_policy, policy_options
from smart_decoding.core.policies.static import EAGLE_1, MEDUSA
from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.rule import TreeRule

EOS = 3
OFFERED = {
    "eos_token_ids": (EOS,),
    "cost": CostModel.from_table({1: {1: 1.0, 64: 3.0}}, {1: 0.01, 64: 0.02}),
}


def state(remaining: list[int], may: list[bool] | None = None, **more) -> BatchState:
    size = len(remaining)
    may_speculate = np.ones(size, bool) if may is None else np.array(may)
    return BatchState(np.full(size, 50), np.array(remaining), np.zeros(size), may_speculate, **more)


def draft(
    policy: Policy, batch: BatchState, rng: np.random.Generator, vocabulary: int = 12
) -> tuple[TreeRule, DraftTrees, list[IntArray]]:
    """Draft as an engine does: level 1 for every request, then by the rule. Return rule, trees and
    the frontiers of the levels."""
    rule = policy.plan(batch)
    assert rule is not None
    trees = DraftTrees.empty(batch.size)
    frontier = np.full(batch.size, ROOT)
    owner = np.arange(batch.size)
    frontiers = []
    for level in range(1, rule.levels + 1):
        prob = -np.sort(-rng.dirichlet(np.full(vocabulary, 0.3), len(frontier)), axis=1)
        prob = prob[:, : rule.children]
        width = prob.shape[1]
        token = np.stack([rng.permutation(vocabulary)[:width] for _ in frontier])
        trees.append(owner.repeat(width), token.ravel(), frontier.repeat(width), prob.ravel())
        if level == 1 and batch.has_free:
            add_chains(trees, batch.size, rng)
        frontier = rule.frontier(trees, level)
        if not len(frontier):
            break
        assert (trees.depth[frontier] == level).all()
        owner = trees.owner[frontier]
        frontiers.append(frontier)
    if not rule.levels:
        add_chains(trees, batch.size, rng)
    return rule, trees, frontiers


def add_chains(trees: DraftTrees, batch: int, rng: np.random.Generator) -> None:
    """What a drafter without a model proposes, in tokens of its own."""
    for owner in range(batch):
        parent = ROOT
        for _ in range(int(rng.integers(4))):
            token = int(rng.choice([EOS, 20, 21]))
            trees.append([owner], [token], [parent], [float(rng.random())], source=1)
            parent = len(trees) - 1


@pytest.mark.parametrize("name", sorted(POLICIES.keys() - {"off"}))
@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.booleans())
@settings(max_examples=25, deadline=None)
def test_selection_is_prefix_closed_and_useful(
    name: str, seed: int, size: int, has_free: bool
) -> None:
    rng = np.random.default_rng(seed)
    policy = make_policy(name, OFFERED)
    remaining = [9, *rng.integers(1, 9, size - 1).tolist()]
    may = [True, *(rng.random(size - 1) < 0.8).tolist()]
    batch = state(remaining, may, has_free=has_free)
    rule, trees, frontiers = draft(policy, batch, rng)
    kept = rule.select(trees)
    assert (np.diff(kept) > 0).all()
    assert rule.select(trees).tolist() == kept.tolist()
    pruned = trees.take(kept)  # raises if not prefix-closed
    assert (pruned.depth < batch.remaining[pruned.owner]).all()
    assert batch.may_speculate[pruned.owner].all()
    assert not (pruned.token[pruned.parent[pruned.parent >= 0]] == EOS).any()
    for nodes in frontiers:
        assert (np.diff(nodes) > 0).all()
        assert (trees.token[nodes] != EOS).all()
        assert (trees.depth[nodes] < batch.remaining[trees.owner[nodes]] - 1).all()


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_to_gain_means_plain(name: str) -> None:
    policy = make_policy(name, OFFERED)
    assert policy.plan(state([1, 1])) is None
    assert policy.plan(state([9, 9], [False, False])) is None


@pytest.mark.parametrize("name", ["paper", "smart"])
def test_measured_costs_replace_a_guess_at_once(name: str) -> None:
    """Where costs are measured while the engine is idle."""
    batch = state([50, 50])
    steep = CostModel.from_table({1: {1: 1.0, 64: 200.0}}, {1: 0.5, 64: 20.0})
    policy = make_policy(name, {"eos_token_ids": (EOS,), "cost": CostModel.default()})
    policy.plan(batch)
    policy.cost = steep
    fresh = make_policy(name, {"eos_token_ids": (EOS,), "cost": steep})
    kept = []
    for each in (policy, fresh):
        plan = each.plan(batch)
        kept.append(None if plan is None else len(draft(each, batch, np.random.default_rng(0))[2]))
    assert kept[0] == kept[1]
    rules = [each.plan(batch) for each in (policy, fresh)]
    if name == "paper":
        assert rules[0] is not None
        assert rules[1] is not None
        np.testing.assert_array_equal(rules[0].keep.spent, rules[1].keep.spent)


def test_chain_is_one_path_per_request() -> None:
    policy = make_policy("chain", length=4)
    rule, trees, frontiers = draft(policy, state([9, 3]), np.random.default_rng(0), 2)
    assert [len(nodes) for nodes in frontiers] == [2, 1, 1]
    kept = rule.select(trees)
    assert trees.owner[kept].tolist().count(0) == 4
    assert trees.owner[kept].tolist().count(1) == 2
    assert sorted(trees.depth[kept].tolist()) == [1, 1, 2, 2, 3, 4]


@pytest.mark.parametrize(
    ("name", "paths", "size"), [("eagle_1", EAGLE_1, 25), ("medusa", MEDUSA, 63)]
)
def test_static_verifies_exactly_the_topology(name: str, paths: list, size: int) -> None:
    assert len(paths) == len(set(paths)) == size
    policy = make_policy("static", topology=name)
    rule, trees, _ = draft(policy, state([20, 20]), np.random.default_rng(1))
    kept = rule.select(trees)
    for owner in range(2):
        ranks = set()
        for node in kept[trees.owner[kept] == owner]:
            path = []
            for step in trees.path(node):
                siblings = np.flatnonzero(
                    (trees.parent == trees.parent[step]) & (trees.owner == owner)
                )
                path.append(int((trees.draft_prob[siblings] > trees.draft_prob[step]).sum()))
            ranks.add(tuple(path))
        assert ranks == set(paths)


def test_eagle2_is_a_beam_ranked_again() -> None:
    policy = make_policy("eagle2", depth=3, top_k=4, total_tokens=12)
    rule, trees, frontiers = draft(policy, state([20, 20]), np.random.default_rng(2))
    assert rule.levels == 4
    assert [len(nodes) for nodes in frontiers] == [8, 8, 8]
    for level, nodes in enumerate(frontiers, start=1):  # the best four of each request
        for owner in range(2):
            mine = np.flatnonzero((trees.owner == owner) & (trees.depth == level))
            best = mine[np.argsort(-trees.path_prob[mine])[:4]]
            assert np.sort(best).tolist() == nodes[trees.owner[nodes] == owner].tolist()
    kept = rule.select(trees)
    for owner in range(2):
        nodes = trees.nodes_of(owner)
        assert len(nodes) == 4 + 3 * 16
        mine = kept[trees.owner[kept] == owner]
        assert len(mine) == 11
        assert (
            trees.path_prob[mine].min()
            >= np.delete(trees.path_prob[nodes], np.searchsorted(nodes, mine)).max()
        )


def test_a_foreign_node_is_expanded_only_below_a_head_state() -> None:
    rule = make_policy("eagle2", top_k=4).plan(state([20]))
    assert rule is not None
    trees = DraftTrees.empty(1)
    trees.append(
        [0, 0], [1, 2], [-1, 0], [0.9, 0.9], source=1
    )  # an n-gram path, one token deeper than the head
    trees.append([0, 0], [5, 6], [-1, -1], [0.5, 0.4], source=0)
    assert rule.frontier(trees, 1).tolist() == [0, 2, 3]
    trees.append([0], [8], [2], [0.5], source=0)  # the head expanded node 2 only
    assert rule.frontier(trees, 2).tolist() == [4]


def test_unknown_names_options_and_values_are_refused_with_the_valid_ones() -> None:
    with pytest.raises(ConfigError, match="off, chain, static, eagle2"):
        make_policy("eagle")
    with pytest.raises(ConfigError, match=r"no option 'lenght'; its options: length"):
        make_policy("chain", lenght=3)
    with pytest.raises(ConfigError, match="none"):
        make_policy("off", length=3)
    for name, options in (
        ("chain", {"length": 0}),
        ("eagle2", {"top_k": 1.5}),
        ("static", {"topology": [[0, 0]]}),
        ("static", {"topology": [[0], []]}),
        ("static", {"topology": [[0.5]]}),
        ("static", {"topology": [[0], [10**9]]}),  # which took all memory
    ):
        with pytest.raises(ConfigError):
            make_policy(name, **options)
    assert policy_options("eagle2") == ["depth", "top_k", "total_tokens", "eos_token_ids"]


def test_old_names_are_refused_with_the_new_ones() -> None:
    for old, new in {"likelihood": "eagle2", "smart_paper": "paper"}.items():
        with pytest.raises(ConfigError, match=f"{old}.* is called .*{new}"):
            make_policy(old)
    with pytest.raises(ConfigError, match="exploration_budget"):
        make_policy("smart", probe_budget=0.1)
