"""What a step of a serving engine costs, learned from its own steps: no profile, numpy only.

    seconds(batch, drafts, levels) = plain(batch) + fixed + per_draft · drafts + per_level · levels

`plain` is learned from steps that verify nothing, the rest from those that do, both around knots,
two for each doubling of the batch size. A knot that was not met yet starts from the nearest one
that was, and the first of all from a cheap guess: what is predicted too cheap is tried, and so
found out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from smart_decoding.core.running import RunningMean

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

SLOW = 2.0  # one slow step counts as at most so many times the usual
PRIOR = 4.0  # observations that a starting guess is worth
# Per observation of the same knot: what a slow start taught must go, or drafts stay off.
MEMORY = 0.99
SOLVE_EVERY = 4  # observations of a knot, once it has many: numpy has its price
ENOUGH = 4  # observations without which nothing is known


class Extra(NamedTuple):
    """Seconds beyond a plain step."""

    fixed: float
    per_draft: float
    per_level: float


GUESS = Extra(0.0, 0.002, 0.03)  # in plain steps


@dataclass
class _Knot:
    """Least squares: extra seconds over (1, drafts, levels).

    waiting: drafts, levels and extra seconds that are not solved for yet."""

    coefficients: Extra
    moments: FloatArray = field(default_factory=lambda: np.zeros((3, 3)))
    products: FloatArray = field(default_factory=lambda: np.zeros(3))
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
        self._plain: dict[int, RunningMean] = {}  # log seconds by knot, ascending
        self._extra: dict[int, _Knot] = {}
        self.plain_steps = 0

    @property
    def known(self) -> bool:
        """Whether enough plain steps were seen to tell anything."""
        return self.plain_steps >= ENOUGH

    def plain(self, batch: int) -> float:
        """Seconds of a step that verifies no draft and drafts nothing: between the knots that were
        met, and as at the nearest one beyond them."""
        means = [mean.mean for mean in self._plain.values()]
        return math.exp(np.interp(_position(batch), list(self._plain), means))

    def extra(self, batch: int) -> Extra:
        """Seconds beyond a plain step."""
        found = self._extra.get(round(_position(batch)))
        return found.coefficients if found is not None else self._guess(batch)

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
        knot = round(_position(batch))
        mean = self._plain.get(knot)
        if mean is None:
            mean = RunningMean(math.log(seconds), clip=math.log(SLOW))
            self._plain = dict(sorted({**self._plain, knot: mean}.items()))
        mean.observe(mean.mean + math.log(seconds / self.plain(batch)))

    def _observe_extra(self, batch: int, drafts: int, levels: int, seconds: float) -> None:
        plain = self.plain(batch)
        guess = self._guess(batch)
        knot = self._extra.setdefault(round(_position(batch)), _Knot(guess))
        fixed, per_draft, per_level = knot.coefficients
        expected = plain + fixed + per_draft * drafts + per_level * levels
        seconds = min(max(seconds, expected / SLOW), expected * SLOW)
        knot.waiting.append((drafts, levels, seconds - plain))
        knot.seen += 1
        if len(knot.waiting) >= min(SOLVE_EVERY, 1 + knot.seen // SOLVE_EVERY):
            knot.solve(guess, batch)

    def _guess(self, batch: int) -> Extra:
        """What a knot costs before it is met: as the nearest one that was, else GUESS."""
        own = round(_position(batch))
        known = [knot for knot in self._extra if self._extra[knot].seen > ENOUGH and knot != own]
        if known:
            return self._extra[min(known, key=lambda knot: abs(knot - own))].coefficients
        plain = self.plain(batch)
        return Extra(*(part * plain for part in GUESS))


def _position(batch: int) -> float:
    """Where a batch size lies between the knots, which are at whole numbers."""
    return 2.0 * math.log2(max(batch, 1))
