"""`smart` with one ingredient exchanged, to measure the gain of each; and profiles that are wrong.

A variant exchanges what the policy observes, or what it makes of it.

Needed by `ablate`, `never-slower`, `robustness` and `bench --policy-options smart:variant=NAME`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from smart_decoding.core.calibration import DriftDetector
from smart_decoding.core.costs import CostModel, Curve
from smart_decoding.core.policies.base import StatelessPolicy
from smart_decoding.core.policies.smart import Smart
from smart_decoding.core.policies.smart.state import Realised

if TYPE_CHECKING:
    from smart_decoding.core.batch import BatchState, Round
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.tree import BoolArray, FloatArray, IntArray
    from smart_lab.trace import Trace

# Wrong profiles: rows and levels, as multiples of what they take.
CHEAP = (0.2, 0.25)
EXPENSIVE = (5.0, 4.0)

# Where a profile is wrong, as a share over the octaves of rows beyond the batch size.
NOWHERE = "nowhere"
BUMPS: Mapping[str, Callable[[FloatArray], FloatArray]] = {
    "around the batch size": lambda octaves: np.exp(-2.0 * octaves**2),
    "beyond twice the batch": lambda octaves: 1.0 / (1.0 + np.exp(-8.0 * (octaves - 1.0))),
    "beyond four times the batch": lambda octaves: 1.0 / (1.0 + np.exp(-8.0 * (octaves - 2.0))),
}
MOST_WRONG = 0.2
BENT = 1024  # rows of a wrong curve


class OneKind(StatelessPolicy):
    """`smart` that takes all requests for greedy ones."""

    name = "smart"

    def __init__(self, inner: Smart) -> None:
        self.inner = inner

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Plan as for greedy requests."""
        return self.inner.plan(self._greedy(batch))

    def observe(self, round: Round) -> None:
        """Observe as of greedy requests."""
        self.inner.observe(replace(round, batch=self._greedy(round.batch)))

    def _greedy(self, batch: BatchState) -> BatchState:
        return replace(batch, temperature=np.zeros(batch.size), pictures=None, constrained=None)


class FrozenCosts(StatelessPolicy):
    """`smart` that never corrects its costs."""

    name = "smart"

    def __init__(self, inner: Smart) -> None:
        self.inner = inner
        self._cost = inner.cost

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Plan at the costs of the beginning."""
        rule = self.inner.plan(batch)
        self.inner.cost = self._cost
        return rule

    def observe(self, round: Round) -> None:
        """Learn all but costs."""
        self.inner.observe(round)
        self.inner.cost = self._cost


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


def smart(trace: Trace, cost: CostModel, **options: object) -> Smart:
    """`smart` as it starts in the recorded engine."""
    policy = trace.policy("smart", cost, **options)
    assert isinstance(policy, Smart)
    return policy


Make: TypeAlias = "Callable[[Trace, CostModel], Policy]"

ABLATIONS: Mapping[str, Make] = {
    "smart": smart,
    "costs: not corrected": lambda t, c: FrozenCosts(smart(t, c)),
    "forecasts: not corrected": lambda t, c: trusting(smart(t, c)),
    "no test for change": lambda t, c: unalarmed(smart(t, c)),
    "one kind of requests": lambda t, c: OneKind(smart(t, c)),
    "no exploration": lambda t, c: smart(t, c, exploration_budget=0.0),
    "no limit for the slowest request": lambda t, c: smart(t, c, max_round_slowdown=math.inf),
}


def with_costs(inner: Smart, cost: CostModel) -> Smart:
    """Start from other costs."""
    inner.cost = cost
    return inner


# By live contestants: `--policy-options smart:variant=cheap_costs`.
VARIANTS: Mapping[str, Callable[[Smart], Policy]] = {
    "cheap_costs": lambda p: with_costs(p, askew(p.cost, *CHEAP)),
    "expensive_costs": lambda p: with_costs(p, askew(p.cost, *EXPENSIVE)),
}
