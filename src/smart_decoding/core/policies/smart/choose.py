"""Choosing how a round is spent: in the mode predicted best, or in one to explore."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from smart_decoding.core.calibration import HORIZON
from smart_decoding.core.exploration import Mode
from smart_decoding.core.selection import BestRate

if TYPE_CHECKING:
    from smart_decoding.core.batch import Round
    from smart_decoding.core.policies.smart.predict import Prediction, Shape
    from smart_decoding.core.policies.smart.state import SmartState
    from smart_decoding.core.selection import SkipModel


@dataclass(frozen=True, slots=True)
class Choice:
    """How a round is to be spent, and the prediction that decided it."""

    mode: Mode
    best: Mode  # predicted best
    prediction: Prediction
    begins: bool = False  # whether a run of explorations begins with the round
    backoff: int = 0  # plain rounds that follow without asking

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

    @property
    def keep(self) -> BestRate:
        """What is verified. An exploration verifies at least one node: otherwise a cost predicted
        too high would never be measured again."""
        keep = self.prediction.keep[self.mode]
        return replace(keep, least=1) if self.explores else keep

    @property
    def skip_model(self) -> SkipModel | None:
        """When the model is left out: never in an exploration, which is to learn of it."""
        may_skip = self.mode is Mode.MODEL and not self.explores
        return self.prediction.skip_model if may_skip else None

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
    prices = prediction.prices
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


def apply(choice: Choice, state: SmartState, size: int) -> None:
    """Let explorations and backoffs begin and end as chosen."""
    state.predicted_plain = (size, choice.prediction.plain)
    if choice.best is not state.best:
        state.best = choice.best
        state.exploration.stop()
    if choice.begins:
        state.explored = choice.mode
        state.exploration.begin(size, choice.prediction.prices[choice.mode])
    if choice.backoff:
        state.backoff.begin(choice.backoff, size)
