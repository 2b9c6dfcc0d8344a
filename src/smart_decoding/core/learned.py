"""All that real rounds teach: costs, overhead, acceptance, and what forecasts leave out."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.correction import SURPRISE
from smart_decoding.core.observed import merged
from smart_decoding.core.overhead import Overhead, size_bucket
from smart_decoding.core.running import HORIZON, RunningMean
from smart_decoding.core.selection import BestRate
from smart_decoding.core.timings import Timings

if TYPE_CHECKING:
    from smart_decoding.core.calibration import Calibration
    from smart_decoding.core.cost import CostModel
    from smart_decoding.core.forecast import Forecast
    from smart_decoding.core.policies.base import Round

# Rounds between two lessons in costs, once as many have passed: learning takes time itself, but a
# machine's state lasts for seconds only. HORIZON rounds pass between two lessons in acceptance.
COSTS_EVERY = 8
UNSURE = 0.3  # standard deviation of one request's log rate in a round over its forecast


class Learned:
    """cost: as corrected so far. calibration, forecast, overhead: as they are now."""

    def __init__(self, cost: CostModel, calibration: Calibration, forecast: Forecast) -> None:
        self.cost = cost
        self.calibration = calibration
        self.forecast = forecast
        self.overhead = Overhead(cost.overhead_seconds)
        self._rounds = 0  # that drafted
        # Tokens of drafted rounds, and those that were forecast for their seconds, by size bucket:
        # the mean of single rounds' ratios would say less than all of them together reach.
        self._tokens: defaultdict[int, RunningMean] = defaultdict(RunningMean)
        self._forecast_tokens: defaultdict[int, RunningMean] = defaultdict(RunningMean)
        self._plain = Timings()  # of plain rounds that costs are not corrected by yet
        self._drafted = Timings()  # of others
        self._waiting: list[Round] = []  # not learned from yet
        self._expected = 0.0  # nodes that these should have accepted
        self._missing = 0.0  # and that they accepted less

    def realised(self, size: int) -> float:
        """What drafted rounds of about this size reach of the rate that is forecast for them, as
        far as they may: what was hardly tried is believed to be good.

        Choosing among real nodes does better than a mean can predict."""
        bucket = size_bucket(size)
        tokens = self._tokens[bucket]
        hope = math.exp(UNSURE / math.sqrt((1 + tokens.seen) * size))
        if not tokens.seen:
            return hope
        return hope * tokens.mean / self._forecast_tokens[bucket].mean

    def observe(self, round: Round, forecast_rate: float) -> bool:
        """After any round; whether something was learned that predictions depend on.

        forecast_rate: tokens per second that were forecast of a round in which a model may draft,
        though free drafters may have been enough; or 0."""
        batch = round.batch
        if not batch.prefill_rows:
            self.overhead.observe(batch.size, round.rule is not None, round.other_seconds)
        if round.rule is None:
            # Rounds with prompts have as many rows as those that draft.
            (self._drafted if batch.prefill_rows else self._plain).add(round)
            return False
        self._rounds += 1
        self._drafted.add(round)
        if self._rounds % min(COSTS_EVERY, self._rounds) == 0:
            self._learn_costs(self._drafted)
        self._observe_trees(round, forecast_rate)
        # As if accepted nodes were Poisson.
        surprised = self._missing**2 > SURPRISE**2 * self._expected
        due = len(self._waiting) >= min(HORIZON, self._rounds - len(self._waiting))
        return (surprised or due) and self.learn_acceptance()

    def learn_plain(self) -> bool:
        """Corrects costs by the plain rounds since the last time; whether there were any: what the
        machine has become meanwhile may make drafting pay."""
        return self._learn_costs(self._plain)

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
        if (trees.source == 0).any():  # nodes of the model drafter
            self.forecast.observe(trees)
        return True

    def _learn_costs(self, timings: Timings) -> bool:
        samples = timings.take()
        for sample in samples:
            self.cost = self.cost.corrected(sample)
        return bool(samples)

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
        if rule.levels == 0 and not forecast_rate:
            self.forecast.observe_free(trees, rule.limits)
        elif rule.levels and forecast_rate:
            costs = rule.keep.costs
            further = sum(costs.levels[round.level_widths[1:]].tolist())
            seconds = costs.sunk + further + float(costs.verify[len(round.kept)])
            bucket = size_bucket(round.batch.size)
            self._tokens[bucket].observe(costs.tokens + expected)
            self._forecast_tokens[bucket].observe(forecast_rate * seconds)
