"""What a step of a serving engine costs, learned from its own steps: no profile, numpy only.

    seconds(batch, drafts, levels) = plain(batch) + fixed + per_draft · drafts + per_level · levels

`plain` is learned from steps that verify nothing, by batch size; the rest, per range of batch
sizes, from those that do. A range that was not met yet starts from the nearest one that was, and
the first of all from a cheap guess: what is predicted too cheap is tried, and so found out.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

KNOTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024)  # batch sizes
PRIOR = 4.0  # observations that a starting guess is worth
# Per observation of the same range: what a slow start taught must go, or drafts stay off.
MEMORY = 0.99
GAIN = 0.05  # of a running mean
CLIP = 0.3  # one odd step counts as at most 30 % off
FIRST_CLIP = 4.0  # at first
# Observations of a range: later ones are solved for four at a time, as numpy has its price.
FIRST_SOLVED = 8
SOLVE_EVERY = 4
ENOUGH = 4  # plain steps without which nothing is known


class Extra(NamedTuple):
    """Seconds beyond a plain step."""

    fixed: float
    per_draft: float
    per_level: float


GUESS = Extra(0.0, 0.002, 0.03)  # in plain steps
NO_EXTRA = Extra(0.0, 0.0, 0.0)


@dataclass
class _Range:
    """Least squares of one range of batch sizes: extra seconds over (1, drafts, levels).

    waiting: drafts, levels and extra seconds that are not solved for yet."""

    moments: FloatArray = field(default_factory=lambda: np.zeros((3, 3)))
    products: FloatArray = field(default_factory=lambda: np.zeros(3))
    coefficients: Extra = NO_EXTRA
    seen: int = 0
    waiting: list[tuple[int, int, float]] = field(default_factory=list)

    def solve(self, guess: Extra, batch: int) -> None:
        """Coefficients from all that was observed, `guess` being worth PRIOR observations."""
        columns = np.array(self.waiting)
        self.waiting.clear()
        features = np.column_stack((np.ones(len(columns)), columns[:, :2]))
        fade = MEMORY ** len(columns)
        self.moments = self.moments * fade + features.T @ features
        self.products = self.products * fade + columns[:, 2] @ features
        ridge = PRIOR * np.array([1.0, float(batch * batch), 4.0])
        solved = np.linalg.solve(
            self.moments + np.diag(ridge), self.products + ridge * np.array(guess)
        )
        self.coefficients = Extra(*np.maximum(solved, 0.0).tolist())


class StepCosts:
    """Seconds of a step. batch: sequences. drafts: draft tokens verified in all. levels: passes of
    a draft model."""

    def __init__(self) -> None:
        self._plain = [0.0] * len(KNOTS)
        self._weight = [0.0] * len(KNOTS)
        self._ranges: dict[int, _Range] = {}
        self.plain_steps = 0

    @property
    def known(self) -> bool:
        """Whether enough plain steps were seen to tell anything."""
        return self.plain_steps >= ENOUGH

    def plain(self, batch: int) -> float:
        """Seconds of a step that verifies no draft and drafts nothing."""
        low, share = _place(batch)
        return self._at(low) * (1.0 - share) + (self._at(low + 1) * share if share else 0.0)

    def extra(self, batch: int) -> Extra:
        """Seconds beyond a plain step."""
        found = self._ranges.get(_place(batch)[0])
        return found.coefficients if found is not None and found.seen else self._guess(batch)

    def observe(self, batch: int, drafts: int, levels: int, seconds: float) -> None:
        """After one real step that prefilled nothing. Unusable times change nothing."""
        if not (math.isfinite(seconds) and seconds > 0 and batch > 0):
            return
        if drafts or levels:
            if self.known:
                self._observe_extra(batch, drafts, levels, seconds)
        else:
            self._observe_plain(batch, seconds)

    def _observe_plain(self, batch: int, seconds: float) -> None:
        self.plain_steps += 1
        low, share = _place(batch)
        expected = self.plain(batch) if self.plain_steps > 1 else seconds
        for knot, part in ((low, 1.0 - share), (low + 1, share)):
            if part <= 0:
                continue
            self._plain[knot] = self._at(knot) or seconds
            self._weight[knot] += part
            limit = CLIP if self._weight[knot] > ENOUGH else FIRST_CLIP
            error = min(max(seconds - expected, -limit * expected), limit * expected)
            self._plain[knot] += part * error * max(GAIN, 1.0 / (1.0 + self._weight[knot]))

    def _observe_extra(self, batch: int, drafts: int, levels: int, seconds: float) -> None:
        plain = self.plain(batch)
        guess = self._guess(batch)
        known = self._ranges.setdefault(_place(batch)[0], _Range())
        fixed, per_draft, per_level = known.coefficients if known.seen else guess
        expected = fixed + per_draft * drafts + per_level * levels
        room = CLIP * (plain + expected) if known.seen > ENOUGH else plain
        extra = min(max(seconds - plain, expected - room), expected + room)
        known.waiting.append((drafts, levels, extra))
        known.seen += 1
        if known.seen <= FIRST_SOLVED or len(known.waiting) >= SOLVE_EVERY:
            known.solve(guess, batch)

    def _guess(self, batch: int) -> Extra:
        """What a range costs before it is seen: the nearest one that was seen, else GUESS."""
        own = _place(batch)[0]
        seen = [knot for knot, known in self._ranges.items() if known.seen > ENOUGH and knot != own]
        if seen:
            return self._ranges[min(seen, key=lambda knot: abs(knot - own))].coefficients
        plain = self.plain(batch)
        return Extra(*(part * plain for part in GUESS))

    def _at(self, knot: int) -> float:
        """Plain seconds at a knot, interpolated between those that were met (flat outside)."""
        if self._weight[knot] > 0:
            return self._plain[knot]
        met = [index for index, weight in enumerate(self._weight) if weight > 0]
        return float(np.interp(knot, met, [self._plain[index] for index in met])) if met else 0.0


def _place(batch: int) -> tuple[int, float]:
    """(index of the knot at or below, share of the next one)."""
    batch = min(max(batch, 1), KNOTS[-1])
    above = bisect_left(KNOTS, batch)
    if KNOTS[above] == batch:
        return above, 0.0
    low = above - 1
    return low, (batch - KNOTS[low]) / (KNOTS[above] - KNOTS[low])
