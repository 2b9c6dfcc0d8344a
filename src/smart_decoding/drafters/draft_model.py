"""Drafting with a smaller model of the same vocabulary, level by level (Leviathan et al. 2023; Chen
et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

from smart_decoding.drafters.levels import LevelDrafter, LevelRequest, Ranked, RoundInputs, State
from smart_decoding.engine.kv import PAGE

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.drafting import Draft
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.rows import Rows


class SmallModel(Protocol):
    """What the drafter needs of a model."""

    drafts_rounds: bool

    def prepare(
        self, rule: TreeRule, proposed: DraftTrees, inputs: RoundInputs
    ) -> Callable[[], Draft]:
        """Return the one call that drafts a round beside proposed nodes, if it `drafts_rounds`."""

    def rank(self, rows: Rows, asked: LevelRequest) -> Ranked:
        """Return one forward: the best children of the rows whose logits are wanted."""


class DraftModelDrafter(LevelDrafter[State]):
    """A model reads plain tokens, so that it can run what the target found in its prefix cache."""

    name = "draft_model"
    ahead = 0

    def __init__(self, model: SmallModel, pool_pages: int, scratch_pages: int) -> None:
        super().__init__(pool_pages, scratch_pages)
        self._model = model

    def _admit(self, request: Request, first: int) -> State:
        """Go on after the cached pages, from the first on, whose keys the model still has."""
        state = State(0, 0)
        keys = self._keys(request, state, first // PAGE)
        for page, key in zip(request.table.pages, keys, strict=False):
            if self._kept[page] != key:
                break
            state.length += PAGE
        return state

    def _first(
        self, rows: Rows, last: IntArray, states: Sequence[State], asked: LevelRequest
    ) -> Ranked:
        rows.logit_rows = last
        return self._model.rank(rows, asked)

    def _deeper(self, rows: Rows, above: IntArray, asked: LevelRequest) -> Ranked:
        return self._model.rank(rows, asked)

    def follows(self, rule: TreeRule) -> bool:
        """Return where the model drafts rounds in one call."""
        return self._model.drafts_rounds

    def _prepare(
        self, rule: TreeRule, proposed: DraftTrees, inputs: RoundInputs, states: Sequence[State]
    ) -> Callable[[], Draft]:
        return self._model.prepare(rule, proposed, inputs)

    def _advance(self, request: Request, state: State) -> None:
        """Keys of a cut context (unlike a head's, they depend on it) serve no other request."""
        super()._advance(request, state)
        if state.start:
            self._kept[self._table(request, state)[state.start // PAGE :]] = 0
