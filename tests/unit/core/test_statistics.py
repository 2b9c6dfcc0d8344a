"""Figures about rounds."""

from __future__ import annotations

import numpy as np

from smart_decoding.core.policies.statistics import shape_of
from smart_decoding.core.tree import DraftTrees


def test_what_a_round_verifies_has_a_shape() -> None:
    trees = DraftTrees.empty(2)
    trees.append(np.array([0, 0, 1]), np.arange(3), np.array([-1, -1, -1]), np.full(3, 0.5))
    trees.append(np.array([0]), np.arange(1), np.array([0]), np.full(1, 0.5))
    assert shape_of(trees, np.zeros(0, np.int64)) == "plain"
    assert shape_of(trees, np.array([0, 2, 3])) == "chain"
    assert shape_of(trees, np.array([0, 1])) == "tree"
