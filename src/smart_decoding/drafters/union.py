"""Several drafters in one tree: one optional drafter with a model, then drafters without model
cost.

The free drafters propose first. The same token below the same parent is one node: it belongs to the
first of the drafters that proposed it, the model before all others, and gets the largest of their
draft probabilities. Sources: 0 is the model, the free drafters are 1, 2, ... (without a model too).
The model expands any node whose parent it has expanded, whoever proposed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smart_decoding.core.tree import DraftTrees, IntArray, fold, merge, of_expanded, slots
from smart_decoding.drafters.levels import LevelDrafter
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.protocols import Drafter, Features, Grow, Grown
    from smart_decoding.engine.request import Request

MODEL = 0


class UnionDrafter:
    """Drafts with all of `drafters`: at most one of them has a model, and then it is the first.
    Raises ConfigError."""

    name = "union"

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ConfigError("a union needs at least one drafter")
        if any(drafter.has_model for drafter in drafters[1:]):
            raise ConfigError(
                "a union takes at most one drafter with a model, and it must be the first"
            )
        self.drafters = list(drafters)
        self.model = drafters[0] if drafters[0].has_model else None
        self.free_drafters = self.drafters[1:] if self.model else self.drafters
        self.has_model = self.model is not None
        self.aux_layers: tuple[int, ...] = self.model.aux_layers if self.model else ()
        self.free = bool(self.free_drafters)
        grows = isinstance(self.model, LevelDrafter) and self.model.grow is not None
        self.grow: Grow | None = self._grow if grows else None
        # what is proposed, and not taken yet: by the limits of its rule, which are the round's
        self._given: tuple[IntArray, DraftTrees] | None = None
        self.wants_ends = False

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """The model's."""
        return self.model.pending_rows(requests) if self.model else 0

    def start(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """All that the free drafters propose, and the model's first level."""
        trees = self._taken(requests, rule)
        if self.model and rule.levels:
            merge(trees, self.model.start(requests, rule), MODEL)
        return trees

    def expand(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        """Expands those of `nodes` whose parent the model has expanded."""
        if self.model is None:
            raise ValueError("a union without a model has no model levels to expand")
        nodes = nodes[of_expanded(trees, slots(trees))[nodes]]
        if not len(nodes):
            return 0
        before = len(trees)
        width = self.model.expand(requests, trees, nodes, rule)
        fold(trees, before)
        return width

    def _grow(self, requests: Sequence[Request], rule: TreeRule) -> Grown | None:
        """`start`, `expand` as the rule says, and what to verify, in one call of the model's."""
        assert isinstance(self.model, LevelDrafter)
        if not self.model.follows(rule):
            return None
        return self.model.grow_beside(self._taken(requests, rule), requests, rule)

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """What the free drafters propose. The next `start` or `grow` goes on from it."""
        trees = self._proposed(requests, rule)
        self._given = (rule.limits, trees)
        return trees

    def _taken(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        given = self._given
        self._given = None
        if given is not None and given[0] is rule.limits:
            return given[1]
        return self._proposed(requests, rule)

    def _proposed(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        trees = DraftTrees.empty(len(requests))
        for source, drafter in enumerate(self.free_drafters, start=MODEL + 1):
            merge(trees, drafter.start(requests, rule), source)
        return trees

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Tells all drafters."""
        for drafter in self.drafters:
            drafter.extend(request, features, first, tokens)

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Tells all drafters."""
        for drafter in self.drafters:
            drafter.extend_each(requests, features)

    def release(self, request: Request) -> None:
        """Tells all drafters."""
        for drafter in self.drafters:
            drafter.release(request)
