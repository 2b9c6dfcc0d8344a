"""The choice over drafted trees in C++ against its reference in numpy."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smart_decoding.core.calibration import DEPTHS, KINDS, Calibration
from smart_decoding.core.lookahead import LookAhead
from smart_decoding.core.policies.chooser import Drafted, NumpyChooser
from smart_decoding.core.tree import DraftTrees
from smart_decoding.kernels.chooser import NativeChooser

pytestmark = pytest.mark.usefixtures("variant")
ENDS = np.array([3, 7])
VERIFY = 400


def random_trees(rng: np.random.Generator, batch: int, sources: int) -> DraftTrees:
    trees = DraftTrees.empty(batch)
    frontier = [(owner, -1) for owner in range(batch)]
    for _ in range(int(rng.integers(1, 5))):
        first = len(trees)
        fresh = []
        for owner, parent in frontier:
            k = int(rng.integers(1, 6))
            prob = np.sort(rng.dirichlet(np.ones(k)) * rng.random())[::-1]
            trees.append(
                [owner] * k, rng.integers(0, 20, k), [parent] * k, prob, int(rng.integers(sources))
            )
            fresh += [owner] * k
        nodes = np.arange(first, len(trees))
        some = np.sort(rng.choice(nodes, min(len(nodes), 6), replace=False))
        frontier = [(int(trees.owner[node]), int(node)) for node in some]
    return trees


def drafted(seed: int, batch: int, sources: int) -> Drafted:
    rng = np.random.default_rng(seed)
    trees = random_trees(rng, batch, sources)
    calibration = Calibration()
    for _ in range(3):
        nodes = np.flatnonzero(rng.random(len(trees)) < 0.5)
        calibration.observe(trees, nodes, rng.random(len(nodes)) < 0.5, np.ones(batch, np.uint8))
    verify = 1.0 + np.cumsum(rng.random(VERIFY) * rng.choice([0.0, 0.05, 0.3], VERIFY))
    limit = float(rng.choice([math.inf, 1.5, 3.0]))
    limits = rng.integers(0, 7, batch)
    kind = rng.integers(0, KINDS, batch).astype(np.uint8)
    return Drafted(
        trees, calibration, limits, kind, ENDS, float(batch), float(rng.random()), verify, limit
    )


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_the_same_nodes_are_selected_and_expanded(seed: int, batch: int, sources: int) -> None:
    one = drafted(seed, batch, sources)
    other = drafted(seed, batch, sources)
    reference = NumpyChooser()
    native = NativeChooser()
    one.least = other.least = seed % 2
    kept, rate, expected = reference.select(one)
    kept_, rate_, expected_ = native.select(other)
    np.testing.assert_allclose(other.trees.accept_prob, one.trees.accept_prob, rtol=1e-12)
    assert kept_.tolist() == kept.tolist()
    assert (rate_, expected_) == pytest.approx((rate, expected), rel=1e-12)

    rng = np.random.default_rng(seed)
    ahead = LookAhead(np.sort(rng.dirichlet(np.ones(8), DEPTHS) * 0.9)[:, ::-1].copy())
    widths = np.array([1, 2, 4, 8]) * batch
    level_seconds = rng.random() * 0.1 + 0.002 * np.arange(64)
    for level in range(1, int(one.trees.depth.max()) + 1):
        asked = (ahead, level, int(rng.integers(1, 4)), widths, level_seconds)
        expanded = native.frontier(other, *asked)
        assert expanded.tolist() == reference.frontier(one, *asked).tolist()
        assert (
            native.select(other)[0].tolist() == kept.tolist()
        )  # after a frontier that is empty: of the same call


def test_a_drafter_that_the_calibration_has_not_seen_gets_room() -> None:
    asked = drafted(0, 2, 1)
    asked.trees.source[:] = 5
    NativeChooser().select(asked)
    assert np.isfinite(asked.trees.accept_prob).all()
    assert len(asked.calibration.prior) == 6
