"""Seconds over a count of rows, as measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray


_TINY = float(np.finfo(float).tiny)


@dataclass(frozen=True, slots=True)
class Curve:
    """Linear between points, constant before the first, linear beyond the last with the mean slope
    of the upper half (one flat last step must not make further rows look free)."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    @classmethod
    def from_table(cls, table: Mapping[int, float]) -> Curve:
        """From {rows: seconds}, taken as they are. Raises ValueError for unusable ones."""
        rows = sorted(table)
        seconds = [float(table[r]) for r in rows]
        if not rows or rows[0] < 0 or not all(math.isfinite(s) and s > 0 for s in seconds):
            raise ValueError("a cost curve needs positive, finite seconds at row counts from 0")
        return cls(tuple(int(r) for r in rows), tuple(seconds))

    @classmethod
    def monotone(cls, samples: Mapping[float, list[float]]) -> Curve:
        """Medians per (whole) row count, made non-decreasing by isotonic regression of their
        logarithms."""
        rows = sorted(samples)
        logs = np.log([float(np.median(samples[r])) for r in rows])
        weights = np.array([len(samples[r]) for r in rows], np.float64)
        seconds = np.exp(non_decreasing(logs, weights)).tolist()
        return cls(tuple(int(r) for r in rows), tuple(seconds))

    def beyond_first(self) -> Curve:
        """What further rows add; no curve holds a zero."""
        return Curve(self.rows, tuple(max(s - self.seconds[0], _TINY) for s in self.seconds))

    def dense(self, size: int) -> FloatArray:
        """Seconds at 0, 1, ... size - 1 rows."""
        grid: FloatArray = np.arange(size, dtype=np.float64)
        values: FloatArray = np.interp(grid, self.rows, self.seconds)
        last = self.rows[-1]
        values[last:] = self.seconds[-1] + self._slope() * (grid[last:] - last)
        return values

    def _slope(self) -> float:
        last = self.rows[-1]
        if len(self.rows) == 1:
            return self.seconds[-1] / max(last, 1)
        half = max(i for i, rows in enumerate(self.rows[:-1]) if rows <= last / 2 or i == 0)
        return max(0.0, (self.seconds[-1] - self.seconds[half]) / (last - self.rows[half]))

    def to_lists(self) -> list[list[float]]:
        """Rows and seconds; `from_lists` is the inverse."""
        return [list(self.rows), list(self.seconds)]

    @classmethod
    def from_lists(cls, lists: list[list[float]]) -> Curve:
        """Raises TypeError or ValueError for what `to_lists` never wrote."""
        return cls.from_table(dict(zip(*lists, strict=True)))


def non_decreasing(values: FloatArray, weights: FloatArray) -> FloatArray:
    """The non-decreasing sequence closest to `values` by weighted least squares: neighbours that
    decrease become one, at their mean (pool adjacent violators)."""
    blocks: list[tuple[float, float, int]] = []  # mean, weight, values
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        blocks.append((value, weight, 1))
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            (low, first, n), (high, second, m) = blocks[-2:]
            mean = (low * first + high * second) / (first + second)
            blocks[-2:] = [(mean, first + second, n + m)]
    return np.repeat([mean for mean, _, _ in blocks], [count for _, _, count in blocks])
