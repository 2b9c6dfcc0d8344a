"""A running mean, for all that is learned one round at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass

HORIZON = 32  # rounds for which what was learned or decided holds; lessons and rests last as long


@dataclass(slots=True)
class RunningMean:
    """mean: of what was observed, older values fading. clip: one observation moves it as if it were
    at most so far away. seen: observations."""

    mean: float = 0.0
    clip: float = math.inf
    seen: int = 0

    def observe(self, value: float) -> None:
        """Counts a value; one that is not finite changes nothing."""
        if not math.isfinite(value):
            return
        self.seen += 1
        error = value - self.mean
        if self.seen > 1:
            error = min(max(error, -self.clip), self.clip)
        self.mean += error * max(1 / HORIZON, 1 / self.seen)
