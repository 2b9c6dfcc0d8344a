"""What drafted rounds reach of the rate that is forecast for them, and what a model catches up with
in its rounds."""

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


class CatchingUp:
    """Rows beyond those of any round that a model has caught up with in the rounds that it drafted
    in, by size bucket.

    Where new requests come all the time, a prompt serves the few rounds until the next one comes,
    and not until its own answer ends."""

    def __init__(self) -> None:
        self._known: dict[int, RunningMean] = {}
        self._believed: dict[int, RunningMean] = {}  # of sizes that are not known yet

    def rounds(self, size: int, missed: int, held: float, stay: int) -> float:
        """How many rounds catching up with `missed` rows serves, `stay` at most: as many as usually
        miss so much together.

        Before any round is known these are `held` rows in `stay` rounds. That weighs as much as
        those rounds, and fades as they do."""
        if not missed:
            return stay
        bucket = size_bucket(size)
        rows = self._known.get(bucket)
        if rows is None:
            rows = self._believed[bucket] = RunningMean(held / stay, seen=stay)
        return min(max(1.0, missed / max(1.0, rows.mean)), stay)

    def observe(self, size: int, missed: int) -> None:
        """After a round in which the model drafted."""
        bucket = size_bucket(size)
        if bucket not in self._known:
            self._known[bucket] = self._believed.get(bucket, RunningMean())
        self._known[bucket].observe(missed)
