"""Online correction of a cost table by the times of real steps.

A shared machine changes in two ways. Everything becomes slower or faster: one factor. Or neighbours
leave more or less memory bandwidth: reading the weights, which is all that a few rows cost, takes
another time, while many rows, which are bound by arithmetic, cost what they did, so that the
*slope* over rows changes, too: one shift, which fades out with the rows. What the two do not
explain is the table's own error: a factor that is smooth over the logarithm of the rows.

The three are told apart by a Kalman filter (extended, as the shift acts within a logarithm): speed
and memory wander quickly about the table's, and the table's error is a Gaussian process over bins.
What a step of 24 rows says of 32 rows, of one row, and of the machine follows from how uncertain
each of them is; a rare exploration settles what many steps of one size left open.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray, IntArray

MAX_ROWS = 8192  # further ones are corrected as these
BINS = 2 * (MAX_ROWS.bit_length() - 1) + 1  # two per octave: centres at 1, 1.4, 2, ... rows
NOISE = 0.06  # of one step's time: standard deviation of its logarithm
# Standard deviations beyond which an observation surprises: it counts as no further off, since
# outliers should move little, and the speed becomes less certain: it may be a new state.
SURPRISE = 2.0
# Prior standard deviations.
SPEED = 0.2
MEMORY = 0.8
TABLE = 2 * NOISE  # its entries are medians of a few steps, of another day
WALK = 1 / 16  # of speed and memory, per observation, over their prior standard deviations
REACH = 10.0  # bins over which the table's error is alike

_POSITION = 2.0 * np.log2(np.maximum(np.arange(MAX_ROWS + 1), 1))
_LOW: IntArray = np.minimum(_POSITION.astype(np.int64), BINS - 2)
_FRACTION: FloatArray = _POSITION - _LOW
_DISTANCE = np.abs(np.subtract.outer(np.arange(BINS), np.arange(BINS)))
_ALIKE: FloatArray = TABLE**2 * np.exp(-_DISTANCE / REACH)


def _covariance(speed: float, memory: float, table: FloatArray) -> FloatArray:
    covariance = np.zeros((BINS + 2, BINS + 2))
    covariance[0, 0] = speed**2
    covariance[1, 1] = memory**2
    covariance[2:, 2:] = table
    return covariance


# What an observation's time leaves of the state, and adds to the uncertainty: what is not observed
# becomes as uncertain as it was at first, and no more.
_KEEP = np.ones(BINS + 2)
_KEEP[:2] = math.sqrt(1.0 - WALK**2)
_KEEP_BOTH = np.multiply.outer(_KEEP, _KEEP)
_WALK = _covariance(WALK * SPEED, WALK * MEMORY, np.zeros_like(_ALIKE))


@dataclass(frozen=True, slots=True)
class Correction:
    """mean: [2 + BINS] log factors: speed, on every step of the machine; memory, on reading the
    weights; and the table's error by bin. covariance: of these.

    All three are logarithms, so that a step that only reads weights is linear in them: the filter
    would drift along a curve."""

    mean: FloatArray = field(default_factory=lambda: np.zeros(BINS + 2))
    covariance: FloatArray = field(default_factory=lambda: _covariance(SPEED, MEMORY, _ALIKE))

    def seconds(
        self, rows: IntArray | slice, table: FloatArray, weights: FloatArray | float
    ) -> FloatArray:
        """What the table's seconds are now, for `rows` or a slice of row counts; `weights`: those
        of them in which the step does nothing but wait for the weights. Bins are interpolated,
        linear in log rows."""
        if not isinstance(rows, slice):
            rows = np.minimum(rows, MAX_ROWS)
        elif rows.stop > MAX_ROWS:
            rows = np.minimum(np.arange(rows.start, rows.stop), MAX_ROWS)
        low = _LOW[rows]
        error = self.mean[2:]
        left = error.take(low)
        between = (error.take(low + 1) - left) * _FRACTION[rows]
        factor: FloatArray = np.exp(left + between + self.mean[0])
        factor *= table + math.expm1(self.mean[1]) * np.minimum(weights, table)
        return factor

    def updated(
        self, rows: float, table: float, weights: float, seconds: float, steps: int = 1
    ) -> Correction:
        """After a step of `rows` rows that took `seconds`, or the means of `steps`; `table` and
        `weights` as in `seconds()`.

        Unusable times (NaN, zero, negative) change nothing."""
        if not (math.isfinite(seconds) and seconds > 0 and table > 0):
            return self
        position = 2.0 * math.log2(min(max(rows, 1), MAX_ROWS))
        low = min(int(position), BINS - 2)
        right = position - low
        left = 1.0 - right
        mean = self.mean * _KEEP
        speed, memory, left_error, right_error = mean[[0, 1, 2 + low, 3 + low]].tolist()
        weights = min(weights, table)  # a noisy profile may say that they take longer
        now = table + math.expm1(memory) * weights
        slope = math.exp(memory) * weights / now
        covariance = self.covariance * _KEEP_BOTH + _WALK

        def along_row(x: FloatArray) -> FloatArray:
            """The log seconds' derivatives, which are sparse, times `x`."""
            product: FloatArray = x[0] + slope * x[1] + left * x[2 + low] + right * x[3 + low]
            return product

        along = along_row(covariance)
        spread = math.sqrt(float(along_row(along)) + NOISE**2 / steps)
        error = math.log(seconds / now) - speed - left * left_error - right * right_error
        gain = along / spread
        mean += gain * min(max(error / spread, -SURPRISE), SURPRISE)
        covariance -= np.multiply.outer(gain, gain)
        if abs(error) > SURPRISE * spread:
            covariance[0, 0] += (0.5 * SPEED) ** 2
        return Correction(mean, covariance)
