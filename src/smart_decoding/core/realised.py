"""What drafted rounds reach of the rate that is forecast for them, and what a model catches up with
in its rounds."""

from __future__ import annotations

import math
from collections import defaultdict

from smart_decoding.core.overhead import size_bucket
from smart_decoding.core.running import HORIZON, RunningMean

UNSURE = 0.3  # standard deviation of one request's log rate in a round over its forecast


class Realised:
    """All tokens of some rounds, over those that were forecast for their seconds, by size bucket:
    the mean of single rounds' ratios would say less than all of them together reach."""

    def __init__(self) -> None:
        self._tokens: defaultdict[int, RunningMean] = defaultdict(RunningMean)
        self._forecast: defaultdict[int, RunningMean] = defaultdict(RunningMean)

    def of(self, size: int) -> float:
        """The ratio for batches of about this size, as far as it may be: what was hardly tried is
        believed to be good."""
        bucket = size_bucket(size)
        tokens = self._tokens[bucket]
        hope = math.exp(UNSURE / math.sqrt((1 + tokens.seen) * size))
        return hope * tokens.mean / self._forecast[bucket].mean if tokens.seen else hope

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
        self._rows: defaultdict[int, RunningMean] = defaultdict(RunningMean)

    def rounds(self, size: int, missed: int, held: float, stay: int) -> float:
        """How many rounds catching up with `missed` rows serves, `stay` at most: as many as usually
        miss so much together.

        Before any round is known these are `held` rows in `stay` rounds, which weighs as much as
        those rounds later on."""
        if not missed:
            return stay
        rows = self._rows[size_bucket(size)]
        seen = min(rows.seen, HORIZON)
        usual = (held + seen * rows.mean) / (stay + seen)
        return min(max(1.0, missed / usual), stay)

    def observe(self, size: int, missed: int) -> None:
        """After a round in which the model drafted."""
        self._rows[size_bucket(size)].observe(missed)
