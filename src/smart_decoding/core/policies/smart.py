"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured
costs and calibrated probabilities. How it works: docs/controller.md."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smart_decoding.core.calibration import HORIZON, WIDEST, Calibration, Forecast
from smart_decoding.core.costs import CostModel
from smart_decoding.core.exploration import Backoff, Exploration
from smart_decoding.core.learned import Learned
from smart_decoding.core.policies.base import require_int, require_number, token_array
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.core.prediction import Mode, Prediction, Shape, predict
from smart_decoding.core.rule import Scores, TreeRule

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.policies.base import TokenIds
    from smart_decoding.core.tree import IntArray


@dataclass(frozen=True, slots=True)
class Choice:
    """How a round is to be spent, and what that was decided by.

    best: the mode predicted best. begins: whether a run of explorations begins with the round.
    backoff: plain rounds that follow without asking."""

    mode: Mode
    best: Mode
    prediction: Prediction
    begins: bool = False
    backoff: int = 0

    @property
    def explores(self) -> bool:
        """Whether the round leaves what is predicted best."""
        return self.mode is not self.best

    def forecast_rate(self, round: Round) -> float:
        """Tokens per second that were forecast: of a model's drafts, else of plain decoding. 0
        where the model was left out, as free drafters were enough: others may do worse."""
        if self.mode is not Mode.MODEL:
            return self.prediction.rates[Mode.PLAIN]
        return self.prediction.forecast_rate if round.rule and round.rule.levels else 0.0

    def loss(self, round: Round) -> float:
        """Seconds that the round took longer than the best mode for as many tokens."""
        tokens = round.batch.size + round.accepted
        return round.seconds - tokens / self.prediction.rates[self.best]


def choose(
    prediction: Prediction, exploration: Exploration, explored: Mode | None, shape: Shape
) -> Choice:
    """Choose the mode predicted best, or one to explore; nothing changes by that. Plain decoding
    backs off for as long as no exploration is due, but no longer than these answers last.

    explored: by the run that is going on, if it still is one."""
    best = prediction.best
    prices = {mode: prediction.price(mode) for mode in prediction.rates if mode is not best}
    if exploration.left > 0 and explored in prices:
        return Choice(explored, best, prediction)
    others = [mode for mode, price in prices.items() if exploration.affords(price, shape.size)]
    wait = exploration.wait if others else HORIZON
    if others and wait == 0:
        return Choice(others[exploration.count % len(others)], best, prediction, begins=True)
    backs_off = prices and best is Mode.PLAIN
    backoff = int(min(wait, HORIZON, shape.deepest)) - 1 if backs_off else 0
    return Choice(best, best, prediction, backoff=backoff)


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
        self._choice: Choice | None = None  # for the round to come; None: it did not ask
        self._best = Mode.PLAIN  # what was predicted best last
        self._explored = Mode.PLAIN  # by the last exploration
        self._backoff = Backoff()

    @property
    def cost(self) -> CostModel:
        """The costs as corrected so far."""
        return self.learned.cost

    @cost.setter
    def cost(self, model: CostModel) -> None:
        self.learned.cost = model
        self._predictions.clear()

    def plan(self, batch: BatchState) -> TreeRule | None:
        """The option predicted best, or one to explore."""
        self._choice = None
        if self._backoff.goes_on(batch.size):
            return None
        for round in self._backoff.take():
            self._observe(round, None)
        limits = batch.limits
        shape = Shape.of(batch, limits)
        if not shape.drafting:
            return None
        if self.learned.learn_plain():
            self._predictions.clear()
        prediction = self.predict(shape)
        explored = self._explored if self._best is prediction.best else None
        choice = choose(prediction, self.exploration, explored, shape)
        self._apply(choice, batch.size)
        self._choice = choice
        if choice.mode is Mode.PLAIN:
            return None
        return self._rule(choice, batch, limits, shape.deepest)

    def predict(self, shape: Shape) -> Prediction:
        """What plain decoding and every way to draft would bring, kept until something is
        learned."""
        key = shape.key()
        found = self._predictions.get(key)
        if found is None:
            found = predict(shape, self.learned, self.max_levels, self.max_round_slowdown)
            self._predictions[key] = found
        return found

    def _apply(self, choice: Choice, size: int) -> None:
        """Let explorations and backoffs begin and end as chosen."""
        if choice.best is not self._best:
            self._best = choice.best
            self.exploration.stop()
        if choice.begins:
            self._explored = choice.mode
            price = choice.prediction.price(choice.mode)
            self.exploration.begin(price=price, size=size)
        if choice.backoff:
            self._backoff.begin(choice.backoff, size)

    def _rule(self, choice: Choice, batch: BatchState, limits: IntArray, deepest: int) -> TreeRule:
        """How deep to go is decided level by level."""
        levels = min(self.max_levels, deepest) if choice.mode is Mode.MODEL else 0
        keep = choice.prediction.keep[choice.mode]
        if choice.explores:
            # At least one node: otherwise a cost predicted too high would never be measured again.
            keep = replace(keep, least=1)
        expand = choice.prediction.expand
        scores = Scores(self.calibration, batch.kind)
        # An exploration is to learn of the model.
        may_skip = choice.mode is Mode.MODEL and not choice.explores
        skip_model = choice.prediction.skip_model if may_skip else None
        return TreeRule(levels, self.children, limits, self._ends, expand, keep, scores, skip_model)

    def observe(self, round: Round) -> None:
        """Learns from any round; explorations pay for what they lost."""
        unasked = self._choice is None and round.rule is None
        for known in self._backoff.add(round) if unasked else [round]:
            self._observe(known, self._choice_of(known))

    def _choice_of(self, round: Round) -> Choice | None:
        """What planned the round; None where none did, as with prompts, or another one."""
        choice = self._choice
        if choice is None or round.batch.prefill_rows:
            return None
        return choice if (round.rule is None) == (choice.mode is Mode.PLAIN) else None

    def _observe(self, round: Round, choice: Choice | None) -> None:
        if self.learned.observe(round, choice.forecast_rate(round) if choice else 0.0):
            self._predictions.clear()
        if choice is not None and choice.explores:
            self._observe_exploration(round, choice)
        elif not round.batch.prefill_rows:
            self.exploration.observe_best()
        self.statistics.record(round, choice.prediction.plain if choice else round.seconds)

    def _observe_exploration(self, round: Round, choice: Choice) -> None:
        if self.exploration.observe(choice.loss(round), choice.prediction.plain):
            self.learned.learn_plain()
            self.learned.learn_acceptance()
            self._predictions.clear()

    def stats(self) -> dict[str, float]:
        """Running figures for metrics: estimated speedup, share of rounds off, calibration error,
        exploration. In backoff they are up to HORIZON rounds old."""
        return {
            **self.statistics.summary(),
            "exploration_seconds": self.exploration.seconds,
            "explorations": float(self.exploration.count),
        }
