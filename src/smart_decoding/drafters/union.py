"""Several drafters in one tree: one optional drafter with a model, then drafters without model
cost.

The same token below the same parent is one node: it belongs to the first drafter that proposed it,
the model before all others, and gets the largest of their draft probabilities. Sources: 0 is the
model, the free drafters are 1, 2, ... (without a model too).

What is asked of the model drafter: nothing but the protocol. It works on trees of its own, `view`,
in which its nodes have the indices at which it appended them, whatever the others proposed;
`expand` gets view indices. It expands its own nodes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.calibration import path_products
from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.protocols import Drafter, Features, Grow, Logits
    from smart_decoding.engine.request import Request

MODEL = 0


@dataclass(slots=True)
class Merged:
    """The trees of one round.

    trees: all nodes. view: the model drafter's. of_view[i]: the node that view node i became.
    child: (owner, parent, token) -> node."""

    trees: DraftTrees
    view: DraftTrees
    of_view: list[int] = field(default_factory=list)
    child: dict[tuple[int, int, int], int] = field(default_factory=dict)

    def add_free(self, other: DraftTrees, source: int) -> None:
        """Merges a free drafter's trees."""
        self._merge(other, [], source)
        self._refresh()

    def add_view(self) -> None:
        """Merges the nodes that the model drafter has appended to its view."""
        self._merge(self.view, self.of_view, MODEL)
        self._refresh()

    def view_nodes(self, nodes: IntArray) -> IntArray:
        """The view's indices of those of `nodes` that the model drafter proposed."""
        in_view = {node: i for i, node in enumerate(self.of_view)}
        return np.array([in_view[node] for node in nodes.tolist() if node in in_view], np.int64)

    def _merge(self, other: DraftTrees, place: list[int], source: int) -> None:
        """Adds other's nodes from len(place) on, noting in `place` the node that each becomes."""
        trees = self.trees
        first = len(place)
        new: list[int] = []
        parents: list[int] = []
        columns = [
            c[first:].tolist() for c in (other.owner, other.parent, other.token, other.draft_prob)
        ]
        for i, (owner, above, token, prob) in enumerate(zip(*columns, strict=True), start=first):
            parent = ROOT if above == ROOT else place[above]
            count = len(trees) + len(new)
            node = self.child.setdefault((owner, parent, token), count)
            place.append(node)
            if node == count:
                new.append(i)
                parents.append(parent)
            elif node < len(trees):  # else equal siblings within `other`: the first one counts
                trees.draft_prob[node] = max(trees.draft_prob[node], prob)
                trees.source[node] = min(trees.source[node], source)
        if new:
            trees.adopt(other, new, parents, source)

    def _refresh(self) -> None:
        trees = self.trees
        if len(trees):
            trees.path_prob = path_products(trees.parent, trees.draft_prob, int(trees.depth.max()))


class UnionDrafter:
    """Drafts with all of `drafters`: at most one of them has a model, and then it is the first.
    Raises ConfigError."""

    name = "union"

    def __init__(self, drafters: Sequence[Drafter]) -> None:
        if not drafters:
            raise ConfigError("a union needs at least one drafter")
        if any(drafter.max_levels for drafter in drafters[1:]):
            raise ConfigError(
                "a union takes at most one drafter with a model, and it must be the first"
            )
        self.drafters = list(drafters)
        self.model = drafters[0] if drafters[0].max_levels else None
        self.free_drafters = self.drafters[1:] if self.model else self.drafters
        self.max_levels = self.model.max_levels if self.model else 0
        self.aux_layers: tuple[int, ...] = self.model.aux_layers if self.model else ()
        self.free = bool(self.free_drafters)
        self._listeners = [
            drafter for drafter in self.drafters if getattr(drafter, "wants_logits", False)
        ]
        self.grow: Grow | None = None
        self.wants_logits = bool(self._listeners)
        self.wants_ends = False
        self._round: Merged | None = None

    def pending_rows(self, requests: Sequence[Request]) -> int:
        """The model's."""
        return self.model.pending_rows(requests) if self.model else 0

    def start(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """The model's first level, and all that the free drafters propose."""
        batch = len(requests)
        view = DraftTrees.empty(batch)
        if self.model and rule.levels:
            view = self.model.start(requests, rule)
        merged = self._round = Merged(DraftTrees.empty(batch), view)
        merged.add_view()
        for source, drafter in enumerate(self.free_drafters, start=MODEL + 1):
            merged.add_free(drafter.start(requests, rule), source)
        return merged.trees

    def expand(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, rule: TreeRule
    ) -> int:
        """Expands those of `nodes` that the model proposed."""
        merged = self._round
        if self.model is None or merged is None or merged.trees is not trees:
            raise ValueError(
                "expand() wants the trees of the last start(), and a drafter with a model"
            )
        wanted = merged.view_nodes(nodes)
        if not len(wanted):
            return 0
        width = self.model.expand(requests, merged.view, wanted, rule)
        merged.add_view()
        return width

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

    def observe_logits(self, tokens: IntArray, logits: Logits) -> None:
        """Hands the verified rows' tokens [rows] and logits [rows, vocab] to the drafters that want
        them."""
        for drafter in self._listeners:
            drafter.observe_logits(tokens, logits)

    def release(self, request: Request) -> None:
        """Tells all drafters."""
        for drafter in self.drafters:
            drafter.release(request)
