"""A fixed topology for every request and round, as in Medusa and EAGLE-1.

A node is the path of child ranks from the root, rank 0 being the drafter's first choice; (0, 2) is
the third best child of the best first token. Both published trees below have consecutive ranks, so
they are written as {path of an inner node: number of its children}.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from smart_decoding.core.policies.base import StatelessPolicy, require_int, token_array
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import Topology
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState
    from smart_decoding.core.policies.base import TokenIds

RankPath: TypeAlias = tuple[int, ...]


def from_children(children: Mapping[RankPath, int]) -> list[RankPath]:
    """Return all node paths of a tree of child counts, sorted by depth, then rank."""
    nodes = [(*parent, rank) for parent, count in children.items() for rank in range(count)]
    return sorted(nodes, key=lambda path: (len(path), path))


# EAGLE-1's tree (`mc_sim_7b_63` in its model/choices.py): 25 nodes and the root, 5 levels.
EAGLE_1 = from_children(
    {
        (): 4,
        (0,): 3,
        (1,): 2,
        (2,): 2,
        (3,): 1,
        (0, 0): 3,
        (0, 1): 2,
        (0, 2): 2,
        (1, 0): 1,
        (0, 0, 0): 3,
        (0, 0, 0, 0): 2,
    }
)

# Medusa's tree for Vicuna-7B (`mc_sim_7b_63` in its model/medusa_choices.py): 63 nodes, 4 levels.
MEDUSA = from_children(
    {
        (): 10,
        (0,): 10,
        (1,): 7,
        (2,): 3,
        (3,): 2,
        **{(rank,): 1 for rank in range(4, 10)},
        (0, 0): 10,
        (0, 1): 3,
        (0, 2): 2,
        **{(0, rank): 1 for rank in range(3, 8)},
        (1, 0): 2,
        (2, 0): 1,
        (0, 0, 0): 2,
    }
)

TOPOLOGIES: dict[str, list[RankPath]] = {"eagle_1": EAGLE_1, "medusa": MEDUSA}

WIDEST = 255  # the last rank of a child; published topologies have ranks below 10


class Static(StatelessPolicy):
    """Drafts and verifies the nodes whose path of child ranks (by draft_prob) lies in `topology`.

    `topology` is a name ('eagle_1', 'medusa') or a list of rank paths, each node's parent included.
    """

    name = "static"

    def __init__(
        self, topology: str | Sequence[Sequence[int]] = "eagle_1", eos_token_ids: TokenIds = ()
    ) -> None:
        self.paths = _parse(topology)
        self.levels = max(len(path) for path in self.paths)
        self.children = 1 + max(rank for path in self.paths for rank in path)
        place = {(): 0, **{path: i for i, path in enumerate(self.paths, 1)}}
        following = np.full((len(place), self.children), -1, np.int64)
        for path in self.paths:
            following[place[path[:-1]], path[-1]] = place[path]
        self._topology = Topology(following)
        self._ends = token_array(eos_token_ids)

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the rule, with as many levels as the longest request may use."""
        tree = self._topology
        return TreeRule.of(batch.limits, self.levels, self.children, self._ends, tree, tree)


def _parse(topology: str | Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    if isinstance(topology, str):
        if topology not in TOPOLOGIES:
            known = ", ".join(TOPOLOGIES)
            raise ConfigError(
                f"unknown topology {topology!r}; known: {known}, or a list of rank paths"
            )
        return TOPOLOGIES[topology]
    try:
        paths = list(dict.fromkeys(tuple(path) for path in topology))
    except TypeError:
        raise ConfigError(
            "topology must be a name or a list of lists of child ranks, such as [[0], [1], [0, 0]]"
        ) from None
    if not all(paths) or not paths:
        raise ConfigError("topology must hold at least one path, and no empty ones")
    for path in paths:
        for rank in path:
            require_int("a child rank of topology", rank, 0, WIDEST)
    orphans = [path for path in paths if len(path) > 1 and path[:-1] not in paths]
    if orphans:
        raise ConfigError(
            f"topology holds {list(orphans[0])} but not its parent {list(orphans[0][:-1])}"
        )
    return paths
