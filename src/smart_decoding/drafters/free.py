"""What drafters without a model share: they propose whole trees at once, at no measurable cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.tree import DraftTrees

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.protocols import Features, Grow, Logits
    from smart_decoding.engine.request import Request


def free_trees(batch: int, nodes: Sequence[Any]) -> DraftTrees:
    """Trees of a drafter without a model, whose nodes cannot be expanded: source 0 is a model's.
    nodes: owner, token, parent, depth, draft_prob and path_prob, [nodes] each."""
    owner, token, parent, depth, draft, path = nodes
    unknown = np.full(len(owner), np.nan)
    source = np.ones(len(owner), np.int64)
    return DraftTrees(batch, owner, token, parent, depth, draft, path, unknown, source)


class FreeDrafter:
    """The part of `Drafter` that is the same for all of them: nothing to run, nothing to keep."""

    has_model = False
    free = True
    aux_layers: tuple[int, ...] = ()
    grow: Grow | None = None
    wants_logits = False
    wants_ends = False

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """None: there is no model."""
        return 0

    def expand(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        """Raises ValueError: there are no further levels."""
        raise ValueError(f"{type(self).__name__} has no model levels to expand")

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Nothing to learn."""

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Nothing to learn."""

    def observe_logits(self, tokens: IntArray, logits: Logits) -> None:
        """Not wanted."""

    def release(self, request: Request) -> None:
        """Nothing to forget."""
