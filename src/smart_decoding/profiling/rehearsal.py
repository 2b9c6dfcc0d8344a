"""Levels of a drafter with a model as real rounds have them, bookkeeping included, to be timed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.calibration import DEPTHS, Calibration
from smart_decoding.core.lookahead import RANKS, LookAhead
from smart_decoding.core.policies.chooser import Drafted, Growth
from smart_decoding.core.policies.protocol import DraftPlan
from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.kv import PAGE, BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.kernels.chooser import native_chooser

if TYPE_CHECKING:
    from smart_decoding.drafters.levels import LevelDrafter

PLAN = DraftPlan(speculate=True, levels=8, children=8)
AT_ONCE = 256  # rows that are caught up with together
FREE = np.ones(1 << 14)  # seconds of verifying any number of nodes
MORE = 96  # tokens that requests grow by before they begin anew, if nothing else is said


class Rehearsal:
    """`batch` requests of `context` random tokens, and up to `more`. The drafter's keys are
    overwritten."""

    def __init__(
        self,
        drafter: LevelDrafter[Any],
        pages: int,
        batch: int,
        context: int,
        vocab: int,
        more: int = MORE,
    ) -> None:
        self.batch = batch
        self.context = context
        self._drafter = drafter
        self._pool = PagePool(pages)
        self._more = more
        self._vocab = vocab
        self._random = np.random.default_rng(0)
        self._requests: list[Request] = []
        self._chooser = native_chooser()
        self._grow = drafter.grow if self._chooser is not None else None
        self._trees = DraftTrees.empty(batch)
        self._frontier = np.zeros(0, np.int64)

    @staticmethod
    def fits(pages: int, batch: int, context: int, more: int = MORE) -> bool:
        """Whether the requests at their longest fit into a cache of `pages`."""
        return batch * -(-(context + more + 1) // PAGE) <= pages

    def commit(self, waiting: int) -> None:
        """Every request gets a token, and the first one `waiting` more."""
        longest = self.context + self._more
        if not self._requests or self._requests[0].table.length + 1 + waiting > longest:
            self._begin()
        for request in self._requests:
            self._lengthen(request, 1)
        if waiting:
            self._lengthen(self._requests[0], waiting)

    def first(self) -> None:
        """Runs the first level."""
        if self._grow is not None:
            self._grow(self._requests, self._forced(1, 1))
        else:
            self._trees = self._drafter.start(self._requests, PLAN)

    def reach(self, width: int) -> None:
        """Drafts until a level has `width` nodes, or no more than the one before; these are
        expanded next."""
        self.commit(0)
        if self._grow is not None:  # `expand` drafts the levels before it, too
            return
        self.first()
        before = 0
        level = np.arange(len(self._trees))
        while before < len(level) < width:
            before = len(level)
            known = len(self._trees)
            self._drafter.expand(self._requests, self._trees, level, PLAN)
            level = np.arange(known, len(self._trees))
        self._frontier = level[:width]

    def expand(self, width: int) -> tuple[int, float | None]:
        """Expands those; returns how many they were, and the level's seconds if it knows them."""
        if self._grow is None:
            return self._drafter.expand(self._requests, self._trees, self._frontier, PLAN), None
        levels = 2
        reached = self.batch * PLAN.children
        while reached < width:
            levels += 1
            reached *= PLAN.children
        grown = self._grow(self._requests, self._forced(width, levels))
        return grown.expanded[-1], grown.seconds[-1]

    def _forced(self, width: int, levels: int) -> DraftPlan:
        """A plan by which `width` nodes of each level are expanded: further levels and nodes cost
        nothing in it."""
        assert self._chooser is not None
        drafted = Drafted(
            DraftTrees.empty(self.batch),
            Calibration(),
            limits=np.full(self.batch, levels + 1),
            kind=np.ones(self.batch, np.uint8),
            ends=np.zeros(0, np.int64),
            tokens=self.batch,
            sunk=0.0,
            verify=FREE,
            limit=math.inf,
        )
        ahead = LookAhead(np.full((DEPTHS, RANKS), 0.5))
        growth = Growth(
            self._chooser, drafted, ahead, levels, 1, np.array([width]), np.zeros(width + 1)
        )
        return DraftPlan(True, levels, PLAN.children, growth=growth)

    def end(self) -> None:
        """Releases the requests and their pages."""
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
                self._lengthen(request, min(AT_ONCE, self.context - start))
                self._drafter.start([request], PLAN)

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
