"""What all policies share: which requests may draft, which nodes are worth anything, which can be
expanded."""

from __future__ import annotations

from collections.abc import Collection
from typing import TypeAlias

import numpy as np

from smart_decoding.core.policies.protocol import BatchState
from smart_decoding.core.tree import BoolArray, DraftTrees, FloatArray, IntArray, of_expanded, slots
from smart_decoding.errors import ConfigError

TokenIds: TypeAlias = Collection[int]


def depth_limits(batch: BatchState) -> IntArray:
    """[batch] deepest useful node of each request: 0 where it refuses speculation or needs one
    token only."""
    limits: IntArray = np.where(batch.may_speculate, batch.remaining - 1, 0)
    return limits


def useful(trees: DraftTrees, limits: IntArray, eos: TokenIds) -> BoolArray:
    """[nodes] whether a node could ever be emitted: within its request's depth limit and not below
    an end token."""
    result: BoolArray = trees.depth <= limits.take(trees.owner)
    ends = is_token(trees.token, eos)
    if ends.any():
        result &= ~_has_marked_ancestor(trees, ends)
    return result


def expandable(trees: DraftTrees, level: int, limits: IntArray, eos: TokenIds) -> IntArray:
    """Ascending indices of the nodes of `level` that the model drafter can expand and whose
    children could be useful.

    A node proposed by another drafter has a head state above it only where the model drafter
    expanded its parent."""
    mask = (trees.depth == level) & (trees.depth < limits.take(trees.owner))
    ends = is_token(trees.token, eos)
    if ends.any():
        mask &= ~(ends | _has_marked_ancestor(trees, ends))
    if trees.source.any():
        mask &= of_expanded(trees, slots(trees))
    return np.flatnonzero(mask)


def is_token(token: IntArray, ids: TokenIds) -> BoolArray:
    """[nodes] whether a token is one of the few `ids`."""
    result: BoolArray = np.zeros(len(token), np.bool_)
    for token_id in ids:
        result |= token == token_id
    return result


def best_per_owner(trees: DraftTrees, nodes: IntArray, score: FloatArray, count: int) -> IntArray:
    """The `count` nodes of each request with the largest score ([len(nodes)]), ties to the lower
    index; ascending."""
    owner = trees.owner[nodes]
    order = np.lexsort((-score, owner))  # stable: equal scores stay in ascending order
    sorted_owner = owner[order]
    rank = np.arange(len(nodes)) - np.searchsorted(sorted_owner, sorted_owner)
    kept: IntArray = np.sort(nodes[order[rank < count]])
    return kept


def require_int(name: str, value: int, low: int, high: int) -> int:
    """`value` if it is an integer in [low, high]. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(f"{name} must be an integer from {low} to {high}, not {value!r}")
    return value


def require_number(name: str, value: float, low: float, high: float) -> float:
    """`value` as a float if it lies in [low, high]. Raises ConfigError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ConfigError(f"{name} must be a number from {low} to {high}, not {value!r}")
    return float(value)


def _has_marked_ancestor(trees: DraftTrees, marked: BoolArray) -> BoolArray:
    below = np.append(marked, False)[trees.parent]  # index -1, the root, is never marked
    for _ in range(int(trees.depth.max()) - 1):
        below |= np.append(below, False)[trees.parent]
    return below
