"""Acceptance by exact enumeration on tiny vocabularies: losslessness, expectation, and the trap of
pruned samples."""

import itertools
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.tree import ROOT, DraftTrees, accept

VOCABULARY = 2


def target(owner: int, tokens: tuple[int, ...]) -> np.ndarray:
    """A distribution that depends on the whole prefix."""
    return np.random.default_rng([owner, len(tokens), *tokens]).dirichlet(np.ones(VOCABULARY))


def expected_tokens(trees: DraftTrees) -> np.ndarray:
    """[batch] exact expectation of the tokens emitted per request, by enumerating every walk over
    the vocabulary."""
    children: dict[tuple[int, int], dict[int, int]] = {}
    for node in range(len(trees)):
        siblings = children.setdefault((int(trees.owner[node]), int(trees.parent[node])), {})
        siblings.setdefault(int(trees.token[node]), node)

    def below(owner: int, node: int, tokens: tuple[int, ...]) -> float:
        p_target = target(owner, tokens)
        drafted = children.get((owner, node), {})
        return 1.0 + sum(
            float(p_target[t]) * below(owner, child, (*tokens, t)) for t, child in drafted.items()
        )

    return np.array([below(owner, ROOT, ()) for owner in range(trees.batch)])


def random_trees(rng: np.random.Generator, batch: int, nodes: int) -> DraftTrees:
    trees = DraftTrees.empty(batch)
    taken = set()
    for _ in range(nodes):
        owner = int(rng.integers(batch))
        parent = int(rng.choice([-1, *trees.nodes_of(owner)]))
        token = int(rng.integers(VOCABULARY))
        if (owner, parent, token) not in taken:
            taken.add((owner, parent, token))
            trees.append([owner], [token], [parent], [0.5])
    return trees


def prefix(trees: DraftTrees, row: int) -> tuple[int, tuple[int, ...]]:
    if row < trees.batch:
        return row, ()
    node = row - trees.batch
    return int(trees.owner[node]), tuple(int(trees.token[n]) for n in trees.path(node))


def outcomes(trees: DraftTrees):
    """Every assignment of target tokens to rows, with its probability and the acceptance it leads
    to."""
    rows = range(trees.batch + len(trees))
    p = [target(*prefix(trees, row)) for row in rows]
    for draws in itertools.product(range(VOCABULARY), repeat=len(rows)):
        weight = np.prod([p[row][draw] for row, draw in zip(rows, draws, strict=True)])
        yield float(weight), accept(trees, lambda visited, draws=draws: np.array(draws)[visited])


@given(st.integers(0, 2**32 - 1), st.integers(1, 2))
@settings(max_examples=8, deadline=None)
def test_output_is_the_targets_and_the_expectation_is_exact(seed: int, batch: int) -> None:
    trees = random_trees(np.random.default_rng(seed), batch, 5)
    first_two = [defaultdict(float) for _ in range(batch)]
    tokens = np.zeros(batch)
    for weight, result in outcomes(trees):
        for owner, emitted in enumerate(result.emitted):
            tokens[owner] += weight * len(emitted)
            after = [1.0] if len(emitted) >= 2 else target(owner, tuple(int(t) for t in emitted))
            for extra, p in enumerate(after):  # plain decoding goes on where the round stopped
                first_two[owner][tuple(int(t) for t in (*emitted, extra)[:2])] += weight * p
    for owner in range(batch):
        for a, b in itertools.product(range(VOCABULARY), repeat=2):
            exact = target(owner, ())[a] * target(owner, (a,))[b]
            assert first_two[owner][a, b] == pytest.approx(exact, abs=1e-12)
    np.testing.assert_allclose(expected_tokens(trees), tokens, rtol=1e-12)
    path_probs = [
        np.prod([target(*prefix(trees, r))[t] for r, t in _steps(trees, n)])
        for n in range(len(trees))
    ]
    np.testing.assert_allclose(tokens, 1 + np.bincount(trees.owner, path_probs, batch), rtol=1e-12)


def _steps(trees: DraftTrees, node: int):
    path = trees.path(node)
    rows = [int(trees.owner[node]), *(n + trees.batch for n in path[:-1])]
    return zip(rows, (int(trees.token[n]) for n in path), strict=True)


def test_only_visited_rows_are_sampled_level_by_level() -> None:
    trees = DraftTrees.empty(2)
    trees.append([0, 0, 1], [5, 6, 7], [-1, -1, -1], [0.5, 0.4, 0.9])
    trees.append([0, 1], [8, 9], [1, 2], [0.5, 0.5])
    calls = []

    def sample(rows):
        calls.append(list(rows))
        return np.array([{0: 6, 1: 3, 3: 8, 5: 4}[int(r)] for r in rows])

    result = accept(trees, sample)
    assert calls == [[0, 1], [3], [5]]
    assert result.emitted == [[6, 8, 4], [3]]
    assert result.path == [[1, 3], []]
    assert result.root_next.tolist() == [6, 3]
    assert result.next_token.tolist() == [-1, 8, -1, 4, -1]


def test_no_nodes_is_plain_decoding() -> None:
    result = accept(DraftTrees.empty(2), lambda rows: np.array(rows) + 40)
    assert result.emitted == [[40], [41]]


def _probability_of_a(*, drafts_are_sampled: bool) -> float:
    """Output probability of A where p = q = uniform on {A, B} and a draft B is always pruned before
    verification."""
    p = {"A": 0.5, "B": 0.5}
    total = 0.0
    for draft, q in {"A": 0.5, "B": 0.5}.items() if drafts_are_sampled else [("A", 1.0)]:
        pruned = draft == "B"
        # rejection sampling accepts with min(1, p/q) = 1; a pruned draft leaves a fresh draw from p
        if drafts_are_sampled:
            total += q * (p["A"] if pruned else float(draft == "A"))
        else:  # a point mass: the target's own draw is what is emitted, child or not
            total += q * p["A"]
    return total


def test_trap_pruning_sampled_drafts_biases_the_output_pruning_point_masses_does_not() -> None:
    assert _probability_of_a(drafts_are_sampled=True) == 0.75
    assert _probability_of_a(drafts_are_sampled=False) == 0.5
    tree = DraftTrees.empty(1)
    tree.append([0], [0], [-1], [0.5])  # A drafted, B pruned: the reference walk with p uniform
    emitted = [
        accept(tree, lambda rows, a=a, b=b: np.array([a, b])[rows]).emitted[0][0]
        for a in (0, 1)
        for b in (0, 1)
    ]
    assert np.mean(np.array(emitted) == 0) == 0.5
