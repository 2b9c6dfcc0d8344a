"""Predicts plain decoding and every way to draft for a batch, from costs and mean children."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.choice import best_rates, best_size
from smart_decoding.core.forecast import Forecast, expected_tree
from smart_decoding.core.overhead import size_bucket
from smart_decoding.core.policies.catch_up import CatchUp, FirstLevel
from smart_decoding.core.policies.round_forecast import FREE_ONLY, RoundForecast

if TYPE_CHECKING:
    from smart_decoding.core.policies.learned_costs import LearnedCosts
    from smart_decoding.core.policies.round_state import RoundState
    from smart_decoding.core.tree import FloatArray

WIDTHS = (1, 2, 4, 8)  # frontier nodes per drafting request that are considered
SMALL_BATCH = 4  # larger ones have no room for wide or deep trees, which are not predicted then
FEW_LEVELS = 4
KEEP_ROUNDS = 64  # that a forecast is reused for while nothing changes
MAX_KEPT = 64
MOVED = 0.03  # of plain decoding's seconds: a change that asks for a new forecast
BIAS_GAIN = 1 / 16
BIAS_CLIP = 0.3  # one round counts as at most so far off, in log rate
BIAS_FADE = 1 / 48  # per round without drafting: a shortfall counts less and less


class Forecaster:
    """Forecasts by the batch's shape, kept for some rounds, and their bias by size.

    bias: log of what drafting rounds reached over their forecast, by `size_bucket`."""

    def __init__(
        self, costs: LearnedCosts, forecast: Forecast, max_levels: int, max_round_slowdown: float
    ) -> None:
        self.costs = costs
        self.forecast = forecast
        self.max_levels = max_levels
        self.max_round_slowdown = max_round_slowdown
        self.catch_up = CatchUp()
        self.bias: dict[int, float] = {}
        self._kept: dict[tuple[object, ...], RoundForecast] = {}

    def kept_or_new(self, state: RoundState, now: int) -> RoundForecast:
        """The forecast for a round, made anew when the batch's shape has changed or it is old.

        now: the number of the round."""
        key = self._shape(state)
        found = self._kept.get(key)
        if found is None or self._is_stale(found, state, now):
            self.costs.disturbed = True
            if len(self._kept) >= MAX_KEPT:
                self._kept.clear()
            found = self._kept[key] = self.predict(state)
            found.made = now
        return found

    def drop_kept(self) -> None:
        """What was learned changes all forecasts."""
        self._kept.clear()

    def predict(self, state: RoundState) -> RoundForecast:
        """A new forecast."""
        size = state.batch.size
        drafting = state.drafting
        levels = self._max_levels(state)
        widths: tuple[int, ...] = WIDTHS
        if drafting > SMALL_BATCH:
            levels = min(levels, FEW_LEVELS)
            widths = WIDTHS[:2]
        model = self.costs.model
        children = self.forecast.children(np.array(state.kinds) / size)
        of_model = children.shape[1] * (1 + (max(levels, 1) - 1) * widths[-1])
        verify = self.costs.verify(state, drafting * max(of_model, len(self.forecast.free)) + 1)
        beside, more = self.costs.overhead.of(size)
        forecast = RoundForecast(
            size,
            first=self.first_level(state).charged,
            plain=beside + float(verify[0]),
            overhead=beside + more,
            verify=verify,
            levels=model.draft_seconds(np.arange(1 + WIDTHS[-1] * drafting), state.context),
            children=children,
            bias=math.exp(self.bias.get(size_bucket(size), 0.0)),
        )
        if state.batch.has_free:
            self._add_free(forecast, drafting)
        for width in widths if levels else ():
            self._add_model(forecast, drafting, levels, width)
        return forecast

    def _add_free(self, forecast: RoundForecast, drafting: int) -> None:
        """The rate with the drafters without model alone."""
        gains = np.repeat(-np.sort(-self.forecast.free), drafting)
        verify = forecast.verify[: len(gains) + 1]
        limit = self.round_limit(forecast)
        _, rate = best_size(gains, forecast.size, forecast.overhead, verify, limit)
        forecast.values[FREE_ONLY] = rate

    def _add_model(self, forecast: RoundForecast, drafting: int, levels: int, width: int) -> None:
        """The rates with 1, 2, ... `levels` levels of the model drafter, `width` nodes wide."""
        tree = expected_tree(forecast.children, levels, width)
        losses = np.repeat(np.sort(-tree, axis=1), drafting, axis=1)
        further = np.arange(levels, dtype=np.float64)
        sunk: FloatArray = (
            forecast.overhead + forecast.first + further * float(forecast.levels[width * drafting])
        )
        verify = forecast.verify[: losses.shape[1] + 1]
        rates = best_rates(losses, forecast.size, sunk, verify, self.round_limit(forecast))
        forecast.values.update({(1 + i, width): float(rate) for i, rate in enumerate(rates)})

    def first_level(self, state: RoundState) -> FirstLevel:
        """Seconds of the round's first level."""
        return self.catch_up.first_level(self.costs.model, state)

    def round_limit(self, forecast: RoundForecast) -> float:
        """Seconds that a round may last: a lone request, which gets all the nodes, has no bound."""
        return self.max_round_slowdown * forecast.plain if forecast.size > 1 else math.inf

    def observe_value(self, size: int, value: float, predicted: float) -> None:
        """After a choice among drafted nodes: the rate expected of it, and the one predicted."""
        key = size_bucket(size)
        before = self.bias.get(key, 0.0)
        error = math.log(value / predicted) - before
        self.bias[key] = before + min(max(error, -BIAS_CLIP), BIAS_CLIP) * BIAS_GAIN

    def fade_bias(self, size: int) -> None:
        """After a round without drafting: the head may be good again. A positive bias stays: it
        comes of choosing among real nodes, which a mean cannot predict."""
        key = size_bucket(size)
        if self.bias.get(key, 0.0) < 0.0:
            self.bias[key] *= 1.0 - BIAS_FADE

    def _is_stale(self, forecast: RoundForecast, state: RoundState, now: int) -> bool:
        if now - forecast.made >= min(KEEP_ROUNDS, 2 + now // 2):
            return True
        size = state.batch.size
        if size not in self.costs.corrected_sizes:
            return False
        self.costs.corrected_sizes.discard(size)
        plain = float(self.costs.model.verify_seconds(size, size, state.context))
        return abs(plain / float(forecast.verify[0]) - 1.0) > MOVED

    def _shape(self, state: RoundState) -> tuple[object, ...]:
        """The shape of a batch; what barely changes the costs is taken coarsely."""
        batch = state.batch
        waiting = (batch.catch_up_rows // (4 * batch.size)).bit_length()
        sharing = self.catch_up.sharing(state).bit_length() if waiting else 0
        return (
            (batch.size, state.drafting, self._max_levels(state)),
            *state.kinds,
            batch.has_free,
            (waiting, sharing, int(state.context) // 128),
            self.forecast.calibration.changes,
        )

    def _max_levels(self, state: RoundState) -> int:
        """Levels to predict, rounded up to a power of two: every answer comes to its end, one token
        after another, and a new forecast for each would be work for little."""
        if not state.batch.has_model or state.deepest <= 0:
            return 0
        return min(self.max_levels, 1 << (state.deepest - 1).bit_length())
