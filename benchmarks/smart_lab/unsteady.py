"""A machine for replays whose costs change while a policy runs: states of its memory take turns,
and every step is noisy.

Needed by tests/lab/test_unsteady.py, which holds that `smart` follows a machine that changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from smart_lab.replay import StepCosts

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel

OUTLIERS, OUTLIER = 0.03, 1.5  # share of steps that take so many times as long


class Unsteady:
    """StepCosts at one batch size. states: the costs that take turns, each for `lasts` tokens on
    average; noise: standard deviation of a step's log seconds.

    Turns are counted in tokens, so that every policy does the same work in the same state: ratios
    are paired."""

    def __init__(
        self,
        states: Sequence[CostModel],
        batch_size: int,
        lasts: float,
        noise: float = 0.06,
        seed: int = 0,
    ) -> None:
        self._states = [StepCosts(cost, batch_size) for cost in states]
        self._lasts, self._noise = lasts, noise
        self._turns, self._rng = np.random.default_rng(seed), np.random.default_rng([seed, 1])
        self._state, self._left = -1, 0.0
        self.advance(0)

    def verify(self, rows: int, context: float, beyond: float = 0.0) -> float:
        return self._noisy(self._states[self._state].verify(rows, context, beyond))

    def levels(self, widths: Sequence[int], context: float) -> list[float]:
        return [
            self._noisy(seconds) for seconds in self._states[self._state].levels(widths, context)
        ]

    def advance(self, tokens: int) -> None:
        """After a round of so many tokens."""
        self._left -= tokens
        while self._left <= 0:
            self._state = (self._state + 1) % len(self._states)
            self._left += float(self._turns.exponential(self._lasts))

    def _noisy(self, seconds: float) -> float:
        outlier = OUTLIER if self._rng.random() < OUTLIERS else 1.0
        return seconds * outlier * float(np.exp(self._noise * self._rng.standard_normal()))
