"""What a verification says of drafted nodes: of children of accepted nodes, and of no others, which
it never tested."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.tree import join

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smart_decoding.core.policies.base import Round
    from smart_decoding.core.tree import BoolArray, DraftTrees, IntArray


def observed(
    trees: DraftTrees, root_next: IntArray, next_token: IntArray
) -> tuple[IntArray, BoolArray]:
    """`Round.observed()`: the nodes that were tested, and whether the target chose them.

    root_next, next_token: as in `Round`."""
    after = np.where(trees.parent < 0, root_next[trees.owner], next_token[trees.parent])
    nodes = np.flatnonzero(after >= 0)
    return nodes, trees.token[nodes] == after[nodes]


def merged(rounds: Sequence[Round]) -> tuple[DraftTrees, IntArray, BoolArray]:
    """The trees of several rounds as those of one, and what `observed()` says of them."""
    if len(rounds) == 1:
        return (rounds[0].trees, *rounds[0].observed())
    trees = join([r.trees for r in rounds])
    next_token = np.concatenate([r.next_token for r in rounds])
    root_next = np.concatenate([r.root_next for r in rounds])
    return (trees, *observed(trees, root_next, next_token))
