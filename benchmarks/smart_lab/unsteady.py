"""A machine for replays whose costs change while a policy runs: states of its memory take turns,
and every step is noisy.

Needed by `never-slower`, and by tests/lab/test_unsteady.py, which holds that `smart` follows a
machine that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from smart_lab.replay import READ, StepCosts

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_lab.replay import Drafted, Walk

NOISE = 0.06  # standard deviation of a step's log seconds
OUTLIERS, OUTLIER = 0.03, 1.5  # share of steps that take so many times as long


class Turns:
    """Numbers below `count` that take turns, each for `lasts` tokens on average (inf: for ever).
    now: the one whose turn it is."""

    def __init__(self, count: int, lasts: float, rng: np.random.Generator) -> None:
        self._count, self._lasts, self._rng = count, lasts, rng
        self.now, self._left = -1, 0.0
        self.advance(0)

    def advance(self, tokens: int) -> None:
        """After a round of so many tokens."""
        self._left -= tokens
        while self._left <= 0:
            self.now = (self.now + 1) % self._count
            self._left += float(self._rng.exponential(self._lasts))


def noisy(seconds: float, rng: np.random.Generator, noise: float = NOISE) -> float:
    """Return what a step of so many seconds takes this time."""
    outlier = OUTLIER if rng.random() < OUTLIERS else 1.0
    return seconds * outlier * float(np.exp(noise * rng.standard_normal()))


class Unsteady:
    """StepCosts at one batch size. states: the costs that take turns, each for `lasts` tokens on
    average; noise: standard deviation of a step's log seconds.

    Turns are counted in tokens, so that every policy does the same work in the same state: ratios
    are paired."""

    prompts = READ

    def __init__(
        self,
        states: Sequence[CostModel],
        batch_size: int,
        lasts: float,
        noise: float = NOISE,
        seed: int = 0,
    ) -> None:
        self._states = [StepCosts(cost, batch_size) for cost in states]
        self._noise, self._rng = noise, np.random.default_rng([seed, 1])
        self._turns = Turns(len(states), lasts, np.random.default_rng(seed))

    def experts(self, done: Drafted, walk: Walk) -> float:
        """Return 0: no model here is a mixture."""
        return 0.0

    def verify(self, rows: int, context: float, beyond: float = 0.0, experts: float = 0.0) -> float:
        state = self._states[self._turns.now]
        return noisy(state.verify(rows, context, beyond), self._rng, self._noise)

    def levels(self, widths: Sequence[int], context: float) -> list[float]:
        levels = self._states[self._turns.now].levels(widths, context)
        return [noisy(seconds, self._rng, self._noise) for seconds in levels]

    def advance(self, tokens: int) -> None:
        """After a round of so many tokens."""
        self._turns.advance(tokens)
