"""Several drafters in one tree: at most one with a model, and free drafters, without model cost.

The free drafters propose first. The same token below the same parent is one node. It gets the
largest draft probability of its drafters, and the source of the first of them: 0 is the model, free
drafters are 1, 2, ... even without a model. The model can expand any node whose parent it has
expanded, whichever drafter proposed it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from smart_decoding.core.rule import Draft
from smart_decoding.core.tree import MODEL, DraftTrees, merge
from smart_decoding.errors import ConfigError
from smart_decoding.kernels.selection import fastest_selection

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.protocols import Drafter, Features
    from smart_decoding.engine.request import Request


class UnionDrafter:
    """Drafts with all of `drafters`. At most one has a model, and it is the first. Raises
    ConfigError."""

    name = "union"

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ConfigError("a union needs at least one drafter")
        if any(drafter.has_model for drafter in drafters[1:]):
            raise ConfigError(
                "a union takes at most one drafter with a model, and it must be the first"
            )
        self.drafters = list(drafters)
        self.has_model = drafters[0].has_model
        self.model: Any = drafters[0] if self.has_model else None
        self.free_drafters: list[Any] = self.drafters[self.has_model :]
        self.aux_layers: tuple[int, ...] = self.model.aux_layers if self.model else ()
        self.resting_layers = self.model.resting_layers if self.model else ()
        self.free = bool(self.free_drafters)
        self.needs_ends = False

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """Return the model's rows; 0 without a model."""
        return int(self.model.pending_rows(requests)) if self.model else 0

    def draft(
        self, requests: Sequence[Request], rule: TreeRule, interrupted: Callable[[], bool]
    ) -> Draft:
        """Draft with the free drafters, then with the model, unless the rule leaves it out."""
        trees = self.propose(requests, rule)
        rule = rule.after_free(trees)
        if self.model is None or not rule.levels:
            return Draft(trees, rule, fastest_selection().select(rule, trees))
        draft: Draft = self.model.draft(requests, rule, interrupted, trees)
        return draft

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Propose the merged nodes of the free drafters."""
        trees = DraftTrees.empty(len(requests))
        for source, drafter in enumerate(self.free_drafters, start=MODEL + 1):
            merge(trees, drafter.propose(requests, rule), source)
        return trees

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Pass the tokens on to all drafters."""
        for drafter in self.drafters:
            drafter.extend(request, features, first, tokens)

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Pass the tokens on to all drafters."""
        for drafter in self.drafters:
            drafter.extend_each(requests, features)

    def release(self, request: Request) -> None:
        """Make all drafters forget the request."""
        for drafter in self.drafters:
            drafter.release(request)
