"""What drafted rounds reach of the rate that is forecast for them."""

from __future__ import annotations

import math
from collections import defaultdict

from smart_decoding.core.calibration import RunningMean
from smart_decoding.core.costs import size_bucket

UNSURE = 0.3  # standard deviation of one request's log rate in a round over its forecast


class Realised:
    """All tokens of some rounds, over those that were forecast for their seconds, by size bucket:
    the mean of single rounds' ratios would say less than all of them together reach."""

    def __init__(self) -> None:
        self._tokens: defaultdict[int, RunningMean] = defaultdict(RunningMean)
        self._forecast: defaultdict[int, RunningMean] = defaultdict(RunningMean)

    def of(self, size: int) -> float:
        """The ratio for batches of about this size, with optimism: what was hardly tried may be
        better."""
        bucket = size_bucket(size)
        tokens = self._tokens[bucket]
        optimism = math.exp(UNSURE / math.sqrt((1 + tokens.seen) * size))
        return optimism * tokens.mean / self._forecast[bucket].mean if tokens.seen else optimism

    def observe(self, size: int, tokens: float, forecast: float) -> None:
        """After a round that brings so many tokens, in place of those forecast."""
        bucket = size_bucket(size)
        self._tokens[bucket].observe(tokens)
        self._forecast[bucket].observe(forecast)
