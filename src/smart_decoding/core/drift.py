"""Notices that a drafter has become much worse or better than its calibration says: Page's CUSUM
test, both ways."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import BoolArray, FloatArray, IntArray

MEMORY = 3000.0  # observed children that a calibration remembers of each curve, about
ODDS = 4.0  # the alternatives tested: acceptance odds four times lower, or higher
# Log likelihood ratio that raises the alarm: in the mean, no false one within as many observations
# as a calibration remembers (Lorden's bound).
THRESHOLD = math.log(MEMORY)


class DriftDetector:
    """One pair of tests per source: a drafter with one kind of request. State arrays have shape [2
    (worse, better), sources]."""

    def __init__(self, sources: int) -> None:
        self.evidence = np.zeros((2, sources))
        self.hits = np.zeros((2, sources))
        self.expected = np.zeros((2, sources))

    def reserve(self, sources: int) -> None:
        """Room for drafters up to index `sources` - 1."""
        more = np.zeros((2, max(0, sources - self.evidence.shape[1])))
        self.evidence = np.concatenate((self.evidence, more), axis=1)
        self.hits = np.concatenate((self.hits, more), axis=1)
        self.expected = np.concatenate((self.expected, more), axis=1)

    def update(
        self, source: IntArray, expected: FloatArray, hit: BoolArray
    ) -> list[tuple[int, float]]:
        """After observed children (arrays [observed]): the sources that changed, each with
        accepted / expected since the change began."""
        size = self.evidence.shape[1]
        odds = expected / (1.0 - expected)
        base = np.log1p(odds)
        hits = np.bincount(source, hit, size)
        shift = math.log(ODDS) * hits
        self.evidence[0] += np.bincount(source, base - np.log1p(odds / ODDS), size) - shift
        self.evidence[1] += np.bincount(source, base - np.log1p(odds * ODDS), size) + shift
        self.hits += hits
        self.expected += np.bincount(source, expected, size)
        alive = self.evidence > 0
        self.evidence *= alive
        self.hits *= alive
        self.expected *= alive
        if self.evidence.max() < THRESHOLD:
            return []
        return [
            self._alarm(int(way), int(index))
            for way, index in np.argwhere(self.evidence >= THRESHOLD)
        ]

    def _alarm(self, way: int, index: int) -> tuple[int, float]:
        ratio = (self.hits[way, index] + 0.5) / (self.expected[way, index] + 0.5)
        for array in (self.evidence, self.hits, self.expected):
            array[:, index] = 0.0
        return index, float(ratio)
