"""Which mode a round is in: plain decoding, or one of the ways to draft.

It is the one predicted best, but for burn-in, exploration and backoff.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from smart_decoding.core.exploration import CLEAR_LOSS, Exploration
from smart_decoding.core.overhead import size_bucket
from smart_decoding.core.policies.backoff import Backoff

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Round
    from smart_decoding.core.policies.forecaster import Forecaster
    from smart_decoding.core.policies.round_forecast import Option, RoundForecast
    from smart_decoding.core.policies.round_state import RoundState

# Predicted speedup that it takes to begin drafting, and to go on: costs are known to a few per
# cent, not better, and each return to drafting pays for the rows that have waited.
BEGIN_SPEEDUP = 1.03
KEEP_SPEEDUP = 1.0
CLEARLY_WORSE = 0.9  # below this predicted speedup no further look is needed soon
# Rounds that a batch size is drafted for, if that is not clearly worse: what was measured decides
# then.
BURN_IN = 16
# Below this predicted speedup, an exploration of plain decoding goes on for some rounds of backoff:
# they are what plain decoding is, their mean is nearly free of noise, and costs at drafting's sizes
# say too little of it.
NEAR_SPEEDUP = 1.2
NEAR_ROUNDS = 3
CATCH_UP_SHARE = 2  # an exploration must afford this part of a long catch-up
# Rounds of plain decoding at most without asking whether to draft, and where drafting is not
# clearly worse. A bad head is drafted from until it is predicted to reach no more than plain
# decoding, and stays there: asked often, it costs 1 % of the time.
MAX_BACKOFF = 64
NEAR_BACKOFF = 16
FIRST_ROUNDS = 32  # without a backoff


class Modes:
    """Chooses the mode of each round, and learns from explorations whether to go on.

    burn_in: rounds with a model's drafts, by `size_bucket`. drafting: whether that was predicted
    best; began: the round that it began in."""

    def __init__(self, forecaster: Forecaster, exploration: Exploration) -> None:
        self.exploration = exploration
        self.backoff = Backoff()
        self.burn_in: Counter[int] = Counter()
        self.drafting = False
        self.began = 0
        self._forecaster = forecaster
        self._runs = 0  # of explorations

    def choose(self, state: RoundState, forecast: RoundForecast, now: int) -> Option | None:
        """The mode of round `now` (None: plain decoding)."""
        best = forecast.best(KEEP_SPEEDUP if self.drafting else BEGIN_SPEEDUP)
        best = best or self._burn_in_option(forecast)
        state.best_rate = forecast.rate(best)
        if (best is not None) != self.drafting:
            self._change(best is not None, now)
        option = self._explore(state, forecast, best)
        if option is not None or state.exploring or now <= FIRST_ROUNDS:
            self.backoff.reset()
        else:
            clear = forecast.predicted_speedup < CLEARLY_WORSE
            most = MAX_BACKOFF if clear else NEAR_BACKOFF
            self.backoff.double(most, self.exploration.rounds_left, forecast.size)
        return option

    def in_burn_in(self, size: int) -> bool:
        """Whether batches of about this size have hardly been drafted for yet."""
        return self.burn_in[size_bucket(size)] < BURN_IN

    def _burn_in_option(self, forecast: RoundForecast) -> Option | None:
        """The best way to draft with the model, where it has hardly been tried and is not clearly
        worse: predictions are off by a few per cent, and what is not drafted teaches nothing."""
        option = forecast.best_with_model
        if option is None or not self.in_burn_in(forecast.size):
            return None
        worse = forecast.rate(option) <= CLEARLY_WORSE * forecast.rate(None)
        return None if worse else option

    def _change(self, drafting: bool, now: int) -> None:
        if drafting:
            self.began = now
        else:
            self._forecaster.catch_up.drafting_ended(now - self.began)
        self.drafting = drafting
        self.exploration.mode_changed()

    def _explore(
        self, state: RoundState, forecast: RoundForecast, best: Option | None
    ) -> Option | None:
        """`best`, or now and then another mode; the others take turns."""
        self.exploration.unlikely = best is None and forecast.predicted_speedup < CLEARLY_WORSE
        if self.exploration.backs_off:
            return best
        others = forecast.others(best)
        other = others[self._runs % len(others)]
        cost = forecast.exploration_cost(other, best) + self._uncharged(state, other)
        near = forecast.predicted_speedup < NEAR_SPEEDUP
        near = near or not self._forecaster.costs.overhead.knows_plain(forecast.size)
        further = NEAR_ROUNDS if other is None and near else 0
        newcomers = state.batch.catch_up_rows > self._forecaster.max_levels * forecast.size
        retry = self.exploration.retries > 0 and not newcomers
        if other == best or not (retry or self.exploration.due((1 + further) * cost)):
            return best
        state.exploring = True
        self.backoff.begin(further, forecast.size)
        return other

    def _uncharged(self, state: RoundState, option: Option | None) -> float:
        """Seconds of catching up that a plan does not charge to a single round, but an exploration
        partly: where it turns out well, further rounds share them. What it really loses is taken
        from the budget afterwards, in full."""
        if option is None or not option[0]:
            return 0.0
        first = self._forecaster.first_level(state)
        return (first.whole - first.charged) / CATCH_UP_SHARE

    def observe_exploration(
        self, round: Round, state: RoundState, accepted: int, seconds: float
    ) -> bool:
        """Pays for it; whether it was the last of its run.

        Whether others follow is another question than what it cost: rows that had waited are an
        investment, and where they were most of the cost, the next rounds are there to use it. A
        plain round that did well was luck, or the costs know by now."""
        forecast = state.forecast
        assert forecast is not None
        drafted = round.rule is not None
        beside = forecast.overhead if drafted else forecast.plain - float(forecast.verify[0])
        loss = seconds + beside - (forecast.size + accepted) / state.best_rate
        if drafted:
            invested = 0.0
            if round.level_widths:
                regular = self._forecaster.first_level(state).regular
                invested = max(0.0, round.level_seconds[0] - regular)
            self.exploration.observe(loss, promising=loss < 2 * invested)
        else:
            # A process that was stopped meanwhile must not lose the explorations of hours.
            loss = min(loss, forecast.plain)
            clear = loss > CLEAR_LOSS * seconds
            loss *= 1 + self.backoff.rounds
            self.exploration.observe(loss, promising=False, clear=clear)
        ended = not drafted or self.exploration.retries <= 0
        self._runs += ended
        return ended
