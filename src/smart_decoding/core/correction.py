"""Online correction of a cost table by the times of real steps: one factor for the machine's present speed, one per
logarithmic bin of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from smart_decoding.core.tree import FloatArray, IntArray

BINS = 27  # two per octave: centres at 1, 1.4, 2, ... 8192 rows
MAX_ROWS = 8192
CLIP = 0.5  # one observation counts as at most exp(0.5) too slow or too fast: outliers move little
SPEED_GAIN = 0.1
BIN_GAIN = 0.05
FORGET = 0.9995  # per observation: an unvisited bin drifts back to the table

_POSITION = 2.0 * np.log2(np.maximum(np.arange(MAX_ROWS + 1), 1))
_LOW: IntArray = np.minimum(_POSITION.astype(np.int64), BINS - 2)
_FRACTION: FloatArray = _POSITION - _LOW


@dataclass(frozen=True, slots=True)
class Correction:
    """Log factors on predicted seconds. `speed` is shared by every step of the machine; arrays have shape [BINS]."""

    speed: float = 0.0
    seen: int = 0
    log_factor: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    weight: FloatArray = field(default_factory=lambda: np.zeros(BINS))

    def factor(self, rows: IntArray | slice) -> FloatArray:
        """Multiplier for `rows` (or a slice of row counts), linear in log rows between bins."""
        if not isinstance(rows, slice):
            rows = np.minimum(rows, MAX_ROWS)
        elif rows.stop > MAX_ROWS:
            rows = np.minimum(np.arange(rows.start, rows.stop), MAX_ROWS)
        low, fraction = _LOW[rows], _FRACTION[rows]
        left = self.log_factor.take(low)
        result: FloatArray = np.exp(left + (self.log_factor.take(low + 1) - left) * fraction + self.speed)
        return result

    def updated(self, rows: int, predicted: float, seconds: float, shared: float | None = None) -> Correction:
        """After a step of `rows` rows that took `seconds` where the uncorrected table says `predicted`.

        A clipped step towards the observed log ratio, like a running median. `shared` takes the machine's speed from
        another correction instead of learning it here. Unusable times (NaN, zero, negative) change nothing."""
        if not (math.isfinite(seconds) and seconds > 0 and predicted > 0):
            return self
        row = min(max(rows, 0), MAX_ROWS)
        low, right = int(_LOW[row]), float(_FRACTION[row])
        left = 1.0 - right
        present = left * float(self.log_factor[low]) + right * float(self.log_factor[low + 1])
        speed = self.speed if shared is None else shared
        clip = max(CLIP, 2.0 / (self.seen + 1))
        error = min(max(math.log(seconds / predicted) - speed - present, -clip), clip)
        if shared is None:
            gain = max(SPEED_GAIN, 0.5 / (self.seen + 1))
            speed, error = speed + gain * error, (1 - gain) * error
        log_factor, weight = self.log_factor * FORGET, self.weight * FORGET
        for index, share in ((low, left), (low + 1, right)):
            if share > 0:
                weight[index] += share
                log_factor[index] += share * error * max(BIN_GAIN, 0.5 / (1.0 + weight[index]))
        return Correction(speed, self.seen + 1, log_factor, weight)
