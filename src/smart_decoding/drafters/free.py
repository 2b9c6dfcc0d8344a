"""The base of drafters without a model: they propose whole trees at once, at no measurable cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from smart_decoding.core.rule import Draft
from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.protocols import NoDrafter
from smart_decoding.kernels.selection import fastest_selection

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.request import Request


class FreeDrafter(NoDrafter):
    """The base of free drafters: it runs no model and keeps no state."""

    free = True

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Propose nodes for each request: none, unless a subclass does."""
        return DraftTrees.empty(len(requests))

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        """Propose trees, and choose the nodes to verify as the rule says."""
        trees = self.propose(requests, rule)
        return Draft(trees, rule, fastest_selection().select(rule, trees))
