"""Every policy: prefix-closed selections within limits, and each fixed policy's own definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import POLICIES, make_policy, policy_options
from smart_decoding.core.policies.base import BatchState
from smart_decoding.core.policies.topologies import EAGLE_1, MEDUSA
from smart_decoding.core.tree import DraftTrees
from smart_decoding.errors import ConfigError

EOS = 3
OFFERED = {
    "eos_token_ids": (EOS,),
    "cost": CostModel.from_table({1: {1: 1.0, 64: 3.0}}, {1: 0.01, 64: 0.02}),
}


def state(remaining: list[int], may: list[bool] | None = None, **more) -> BatchState:
    size = len(remaining)
    may_speculate = np.ones(size, bool) if may is None else np.array(may)
    return BatchState(np.full(size, 50), np.array(remaining), np.zeros(size), may_speculate, **more)


def draft(policy, batch: BatchState, rng: np.random.Generator, vocabulary: int = 12):
    """What an engine does: level 1 for every request, then as the policy asks."""
    trees = DraftTrees.empty(batch.size)
    plan = policy.plan(batch)
    if not plan.speculate or plan.levels == 0:
        return plan, trees, []
    frontier = np.full(batch.size, -1)
    owner = np.arange(batch.size)
    asked = []
    for level in range(1, plan.levels + 1):
        k = plan.children
        prob = np.sort(rng.dirichlet(np.full(vocabulary, 0.3), len(frontier)), axis=1)[:, ::-1][
            :, :k
        ]
        token = np.stack([rng.permutation(vocabulary)[: prob.shape[1]] for _ in frontier])
        repeat = prob.shape[1]
        trees.append(
            np.repeat(owner, repeat), token.ravel(), np.repeat(frontier, repeat), prob.ravel()
        )
        if level == plan.levels:
            break
        chosen = policy.frontier(plan, batch, trees, level)
        if chosen is None:
            break
        assert len(chosen)
        assert (trees.depth[chosen] == level).all()
        frontier, owner = chosen, trees.owner[chosen]
        asked.append(chosen)
    return plan, trees, asked


@pytest.mark.parametrize("name", POLICIES)
@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_selection_is_prefix_closed_and_useful(name: str, seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    policy = make_policy(name, OFFERED)
    batch = state(rng.integers(1, 9, size).tolist(), (rng.random(size) < 0.8).tolist())
    plan, trees, asked = draft(policy, batch, rng)
    kept = policy.select(plan, batch, trees)
    assert (np.diff(kept) > 0).all()
    pruned = trees.take(kept)  # raises if not prefix-closed
    assert (pruned.depth < batch.remaining[pruned.owner]).all()
    assert batch.may_speculate[pruned.owner].all()
    assert not (pruned.token[pruned.parent[pruned.parent >= 0]] == EOS).any()
    for nodes in asked:
        assert (trees.token[nodes] != EOS).all()
        assert (trees.depth[nodes] < batch.remaining[trees.owner[nodes]] - 1).all()


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_to_gain_means_off(name: str) -> None:
    policy = make_policy(name, OFFERED)
    assert not policy.plan(state([1, 1])).speculate
    assert not policy.plan(state([9, 9], [False, False])).speculate


def test_chain_is_one_path_per_request() -> None:
    policy = make_policy("chain", length=4)
    plan, trees, _ = draft(policy, state([9, 3]), np.random.default_rng(0))
    kept = policy.select(plan, state([9, 3]), trees)
    assert trees.owner[kept].tolist().count(0) == 4
    assert trees.owner[kept].tolist().count(1) == 2


@pytest.mark.parametrize(
    ("name", "paths", "size"), [("eagle_1", EAGLE_1, 25), ("medusa", MEDUSA, 63)]
)
def test_static_verifies_exactly_the_topology(name: str, paths: list, size: int) -> None:
    assert len(paths) == len(set(paths)) == size
    policy = make_policy("static", topology=name)
    batch = state([20, 20])
    plan, trees, _ = draft(policy, batch, np.random.default_rng(1))
    kept = policy.select(plan, batch, trees)
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
    batch = state([20, 20])
    plan, trees, asked = draft(policy, batch, np.random.default_rng(2))
    assert plan.levels == 4
    assert [len(nodes) for nodes in asked] == [8, 8, 8]
    kept = policy.select(plan, batch, trees)
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
    policy = make_policy("eagle2", top_k=4)
    batch = state([20])
    trees = DraftTrees.empty(1)
    trees.append(
        [0, 0], [1, 2], [-1, 0], [0.9, 0.9], source=1
    )  # an n-gram path, one token deeper than the head
    trees.append([0, 0], [5, 6], [-1, -1], [0.5, 0.4], source=0)
    assert policy.frontier(policy.plan(batch), batch, trees, 1).tolist() == [0, 2, 3]
    trees.append([0], [8], [2], [0.5], source=0)  # the head expanded node 2 only
    assert policy.frontier(policy.plan(batch), batch, trees, 2).tolist() == [4]


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
