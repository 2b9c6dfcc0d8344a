"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured
costs and calibrated probabilities. How it works: docs/controller.md.

A round is `predict` (what each way to spend it would bring), `choose` (the best one, or one to
explore), and `learn` (from what happened). `SmartState` is all that lasts between rounds.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from smart_decoding.core.calibration import HORIZON, WIDEST, Calibration, Forecast
from smart_decoding.core.costs import CostModel, Overhead
from smart_decoding.core.exploration import Credit, Exploration, Mode
from smart_decoding.core.policies.base import require_int, require_number, token_array
from smart_decoding.core.policies.smart.choose import Choice, apply, choose
from smart_decoding.core.policies.smart.learn import learn, learn_plain
from smart_decoding.core.policies.smart.predict import Prediction, Shape, predict
from smart_decoding.core.policies.smart.state import SmartState
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.core.rule import Scores, TreeRule

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.policies.base import TokenIds

__all__ = ["Choice", "Mode", "Prediction", "Shape", "Smart", "SmartState", "choose", "predict"]


class Smart:
    """The cost-aware policy.

    cost: measured costs (None: a guess that real rounds correct). calibration, forecast: stored
    priors. max_levels, children: the deepest tree and the proposals per node that are considered.
    max_round_slowdown: no request of several is slower, per token, than this multiple of plain
    decoding's time. What a model must read before it can draft is shared among the rounds that
    follow. exploration_budget: share of the time that may go into exploring the options predicted
    worse.
    """

    name = "smart"

    def __init__(
        self,
        cost: CostModel | None = None,
        calibration: Calibration | None = None,
        forecast: Forecast | None = None,
        max_levels: int = 8,
        children: int = WIDEST,
        max_round_slowdown: float = 1.15,
        exploration_budget: float = 0.005,
        eos_token_ids: TokenIds = (),
    ) -> None:
        self.max_levels = require_int("max_levels", max_levels, 1, 64)
        self.children = require_int("children", children, 1, 256)
        slowdown = require_number("max_round_slowdown", max_round_slowdown, 1.0, math.inf)
        budget = require_number("exploration_budget", exploration_budget, 0.0, 0.5)
        calibration = calibration or Calibration()
        cost = cost or CostModel.default()
        self.state = SmartState(
            cost,
            calibration,
            forecast or Forecast(calibration),
            Exploration(budget),
            Overhead(cost.overhead_seconds),
            Credit(slowdown),
        )
        self.statistics = Statistics()
        self._ends = token_array(eos_token_ids)
        # By which the last round was planned; None where it was plain without a choice.
        self._choice: Choice | None = None

    @property
    def cost(self) -> CostModel:
        """The costs as corrected so far. Measured ones may take their place."""
        return self.state.cost

    @cost.setter
    def cost(self, model: CostModel) -> None:
        self.state.begin_costs(model)

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the option predicted best, or one to explore."""
        state = self.state
        self._choice = None
        if state.backoff.goes_on(batch.size):
            return None
        for round in state.backoff.take():
            self._learn(round)
        longest, recovery = math.inf, HORIZON
        if batch.size > 1:  # a lone request has nobody to wait for
            longest = state.credit.longest_round(batch.requests)
            recovery = state.credit.recovery(batch.requests) or HORIZON
        limits = batch.limits
        shape = Shape.of(batch, limits, longest)
        if not shape.drafting:
            return None
        learn_plain(state)
        prediction = predict(state, shape, self.max_levels)
        choice = self._choice = choose(prediction, state, shape, recovery)
        apply(choice, state, shape.size)
        if choice.mode is Mode.PLAIN:
            return None
        return TreeRule(
            # how deep to go is decided level by level
            levels=min(self.max_levels, shape.deepest) if choice.mode is Mode.MODEL else 0,
            children=self.children,
            limits=limits,
            ends=self._ends,
            expand=choice.prediction.expand,
            keep=choice.keep,
            scores=Scores(state.calibration, batch.kind),
            skip_model=choice.skip_model,
        )

    def predict(self, shape: Shape) -> Prediction:
        """Return what plain decoding and every way to draft would bring."""
        return predict(self.state, shape, self.max_levels)

    def observe(self, round: Round) -> None:
        """Learn from any round; explorations pay for what they lost."""
        unasked = self._choice is None and round.rule is None
        for known in self.state.backoff.add(round) if unasked else [round]:
            self._learn(known)

    def _learn(self, round: Round) -> None:
        self.statistics.record(round, *learn(self.state, round, self._choice))

    def stats(self) -> dict[str, float]:
        """Running figures for metrics: estimated speedup, share of rounds off, calibration error,
        exploration. In backoff they are up to HORIZON rounds old."""
        return {
            **self.statistics.summary(),
            "exploration_seconds": self.state.exploration.seconds,
            "explorations": float(self.state.exploration.count),
        }
