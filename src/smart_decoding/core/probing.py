"""When to try what is believed to be worse, so that beliefs stay true, and at what price:
deterministic and bounded."""

from __future__ import annotations

import math

FIRST_GAP, LAST_GAP = (
    8,
    32,
)  # rounds between probes of the other mode: doubled by each that shows nothing
CLEAR, CLEAR_GAP = (
    0.15,
    128,
)  # or of this many, where a plain round has lost more than this part of its time
HOPE = 4  # probes in a row after one that turned out well
RUN = 12  # probes in a row at most, for who learns from them only then
RARELY = (
    0.25  # of the budget, once probes have shown nothing and a change for the better is unlikely
)
CREDIT_ROUNDS = 400  # unspent budget is kept for this many rounds


class Prober:
    """Spends at most `budget` of the time (plus one run of probes) on rounds in the mode that is
    not believed best.

    Probes that turn out well earn their gain and are repeated at once: a drafter that has recovered
    is back soon."""

    def __init__(self, budget: float, most: float = math.inf) -> None:
        """most: probes in a row."""
        self.budget, self.most = budget, most
        self.credit = 0.0  # seconds
        self.price = 0.0  # seconds that the next probe will cost
        self.spent = 0.0  # seconds lost to probes in all, gains not counted
        self.hope = 0  # failures in a row that a success still excuses
        self.gap = FIRST_GAP
        self.run, self.gained = 0, False  # probes in a row, and whether one of them was better
        self.waited = 0
        self.count = 0
        self.unlikely = False  # whether the other mode is believed to be far worse

    @property
    def patience(self) -> int:
        """Rounds before a probe can be due at all, as far as that is known."""
        if self.hope > 0:
            return 0
        return self.gap - self.waited - 1 if self.waited < self.gap else 2 * LAST_GAP

    @property
    def waits(self) -> bool:
        """Whether no probe can be due now, whatever its price."""
        return self.budget <= 0 or (self.hope <= 0 and self.waited < self.gap)

    def due(self, price: float) -> bool:
        """Whether this round may probe, for about `price` seconds."""
        self.price = price
        return not self.waits and self.credit >= price

    def ordinary_round(self, seconds: float) -> None:
        """After a round in the believed mode."""
        self.waited += 1
        earned = self.budget * seconds
        most = max(earned * CREDIT_ROUNDS, self.price)
        if self.unlikely and self.gap >= LAST_GAP:
            earned *= RARELY
        self.credit = min(self.credit + earned, most)

    def probe_round(self, loss: float, hopeful: bool | None = None, clear: bool = False) -> None:
        """After a probe that cost `loss` seconds more than the believed mode would have (negative:
        it was better).

        hopeful: whether more of them shall follow at once (None: if it was better). clear: whether
        it leaves little doubt."""
        self._pay(loss)
        self.run, self.gained = self.run + 1, self.gained or loss < 0
        self.hope = HOPE if (loss < 0 if hopeful is None else hopeful) else self.hope - 1
        if self.hope <= 0 or self.run >= self.most:
            wider = FIRST_GAP if self.gained else max(2 * self.gap, FIRST_GAP)
            self.gap = min(wider, CLEAR_GAP if clear else LAST_GAP)
            self.hope, self.run, self.gained = min(self.hope, 0), 0, False

    def lost(self) -> None:
        """After a probe that told nothing: it is paid for as was expected, and the next one waits
        as after any."""
        self._pay(self.price)

    def _pay(self, loss: float) -> None:
        self.count += 1
        self.waited = 0
        self.credit -= loss
        self.spent += max(loss, 0.0)

    def mode_changed(self) -> None:
        """The believed mode is another one now: soon check again."""
        self.gap, self.waited = FIRST_GAP, 0
        self.hope, self.run, self.gained = 0, 0, False
