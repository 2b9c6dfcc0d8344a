"""Online correction of a cost table by the times of real steps.

A shared machine changes in two ways. Everything becomes slower or faster: one factor. Or neighbours leave more or less
memory bandwidth: reading the weights, which is all that a few rows cost, takes another time, while many rows, which are
bound by arithmetic, cost what they did, so that the *slope* over rows changes, too: one shift, which fades out with the
rows. What the two do not explain goes into one factor per logarithmic bin of rows."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from smart_decoding.core.tree import FloatArray, IntArray

BINS = 27  # two per octave: centres at 1, 1.4, 2, ... 8192 rows
MAX_ROWS = 8192
CLIP = 0.5  # one observation counts as at most exp(0.5) too slow or too fast: outliers move little
SPEED_GAIN = 0.15
SPEED_SHARE = 0.03  # of an error that the memory could explain as well
BIN_GAIN = 0.03
MOST_MEMORY = 0.6  # beyond, it is no state of the memory
FORGET = 0.9995  # per observation: an unvisited bin drifts back to the table

_POSITION = 2.0 * np.log2(np.maximum(np.arange(MAX_ROWS + 1), 1))
_LOW: IntArray = np.minimum(_POSITION.astype(np.int64), BINS - 2)
_FRACTION: FloatArray = _POSITION - _LOW


@dataclass(frozen=True, slots=True)
class Correction:
    """speed: log factor on every step of the machine. memory: what reading the weights takes more or less, as a part of
    what it takes by the table. log_factor: [BINS]."""

    speed: float = 0.0
    memory: float = 0.0
    seen: int = 0
    log_factor: FloatArray = field(default_factory=lambda: np.zeros(BINS))
    weight: FloatArray = field(default_factory=lambda: np.zeros(BINS))

    def seconds(self, rows: IntArray | slice, table: FloatArray, weights: FloatArray | float) -> FloatArray:
        """What the table's seconds are now, for `rows` or a slice of row counts; `weights`: those of them in which the
        step does nothing but wait for the weights. Bins are interpolated, linear in log rows."""
        if not isinstance(rows, slice):
            rows = np.minimum(rows, MAX_ROWS)
        elif rows.stop > MAX_ROWS:
            rows = np.minimum(np.arange(rows.start, rows.stop), MAX_ROWS)
        low, fraction = _LOW[rows], _FRACTION[rows]
        left = self.log_factor.take(low)
        factor: FloatArray = np.exp(left + (self.log_factor.take(low + 1) - left) * fraction + self.speed)
        factor *= table + self.memory * weights
        return factor

    def updated(self, rows: int, table: float, weights: float, seconds: float) -> Correction:
        """After a step of `rows` rows that took `seconds`; `table` and `weights` as in `seconds()`.

        A clipped step towards the observed log ratio, like a running median. Unusable times (NaN, zero, negative)
        change nothing."""
        if not (math.isfinite(seconds) and seconds > 0 and table > 0):
            return self
        row = min(max(rows, 0), MAX_ROWS)
        low, right = int(_LOW[row]), float(_FRACTION[row])
        left = 1.0 - right
        present = left * float(self.log_factor[low]) + right * float(self.log_factor[low + 1])
        speed, memory = self.speed, self.memory
        now = table + memory * weights
        clip = max(CLIP, 2.0 / (self.seen + 1))
        error = min(max(math.log(seconds / now) - speed - present, -clip), clip)
        gain, slope = max(SPEED_GAIN, 0.5 / (self.seen + 1)), weights / now  # slope: of log seconds over `memory`
        step = gain * error / (SPEED_SHARE + slope**2)
        speed, error = speed + SPEED_SHARE * step, (1 - gain) * error
        memory = min(max(memory + slope * step, -MOST_MEMORY), MOST_MEMORY)
        log_factor, weight = self.log_factor * FORGET, self.weight * FORGET
        for index, part in ((low, left), (low + 1, right)):
            if part > 0:
                weight[index] += part
                log_factor[index] += part * error * max(BIN_GAIN, 0.1 / (1.0 + weight[index]))
        return Correction(speed, memory, self.seen + 1, log_factor, weight)
