"""Levels of a drafter with a model as real rounds have them, bookkeeping included, to be timed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.rule import Scores, TreeRule
from smart_decoding.core.selection import RANKS, BestRate, LookAhead, RoundCosts
from smart_decoding.engine.kv import PAGE, BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker

if TYPE_CHECKING:
    from smart_decoding.core.rule import Draft
    from smart_decoding.drafters.levels import LevelDrafter

CHILDREN = 8
FREE = np.ones(1 << 14)  # seconds of verifying any number of nodes
MORE = 96  # tokens that requests may grow by, by default


class Rehearsal:
    """`batch` requests of `context` random tokens, and up to `more`. needed: pages whose draft keys
    are overwritten."""

    def __init__(
        self,
        drafter: LevelDrafter[Any],
        batch: int,
        context: int,
        vocab: int,
        more: int = MORE,
    ) -> None:
        self.batch = batch
        self.context = context
        self.needed = batch * -(-(context + more + 1) // PAGE)
        self.states = 0
        self._drafter = drafter
        self._vocab = vocab
        self._random = np.random.default_rng(0)
        self._requests: list[Request] = []

    def place(self, pages: Sequence[int], states: Sequence[int]) -> None:
        """Begin in these pages; no state of a target is needed."""
        pool = PagePool.of(pages)
        params = SamplingParams(temperature=0.0)
        for _ in range(self.batch):
            stop = StopChecker(params, lambda ids: "")
            request = Request("rehearsal", self._tokens(1), params, 0, BlockTable(pool), stop)
            self._requests.append(request)
            self._lengthen(request, self.context)
            self._drafter.skip(request)

    def commit(self, waiting: int) -> None:
        """Every request gets a token, and the first one `waiting` more."""
        for request in self._requests:
            self._lengthen(request, 1)
        if waiting:
            self._lengthen(self._requests[0], waiting)

    def first(self) -> None:
        """Draft the first level."""
        self._draft(1, 1)

    def deeper(self, width: int) -> tuple[int, float]:
        """Draft until a level expands up to `width` nodes; return how many the last level expanded,
        and its seconds."""
        levels = 2
        reached = self.batch * CHILDREN
        while reached < width:
            levels += 1
            reached *= CHILDREN
        draft = self._draft(width, levels)
        return draft.widths[-1], draft.level_seconds[-1]

    def _draft(self, width: int, levels: int) -> Draft:
        return self._drafter.draft(
            self._requests, _forced(self.batch, width, levels), lambda: False
        )

    def end(self) -> None:
        """Release the requests."""
        for request in self._requests:
            self._drafter.release(request)
        self._requests = []

    def _lengthen(self, request: Request, count: int) -> None:
        """The target has processed `count` more tokens."""
        first = request.table.length
        request.table.reserve(count)
        request.tokens += self._tokens(count)
        request.table.commit(request.tokens, first + count)
        request.table.cover(1)  # as the scheduler does for the round to come
        self._drafter.extend(
            request, self._drafter.blank(count), first, request.tokens[first : first + count]
        )

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._random.integers(0, self._vocab, count).tolist()
        return tokens


def _forced(batch: int, width: int, levels: int) -> TreeRule:
    """Return a rule that expands `width` nodes of each level, as if further levels and nodes were
    free."""
    costs = RoundCosts(batch, 0.0, np.zeros(width + 1), FREE)
    return TreeRule(
        levels,
        CHILDREN,
        limits=np.full(batch, levels + 1),
        ends=np.zeros(0, np.int64),
        expand=LookAhead(
            costs, np.array([width]), np.full((levels, RANKS), 0.5), np.full(CHILDREN, 0.5), batch
        ),
        keep=BestRate(costs),
        scores=Scores(Calibration(), np.ones(batch, np.uint8)),
    )
