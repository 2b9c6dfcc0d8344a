"""When to leave the mode predicted best, so that predictions stay true, and at what cost.

Deterministic and bounded: it spends a share of the time, and backs off while it finds nothing.
"""

from __future__ import annotations

import math

MIN_BACKOFF = 8  # rounds between two explorations, doubled by each that finds nothing
MAX_BACKOFF = 32
CLEAR_BACKOFF = 128  # rounds at most where the last one left little doubt
CLEAR_LOSS = 0.15  # part of a plain round's seconds: a larger loss leaves little doubt
RETRIES = 4  # explorations in a row after one that turned out well
MAX_RUN = 12  # explorations in a row, for those who learn from them only then
UNLIKELY_SHARE = 0.25  # of the budget, once backed off from a mode that is far worse
CREDIT_ROUNDS = 400  # unspent budget is kept for this many rounds


class Exploration:
    """Spends at most `budget` of the time, plus one run, on the mode that is not predicted best.

    A mode that turns out well earns its gain and is retried at once: a drafter that has recovered
    is back soon."""

    def __init__(self, budget: float, max_run: float = math.inf) -> None:
        """budget: share of the time. max_run: explorations in a row."""
        self.budget = budget
        self.max_run = max_run
        self.credit = 0.0  # seconds
        self.cost = 0.0  # seconds that the next exploration will take
        self.spent = 0.0  # seconds lost to explorations in all, gains not counted
        self.count = 0
        self.retries = 0  # failures in a row that a success still excuses
        self.backoff = MIN_BACKOFF
        self.waited = 0  # rounds since the last exploration
        self.unlikely = False  # whether the other mode is predicted to be far worse
        self._run = 0  # explorations in a row
        self._gained = False  # whether one of them was better

    @property
    def rounds_left(self) -> int:
        """Rounds before an exploration can be due at all, as far as that is known."""
        if self.retries > 0:
            return 0
        if self.waited < self.backoff:
            return self.backoff - self.waited - 1
        return 2 * MAX_BACKOFF

    @property
    def backs_off(self) -> bool:
        """Whether none can be due now, whatever its cost."""
        return self.budget <= 0 or (self.retries <= 0 and self.waited < self.backoff)

    def due(self, cost: float) -> bool:
        """Whether this round may explore, for about `cost` seconds."""
        self.cost = cost
        return not self.backs_off and self.credit >= cost

    def observe_best(self, seconds: float) -> None:
        """After a round in the mode predicted best."""
        self.waited += 1
        earned = self.budget * seconds
        most = max(earned * CREDIT_ROUNDS, self.cost)
        if self.unlikely and self.backoff >= MAX_BACKOFF:
            earned *= UNLIKELY_SHARE
        self.credit = min(self.credit + earned, most)

    def observe(self, loss: float, promising: bool | None = None, clear: bool = False) -> None:
        """After an exploration that lost `loss` seconds against the best mode (negative: gained).

        promising: whether others shall follow at once (None: if it gained). clear: whether it
        leaves little doubt."""
        self._pay(loss)
        self._run += 1
        self._gained = self._gained or loss < 0
        promising = loss < 0 if promising is None else promising
        self.retries = RETRIES if promising else self.retries - 1
        if self.retries <= 0 or self._run >= self.max_run:
            wider = MIN_BACKOFF if self._gained else max(2 * self.backoff, MIN_BACKOFF)
            self.backoff = min(wider, CLEAR_BACKOFF if clear else MAX_BACKOFF)
            self._end_run(min(self.retries, 0))

    def observe_unmeasured(self) -> None:
        """After one that told nothing: it costs what was expected, and the next one waits."""
        self._pay(self.cost)

    def mode_changed(self) -> None:
        """Another mode is predicted best now: check again soon."""
        self.backoff = MIN_BACKOFF
        self.waited = 0
        self._end_run(0)

    def _pay(self, loss: float) -> None:
        self.count += 1
        self.waited = 0
        self.credit -= loss
        self.spent += max(loss, 0.0)

    def _end_run(self, retries: int) -> None:
        self.retries = retries
        self._run = 0
        self._gained = False
