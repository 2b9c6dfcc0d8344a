"""Drafting with a smaller model of the same vocabulary, level by level (Leviathan et al. 2023; Chen
et al. 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from smart_decoding.drafters.levels import LevelDrafter, State
from smart_decoding.engine.kv import PAGE

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft, TreeRule
    from smart_decoding.core.tree import DraftTrees, IntArray
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.rows import DraftInputs, LevelRequest, Ranked, Rows


class SmallModel(Protocol):
    """A model that this drafter can run. drafts_rounds: whether `draft` may be called."""

    drafts_rounds: bool

    def draft(self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs) -> Draft:
        """Draft a round in one call, and merge it with the proposed nodes."""

    def rank(self, rows: Rows, request: LevelRequest) -> Ranked:
        """Run one forward; return the best children of the rows whose logits are required."""


class DraftModelDrafter(LevelDrafter[State]):
    """Drafts with a model. It reads plain tokens, so it can also run tokens whose keys the target
    found in its prefix cache."""

    name = "draft_model"
    ahead = 0

    def __init__(self, model: SmallModel, pool_pages: int, scratch_pages: int) -> None:
        super().__init__(pool_pages, scratch_pages)
        self._model = model

    def _admit(self, request: Request, first: int) -> State:
        """Start behind the first cached pages whose keys the model still has."""
        state = State(0, 0)
        keys = self._keys(request, state, first // PAGE)
        for page, key in zip(request.table.pages, keys, strict=False):
            if self._page_keys[page] != key:
                break
            state.length += PAGE
        return state

    def _first(
        self, rows: Rows, last: IntArray, states: Sequence[State], request: LevelRequest
    ) -> Ranked:
        rows.logit_rows = last
        return self._model.rank(rows, request)

    def _deeper(self, rows: Rows, above: IntArray, request: LevelRequest) -> Ranked:
        return self._model.rank(rows, request)

    def follows(self, rule: TreeRule) -> bool:
        """Return whether the model drafts rounds in one call."""
        return self._model.drafts_rounds

    def _draft_round(
        self, rule: TreeRule, proposed: DraftTrees, inputs: DraftInputs, states: Sequence[State]
    ) -> Draft:
        return self._model.draft(rule, proposed, inputs)

    def _advance(self, request: Request, state: State) -> None:
        """Advance, and forget the keys of a cut context: unlike a head's, they serve no other
        request."""
        super()._advance(request, state)
        if state.start:
            self._page_keys[self._table(request, state)[state.start // PAGE :]] = 0
