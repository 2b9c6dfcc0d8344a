"""A fixed topology for every request and round, as in Medusa and EAGLE-1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smart_decoding.core.policies.common import TokenIds, depth_limits, expandable, useful
from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, StatelessPolicy
from smart_decoding.core.policies.topologies import TOPOLOGIES
from smart_decoding.core.tree import DraftTrees, IntArray, slots
from smart_decoding.errors import ConfigError

_OUTSIDE = -1


class Static(StatelessPolicy):
    """Drafts and verifies the nodes whose path of child ranks (by draft_prob) lies in `topology`.

    `topology` is a name ('eagle_1', 'medusa') or a list of rank paths, each node's parent included.
    """

    name = "static"

    def __init__(
        self, topology: str | Sequence[Sequence[int]] = "eagle_1", eos_token_ids: TokenIds = ()
    ) -> None:
        self.paths = _parse(topology)
        self.children = 1 + max(rank for path in self.paths for rank in path)
        self.levels = max(len(path) for path in self.paths)
        self.eos = frozenset(eos_token_ids)
        index = {(): 0, **{path: i for i, path in enumerate(self.paths, 1)}}
        # (place, rank) -> place in the topology
        self._next = np.full((len(index), self.children), _OUTSIDE, np.int64)
        for path, place in index.items():
            if path:
                self._next[index[path[:-1]], path[-1]] = place
        self._inner = (self._next != _OUTSIDE).any(axis=1)

    def plan(self, batch: BatchState) -> DraftPlan:
        """The topology's levels, as far as a request may use them."""
        limits = depth_limits(batch)
        levels = min(self.levels, int(limits.max(initial=0)))
        inner = sum(len(path) == 1 and bool(self._inner[i]) for i, path in enumerate(self.paths, 1))
        if not levels:
            return OFF
        return DraftPlan(True, levels, self.children, inner * int((limits > 1).sum()))

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        """The nodes of the topology that have children in it."""
        if level >= plan.levels:
            return None
        nodes = expandable(trees, level, depth_limits(batch), self.eos)
        place = self._places(trees)[nodes]
        nodes = nodes[(place != _OUTSIDE) & self._inner[place]]
        return nodes if len(nodes) else None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        """The nodes of the topology."""
        inside = self._places(trees) != _OUTSIDE
        return np.flatnonzero(useful(trees, depth_limits(batch), self.eos) & inside)

    def _places(self, trees: DraftTrees) -> IntArray:
        """[nodes] each node's place in the topology, or _OUTSIDE."""
        rank = sibling_ranks(trees)
        place = np.full(len(trees), _OUTSIDE, np.int64)
        for depth in range(1, min(self.levels, int(trees.depth.max(initial=0))) + 1):
            nodes = np.flatnonzero((trees.depth == depth) & (rank < self.children))
            above = place[trees.parent[nodes]] if depth > 1 else np.zeros(len(nodes), np.int64)
            inside = above != _OUTSIDE
            place[nodes[inside]] = self._next[above[inside], rank[nodes[inside]]]
        return place


def sibling_ranks(trees: DraftTrees) -> IntArray:
    """[nodes] rank among siblings by draft_prob, 0 the largest, ties to the lower index."""
    slot = slots(trees)
    order = np.lexsort((-trees.draft_prob, slot))
    sorted_slot = slot[order]
    rank = np.empty(len(trees), np.int64)
    rank[order] = np.arange(len(trees)) - np.searchsorted(sorted_slot, sorted_slot)
    return rank


def _parse(topology: str | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    if isinstance(topology, str):
        if topology not in TOPOLOGIES:
            known = ", ".join(TOPOLOGIES)
            raise ConfigError(
                f"unknown topology {topology!r}; known: {known}, or a list of rank paths"
            )
        return TOPOLOGIES[topology]
    try:
        paths = list(dict.fromkeys(tuple(int(rank) for rank in path) for path in topology))
    except (TypeError, ValueError):
        raise ConfigError(
            "topology must be a name or a list of lists of child ranks, such as [[0], [1], [0, 0]]"
        ) from None
    if not paths or any(not path or min(path) < 0 for path in paths):
        raise ConfigError("topology must hold at least one path, and paths of ranks from 0 up")
    orphans = [path for path in paths if len(path) > 1 and path[:-1] not in paths]
    if orphans:
        raise ConfigError(
            f"topology holds {list(orphans[0])} but not its parent {list(orphans[0][:-1])}"
        )
    return paths
