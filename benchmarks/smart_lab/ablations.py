"""`smart` with one ingredient exchanged, to see what each gives; and with knowledge that no
controller has.

A variant wraps the policy and redoes one of its decisions, through its public methods alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from smart_decoding.core.calibration import BIN_PROBS, MAX_PROB, Calibration, default_prior
from smart_decoding.core.choice import best_size, ranked
from smart_decoding.core.cost import CostModel, Curve
from smart_decoding.core.policies.common import best_per_owner, depth_limits, expandable, useful
from smart_decoding.core.policies.protocol import (
    OFF,
    BatchState,
    DraftPlan,
    Policy,
    Round,
    StatelessPolicy,
)
from smart_decoding.core.policies.smart import Smart
from smart_decoding.core.tree import ROOT, BoolArray, DraftTrees, FloatArray, IntArray
from smart_lab.recording import Recording
from smart_lab.replay import Source, Walk
from smart_lab.trace import Trace

FLAT_CONTEXT = 128.0
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # that keep their own curve
CERTAIN = 1e6  # observations behind a curve that is not to move
CHEAP, DEAR = (
    (0.2, 0.25),
    (5.0, 4.0),
)  # wrong profiles: rows and levels, as multiples of what they take
WIDTHS = (1, 2, 4, 8)  # frontier nodes per request that a foreseeing policy considers


class Variant(StatelessPolicy):
    """`smart`, followed in every decision. Keeps account of what drafting has cost so far in the
    round."""

    name = "smart"

    def __init__(self, inner: Smart) -> None:
        self.inner = inner
        self._sunk = 0.0

    def plan(self, batch: BatchState) -> DraftPlan:
        plan = self.inner.plan(batch)
        self._sunk = 0.0
        if plan.speculate:
            self._sunk = self.inner.cost.overhead_seconds + self._first(batch)
        if type(self).frontier is not Variant.frontier or type(self)._expand is not Variant._expand:
            return replace(
                plan, growth=None
            )  # a drafter that grows whole trees in one call would not ask us
        return plan

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        nodes = self.inner.frontier(plan, batch, trees, level)
        if nodes is not None:
            nodes = self._expand(plan, batch, trees, level, nodes)
            self._sunk += self._level(batch, len(nodes))
        return nodes

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        return self.inner.select(plan, batch, trees)

    def observe(self, round: Round) -> None:
        self.inner.observe(round)

    def _expand(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int, nodes: IntArray
    ) -> IntArray:
        """What to expand instead of `nodes`."""
        return nodes

    def _first(self, batch: BatchState) -> float:
        waiting = min(batch.catch_up_rows, 2 * batch.size)
        return float(self.inner.cost.first_seconds(batch.size, waiting, _context(batch)))

    def _level(self, batch: BatchState, width: int) -> float:
        return float(self.inner.cost.draft_seconds(width, _context(batch)))

    def _seconds(self, batch: BatchState, nodes: int) -> FloatArray:
        """Of the round so far and a verification of 0, 1, ... nodes."""
        return self._sunk + self.inner.cost.verify_curve(
            batch.size, batch.size, nodes + 1, _context(batch)
        )

    def _candidates(self, batch: BatchState, trees: DraftTrees) -> IntArray:
        """Nodes that may be verified, by falling accept_prob (which `smart` has set)."""
        nodes = np.flatnonzero(useful(trees, depth_limits(batch), self.inner.eos))
        found: IntArray = nodes[ranked(trees.accept_prob[nodes])]
        return found


class EvenBudget(Variant):
    """Every request expands and verifies as many nodes as every other one."""

    def _expand(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int, nodes: IntArray
    ) -> IntArray:
        able = expandable(trees, level, depth_limits(batch), self.inner.eos)
        each = max(1, round(len(nodes) / batch.size))
        return best_per_owner(trees, able, trees.accept_prob[able], each)

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        self.inner.select(plan, batch, trees)
        nodes = np.sort(self._candidates(batch, trees))
        if not plan.speculate or not len(nodes):
            return np.zeros(0, np.int64)
        most = int(np.bincount(trees.owner[nodes]).max())
        choices = [
            best_per_owner(trees, nodes, trees.accept_prob[nodes], each) for each in range(most + 1)
        ]
        seconds = self._seconds(batch, len(nodes))
        values = [
            (batch.size + trees.accept_prob[kept].sum()) / seconds[len(kept)] for kept in choices
        ]
        return choices[int(np.argmax(values))]


class GreedyRule(Variant):
    """Takes the best candidate as long as it pays by itself, as the paper's rule does, and stops at
    the first that does not."""

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        self.inner.select(plan, batch, trees)
        if not plan.speculate or not len(trees):
            return np.zeros(0, np.int64)
        nodes = self._candidates(batch, trees)
        seconds, tokens, kept = self._seconds(batch, len(nodes)), float(batch.size), 0
        for gain in trees.accept_prob[nodes].tolist():
            step = float(seconds[kept + 1] - seconds[kept])
            if gain * float(seconds[kept]) <= tokens * step:
                break
            tokens, kept = tokens + gain, kept + 1
        return np.sort(nodes[:kept])


class AllLevels(Variant):
    """Never stops drafting before `levels` levels: the frontier's best nodes, one for each
    request."""

    def __init__(self, inner: Smart, levels: int) -> None:
        super().__init__(inner)
        self.levels = levels

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        asked = super().frontier(plan, batch, trees, level) if level < self.levels else None
        if asked is not None or level >= min(self.levels, plan.levels):
            return asked
        able = expandable(trees, level, depth_limits(batch), self.inner.eos)
        nodes = np.sort(able[ranked(trees.accept_prob[able])[: batch.size]])
        self._sunk += self._level(batch, len(nodes)) if len(nodes) else 0.0
        return nodes if len(nodes) else None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        """The exact choice, with what was really drafted as sunk."""
        self.inner.select(plan, batch, trees)
        nodes = self._candidates(batch, trees)
        size, _ = best_size(
            trees.accept_prob[nodes],
            batch.size,
            self._sunk,
            self._seconds(batch, len(nodes)) - self._sunk,
        )
        return np.sort(nodes[:size]) if plan.speculate else np.zeros(0, np.int64)


class LookBack(AllLevels):
    """Stops when the level that was just drafted has not made the round better."""

    def __init__(self, inner: Smart, levels: int = 8) -> None:
        super().__init__(inner, levels)
        self._best = 0.0

    def plan(self, batch: BatchState) -> DraftPlan:
        plan = super().plan(batch)
        self._best = batch.size / float(
            self.inner.cost.verify_seconds(batch.size, batch.size, _context(batch))
        )
        return plan

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        self.inner.calibration.score(trees, batch.temperature <= 0)
        nodes = self._candidates(batch, trees)
        seconds = self._seconds(batch, len(nodes))
        _, value = best_size(trees.accept_prob[nodes], batch.size, 0.0, seconds)
        if level > 1 and value <= self._best:
            return None
        self._best = max(value, self._best) if level > 1 else value
        return super().frontier(plan, batch, trees, level)


class FrozenCosts(Variant):
    """Never corrects its costs."""

    def __init__(self, inner: Smart) -> None:
        super().__init__(inner)
        inner.costs.learn_plain = inner.costs.plain_rounds.clear  # type: ignore[method-assign]

    def observe(self, round: Round) -> None:
        before = self.inner.cost
        self.inner.observe(round)
        self.inner.cost = before


class Foreseeing(FrozenCosts):
    """Knows what deeper levels would propose before they are drafted, and pays for those that it
    takes only."""

    def __init__(self, inner: Smart) -> None:
        super().__init__(inner)
        self._walk: Walk | None = None
        self._steps: list[IntArray] = []

    def foresee(self, walk: Walk) -> None:
        """The positions of the round to come."""
        self._walk = walk

    def plan(self, batch: BatchState) -> DraftPlan:
        assert self._walk is not None
        self.inner.plan(batch)
        best, self._steps = batch.size / float(self._seconds_of(batch, 0.0, 0)[0]), []
        levels, inner = 0, self.inner
        for wide in WIDTHS:
            trees, source, steps = (
                DraftTrees.empty(batch.size),
                Source(self._walk.recording, self._walk.position),
                [],
            )
            sunk = inner.cost.overhead_seconds + self._first(batch)
            source.expand(trees, np.full(batch.size, ROOT), inner.children, np.arange(batch.size))
            for level in range(
                1, min(inner.max_levels, int(depth_limits(batch).max(initial=0))) + 1
            ):
                inner.calibration.score(trees, batch.temperature <= 0)
                nodes = self._candidates(batch, trees)
                _, value = best_size(
                    trees.accept_prob[nodes],
                    batch.size,
                    0.0,
                    self._seconds_of(batch, sunk, len(nodes)),
                )
                if value > best:
                    best, levels, self._steps = value, level, list(steps)
                able = expandable(trees, level, depth_limits(batch), inner.eos)
                if not len(able):
                    break
                steps.append(np.sort(able[ranked(trees.accept_prob[able])[: wide * batch.size]]))
                sunk += self._level(batch, len(steps[-1]))
                source.expand(trees, steps[-1], inner.children)
        return DraftPlan(True, levels, inner.children) if levels else OFF

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        return self._steps[level - 1] if level <= len(self._steps) else None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        inner = self.inner
        inner.calibration.score(trees, batch.temperature <= 0)
        sunk = inner.cost.overhead_seconds + self._first(batch)
        sunk += sum(self._level(batch, len(step)) for step in self._steps)
        nodes = self._candidates(batch, trees)
        size, _ = best_size(
            trees.accept_prob[nodes], batch.size, 0.0, self._seconds_of(batch, sunk, len(nodes))
        )
        return np.sort(nodes[:size])

    def _seconds_of(self, batch: BatchState, sunk: float, nodes: int) -> FloatArray:
        self._sunk = sunk
        return self._seconds(batch, nodes)


class Unmoved(Calibration):
    """A calibration that learns nothing."""

    def observe(
        self, trees: DraftTrees, nodes: IntArray, chosen: BoolArray, greedy: BoolArray
    ) -> None:
        pass


def raw() -> Calibration:
    """The drafter's confidence, taken for the truth."""
    return Unmoved(np.broadcast_to(BIN_PROBS, default_prior(2).shape).copy())


def fitted(recording: Recording) -> Calibration:
    """The curves that these very answers bear out: as good as learning could ever become."""
    prior = default_prior(2)
    hits, counts = np.zeros_like(prior), np.zeros_like(prior)
    calibration = Calibration()
    walk = Walk.everywhere(recording)
    position, depth = np.arange(recording.positions), 1
    slot = position
    while len(slot):
        count = recording.count[slot].astype(np.int64)
        node = np.repeat(recording.child[slot] - np.cumsum(count) + count, count) + np.arange(
            int(count.sum())
        )
        owner = np.repeat(position, count)
        hit = recording.token[node] == walk.truth(owner, np.full(len(owner), depth))
        known = walk.truth(owner, np.full(len(owner), depth)) >= 0
        bins = calibration.bins(recording.prob[node].astype(np.float64))
        level = min(depth, prior.shape[1]) - 1
        np.add.at(hits[0, level, 1], bins[known], hit[known])
        np.add.at(counts[0, level, 1], bins[known], 1)
        position, slot, depth = owner[hit], recording.positions + node[hit], depth + 1
    curve = np.clip((hits + 2 * prior) / (counts + 2), 1e-4, MAX_PROB)
    return Unmoved(curve, np.where(counts > 0, CERTAIN, 0.0))


def flat(cost: CostModel, context: float = FLAT_CONTEXT, rows: int = 2048) -> CostModel:
    """The same costs at every context: those at `context`."""
    tables = {
        batch: dict(enumerate(cost.verify_curve(batch, batch, rows, context).tolist(), batch))
        for batch in {*cost.verify, *BATCHES}
    }
    draft = dict(enumerate(cost.draft_seconds(np.arange(1, rows), context).tolist(), 1))
    first = cost.first and Curve(
        tuple(range(1, rows)),
        tuple(float(cost.first_seconds(r, 0, context)) for r in range(1, rows)),
    )
    return replace(
        CostModel.from_table(tables, draft, cost.overhead_seconds),
        first=first,
        waiting=cost.waiting,
    )


def askew(cost: CostModel, rows: float, levels: float) -> CostModel:
    """A wrong profile, as if taken elsewhere: what rows add to the smallest forward is `rows` times
    as dear, a drafted level `levels` times."""
    verify = {}
    for batch, curve in cost.verify.items():
        least = curve.seconds[0]
        verify[batch] = {
            r: least + rows * (s - least) for r, s in zip(curve.rows, curve.seconds, strict=True)
        }
    draft = {r: levels * s for r, s in zip(cost.draft.rows, cost.draft.seconds, strict=True)}
    first, waiting = (
        c and Curve(c.rows, tuple(levels * s for s in c.seconds))
        for c in (cost.first, cost.waiting)
    )
    wrong = replace(
        CostModel.from_table(verify, draft, cost.overhead_seconds), first=first, waiting=waiting
    )
    return replace(
        wrong,
        row_token=cost.row_token,
        sequence_token=cost.sequence_token,
        draft_token=cost.draft_token,
    )


def smart(
    trace: Trace, cost: CostModel, calibration: Calibration | None = None, **options: object
) -> Smart:
    """`smart` as it starts in the recorded engine, with another calibration if one is given."""
    given = {} if calibration is None else {"calibration": calibration}
    policy = trace.policy("smart", cost, **given, **options)
    assert isinstance(policy, Smart)
    if calibration is not None:
        policy.forecast.calibration = calibration
    return policy


Make = Callable[[Trace, CostModel], Policy]

ABLATIONS: Mapping[str, Make] = {
    "smart": smart,
    "even budget": lambda t, c: EvenBudget(smart(t, c)),
    "greedy rule": lambda t, c: GreedyRule(smart(t, c)),
    "no calibration": lambda t, c: smart(t, c, raw()),
    "calibration: default prior": lambda t, c: smart(t, c, Calibration()),
    "calibration: prior, not learning": lambda t, c: smart(t, c, _still(t)),
    "stop rule: always 8 levels": lambda t, c: AllLevels(smart(t, c), 8),
    "stop rule: always 2 levels": lambda t, c: AllLevels(smart(t, c), 2),
    "stop rule: look back": lambda t, c: LookBack(smart(t, c)),
    "no probing": lambda t, c: smart(t, c, exploration_budget=0.0),
    "no context in the cost": lambda t, c: smart(t, flat(c)),
    "no round limit": lambda t, c: smart(t, c, max_round_slowdown=math.inf),
}


def with_costs(inner: Smart, cost: CostModel) -> Smart:
    inner.cost = cost
    return inner


# By live contestants: `--policy-options smart:variant=all_levels`.
VARIANTS: Mapping[str, Callable[[Smart], Policy]] = {
    "all_levels": lambda p: AllLevels(p, 8),
    "two_levels": lambda p: AllLevels(p, 2),
    "even_budget": EvenBudget,
    "greedy_rule": GreedyRule,
    "cheap_costs": lambda p: with_costs(p, askew(p.cost, *CHEAP)),
    "cheap_kept": lambda p: FrozenCosts(with_costs(p, askew(p.cost, *CHEAP))),
    "dear_costs": lambda p: with_costs(p, askew(p.cost, *DEAR)),
    "dear_kept": lambda p: FrozenCosts(with_costs(p, askew(p.cost, *DEAR))),
}


def _still(trace: Trace) -> Calibration:
    policy = smart(trace, trace.cost or CostModel.default())
    calibration = policy.calibration
    return Unmoved(calibration.prior, calibration.counts)


def _context(batch: BatchState) -> float:
    return float(batch.context.sum()) / batch.size
