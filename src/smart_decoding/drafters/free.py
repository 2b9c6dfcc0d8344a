"""The part of a drafter that is the same without a model: it proposes whole trees at once, at no
measurable cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.protocols import Features, Grow
    from smart_decoding.engine.request import Request


class FreeDrafter:
    """The part of `Drafter` that is the same for all of them: nothing to run, nothing to keep."""

    has_model = False
    free = True
    aux_layers: tuple[int, ...] = ()
    grow: Grow | None = None
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

    def release(self, request: Request) -> None:
        """Nothing to forget."""
