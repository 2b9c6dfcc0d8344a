"""The base of drafters without a model: they propose whole trees at once, at no measurable cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.drafting import Draft
from smart_decoding.kernels.selection import fastest_selection

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.drafting import Selection
    from smart_decoding.engine.protocols import Features
    from smart_decoding.engine.request import Request


class FreeDrafter:
    """The base of free drafters: it runs no model and keeps no state."""

    has_model = False
    free = True
    aux_layers: tuple[int, ...] = ()
    resting_layers: tuple[int, ...] = ()
    needs_ends = False

    @cached_property
    def selection(self) -> Selection:
        """The implementation that follows rules."""
        return fastest_selection()

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Propose nodes for each request: none, unless a subclass does."""
        return DraftTrees.empty(len(requests))

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Return 0: there is no model."""
        return 0

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        """Propose trees, and choose the nodes to verify as the rule says."""
        trees = self.propose(requests, rule)
        return Draft(trees, rule, self.selection.select(rule, trees))

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Do nothing: there is no state."""

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Do nothing: there is no state."""

    def release(self, request: Request) -> None:
        """Do nothing: there is no state."""
