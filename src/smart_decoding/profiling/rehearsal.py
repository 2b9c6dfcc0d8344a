"""Levels of a drafter with a model as real rounds have them, bookkeeping included, to be timed."""

from __future__ import annotations

from typing import Any

import numpy as np

from smart_decoding.core.policies.protocol import DraftPlan
from smart_decoding.core.tree import DraftTrees
from smart_decoding.drafters.levels import LevelDrafter
from smart_decoding.engine.kv import PAGE, BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker

PLAN = DraftPlan(speculate=True, levels=8, children=8)
AT_ONCE = 256  # rows that are caught up with together
MORE = 96  # tokens that requests grow by before they begin anew, if nothing else is said


class Rehearsal:
    """`batch` requests of `context` random tokens, and up to `more`. The drafter's keys are overwritten."""

    def __init__(
        self, drafter: LevelDrafter[Any], pages: int, batch: int, context: int, vocab: int, more: int = MORE
    ) -> None:
        self._drafter, self._pool, self._more = drafter, PagePool(pages), more
        self.batch, self.context, self._vocab = batch, context, vocab
        self._random = np.random.default_rng(0)
        self._requests: list[Request] = []
        self._trees, self._frontier = DraftTrees.empty(batch), np.zeros(0, np.int64)

    @staticmethod
    def fits(pages: int, batch: int, context: int, more: int = MORE) -> bool:
        return batch * -(-(context + more + 1) // PAGE) <= pages

    def commit(self, waiting: int) -> None:
        """Every request gets a token, and the first one `waiting` more."""
        if not self._requests or self._requests[0].table.length + 1 + waiting > self.context + self._more:
            self._begin()
        for request in self._requests:
            self._grow(request, 1)
        if waiting:
            self._grow(self._requests[0], waiting)

    def first(self) -> None:
        self._trees = self._drafter.start(self._requests, PLAN)

    def reach(self, width: int) -> None:
        """Drafts until a level has `width` nodes, or no more than the one before; these are expanded next."""
        self.commit(0)
        self.first()
        before, level = 0, np.arange(len(self._trees))
        while before < len(level) < width:
            before, known = len(level), len(self._trees)
            self._drafter.expand(self._requests, self._trees, level, PLAN)
            level = np.arange(known, len(self._trees))
        self._frontier = level[:width]

    def expand(self) -> int:
        """Expands those; returns how many they were."""
        return self._drafter.expand(self._requests, self._trees, self._frontier, PLAN)

    def end(self) -> None:
        for request in self._requests:
            self._drafter.release(request)
            self._pool.give(request.table.pages)
        self._requests = []

    def _begin(self) -> None:
        self.end()
        params = SamplingParams(temperature=0.0)
        for _ in range(self.batch):
            stop = StopChecker(params, lambda ids: "")
            request = Request("rehearsal", self._tokens(1), params, 0, BlockTable(self._pool), stop)
            self._requests.append(request)
            for start in range(0, self.context, AT_ONCE):
                self._grow(request, min(AT_ONCE, self.context - start))
                self._drafter.start([request], PLAN)

    def _grow(self, request: Request, count: int) -> None:
        """The target has processed `count` more tokens."""
        first = request.table.length
        request.table.reserve(count)
        request.tokens += self._tokens(count)
        request.table.commit(request.tokens, first + count)
        request.table.cover(1)  # as the scheduler does for the round to come
        self._drafter.extend(request, self._drafter.blank(count), first, request.tokens[first : first + count])

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = self._random.integers(0, self._vocab, count).tolist()
        return tokens
