"""All that `smart` knows between two rounds."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from smart_decoding.core.batch import size_bucket
from smart_decoding.core.calibration import RunningMean
from smart_decoding.core.costs import DraftSample, Overhead, VerifySample
from smart_decoding.core.exploration import Backoff, Exploration, Mode

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.calibration import Calibration, Forecast
    from smart_decoding.core.costs import CostModel, Sample
    from smart_decoding.core.exploration import Credit


# Standard deviation of one request's log rate, in a round of free drafters, over its forecast.
UNSURE = 0.3


class Realised:
    """Tokens that drafted trees are expected to bring, over those forecast for their seconds, by
    size bucket. Sums of several rounds are divided: single rounds' ratios have a larger mean.

    unsure: standard deviation of one request's log ratio, by which sizes that were hardly tried are
    believed to be better (optimism). Free drafters need that: they cost next to nothing, and their
    proposals change with the text. A model is explored instead."""

    def __init__(self, unsure: float = 0.0) -> None:
        self.unsure = unsure
        self._tokens: defaultdict[int, RunningMean] = defaultdict(RunningMean)
        self._forecast: defaultdict[int, RunningMean] = defaultdict(RunningMean)
        self._lost: defaultdict[int, float] = defaultdict(float)

    def of(self, size: int) -> float:
        """Return the ratio for batches of about this size. The forecast counts as one round: so one
        whose nodes had no memory does not end all drafting."""
        bucket = size_bucket(size)
        count = self._tokens[bucket].count if bucket in self._tokens else 0
        ratio = self._tokens[bucket].mean / self._forecast[bucket].mean if count else 1.0
        optimism = math.exp(self.unsure / math.sqrt((1 + count) * size))
        return optimism * (1.0 + count * ratio) / (1 + count)

    def observe(self, size: int, tokens: float, forecast: float) -> None:
        """After a round that brings so many tokens, in place of those forecast."""
        bucket = size_bucket(size)
        self._tokens[bucket].observe(tokens)
        self._forecast[bucket].observe(forecast + self._lost.pop(bucket, 0.0))

    def lose(self, size: int, forecast: float) -> None:
        """Charge the next round with tokens forecast for a draft that was dropped. It is no round
        of its own: the first one would halve the ratio, however short."""
        self._lost[size_bucket(size)] += forecast


# --- times ----------------------------------------------------------------------------------------
#
# Costs are corrected by means over several rounds, of forwards of about as many rows. The rate of
# those rounds depends on the mean: clipping single times would bias a heavy tail low.


class Forward(Enum):
    """Kinds of forwards that are alike."""

    VERIFY = "verify"
    FIRST = "first"
    LEVEL = "level"


@dataclass(slots=True)
class Sums:
    """Of forwards: how many, their rows, contexts and seconds, the rows waiting at them, and the
    experts awake in them."""

    count: int = 0
    rows: int = 0
    context: float = 0.0
    seconds: float = 0.0
    waiting: int = 0
    experts: float = 0.0

    def add(self, rows: int, context: float, seconds: float, waiting: int, experts: float) -> None:
        """Count a forward."""
        self.count += 1
        self.rows += rows
        self.context += context
        self.seconds += seconds
        self.waiting += waiting
        self.experts += experts

    def mean(self, kind: Forward, size: int) -> Sample:
        """Return their means as one forward."""
        n = self.count
        rows = self.rows / n
        context = self.context / n
        seconds = self.seconds / n
        if kind is Forward.VERIFY:
            # Plain rounds are many, and all alike. A drafting round's mean counts as one: were it
            # believed more, a few slow ones would say that drafting does not pay.
            rounds = n if rows == size else 1
            return VerifySample(size, rows, context, seconds, rounds, self.experts / n)
        waiting = self.waiting / n if kind is Forward.FIRST else None
        return DraftSample(rows, context, seconds, waiting)


class Timings:
    """The times of rounds: sums by kind of forward, batch size, and octave of the rows."""

    def __init__(self) -> None:
        self._sums: defaultdict[tuple[Forward, int, int], Sums] = defaultdict(Sums)

    def add(self, round: Round) -> None:
        """Count a round."""
        context = round.batch.mean_context
        self._of(Forward.VERIFY, round, round.verify_rows).add(
            round.verify_rows, context, round.verify_seconds, 0, round.experts
        )
        waiting = round.batch.catch_up_rows
        kind = Forward.FIRST
        for width, seconds in zip(round.level_widths, round.level_seconds, strict=True):
            self._of(kind, round, width).add(width - waiting, context, seconds, waiting, 0.0)
            kind = Forward.LEVEL
            waiting = 0

    def _of(self, kind: Forward, round: Round, rows: int) -> Sums:
        return self._sums[kind, round.batch.size, rows.bit_length()]

    def take(self) -> list[Sample]:
        """Return the means of each; they begin anew."""
        samples = [sums.mean(kind, size) for (kind, size, _), sums in self._sums.items()]
        self._sums.clear()
        return samples


# --- the state ------------------------------------------------------------------------------------


@dataclass(eq=False)
class SmartState:
    """All that lasts between rounds."""

    cost: CostModel  # as corrected so far
    calibration: Calibration
    forecast: Forecast
    exploration: Exploration
    overhead: Overhead
    credit: Credit
    # What the model's rounds reach of their forecast: choosing among real nodes does better than a
    # mean can predict.
    with_model: Realised = field(default_factory=Realised)
    # What rounds of free drafters reach of a plain one's rate.
    free: Realised = field(default_factory=lambda: Realised(UNSURE))
    plain: Timings = field(default_factory=Timings)  # of plain rounds; costs have not learned them
    drafted: Timings = field(default_factory=Timings)  # the same of drafting rounds
    rounds: int = 0  # that drafted
    unlearned: list[Round] = field(default_factory=list)  # whose trees are not learned from yet
    expected_accepts: float = 0.0  # sum over unlearned rounds
    shortfall: float = 0.0  # expected less real accepted nodes of unlearned rounds
    best: Mode = Mode.PLAIN  # predicted last
    explored: Mode = Mode.PLAIN  # in the last exploration
    backoff: Backoff = field(default_factory=Backoff)
    # Requests and seconds of a plain round, as predicted last.
    predicted_plain: tuple[int, float] = (0, 0.0)
    # `Prediction`s by shape, until something is learned.
    predictions: dict[tuple[object, ...], Any] = field(default_factory=dict)

    def realised(self, mode: Mode) -> Realised:
        """Return what rounds of a drafting mode reach of their forecast."""
        return self.with_model if mode is Mode.MODEL else self.free

    def begin_costs(self, cost: CostModel) -> None:
        """Take other costs, of which nothing has been learned."""
        self.cost = cost
        self.with_model = Realised()
        self.free = Realised(UNSURE)
        self.plain = Timings()
        self.drafted = Timings()
        self.predictions = {}
