"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured
costs and calibrated probabilities. How it works: docs/controller.md."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.cost import CostModel
from smart_decoding.core.exploration import Exploration
from smart_decoding.core.forecast import WIDEST, Forecast
from smart_decoding.core.learned import Learned
from smart_decoding.core.policies.base import require_int, require_number, token_array
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.core.prediction import Mode, Prediction, Shape, predict
from smart_decoding.core.rest import Rest
from smart_decoding.core.rule import Scores, TreeRule
from smart_decoding.core.running import HORIZON

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import BatchState, Round, TokenIds
    from smart_decoding.core.tree import IntArray


class Smart:
    """The cost-aware policy.

    cost: measured costs (None: a guess that real rounds correct). calibration, forecast: stored
    priors. max_levels, children: the deepest tree and the proposals per node that are considered.
    max_round_slowdown: with several requests, no round is planned to last longer than this multiple
    of a plain one, but for what the drafter has to catch up with. exploration_budget: share of the
    time that may go into exploring the options predicted worse.
    """

    name = "smart"

    def __init__(
        self,
        cost: CostModel | None = None,
        calibration: Calibration | None = None,
        forecast: Forecast | None = None,
        max_levels: int = 8,
        children: int = WIDEST,
        max_round_slowdown: float = 2.0,
        exploration_budget: float = 0.005,
        eos_token_ids: TokenIds = (),
    ) -> None:
        self.max_levels = require_int("max_levels", max_levels, 1, 64)
        self.children = require_int("children", children, 1, 256)
        self.max_round_slowdown = require_number(
            "max_round_slowdown", max_round_slowdown, 1.0, math.inf
        )
        budget = require_number("exploration_budget", exploration_budget, 0.0, 0.5)
        self.calibration = calibration or Calibration()
        self.forecast = forecast or Forecast(self.calibration)
        self.learned = Learned(cost or CostModel.default(), self.calibration, self.forecast)
        self.exploration = Exploration(budget)
        self.statistics = Statistics()
        self._ends = token_array(eos_token_ids)
        self._predictions: dict[tuple[object, ...], Prediction] = {}
        self._prediction: Prediction | None = None  # for the round to come; None: it did not ask
        self._mode = Mode.PLAIN  # of the round to come
        self._best = Mode.PLAIN  # what was predicted best last
        self._explored = Mode.PLAIN  # by the last exploration
        self._rest = Rest()

    @property
    def cost(self) -> CostModel:
        """The costs as corrected so far."""
        return self.learned.cost

    @cost.setter
    def cost(self, model: CostModel) -> None:
        self.learned.cost = model
        self._predictions.clear()

    # --- before a round ---

    def plan(self, batch: BatchState) -> TreeRule | None:
        """The option predicted best, or one to explore."""
        if self._rest.goes_on(batch.size):
            self._prediction = None
            return None
        self._observe_all(self._rest.take())
        limits = batch.limits
        shape = Shape.of(batch, limits)
        if not shape.drafting:
            self._prediction = None
            return None
        if self.learned.learn_plain():
            self._predictions.clear()
        self._prediction = self.predict(shape)
        self._mode = self._choose(self._prediction, batch.size, shape.deepest)
        if self._mode is Mode.PLAIN:
            return None
        return self._rule(batch, limits, shape, self._prediction)

    def predict(self, shape: Shape) -> Prediction:
        """What plain decoding and every way to draft would bring, kept until something is
        learned."""
        key = shape.key(self.max_levels)
        found = self._predictions.get(key)
        if found is None:
            found = predict(shape, self.learned, self.max_levels, self.max_round_slowdown)
            self._predictions[key] = found
        return found

    def _choose(self, prediction: Prediction, size: int, deepest: int) -> Mode:
        """The mode predicted best, but for explorations; and how long it may rest: no longer than
        these answers last."""
        rates = prediction.rates
        best = max(rates, key=rates.__getitem__)
        if best is not self._best:
            self._best = best
            self.exploration.stop()
        if self.exploration.left and self._explored in rates:
            return self._explored
        others = [mode for mode in rates if mode is not best]
        if not others:
            return best
        wait = self.exploration.wait
        if wait == 0:
            self._explored = others[self.exploration.count % len(others)]
            self.exploration.begin()
            return self._explored
        if best is Mode.PLAIN:
            self._rest.begin(int(min(wait, HORIZON, deepest)) - 1, size)
        return best

    def _rule(
        self, batch: BatchState, limits: IntArray, shape: Shape, prediction: Prediction
    ) -> TreeRule:
        """How deep to go is decided level by level."""
        levels = min(self.max_levels, shape.deepest) if self._mode is Mode.MODEL else 0
        keep = prediction.keep[self._mode]
        if self._mode is not self._best:
            # An exploration verifies at least one node: otherwise a cost predicted too high would
            # never be measured again.
            keep = replace(keep, least=1)
        scores = Scores(self.calibration, batch.kind)
        return TreeRule(levels, self.children, limits, self._ends, prediction.grow, keep, scores)

    # --- after a round ---

    def observe(self, round: Round) -> None:
        """Learns from any round; explorations pay for what they lost."""
        rested = self._prediction is None and round.rule is None
        self._observe_all(self._rest.add(round) if rested else [round])

    def _observe_all(self, rounds: list[Round]) -> None:
        for round in rounds:
            self._observe(round)

    def _observe(self, round: Round) -> None:
        prediction = self._prediction
        if round.batch.prefill_rows or (round.rule is None) != (self._mode is Mode.PLAIN):
            prediction = None  # another round than the one that was planned
        forecast_rate = 0.0
        if prediction is not None and self._mode is Mode.MODEL:
            forecast_rate = prediction.forecast_rate
        if self.learned.observe(round, forecast_rate):
            self._predictions.clear()
        if prediction is not None:
            self._observe_exploration(round, prediction)
        elif not round.batch.prefill_rows:
            self.exploration.observe_best()
        self.statistics.record(round, prediction.plain if prediction else round.seconds)

    def _observe_exploration(self, round: Round, prediction: Prediction) -> None:
        if self._mode is self._best:
            self.exploration.observe_best()
            return
        tokens = round.batch.size + round.accepted
        loss = round.seconds - tokens / prediction.rates[self._best]
        if self.exploration.observe(loss, prediction.plain):
            self.learned.learn_plain()
            self.learned.learn_acceptance()
            self._predictions.clear()

    def stats(self) -> dict[str, float]:
        """Running figures for metrics: estimated speedup, share of rounds off, calibration error,
        exploration. At rest they are up to HORIZON rounds old."""
        return {
            **self.statistics.summary(),
            "probe_seconds": self.exploration.seconds,
            "probes": float(self.exploration.count),
        }
