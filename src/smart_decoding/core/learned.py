"""All that real rounds teach: costs, overhead, acceptance, and what forecasts leave out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.cost import DraftSample, VerifySample
from smart_decoding.core.overhead import Overhead, size_bucket
from smart_decoding.core.policies.base import merged
from smart_decoding.core.running import RunningMean
from smart_decoding.core.selection import BestRate

if TYPE_CHECKING:
    from smart_decoding.core.calibration import Calibration
    from smart_decoding.core.cost import CostModel, Sample
    from smart_decoding.core.forecast import Forecast
    from smart_decoding.core.policies.base import Round
    from smart_decoding.core.tree import FloatArray

# Rounds between two lessons, once as many have passed: learning takes time itself, but a machine's
# state lasts for seconds only.
COSTS_EVERY = 8
ACCEPTANCE_EVERY = 32
SURPRISE = 2.0  # standard deviations of accepted nodes, as if these were Poisson: learn at once
UNSURE = 0.3  # standard deviation of one request's log rate in a round over its forecast


class Learned:
    """cost: as corrected so far. calibration, forecast, overhead: as they are now."""

    def __init__(self, cost: CostModel, calibration: Calibration, forecast: Forecast) -> None:
        self.cost = cost
        self.calibration = calibration
        self.forecast = forecast
        self.overhead = Overhead(cost.overhead_seconds)
        self._rounds = 0  # that drafted
        self._realised: dict[int, RunningMean] = {}  # log of value over forecast, by size bucket
        self._plain: dict[int, FloatArray] = {}  # size -> rounds, sums of contexts and of seconds
        self._waiting: list[Round] = []  # not learned from yet
        self._expected = 0.0  # nodes that these should have accepted
        self._missing = 0.0  # and that they accepted less

    def realised(self, size: int) -> float:
        """What drafted rounds of about this size reach of the rate that is forecast for them, as
        far as they may: what was hardly tried is believed to be good.

        Choosing among real nodes does better than a mean can predict."""
        mean = self._realised.get(size_bucket(size), RunningMean())
        return math.exp(mean.mean + UNSURE / math.sqrt((1 + mean.seen) * size))

    def observe(self, round: Round, forecast_rate: float) -> bool:
        """After any round; whether something was learned that predictions depend on.

        forecast_rate: tokens per second that were forecast of a model's drafts, or 0."""
        batch = round.batch
        if not batch.prefill_rows:
            self.overhead.observe(batch.size, round.rule is not None, round.other_seconds)
        if round.rule is None and not batch.prefill_rows:
            sums = self._plain.setdefault(batch.size, np.zeros(3))
            sums += 1.0, batch.mean_context, round.verify_seconds
            return False
        self._rounds += 1
        if self._rounds % min(COSTS_EVERY, 1 + self._rounds // 4) == 0:
            self._learn_costs(round)
        if not len(round.trees):
            return False
        self._observe_trees(round, forecast_rate)
        surprised = self._missing**2 > SURPRISE**2 * self._expected
        due = len(self._waiting) >= min(ACCEPTANCE_EVERY, 1 + self._rounds // 4)
        return (surprised or due) and self.learn_acceptance()

    def learn_plain(self) -> bool:
        """Corrects costs by the plain rounds since the last time; whether there were any.

        One correction for each size, almost without noise: what the machine has become meanwhile
        may make drafting pay."""
        for size, (rounds, context, seconds) in self._plain.items():
            sample = VerifySample(size, size, context / rounds, seconds / rounds, int(rounds))
            self.cost = self.cost.corrected(sample)
        found = bool(self._plain)
        self._plain.clear()
        return found

    def learn_acceptance(self) -> bool:
        """Learns from the trees since the last time; whether there were any. Several rounds in one
        go, as every numpy call has its price."""
        if not self._waiting:
            return False
        trees, nodes, chosen = merged(self._waiting)
        kinds = np.concatenate([round.batch.kind for round in self._waiting])
        self._waiting.clear()
        self._expected = 0.0
        self._missing = 0.0
        self.calibration.observe(trees, nodes, chosen, kinds)
        if trees.source.min() == 0:  # nodes of the model drafter
            self.forecast.observe(trees)
        return True

    def _learn_costs(self, round: Round) -> None:
        batch = round.batch
        context = batch.mean_context
        samples: list[Sample] = [
            VerifySample(batch.size, round.verify_rows, context, round.verify_seconds)
        ]
        waiting: int | None = batch.catch_up_rows
        for width, seconds in zip(round.level_widths, round.level_seconds, strict=True):
            samples.append(DraftSample(width - (waiting or 0), context, seconds, waiting))
            waiting = None
        for sample in samples:
            self.cost = self.cost.corrected(sample)

    def _observe_trees(self, round: Round, forecast_rate: float) -> None:
        trees = round.trees
        rule = round.rule
        if rule is None or rule.scores is None:  # what was drafted is not calibrated
            self.calibration.score(trees, round.batch.kind)
        self._waiting.append(round)
        expected = round.expected
        self._expected += expected
        self._missing += expected - round.accepted
        if rule is None or not isinstance(rule.keep, BestRate):
            return
        if rule.levels == 0:
            self.forecast.observe_free(trees, rule.limits)
        elif forecast_rate:
            costs = rule.keep.costs
            seconds = costs.drafted(trees) + float(costs.verify[len(round.kept)])
            rate = (costs.tokens + expected) / seconds
            bucket = size_bucket(round.batch.size)
            mean = self._realised.setdefault(bucket, RunningMean())
            mean.observe(math.log(rate / forecast_rate))
