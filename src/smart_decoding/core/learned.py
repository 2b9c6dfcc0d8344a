"""All that real rounds teach: costs, overhead, acceptance, and what forecasts leave out."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.batch import merged
from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.costs import SURPRISE, Overhead
from smart_decoding.core.realised import Realised
from smart_decoding.core.selection import BestRate
from smart_decoding.core.timings import Timings

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.calibration import Calibration, Forecast
    from smart_decoding.core.costs import CostModel

# Rounds between two lessons in costs, once as many have passed: learning takes time itself, but a
# machine's state lasts for seconds only. HORIZON rounds pass between two lessons in acceptance.
COSTS_EVERY = 8


class Learned:
    """cost: as corrected so far. calibration, forecast, overhead: as they are now. with_model: what
    the model's rounds reach of their forecast, as choosing among real nodes does better than a mean
    can predict. free: what rounds of free drafters reach of a plain one's rate."""

    def __init__(self, cost: CostModel, calibration: Calibration, forecast: Forecast) -> None:
        self.cost = cost
        self.calibration = calibration
        self.forecast = forecast
        self.overhead = Overhead(cost.overhead_seconds)
        self.with_model = Realised()
        self.free = Realised()
        self._rounds = 0  # that drafted
        self._plain = Timings()  # of plain rounds that costs are not corrected by yet
        self._drafted = Timings()  # of others
        self._waiting: list[Round] = []  # not learned from yet
        self._expected = 0.0  # nodes that these should have accepted
        self._missing = 0.0  # and that they accepted less

    def observe(self, round: Round, forecast_rate: float) -> bool:
        """After any round; whether something was learned that predictions depend on.

        forecast_rate: tokens per second that were forecast of it; 0: it says nothing of them."""
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
        if not forecast_rate or rule is None or not isinstance(rule.keep, BestRate):
            return
        costs = rule.keep.costs
        further = sum(costs.levels[round.level_widths[1:]].tolist())
        seconds = costs.sunk + further + float(costs.verify[len(round.kept)])
        realised = self.with_model if rule.levels else self.free
        realised.observe(round.batch.size, costs.tokens + expected, forecast_rate * seconds)
