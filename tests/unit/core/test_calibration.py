"""Calibration: recovery of a known distortion under censoring and selection, constraints, priors,
change of drafter."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.batch import BatchState
from smart_decoding.core.calibration import (
    BINS,
    DEPTHS,
    KINDS,
    Calibration,
    default_prior,
    path_products,
)
from smart_decoding.core.tree import DraftTrees, FloatArray

GREEDY = np.array([1])
SHARES = np.eye(KINDS)[1]  # all requests are greedy, without pictures
QUALITY = np.array([0.0, 0.8, 0.55, 0.4])  # true acceptance = QUALITY[depth] * draft_prob ** 1.5


def true_prob(prob: FloatArray, depth: FloatArray) -> FloatArray:
    return QUALITY[depth] * prob**1.5


def expand(
    rng: np.random.Generator, calibration: Calibration, children: int = 4, levels: int = 3
) -> DraftTrees:
    """A tree whose levels expand only the two nodes that the calibration finds best: a
    policy-selected tree."""
    trees = DraftTrees.empty(1)
    parents = np.array([-1])
    for _ in range(levels):
        prob = np.concatenate(
            [np.sort(rng.dirichlet(np.full(children + 1, 0.4)))[::-1][:children] for _ in parents]
        )
        first = len(trees)
        parent = np.repeat(parents, children)
        trees.append(np.zeros(len(prob)), np.arange(first, first + len(prob)), parent, prob)
        calibration.score(trees, GREEDY)
        parents = first + np.argsort(-trees.accept_prob[first:])[:2]
    return trees


def verify(rng: np.random.Generator, trees: DraftTrees, p: FloatArray, kept: FloatArray):
    """The target draws one child (or none) below each accepted node; only kept nodes can be walked
    through."""
    observed = []
    chosen = []
    at = -1
    while True:
        children = np.flatnonzero(trees.parent == at)
        observed.extend(children)
        draw = rng.random()
        edges = np.cumsum(p[children])
        hit = np.flatnonzero(draw < edges)
        winner = children[hit[0]] if len(hit) else None
        chosen.extend(children == winner)
        if winner is None or winner not in kept:
            return np.array(observed, np.int64), np.array(chosen, bool)
        at = winner


def test_recovers_a_distortion_from_policy_selected_trees() -> None:
    rng = np.random.default_rng(0)
    calibration = Calibration()
    for _ in range(6000):
        trees = expand(rng, calibration)
        best_six = np.sort(trees.accept_prob)[-6:]
        kept = np.flatnonzero(trees.accept_prob >= best_six[0])
        observed, chosen = verify(rng, trees, true_prob(trees.draft_prob, trees.depth), kept)
        calibration.observe(trees, observed, chosen, GREEDY)
    prob = np.tile(np.linspace(0.1, 0.95, 12), 2)
    depth = np.repeat([1, 2], 12)
    learned = np.array([_conditional(calibration, q, d) for q, d in zip(prob, depth, strict=True)])
    error = np.abs(learned - true_prob(prob, depth))
    evidence = calibration.counts[0, depth - 1, 1, calibration.bins(prob)]
    # Rare confidences lean on the prior: exactness is required where there was evidence.
    assert (evidence > 30).sum() >= 16
    assert error[evidence > 30].max() < 0.1
    assert error[evidence > 30].mean() < 0.03
    assert calibration.changes == 0  # and a steady drafter raises no alarm


def _conditional(calibration: Calibration, prob: float, depth: int) -> float:
    trees = DraftTrees.empty(1)
    for level in range(depth):
        trees.append([0], [level], [level - 1], [prob])
    return float(calibration.score(trees, GREEDY)[-1])


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_siblings_sum_to_at_most_one_and_paths_never_grow(seed: int) -> None:
    rng = np.random.default_rng(seed)
    trees = DraftTrees.empty(2)
    for source in (0, 3):
        size = int(rng.integers(1, 12))
        first = len(trees)
        trees.append(
            rng.integers(0, 2, size),
            rng.integers(0, 9, size),
            np.full(size, -1),
            rng.random(size),
            source,
        )
        parent = rng.integers(first, len(trees), 20)
        trees.append(trees.owner[parent], rng.integers(0, 9, 20), parent, rng.random(20), source)
    conditional = Calibration(np.full((1, DEPTHS, KINDS, BINS), 0.9)).score(trees, np.array([1, 2]))
    slot = np.where(trees.parent < 0, trees.owner, trees.parent + 2)
    assert np.bincount(slot, conditional).max() <= 1 + 1e-12
    above = np.where(trees.parent < 0, 1.0, trees.accept_prob[trees.parent])
    assert (trees.accept_prob <= above).all()
    np.testing.assert_allclose(trees.accept_prob, above * conditional, rtol=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 12))
@settings(max_examples=30, deadline=None)
def test_path_products_equal_the_walk_up(seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    parent = []
    depth = []
    for node in range(40):
        options = [-1] + [i for i in range(node) if depth[i] < levels]
        parent.append(int(rng.choice(options)))
        depth.append(1 if parent[-1] < 0 else depth[parent[-1]] + 1)
    factor = rng.random(40)
    expected = []
    for node in range(40):
        expected.append(factor[node] * (1.0 if parent[node] < 0 else expected[parent[node]]))
    np.testing.assert_allclose(path_products(np.array(parent), factor, max(depth)), expected)


def test_monotone_in_confidence_whatever_was_observed() -> None:
    rng = np.random.default_rng(1)
    calibration = Calibration()
    for _ in range(100):
        trees = DraftTrees.empty(1)
        trees.append(np.zeros(8), np.arange(8), np.full(8, -1), rng.random(8))
        calibration.observe(trees, np.arange(8), rng.random(8) < 0.5, GREEDY)
    assert (np.diff(calibration.curve(0, SHARES), axis=1) >= -1e-12).all()


def test_fresh_state_starts_from_the_default_or_the_stored_prior() -> None:
    np.testing.assert_allclose(
        Calibration().curve(1, np.full(KINDS, 1 / KINDS)), default_prior(1)[0, :, 0], atol=1e-12
    )
    trained = Calibration()
    rng = np.random.default_rng(2)
    for _ in range(300):
        trees = DraftTrees.empty(1)
        trees.append(np.zeros(4), np.arange(4), np.full(4, -1), rng.random(4))
        trained.observe(trees, np.arange(4), np.array([True, False, False, False]), GREEDY)
    fresh = Calibration.from_state(trained.state_dict())
    np.testing.assert_allclose(fresh.curve(0, SHARES), trained.curve(0, SHARES), atol=1e-3)
    assert (fresh.counts <= 40).all()
    with pytest.raises(ValueError, match="calibration"):
        Calibration.from_state({"curve": [1.0], "counts": [1.0]})


@pytest.mark.parametrize("field", ["pictures", "constrained"])
def test_requests_of_another_kind_are_learned_apart(field: str) -> None:
    rng = np.random.default_rng(4)
    calibration = Calibration()
    for prob in rng.random(800):  # the same confidence, but there rarely accepted
        trees = DraftTrees.empty(2)
        trees.append([0, 1], [1, 1], [-1, -1], [prob, prob])
        kind = BatchState(
            *np.ones((2, 2), np.int64),
            np.zeros(2),
            np.ones(2, bool),
            **{field: np.array([False, True])},
        ).kind
        calibration.observe(trees, np.arange(2), rng.random(2) < prob * np.array([0.9, 0.2]), kind)
    trees = DraftTrees.empty(2)
    trees.append([0, 1], [1, 1], [-1, -1], [0.8, 0.8])
    text, other = calibration.score(trees, kind)
    assert text > 0.6
    assert other < 0.3
    both = calibration.curve(0, np.bincount(kind, minlength=KINDS) / 2)
    np.testing.assert_allclose(
        both, sum(calibration.curve(0, np.eye(KINDS)[each]) for each in kind) / 2
    )


def test_what_was_learned_without_grammars_is_a_prior_for_them() -> None:
    """As the shipped heads' are."""
    old = {
        "curve": np.full((1, DEPTHS, 4, BINS), 0.3),
        "counts": np.full((1, DEPTHS, 4, BINS), 9.0),
    }
    calibration = Calibration.from_state(old)
    assert calibration.prior.shape == (1, DEPTHS, KINDS, BINS)
    assert (calibration.prior == 0.3).all()
    assert (calibration.counts[:, :, :4] == 9).all()
    assert (calibration.counts[:, :, 4:] == 0).all()


def test_a_drafter_gone_bad_is_noticed_within_rounds_and_so_is_its_recovery() -> None:
    rng = np.random.default_rng(3)
    calibration = Calibration()
    prob = np.array([0.7, 0.1, 0.05, 0.02])

    def rounds_until(good: bool, done) -> int:
        for count in range(1, 300):
            trees = DraftTrees.empty(1)
            trees.append(np.zeros(4), np.arange(4), np.full(4, -1), prob)
            chosen = np.arange(4) == (rng.choice(5, p=[0.65, 0.1, 0.05, 0.02, 0.18]) if good else 9)
            calibration.observe(trees, np.arange(4), chosen, GREEDY)
            if count > 100 if done is None else done(_conditional(calibration, 0.7, 1)):
                return count
        return 300

    rounds_until(True, None)
    assert _conditional(calibration, 0.7, 1) > 0.5
    assert rounds_until(False, lambda p: p < 0.2) <= 15
    rounds_until(False, None)
    assert rounds_until(True, lambda p: p > 0.45) <= 40


def test_unknown_confidence_scores_as_none() -> None:
    trees = DraftTrees.empty(1)
    trees.append([0, 0], [1, 2], [-1, -1], [np.nan, 0.5])
    assert Calibration().score(trees, GREEDY)[0] < 0.02


def test_what_one_kind_of_request_reveals_is_no_change_of_the_drafter() -> None:
    """Grammars under which hardly a proposal is accepted."""
    rng = np.random.default_rng(5)
    calibration = Calibration()
    prob = np.full(4, 0.7)
    for _ in range(40):
        trees = DraftTrees.empty(2)
        trees.append([0, 1], [1, 1], [-1, -1], prob[:2])
        chosen = rng.random(2) < np.array([0.6, 0.01])
        calibration.observe(trees, np.arange(2), chosen, np.array([1, 5], np.uint8))
    assert calibration.changes > 0
    trees = DraftTrees.empty(2)
    trees.append([0, 1], [1, 1], [-1, -1], prob[:2])
    free, constrained = calibration.score(trees, np.array([1, 5], np.uint8))
    assert free > 0.5
    assert constrained < 0.2
