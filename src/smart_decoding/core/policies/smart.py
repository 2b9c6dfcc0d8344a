"""SMART: drafts, stops and prunes for the most tokens per second of the whole batch, by measured costs and calibrated
probabilities (DESIGN.md, the controller)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.choice import best_size, best_values, ranked
from smart_decoding.core.cost import CostModel, DraftSample, VerifySample
from smart_decoding.core.forecast import Forecast, grow, subtree
from smart_decoding.core.policies.common import (
    TokenIds,
    depth_limits,
    expandable,
    require_int,
    require_number,
    useful,
)
from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, Round
from smart_decoding.core.policies.statistics import Statistics
from smart_decoding.core.probing import Prober
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray

WIDTHS = (1, 2, 4, 8)  # frontier nodes per drafting request that are considered
AHEAD, RANKS_AHEAD = 3, 4  # look-ahead after a level: levels, and children of each node
KEEP_DECISION = 8  # rounds that a forecast choice is reused for while nothing changes


@dataclass(frozen=True, slots=True)
class Decision:
    """A choice by forecast: tokens per second of plain decoding, of each option, and the best option.

    values: {(levels, width per request): tokens per second}; (0, 0) is free drafters only.
    """

    off: float
    values: dict[tuple[int, int], float]
    foresight: float = 1.0  # what drafting really reached over what was forecast for it

    def best(self) -> tuple[int, int] | None:
        """The best way to draft, or None where plain decoding is at least as good."""
        option = self.best_drafting()
        return option if option is not None and self.value(option) > self.off else None

    def best_drafting(self, free: bool = True, model: bool = True) -> tuple[int, int] | None:
        """The best way to draft among those with (levels > 0) and without the model drafter."""
        options = [o for o in self.values if (model if o[0] else free)]
        return max(options, key=self.value, default=None)

    def value(self, option: tuple[int, int] | None) -> float:
        """Tokens per second expected of an option (None: plain decoding)."""
        if option is None:
            return self.off
        return self.values[option] * (self.foresight if option[0] else 1.0)


@dataclass(slots=True)
class _Scratch:
    """What one round's calls share."""

    sunk: float = 0.0  # seconds of drafting, predicted
    scored: int = -1  # nodes when the trees were last scored
    limits: IntArray = field(default_factory=lambda: np.zeros(0, np.int64))
    context: float = 0.0
    probe: bool = False
    plain: float = 0.0  # seconds of a plain round
    believed: float = 0.0  # tokens per second of the believed mode
    forecast: float = 0.0  # tokens per second forecast for this round, uncorrected; 0: none
    expected: float = 0.0  # sum of accept_prob of the selected nodes


class Smart:
    """The cost-aware policy.

    cost: measured costs (None: a guess that real rounds correct). calibration, forecast: stored priors.
    max_levels, children: the deepest tree and the proposals per node that are considered.
    max_round_slowdown: with several requests, no round is planned to last longer than this multiple of a plain one.
    probe_budget: share of the time that may go into checking the mode that is believed worse.
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
        probe_budget: float = 0.005,
        eos_token_ids: TokenIds = (),
    ) -> None:
        self.cost = cost or CostModel.default()
        self.calibration = calibration or Calibration()
        self.forecast = forecast or Forecast(self.calibration)
        self.max_levels = require_int("max_levels", max_levels, 1, 64)
        self.children = require_int("children", children, 1, 256)
        self.max_round_slowdown = require_number("max_round_slowdown", max_round_slowdown, 1.0, math.inf)
        self.prober = Prober(require_number("probe_budget", probe_budget, 0.0, 0.5))
        self.eos = frozenset(eos_token_ids)
        self.statistics = Statistics()
        self._foresight = 0.0  # log of what drafting rounds really reached over their forecast
        self._children: FloatArray = self.forecast.children(1.0)
        self._decision: tuple[tuple[object, ...], Decision] | None = None
        self._age = 0
        self._drafting = True
        self._scratch = _Scratch()

    # --- before drafting ---

    def plan(self, batch: BatchState) -> DraftPlan:
        limits = depth_limits(batch)
        eligible = int(np.count_nonzero(limits > 0))
        self._scratch = scratch = _Scratch(self.cost.overhead_seconds, limits=limits, context=_mean(batch.context))
        if not eligible or not (batch.has_model or batch.has_free):
            return OFF
        levels = min(self.max_levels, int(limits.max())) if batch.has_model else 0
        decision = self._decide(batch, eligible, levels)
        believed = decision.best()
        scratch.believed, scratch.plain = decision.value(believed), batch.size / decision.off
        if (believed is not None) != self._drafting:
            self._drafting = believed is not None
            self.prober.mode_changed()
        option = believed
        if self.prober.due():
            option, scratch.probe = self._probe(decision, believed), True
        return self._start(batch, eligible, levels, decision, option)

    def decide(self, batch: BatchState, eligible: int, levels: int) -> Decision:
        """Forecast tokens per second of plain decoding and of every way to draft for `eligible` requests."""
        context, size = _mean(batch.context), batch.size
        children = self._children = self.forecast.children(float(np.mean(batch.temperature <= 0)))
        first = size + batch.prefill_rows
        width = len(children[0]) * (1 + (max(levels, 1) - 1) * WIDTHS[-1])
        curve = self.cost.verify_curve(size, first, eligible * max(width, len(self.forecast.free)) + 1, context)
        limit, overhead = self._limit(size, float(curve[0])), self.cost.overhead_seconds
        values = {}
        if batch.has_free:
            gains = np.repeat(-np.sort(-self.forecast.free), eligible)
            values[0, 0] = best_size(gains, size, overhead, curve[: len(gains) + 1], limit)[1]
        if levels:
            start = overhead + float(self.cost.draft_seconds(size + batch.catch_up_rows, context))
            steps = self.cost.draft_seconds(np.array(WIDTHS) * eligible, context)
            for wide, step in zip(WIDTHS, steps, strict=True):
                grown = grow(children, levels, wide)
                for level in range(1, levels + 1):
                    if level == 1 and wide > 1:
                        continue
                    gains = np.repeat(-np.sort(-np.concatenate(grown[:level])), eligible)
                    sunk = start + (level - 1) * float(step)
                    values[level, wide] = best_size(gains, size, sunk, curve[: len(gains) + 1], limit)[1]
        return Decision(size / float(curve[0]), values, math.exp(self._foresight))

    def _decide(self, batch: BatchState, eligible: int, levels: int) -> Decision:
        """`decide`, reused for a few rounds of the same shape: forecasts change slowly, and this is the costly part."""
        shape = (batch.size, eligible, levels, batch.has_free, batch.prefill_rows.bit_length())
        key = (*shape, batch.catch_up_rows.bit_length(), self.calibration.changes)
        self._age += 1
        if self._decision is None or self._decision[0] != key or self._age >= KEEP_DECISION:
            self._decision, self._age = (key, self.decide(batch, eligible, levels)), 0
        return self._decision[1]

    def _probe(self, decision: Decision, believed: tuple[int, int] | None) -> tuple[int, int] | None:
        """Another mode than the believed one; where there are two, they take turns."""
        free, model = decision.best_drafting(model=False), decision.best_drafting(free=False)
        candidates = (None, free, None if _has_model(believed) else model)
        others = [o for o in dict.fromkeys(candidates) if o != believed] or [None]
        return others[self.prober.count % len(others)]

    def _start(
        self, batch: BatchState, eligible: int, levels: int, decision: Decision, option: tuple[int, int] | None
    ) -> DraftPlan:
        if option is None:
            self._scratch.sunk = 0.0
            return OFF
        planned, wide = option
        self._scratch.forecast = decision.values[option]
        if planned == 0:
            return DraftPlan(True, 0, self.children)
        first = batch.size + batch.catch_up_rows
        self._scratch.sunk += float(self.cost.draft_seconds(first, self._scratch.context))
        return DraftPlan(True, levels, self.children, wide * eligible)  # frontier() stops earlier where that is better

    # --- while drafting ---

    def frontier(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int) -> IntArray | None:
        scratch = self._scratch
        if level >= plan.levels or not len(trees):
            return None
        self._score(batch, trees)
        nodes = expandable(trees, level, scratch.limits, self.eos)
        if not len(nodes):
            return None
        drafting = int(np.count_nonzero(scratch.limits > 0))
        factors = WIDTHS if drafting <= 4 else WIDTHS[:3]
        widths = sorted({min(factor * drafting, len(nodes)) for factor in factors})
        accept_prob = trees.accept_prob[nodes]
        order = ranked(accept_prob)[: widths[-1]]
        present = trees.accept_prob[useful(trees, scratch.limits, self.eos)]
        width = self._look_ahead(batch, present, accept_prob[order], widths, level, plan.levels)
        if not width:
            return None
        scratch.sunk += float(self.cost.draft_seconds(width, scratch.context))
        return np.sort(nodes[order[:width]])

    def _look_ahead(
        self, batch: BatchState, present: FloatArray, frontier: FloatArray, widths: list[int], level: int, levels: int
    ) -> int:
        """How many nodes of the sorted `frontier` to expand next: 0 if no deeper tree is forecast to beat stopping.

        Each (further levels, width) is one row: the candidates there are, and those forecast below the frontier."""
        scratch, context = self._scratch, self._scratch.context
        ahead = min(AHEAD, levels - level)
        below = subtree(self._children, level + 1, ahead, RANKS_AHEAD)
        hidden_levels = np.arange(len(below)) // RANKS_AHEAD >= np.arange(1, ahead + 1)[:, None]
        hidden_nodes = np.arange(len(frontier)) >= np.array(widths)[:, None]
        by_level = np.where(hidden_levels, 0.0, below)  # [ahead, ahead * RANKS_AHEAD]
        by_width = np.where(hidden_nodes, 0.0, frontier)  # [widths, frontier]
        forecast = by_level[:, None, None, :] * by_width[None, :, :, None]
        options = ahead * len(widths)
        gains = np.zeros((options + 1, len(present) + frontier.size * below.size))
        gains[:, : len(present)] = present
        gains[:options, len(present) :] = forecast.reshape(options, -1)
        steps = self.cost.draft_seconds(np.array(widths), context)
        sunk = np.zeros(options + 1)  # the last option is to stop
        sunk[:options] = (np.arange(1, ahead + 1)[:, None] * steps).ravel()
        curve = self._curve(batch, gains.shape[1])
        limit = self._limit(batch.size, float(curve[0]))
        values = best_values(gains, batch.size, sunk + scratch.sunk, curve, limit)
        best = int(values.argmax())
        return widths[best % len(widths)] if values[best] > values[-1] else 0

    # --- after drafting ---

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        scratch = self._scratch
        if not len(trees):
            return np.zeros(0, np.int64)
        self._score(batch, trees)
        nodes = np.flatnonzero(useful(trees, scratch.limits, self.eos))
        accept_prob = trees.accept_prob[nodes]
        order = ranked(accept_prob)
        gains = accept_prob[order]
        curve = self._curve(batch, len(nodes))
        # A probe verifies at least one node: otherwise a cost believed too high would never be measured again.
        least = 1 if scratch.probe and len(nodes) else 0
        limit = self._limit(batch.size, float(curve[0]))
        size, value = best_size(gains, batch.size, scratch.sunk, curve, limit, least)
        scratch.expected = float(gains[:size].sum())
        if plan.levels and scratch.forecast > 0 and value > 0:
            error = math.log(value / scratch.forecast) - self._foresight
            self._foresight += min(max(error, -0.3), 0.3) / 16
        return np.sort(nodes[order[:size]])

    def observe(self, round: Round) -> None:
        trees, batch, scratch = round.trees, round.batch, self._scratch
        self._learn_costs(round)
        accepted = 0
        if len(trees):
            self._score(batch, trees)
            nodes, chosen = round.observed()
            self.calibration.observe(trees, nodes, chosen, batch.temperature <= 0)
            if round.level_widths:
                self.forecast.observe(trees)
            accepted = int(np.count_nonzero(round.next_token >= 0))
        if round.plan.speculate and round.plan.levels == 0:
            self.forecast.observe_free(trees, int(np.count_nonzero(scratch.limits > 0)))
        seconds = round.verify_seconds + sum(round.level_seconds)
        if scratch.probe:
            self.prober.probe_round(seconds - (batch.size + accepted) / scratch.believed)
        else:
            self.prober.ordinary_round(seconds)
        drafted = round.plan.speculate
        self.statistics.record(batch.size, accepted, scratch.expected, seconds, scratch.plain, drafted)

    def stats(self) -> dict[str, float]:
        """Running figures for metrics: estimated speedup, share of rounds off, calibration error, probing."""
        return {**self.statistics.summary(), "probe_seconds": self.prober.spent, "probes": float(self.prober.count)}

    # --- shared ---

    def _score(self, batch: BatchState, trees: DraftTrees) -> None:
        if self._scratch.scored != len(trees):
            self.calibration.score(trees, batch.temperature <= 0)
            self._scratch.scored = len(trees)

    def _curve(self, batch: BatchState, nodes: int) -> FloatArray:
        """[nodes + 1] seconds of a verification of 0, 1, ... nodes."""
        return self.cost.verify_curve(batch.size, batch.size + batch.prefill_rows, nodes + 1, self._scratch.context)

    def _limit(self, size: int, plain: float) -> float:
        """Seconds that a round may last: no bound for a lone request, which gets all the nodes itself."""
        return self.max_round_slowdown * plain if size > 1 else math.inf

    def _learn_costs(self, round: Round) -> None:
        context = self._scratch.context
        if round.verify_rows:
            sample = VerifySample(round.batch.size, round.verify_rows, context, round.verify_seconds)
            self.cost = self.cost.corrected(sample)
        for level, (width, seconds) in enumerate(zip(round.level_widths, round.level_seconds, strict=True)):
            rows = width + round.batch.catch_up_rows if level == 0 else width
            self.cost = self.cost.corrected(DraftSample(rows, context, seconds))


def _has_model(option: tuple[int, int] | None) -> bool:
    return option is not None and option[0] > 0


def _mean(context: IntArray) -> float:
    return float(context.sum()) / len(context)
