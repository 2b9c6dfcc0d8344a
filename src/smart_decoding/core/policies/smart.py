"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured
costs and calibrated probabilities. How it works: docs/controller.md."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.cost import CostModel
from smart_decoding.core.exploration import MAX_RUN, Exploration
from smart_decoding.core.forecast import Forecast
from smart_decoding.core.overhead import size_bucket
from smart_decoding.core.policies.base import require_int, require_number, token_array
from smart_decoding.core.policies.forecaster import SMALL_BATCH, WIDTHS, Forecaster
from smart_decoding.core.policies.learned_costs import VERIFY_EVERY, LearnedCosts
from smart_decoding.core.policies.modes import FIRST_ROUNDS, Modes
from smart_decoding.core.policies.round_state import RoundState
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.core.policies.tree_learner import TreeLearner
from smart_decoding.core.rule import Scores, TreeRule
from smart_decoding.core.selection import RANKS, BestRate, LookAhead, RoundCosts

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import BatchState, Round, TokenIds
    from smart_decoding.core.policies.round_forecast import Option, RoundForecast
    from smart_decoding.core.tree import FloatArray, IntArray

LOOK_AHEAD = 3  # levels, while drafting
# Rounds between two updates of what is known: at first and once drafting has begun, and later.
FIRST_DRAFTING = 16
LEARN_EVERY_FIRST = 2
LEARN_EVERY = 32


class Smart:
    """The cost-aware policy.

    cost: measured costs (None: a guess that real rounds correct). calibration, forecast: stored
    priors. max_levels, children: the deepest tree and the proposals per node that are considered.
    max_round_slowdown: with several requests, no round is planned to last longer than this multiple
    of a plain one. exploration_budget: share of the time that may go into exploring the mode
    predicted worse.
    """

    name = "smart"

    def __init__(
        self,
        cost: CostModel | None = None,
        calibration: Calibration | None = None,
        forecast: Forecast | None = None,
        max_levels: int = 8,
        children: int = 8,
        max_round_slowdown: float = 2.0,
        exploration_budget: float = 0.005,
        eos_token_ids: TokenIds = (),
    ) -> None:
        self.calibration = calibration or Calibration()
        self.forecast = forecast or Forecast(self.calibration)
        self.max_levels = require_int("max_levels", max_levels, 1, 64)
        self.children = require_int("children", children, 1, 256)
        slowdown = require_number("max_round_slowdown", max_round_slowdown, 1.0, math.inf)
        budget = require_number("exploration_budget", exploration_budget, 0.0, 0.5)
        self.exploration = Exploration(budget, MAX_RUN)
        self.statistics = Statistics()
        self.costs = LearnedCosts(cost or CostModel.default())
        self.forecaster = Forecaster(self.costs, self.forecast, self.max_levels, slowdown)
        self.modes = Modes(self.forecaster, self.exploration)
        self._learner = TreeLearner(self.calibration, self.forecast)
        self._ends = token_array(eos_token_ids)
        self._rounds = 0
        self._round: RoundState | None = None  # what was planned last

    @property
    def cost(self) -> CostModel:
        """The costs as corrected so far."""
        return self.costs.model

    @cost.setter
    def cost(self, model: CostModel) -> None:
        self.costs.model = model

    def predict(self, batch: BatchState) -> RoundForecast:
        """What plain decoding and every way to draft would bring, as `plan` chooses among them."""
        return self.forecaster.predict(RoundState.of(batch))

    # --- before a round ---

    def plan(self, batch: BatchState) -> TreeRule | None:
        """The mode predicted best, or one to explore; plain decoding during a backoff."""
        if self.modes.backoff.covers(batch.size):
            self._round = None
            self.forecaster.fade_bias(batch.size)
            return None
        self.costs.learn_plain()
        state = self._round = RoundState.of(batch)
        if not state.drafting or not (batch.has_model or batch.has_free):
            return None
        forecast = state.forecast = self.forecaster.kept_or_new(state, self._rounds)
        option = self.modes.choose(state, forecast, self._rounds)
        if option is None:
            self.forecaster.fade_bias(forecast.size)
            return None
        state.predicted_rate = forecast.values[option]
        return self._rule(state, forecast, option)

    def _rule(self, state: RoundState, forecast: RoundForecast, option: Option) -> TreeRule:
        """How deep to go is decided level by level: `option` only says whether the model drafts."""
        levels = min(self.max_levels, state.deepest) if option[0] else 0
        costs = RoundCosts(
            tokens=forecast.size,
            sunk=forecast.overhead + (forecast.first if levels else 0.0),
            levels=forecast.levels,
            verify=self._verify(state, forecast),
            limit=self.forecaster.round_limit(forecast),
        )
        below = forecast.below(self.max_levels, LOOK_AHEAD)
        # An exploration verifies at least one node: otherwise a cost predicted too high would never
        # be measured again.
        return TreeRule(
            levels,
            self.children,
            state.limits,
            self._ends,
            LookAhead(costs, _widths(state.drafting), below),
            BestRate(costs, least=int(state.exploring)),
            Scores(self.calibration, state.kind),
        )

    def _verify(self, state: RoundState, forecast: RoundForecast) -> FloatArray:
        """Seconds of verifying as many nodes as a look-ahead may count on."""
        frontier = WIDTHS[-1] * state.drafting
        most = self.children * (forecast.size + frontier) + frontier * LOOK_AHEAD * RANKS
        if len(forecast.verify) <= most:
            forecast.verify = self.costs.verify(state, most + 1)
        return forecast.verify

    def _planned(self, batch: BatchState) -> RoundState | None:
        """The state of a round that was planned and not within a backoff."""
        return self._round if self._round is not None and self._round.batch is batch else None

    # --- after the round ---

    def observe(self, round: Round) -> None:
        """Learns costs, overhead, calibration, forecasts and what an exploration has shown."""
        self._rounds += 1
        batch = round.batch
        state = self._planned(batch)
        drafted = round.rule is not None
        if state is None and not (drafted or batch.prefill_rows):
            self._observe_backoff(round)
            return
        state = state or RoundState.of(batch)
        self._observe_value(round, state)
        learn = self._learns_now(round)
        self._learn_costs(round, state, learn or state.exploring)
        if drafted and not batch.prefill_rows:
            self.costs.observe_overhead(round)
        self.costs.disturbed = False
        accepted = self._observe_trees(round, state, learn)
        self._count_burn_in(round)
        seconds = round.verify_seconds + sum(round.level_seconds)
        if state.exploring:
            if self.modes.observe_exploration(round, state, accepted, seconds):
                self._learn_and_predict_anew()
        elif not batch.prefill_rows:  # prompts' time pays for nothing that slows down decoding
            self.exploration.observe_best(seconds)
        seconds += round.other_seconds
        plain = state.forecast.plain if state.forecast else seconds
        self.statistics.record(batch.size, accepted, state.expected, seconds, plain, drafted)

    def _observe_value(self, round: Round, state: RoundState) -> None:
        """What was verified against what had been predicted."""
        trees = round.trees
        if not len(trees):
            return
        state.expected = float(trees.accept_prob[round.kept].sum())
        rule = round.rule
        if rule is None or rule.levels == 0 or not isinstance(rule.keep, BestRate):
            return
        costs = rule.keep.costs
        seconds = costs.drafted(trees) + float(costs.verify[len(round.kept)])
        value = (costs.tokens + state.expected) / seconds
        if state.predicted_rate > 0:
            self.forecaster.observe_value(round.batch.size, value, state.predicted_rate)

    def _observe_backoff(self, round: Round) -> None:
        """After a plain round that nobody asked about."""
        self.costs.observe_overhead(round)
        self.costs.disturbed = False
        self.costs.observe_plain(round)
        if not self.modes.drafting:  # else it belongs to an exploration, or was not planned
            self.exploration.observe_best(round.verify_seconds)
        seconds = round.verify_seconds + round.other_seconds
        self.statistics.record(round.batch.size, 0, 0.0, seconds, seconds, False)

    def _learns_now(self, round: Round) -> bool:
        beginning = self._rounds - self.modes.began <= FIRST_DRAFTING
        beginning = beginning or self.modes.in_burn_in(round.batch.size)
        often = self._rounds <= FIRST_ROUNDS or (round.rule is not None and beginning)
        return self._rounds % (LEARN_EVERY_FIRST if often else LEARN_EVERY) == 0

    def _learn_costs(self, round: Round, state: RoundState, learn: bool) -> None:
        if learn or self._rounds % VERIFY_EVERY == 0:
            self.costs.learn_verify(round, state.context)
        if learn:
            self.costs.learn_levels(round, state.context)

    def _observe_trees(self, round: Round, state: RoundState, learn: bool) -> int:
        """Learns from what was drafted, now or later; how many nodes were accepted."""
        accepted = self._learner.add(round, state)
        surprised = self._learner.surprised
        if learn or surprised:
            self._learn()
        if surprised:
            self.forecaster.drop_kept()
        if round.rule is not None and round.rule.levels == 0:
            self.forecast.observe_free(round.trees, state.limits)
        return accepted

    def _count_burn_in(self, round: Round) -> None:
        size = round.batch.size
        if round.level_widths and self.modes.in_burn_in(size):
            self.modes.burn_in[size_bucket(size)] += 1
            if not self.modes.in_burn_in(size):
                self._learn_and_predict_anew()  # what was measured decides

    def _learn(self) -> None:
        if self._learner.learn():
            self.costs.disturbed = True  # the next round's time has this in it

    def _learn_and_predict_anew(self) -> None:
        self._learn()
        self.forecaster.drop_kept()

    def stats(self) -> dict[str, float]:
        """Running figures for metrics: estimated speedup, share of rounds off, calibration error,
        exploration."""
        return {
            **self.statistics.summary(),
            "probe_seconds": self.exploration.spent,
            "probes": float(self.exploration.count),
        }


@lru_cache(maxsize=1024)
def _widths(drafting: int) -> IntArray:
    """Frontier widths to consider: a quarter of the drafting requests, the surest ones, half of
    them, and multiples."""
    multiples = WIDTHS if drafting <= SMALL_BATCH else WIDTHS[:3]
    widths = {max(1, drafting // 4), max(1, drafting // 2), *(m * drafting for m in multiples)}
    return np.array(sorted(widths), np.int64)
