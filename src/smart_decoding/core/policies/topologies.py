"""Fixed tree topologies of published decoders.

Convention: a node is the path of child ranks from the root, rank 0 being the drafter's first
choice; (0, 2) is the third best child of the best first token. Both trees below have consecutive
ranks, so the number of children of each inner node says it all: {path of the inner node: number of
children}.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

RankPath: TypeAlias = tuple[int, ...]


def from_children(children: Mapping[RankPath, int]) -> list[RankPath]:
    """All node paths of a tree given by child counts, sorted by depth, then rank."""
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
