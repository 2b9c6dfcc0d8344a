"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured
costs and calibrated probabilities. How it works: docs/controller.md.

A round is `predict` (what each way to spend it would bring), `choose` (the best one, or one to
explore), and `learn` (from what happened). `SmartState` is all that lasts between rounds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smart_decoding.core.calibration import HORIZON, WIDEST, Calibration, Forecast
from smart_decoding.core.costs import CostModel, Overhead
from smart_decoding.core.exploration import Exploration, Mode
from smart_decoding.core.policies.base import require_int, require_number, token_array
from smart_decoding.core.policies.smart.credit import Credit
from smart_decoding.core.policies.smart.learn import learn, learn_acceptance, learn_plain
from smart_decoding.core.policies.smart.predict import Prediction, Shape, predict
from smart_decoding.core.policies.smart.state import SmartState
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.core.rule import Scores, TreeRule
from smart_decoding.core.selection import BestRate

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.policies.base import TokenIds
    from smart_decoding.core.tree import IntArray

__all__ = ["Choice", "Mode", "Prediction", "Shape", "Smart", "SmartState", "choose", "predict"]


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

    @property
    def forecast_rate(self) -> float:
        """Tokens per second that were forecast: of a model's drafts, else of plain decoding."""
        if self.mode is Mode.MODEL:
            return self.prediction.forecast_rate
        return self.prediction.rates[Mode.PLAIN]

    def predicted_seconds(self, round: Round) -> float:
        """Return the seconds that the round was predicted to take, as it was drafted."""
        rule = round.rule
        if rule is None or not isinstance(rule.keep, BestRate):
            return self.prediction.plain
        costs = rule.keep.costs
        further = sum(costs.levels[round.level_widths[1:]].tolist())
        seconds = float(costs.sunk + further + float(costs.verify[len(round.kept)]))
        return seconds + self.unshared(round)

    def unshared(self, round: Round) -> float:
        """Return the seconds that the round's first level takes, and later rounds are charged."""
        return self.prediction.unshared if round.level_widths else 0.0

    def loss(self, round: Round) -> float:
        """Return seconds that the round took longer than the best mode for as many tokens."""
        tokens = round.batch.size + round.accepted
        return round.seconds - tokens / self.prediction.rates[self.best]


def choose(
    prediction: Prediction, state: SmartState, shape: Shape, recovery: int = HORIZON
) -> Choice:
    """Choose the mode predicted best, or one to explore; nothing changes by that. Plain decoding
    backs off for as long as no exploration is due, but no longer than these answers last, or than
    `recovery` rounds, after which longer rounds are allowed."""
    best = prediction.best
    exploration = state.exploration
    prices = {mode: prediction.price(mode) for mode in prediction.rates if mode is not best}
    if exploration.left > 0 and best is state.best and state.explored in prices:
        return Choice(state.explored, best, prediction)
    waits = {mode: exploration.wait(shape.size, price) for mode, price in prices.items()}
    due = [mode for mode, wait in waits.items() if wait <= 0]
    if due:  # in turn
        mode = due[-1] if due[0] is state.explored else due[0]
        return Choice(mode, best, prediction, begins=True)
    wait = min(waits.values(), default=math.inf)
    backoff = int(min(wait, HORIZON, shape.deepest, recovery)) - 1 if best is Mode.PLAIN else 0
    return Choice(best, best, prediction, backoff=backoff)


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
        self._predictions: dict[tuple[object, ...], Prediction] = {}
        # By which the last round was planned; None where it was plain without a choice.
        self._choice: Choice | None = None
        self._plain = (0, 0.0)  # requests and seconds of a plain round, as predicted last

    @property
    def cost(self) -> CostModel:
        """The costs as corrected so far."""
        return self.state.cost

    @cost.setter
    def cost(self, model: CostModel) -> None:
        self.state.begin_costs(model)
        self._predictions.clear()

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the option predicted best, or one to explore."""
        state = self.state
        self._choice = None
        if state.backoff.goes_on(batch.size):
            return None
        for round in state.backoff.take():
            self._learn(round, None)
        depths = batch.limits
        longest = math.inf
        recovery = HORIZON
        if batch.size > 1:  # a lone request has nobody to wait for
            longest = state.credit.longest_round(batch.requests)
            recovery = state.credit.recovery(batch.requests) or HORIZON
        shape = Shape.of(batch, depths, longest)
        if not shape.drafting:
            return None
        if learn_plain(state):
            self._predictions.clear()
        prediction = self.predict(shape)
        self._plain = (batch.size, prediction.plain)
        self._choice = choose(prediction, state, shape, recovery)
        self._apply(self._choice, batch.size)
        if self._choice.mode is Mode.PLAIN:
            return None
        return self._rule(self._choice, batch, depths, shape.deepest)

    def predict(self, shape: Shape) -> Prediction:
        """Return what plain decoding and every way to draft would bring, kept until something is
        learned."""
        key = shape.key()
        found = self._predictions.get(key)
        if found is None:
            found = predict(self.state, shape, self.max_levels)
            self._predictions[key] = found
        return found

    def _apply(self, choice: Choice, size: int) -> None:
        """Let explorations and backoffs begin and end as chosen."""
        state = self.state
        if choice.best is not state.best:
            state.best = choice.best
            state.exploration.stop()
        if choice.begins:
            state.explored = choice.mode
            price = choice.prediction.price(choice.mode)
            state.exploration.begin(size, price)
        if choice.backoff:
            state.backoff.begin(choice.backoff, size)

    def _rule(self, choice: Choice, batch: BatchState, depths: IntArray, deepest: int) -> TreeRule:
        """Return the rule of a mode, under which how deep to go is decided level by level."""
        levels = min(self.max_levels, deepest) if choice.mode is Mode.MODEL else 0
        keep = choice.prediction.keep[choice.mode]
        if choice.explores:
            # At least one node: otherwise a cost predicted too high would never be measured again.
            keep = replace(keep, least=1)
        expand = choice.prediction.expand
        scores = Scores(self.state.calibration, batch.kind)
        # An exploration is to learn of the model.
        may_skip = choice.mode is Mode.MODEL and not choice.explores
        skip_model = choice.prediction.skip_model if may_skip else None
        return TreeRule(levels, self.children, depths, self._ends, expand, keep, scores, skip_model)

    def observe(self, round: Round) -> None:
        """Learn from any round; explorations pay for what they lost."""
        unasked = self._choice is None and round.rule is None
        for known in self.state.backoff.add(round) if unasked else [round]:
            self._learn(known, self._choice_of(known))

    def _choice_of(self, round: Round) -> Choice | None:
        """Return what planned the round; None where none did, as with prompts, or another one."""
        choice = self._choice
        if choice is None or round.batch.prefill_rows:
            return None
        return choice if (round.rule is None) == (choice.mode is Mode.PLAIN) else None

    def _learn(self, round: Round, choice: Choice | None) -> None:
        state = self.state
        size = round.batch.size
        known = self._plain_seconds(round, choice)
        plain = round.seconds - round.lost_seconds if known is None else known
        predicted = known
        if choice is not None:
            predicted = choice.predicted_seconds(round)
        elif round.batch.prefill_rows:
            predicted = self._with_prompts(round)
        explored = choice is not None and choice.explores
        lost = self._choice if round.lost_seconds else None  # planned the draft that was dropped
        if lost is not None and lost.mode is Mode.MODEL:
            # What was caught up with is kept.
            seconds = max(0.0, round.lost_seconds - lost.prediction.unshared)
            state.with_model.lose(size, lost.forecast_rate * seconds)
            if lost.explores and not explored:
                state.exploration.observe(size, round.lost_seconds, plain)
                explored = True
        later = choice.unshared(round) if choice else 0.0
        lasted = 1.0 if round.rule is None or predicted is None else (predicted - later) / plain
        changed = learn(state, round, lasted, later / plain if later else 0.0)
        if choice is not None and round.rule is not None:
            state.realised(choice.mode).observe(
                size, size + round.expected, choice.forecast_rate * _counted(round, choice)
            )
        if choice is not None and choice.explores:
            if state.exploration.observe(size, choice.loss(round), plain):
                learn_plain(state)
                learn_acceptance(state)
                changed = True
        elif not explored and not round.batch.prefill_rows:
            state.exploration.observe_best(size)
        if changed:
            self._predictions.clear()
        self.statistics.record(round, predicted, plain)

    def _with_prompts(self, round: Round) -> float:
        """Return what a round with prompts would take if their rows cost as much as others. No
        decision depends on it."""
        batch = round.batch
        forward = self.state.cost.verify_seconds(batch.size, round.verify_rows, batch.mean_context)
        return self.state.overhead.of(batch.size, False) + float(forward)

    def _plain_seconds(self, round: Round, choice: Choice | None) -> float | None:
        """Return the predicted seconds of a plain round in place of this one. None if none were
        predicted: plain decoding has such a round, too, as one with prompts."""
        if choice is not None:
            return choice.prediction.plain
        size, seconds = self._plain
        return seconds if size == round.batch.size and not round.batch.prefill_rows else None

    def stats(self) -> dict[str, float]:
        """Running figures for metrics: estimated speedup, share of rounds off, calibration error,
        exploration. In backoff they are up to HORIZON rounds old."""
        return {
            **self.statistics.summary(),
            "exploration_seconds": self.state.exploration.seconds,
            "explorations": float(self.state.exploration.count),
        }


def _counted(round: Round, choice: Choice) -> float:
    """Return the seconds of a drafting round that its rate is judged by: the real ones, without
    what the model caught up with for later rounds. A stall at most doubles a round."""
    predicted = choice.predicted_seconds(round)
    ratio = min(max(0.5, round.seconds / predicted), 2.0) if math.isfinite(round.seconds) else 1.0
    return (predicted - choice.unshared(round)) * ratio
