"""`smart` with one ingredient exchanged, to measure the gain of each; and with knowledge that no
controller has.

A variant exchanges parts of the policy's rule, or of its observations.

Needed by `ablate`, `regret` and `bench --policy-options smart:variant=NAME`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from smart_decoding.core.calibration import BIN_PROBS, Calibration, DriftDetector, default_prior
from smart_decoding.core.costs import CostModel, Curve
from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.policies.smart import Smart
from smart_decoding.core.policies.smart.state import Realised
from smart_decoding.core.rule import NO_NODES, Expand, TreeRule, expanded_widths
from smart_decoding.core.selection import (
    BestRate,
    Fixed,
    RoundCosts,
    best_per_owner,
    best_size,
    ranked,
)

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.tree import (
        BoolArray,
        DraftTrees,
        FloatArray,
        IntArray,
        KindArray,
    )
    from smart_lab.trace import Trace

FLAT_CONTEXT = 128.0
BATCHES = (1, 2, 4, 8, 16, 32, 64)  # that keep their own curve
FACTOR_GAIN, FACTOR_STEP = 0.2, 0.25  # of a single factor: a step's share, and its largest error
CERTAIN = 1e6  # observations behind a curve that is not to move
# Wrong profiles: rows and levels, as multiples of what they take.
CHEAP = (0.2, 0.25)
EXPENSIVE = (5.0, 4.0)
WIDTHS = (1, 2, 4, 8)  # frontier nodes per request that a foreseeing policy considers

# Where a profile is wrong, as a share over the octaves of rows beyond the batch size.
NOWHERE = "nowhere"
BUMPS: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "around the batch size": lambda octaves: np.exp(-2.0 * octaves**2),
    "beyond twice the batch": lambda octaves: 1.0 / (1.0 + np.exp(-8.0 * (octaves - 1.0))),
    "beyond four times the batch": lambda octaves: 1.0 / (1.0 + np.exp(-8.0 * (octaves - 2.0))),
}
MOST_WRONG = 0.2
BENT = 1024  # rows of a wrong curve

# Exchanges parts of a rule, whose choice of what to verify is the exact one.
Exchange = Callable[[TreeRule, BestRate], TreeRule]


class Variant(StatelessPolicy):
    """`smart` with parts of its rules exchanged."""

    name = "smart"

    def __init__(self, inner: Smart, exchange: Exchange = lambda rule, exact: rule) -> None:
        self.inner = inner
        self._exchange = exchange
        self._rule: TreeRule | None = None  # the inner policy's own

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the inner policy's rule, exchanged."""
        self._rule = self.inner.plan(batch)
        if self._rule is None or not isinstance(self._rule.keep, BestRate):
            return self._rule
        return self._exchange(self._rule, self._rule.keep)

    def observe(self, round: Round) -> None:
        """The inner policy learns, and takes the rule for its own."""
        self.inner.observe(replace(round, rule=self._rule))


class OneKind(Variant):
    """`smart` that takes all requests for greedy ones."""

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Plan as for greedy requests."""
        return super().plan(self._greedy(batch))

    def observe(self, round: Round) -> None:
        """Observe as of greedy requests."""
        super().observe(replace(round, batch=self._greedy(round.batch)))

    def _greedy(self, batch: BatchState) -> BatchState:
        return replace(batch, temperature=np.zeros(batch.size), pictures=None, constrained=None)


class PromptLessons(Variant):
    """`smart` that learns costs from rounds with prompts, as if their rows were those of
    drafts."""

    def observe(self, round: Round) -> None:
        """Learn, and take the round's time for a verification's."""
        super().observe(round)
        if round.batch.prefill_rows:
            self.inner.state.drafted.add(round)


def even_budget(rule: TreeRule, exact: BestRate) -> TreeRule:
    """Let every request expand and verify as many nodes as every other one."""
    return replace(rule, expand=EvenExpand(rule.expand), keep=EvenKeep(exact.costs, exact.least))


def greedy_rule(rule: TreeRule, exact: BestRate) -> TreeRule:
    """Take the best candidate as long as it pays by itself, as the paper's rule does."""
    return replace(rule, keep=Greedy(exact.costs, exact.least))


def all_levels(levels: int) -> Exchange:
    """Never stops drafting before so many levels, however long the round becomes."""

    def exchange(rule: TreeRule, exact: BestRate) -> TreeRule:
        keep = replace(exact, costs=replace(exact.costs, limit=math.inf))
        return replace(rule, expand=AtLeast(rule.expand, levels), keep=keep)

    return exchange


def look_back(rule: TreeRule, exact: BestRate) -> TreeRule:
    """Stops when the level that was just drafted has not made the round better."""
    return replace(rule, expand=LookBack(AtLeast(rule.expand, rule.levels), exact.costs))


def fixed_before(rule: TreeRule, exact: BestRate) -> TreeRule:
    """Expand as many nodes as on a GPU, where scores are unknown until all is drafted."""
    return replace(rule, expand=Fixed.before(rule) or rule.expand)


@dataclass(frozen=True, slots=True)
class EvenExpand:
    """Expands as many nodes as `inner`, the same number for each request."""

    inner: Expand

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`."""
        nodes = self.inner.frontier(rule, trees, level)
        if not len(nodes):
            return nodes
        each = max(1, round(len(nodes) / trees.batch))
        return best_per_owner(trees, rule.expandable(trees, level), each)


@dataclass(frozen=True, slots=True)
class EvenKeep:
    """The same number of nodes for each request, the number with the most tokens per second, but
    `least` in all."""

    costs: RoundCosts
    least: int

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `Keep`."""
        nodes = np.flatnonzero(rule.useful(trees))
        most = int(np.bincount(trees.owner[nodes]).max(initial=0))
        sunk = self.costs.drafted(trees)
        best, choice = 0.0, NO_NODES
        for each in range(most + 1):
            kept = best_per_owner(trees, nodes, each)
            if len(kept) >= len(self.costs.verify):
                break
            if len(kept) < min(self.least, len(nodes)):
                continue
            seconds = sunk + float(self.costs.verify[len(kept)])
            rate = (self.costs.tokens + float(trees.accept_prob[kept].sum())) / seconds
            if rate > best and (not each or seconds <= self.costs.limit):
                best, choice = rate, kept
        return choice


@dataclass(frozen=True, slots=True)
class Greedy:
    """The best nodes up to the first that does not pay by itself, but `least`."""

    costs: RoundCosts
    least: int

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `Keep`."""
        nodes = np.flatnonzero(rule.useful(trees))
        order = ranked(trees.accept_prob[nodes])[: len(self.costs.verify) - 1]
        seconds = self.costs.drafted(trees) + self.costs.verify
        tokens, kept = self.costs.tokens, 0
        for gain in trees.accept_prob[nodes[order]].tolist():
            step = float(seconds[kept + 1] - seconds[kept])
            pays = gain * float(seconds[kept]) > tokens * step
            if not ((pays and seconds[kept + 1] <= self.costs.limit) or kept < self.least):
                break
            tokens, kept = tokens + gain, kept + 1
        return np.sort(nodes[order[:kept]])


@dataclass(frozen=True, slots=True)
class AtLeast:
    """Expands what `inner` does, and down to `levels` at least the best nodes, one for each
    request."""

    inner: Expand
    levels: int

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`."""
        if level >= self.levels:
            return NO_NODES
        chosen = self.inner.frontier(rule, trees, level)
        if len(chosen):
            return chosen
        able = rule.expandable(trees, level)
        return np.sort(able[ranked(trees.accept_prob[able])[: trees.batch]])


@dataclass(frozen=True, slots=True)
class LookBack:
    """Expands what `inner` does as long as each level has made the round better."""

    inner: Expand
    costs: RoundCosts

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`."""
        rates = [self._rate(rule, trees, deepest) for deepest in range(1, level + 1)]
        if level > 1 and rates[-1] <= max(rates[:-1]):
            return NO_NODES
        return self.inner.frontier(rule, trees, level)

    def _rate(self, rule: TreeRule, trees: DraftTrees, deepest: int) -> float:
        """Return tokens per second if no more than `deepest` levels had been drafted."""
        gains = trees.accept_prob[rule.useful(trees) & (trees.depth <= deepest)]
        gains = gains[ranked(gains)][: len(self.costs.verify) - 1]
        widths = expanded_widths(trees)[1:deepest]
        sunk = self.costs.sunk + float(self.costs.levels.take(widths).sum())
        verify = self.costs.verify[: len(gains) + 1]
        return best_size(gains, self.costs.tokens, sunk, verify, self.costs.limit)[1]


class FrozenCosts(Variant):
    """Never corrects its costs."""

    def __init__(self, inner: Smart) -> None:
        super().__init__(inner)
        self._cost = inner.cost

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Plan at the costs of the beginning."""
        rule = super().plan(batch)
        self.inner.cost = self._cost
        return rule

    def observe(self, round: Round) -> None:
        """Learn all but costs."""
        super().observe(round)
        self.inner.cost = self._cost


@dataclass(frozen=True, slots=True)
class OneFactor:
    """A correction of costs by one factor, a moving mean: in place of speed and memory."""

    log: float = 0.0

    def seconds(self, table: FloatArray, weights: FloatArray | float) -> FloatArray:
        """Return the table's seconds, all by the same factor."""
        corrected: FloatArray = table * math.exp(self.log)
        return corrected

    def of_rows(self, rows: IntArray) -> float:
        """Return 1: all rows have the same factor."""
        return 1.0

    def updated(
        self, table: float, weights: float, seconds: float, steps: int = 1, rows: float = 0.0
    ) -> OneFactor:
        """Move the factor by a share of what it was off, outliers by no more than
        others."""
        if not (math.isfinite(seconds) and seconds > 0 and table > 0):
            return self
        error = math.log(seconds / table) - self.log
        kept = (1.0 - FACTOR_GAIN) ** steps
        return OneFactor(self.log + (1.0 - kept) * min(max(error, -FACTOR_STEP), FACTOR_STEP))


def one_factor(inner: Smart) -> Smart:
    """Correct costs by one factor for each kind of forward."""
    factors: dict[str, Any] = {
        f"{kind}_correction": OneFactor() for kind in ("verify", "draft", "first")
    }
    inner.cost = replace(inner.cost, **factors)
    return inner


class TrustedForecasts(Realised):
    """Expects drafted rounds to reach their forecast rate."""

    def of(self, size: int) -> float:
        """Return 1: forecasts are not corrected."""
        return 1.0


class NeverChanged(DriftDetector):
    """Never reports a change: a changed drafter is learned as slowly as any other."""

    def update(
        self, source: IntArray, expected: FloatArray, hit: BoolArray
    ) -> list[tuple[int, float]]:
        """Return no alarm."""
        return []


def trusting(inner: Smart) -> Smart:
    """Use forecasts without corrections."""
    inner.state.with_model = TrustedForecasts()
    return inner


def unalarmed(inner: Smart) -> Smart:
    """Leave out the test for change."""
    inner.state.calibration.drift = NeverChanged(inner.state.calibration.drift.evidence.shape[1])
    return inner


class Unmoved(Calibration):
    """A calibration that learns nothing."""

    def observe(
        self, trees: DraftTrees, nodes: IntArray, chosen: BoolArray, kind: KindArray
    ) -> None:
        """Learn nothing."""


def raw() -> Calibration:
    """Return the drafter's confidence, taken for the truth."""
    return Unmoved(np.broadcast_to(BIN_PROBS, default_prior(2).shape).copy())


def flat(cost: CostModel, context: float = FLAT_CONTEXT, rows: int = 2048) -> CostModel:
    """Return the same costs at every context: those at `context`."""
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
    """Return a wrong profile, as if taken elsewhere: rows beyond the smallest forward cost `rows`
    times as much, a drafted level `levels` times."""
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


def bent(cost: CostModel, where: str, share: float, size: int) -> CostModel:
    """Return a profile that is wrong by up to `share` for some rows only: one of BUMPS, for batches
    of `size`, or nowhere."""
    if where == NOWHERE:
        return cost
    rows = np.arange(1, BENT)
    factor = 1.0 + share * BUMPS[where](np.log2(rows / size))

    def bend(curve: Curve) -> Curve:
        return Curve(tuple(rows.tolist()), tuple((curve.dense(BENT)[1:] * factor).tolist()))

    return CostModel(  # anew: a replaced one would keep the tables that it has computed
        {batch: bend(curve) for batch, curve in cost.verify.items()},
        cost.draft,
        cost.row_token,
        cost.sequence_token,
        cost.draft_token,
        cost.overhead_seconds,
        first=cost.first,
        waiting=cost.waiting,
    )


def smart(
    trace: Trace, cost: CostModel, calibration: Calibration | None = None, **options: object
) -> Smart:
    """`smart` as it starts in the recorded engine, with another calibration if one is given."""
    given = {} if calibration is None else {"calibration": calibration}
    policy = trace.policy("smart", cost, **given, **options)
    assert isinstance(policy, Smart)
    if calibration is not None:
        policy.state.forecast.calibration = calibration
    return policy


Make: TypeAlias = "Callable[[Trace, CostModel], Policy]"

ABLATIONS: Mapping[str, Make] = {
    "smart": smart,
    "even budget": lambda t, c: Variant(smart(t, c), even_budget),
    "greedy rule": lambda t, c: Variant(smart(t, c), greedy_rule),
    "no calibration": lambda t, c: smart(t, c, raw()),
    "calibration: default prior": lambda t, c: smart(t, c, Calibration()),
    "calibration: not learning": lambda t, c: smart(t, c, _still(t)),
    "stop rule: always 8 levels": lambda t, c: Variant(smart(t, c), all_levels(8)),
    "stop rule: always 2 levels": lambda t, c: Variant(smart(t, c), all_levels(2)),
    "stop rule: look back": lambda t, c: Variant(smart(t, c), look_back),
    "stop rule: fixed before": lambda t, c: Variant(smart(t, c), fixed_before),
    "costs: one factor": lambda t, c: one_factor(smart(t, c)),
    "costs: not corrected": lambda t, c: FrozenCosts(smart(t, c)),
    "forecasts: not corrected": lambda t, c: trusting(smart(t, c)),
    "no test for change": lambda t, c: unalarmed(smart(t, c)),
    "one kind of requests": lambda t, c: OneKind(smart(t, c)),
    "no exploration": lambda t, c: smart(t, c, exploration_budget=0.0),
    "no context in the cost": lambda t, c: smart(t, flat(c)),
    "no limit for the slowest request": lambda t, c: smart(t, c, max_round_slowdown=math.inf),
}


def with_costs(inner: Smart, cost: CostModel) -> Smart:
    inner.cost = cost
    return inner


# By live contestants: `--policy-options smart:variant=all_levels`.
VARIANTS: Mapping[str, Callable[[Smart], Policy]] = {
    "all_levels": lambda p: Variant(p, all_levels(8)),
    "two_levels": lambda p: Variant(p, all_levels(2)),
    "even_budget": lambda p: Variant(p, even_budget),
    "prompt_lessons": PromptLessons,
    "greedy_rule": lambda p: Variant(p, greedy_rule),
    "cheap_costs": lambda p: with_costs(p, askew(p.cost, *CHEAP)),
    "cheap_kept": lambda p: FrozenCosts(with_costs(p, askew(p.cost, *CHEAP))),
    "expensive_costs": lambda p: with_costs(p, askew(p.cost, *EXPENSIVE)),
    "expensive_kept": lambda p: FrozenCosts(with_costs(p, askew(p.cost, *EXPENSIVE))),
}


def _still(trace: Trace) -> Calibration:
    policy = smart(trace, trace.cost or CostModel.default())
    calibration = policy.state.calibration
    return Unmoved(calibration.prior, calibration.counts)
