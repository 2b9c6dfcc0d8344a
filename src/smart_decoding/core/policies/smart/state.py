"""All that `smart` knows between two rounds."""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.core.calibration import RunningMean
from smart_decoding.core.costs import DraftSample, Overhead, VerifySample, size_bucket
from smart_decoding.core.exploration import Backoff, Exploration, Mode
from smart_decoding.core.tree import DraftTrees

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.calibration import Calibration, Forecast
    from smart_decoding.core.costs import CostModel, Sample
    from smart_decoding.core.policies.smart.credit import Credit


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
# those rounds depends on the mean. Of single times the filter would cut the outliers, and believe
# that forwards with a heavy tail, as shared machines have them, are faster than they are.


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
    """cost: as corrected so far. calibration, forecast, overhead: as they are now. with_model: what
    the model's rounds reach of their forecast, as choosing among real nodes does better than a mean
    can predict. free: what rounds of free drafters reach of a plain one's rate.

    plain, drafted: times that costs are not corrected by yet; of plain rounds, and of drafting
    ones. rounds: that drafted. unlearned: those of them whose trees are not
    learned from yet. expected, shortfall: nodes that these were expected to accept, and that less
    the accepted ones.

    best: the mode predicted best last. explored: the mode of the last exploration."""

    cost: CostModel
    calibration: Calibration
    forecast: Forecast
    exploration: Exploration
    overhead: Overhead
    credit: Credit
    with_model: Realised = field(default_factory=Realised)
    free: Realised = field(default_factory=lambda: Realised(UNSURE))
    plain: Timings = field(default_factory=Timings)
    drafted: Timings = field(default_factory=Timings)
    rounds: int = 0
    unlearned: list[Round] = field(default_factory=list)
    expected: float = 0.0
    shortfall: float = 0.0
    best: Mode = Mode.PLAIN
    explored: Mode = Mode.PLAIN
    backoff: Backoff = field(default_factory=Backoff)

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

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, lists and dictionaries, to print and to compare."""
        found: dict[str, Any] = _plain(self)
        return found

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SmartState) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _plain(value: Any) -> Any:
    """Numbers, lists and dictionaries in place of a value and all that it holds."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, DraftTrees):  # without the room that they leave
        return _plain([value.ints[:, : len(value)], value.floats[:, : len(value)]])
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, dict):
        return {str(_plain(key)): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if dataclasses.is_dataclass(value):
        # What a field's `compare` leaves out is a cache.
        fields = [each.name for each in dataclasses.fields(value) if each.compare]
        return {name: _plain(getattr(value, name)) for name in fields}
    names = vars(value) if hasattr(value, "__dict__") else value.__slots__
    return {name: _plain(getattr(value, name)) for name in names}
