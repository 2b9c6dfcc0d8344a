"""The part of a drafter that is the same without a model: it proposes whole trees at once, at no
measurable cost."""

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
    """The part of `Drafter` that is the same for all of them: nothing to run, nothing to keep."""

    has_model = False
    free = True
    aux_layers: tuple[int, ...] = ()
    needs_ends = False

    @cached_property
    def selection(self) -> Selection:
        """What follows rules."""
        return fastest_selection()

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Propose nodes for each request: none."""
        return DraftTrees.empty(len(requests))

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """None: there is no model."""
        return 0

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        """Verify of the proposals what the rule says."""
        trees = self.propose(requests, rule)
        return Draft(trees, rule, self.selection.select(rule, trees))

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Nothing to learn."""

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Nothing to learn."""

    def release(self, request: Request) -> None:
        """Nothing to forget."""
