"""What plain decoding, and drafting with and without a model, are predicted to bring to a batch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.calibration import DEPTHS, HORIZON, KINDS, NODES, WIDEST
from smart_decoding.core.exploration import RUN, Mode
from smart_decoding.core.selection import (
    NONE,
    RANKS,
    BestRate,
    LookAhead,
    RoundCosts,
    SkipModel,
    best_rates,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from smart_decoding.core.batch import BatchState
    from smart_decoding.core.policies.smart.state import SmartState
    from smart_decoding.core.tree import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class Shape:
    """What a prediction depends on. drafting: requests that may draft. deepest: useful level.
    context: mean tokens. kinds: [KINDS] requests of each. waiting: rows to catch up with. stay:
    rounds that catching up is shared among. longest: plain rounds that the round may last."""

    size: int
    drafting: int
    deepest: int
    context: float
    kinds: tuple[int, ...]
    waiting: int
    stay: int
    has_model: bool
    has_free: bool
    longest: float = math.inf

    @classmethod
    def of(cls, batch: BatchState, limits: IntArray, longest: float = math.inf) -> Shape:
        """limits: `batch.limits`, which is computed anew each time it is asked for."""
        each = limits.tolist()
        left = sum(each) // (2 * batch.size)
        return cls(
            batch.size,
            sum(limit > 0 for limit in each),
            max(each),
            batch.mean_context,
            tuple(np.bincount(batch.kind, minlength=KINDS).tolist()),
            batch.catch_up_rows,
            max(1, min(HORIZON, left)),
            batch.has_model,
            batch.has_free,
            longest,
        )

    @property
    def missed(self) -> int:
        """Rows to catch up with beyond those of any round: about one of each request."""
        return max(0, self.waiting - self.size)

    def key(self) -> tuple[object, ...]:
        """Shapes with the same key have the same prediction: what barely matters is coarse."""
        waiting = (self.missed // self.size).bit_length() // 2
        stay = self.stay.bit_length() if waiting else 0
        fixed = (self.size, self.drafting, self.kinds, self.has_model, self.has_free, self.longest)
        return (*fixed, self.deepest > 1, waiting, stay, int(self.context).bit_length())


@dataclass(frozen=True, slots=True)
class Prediction:
    """rates: tokens per second of each mode that is an option. forecast_rate: of MODEL, before what
    such forecasts really reach is taken into account. plain: seconds of a plain round. catch_up:
    those that a model needs for what it has missed; unshared: those of them that a first level
    takes and later rounds are charged. expand: what of a model's trees is expanded.
    keep: what is verified; for MODEL its costs have the first level, a share of the catching up
    included. skip_model: where free drafters propose beside the model, when it is left out."""

    rates: Mapping[Mode, float]
    forecast_rate: float
    plain: float
    catch_up: float
    unshared: float
    expand: LookAhead
    keep: Mapping[Mode, BestRate]
    skip_model: SkipModel | None
    best: Mode = field(init=False)  # of the highest rate
    # Plain rounds that a run in another mode loses against the best one, about.
    prices: Mapping[Mode, float] = field(init=False)

    def __post_init__(self) -> None:
        rates = self.rates
        best = max(rates, key=rates.__getitem__)
        prices = {mode: RUN * (1.0 - rate / rates[best]) for mode, rate in rates.items()}
        del prices[best]
        if Mode.MODEL in prices:
            prices[Mode.MODEL] += self.catch_up / self.plain
        object.__setattr__(self, "best", best)
        object.__setattr__(self, "prices", prices)


def predict(state: SmartState, shape: Shape, max_levels: int) -> Prediction:
    """Return what plain decoding and every way to draft would bring to batches of one shape. It is
    kept until something is learned."""
    key = (max_levels, *shape.key())
    found: Prediction | None = state.predictions.get(key)
    if found is None:
        found = state.predictions[key] = _predict(state, shape, max_levels)
    return found


def _predict(state: SmartState, shape: Shape, max_levels: int) -> Prediction:
    size = shape.size
    drafting = shape.drafting
    costs, plain = _round_costs(state, shape)
    children = state.forecast.children(np.array(shape.kinds) / size)
    first, catch_up = _first_level_seconds(state, shape)
    forecast_rate = 0.0
    skip_model = None
    rates = {Mode.PLAIN: size / plain}
    if shape.has_free and _allows_node(costs, 0.0):
        rates[Mode.FREE] = rates[Mode.PLAIN] * state.free.of(size)
    if shape.has_model and _allows_node(costs, first):
        levels = max_levels if shape.deepest > 1 else 1  # every answer comes to its end
        losses, drafted = _levels(children, levels, costs, first, drafting)
        forecast_rate = _rate(losses, drafted, costs, drafting)
        rates[Mode.MODEL] = forecast_rate * state.with_model.of(size)
        if shape.has_free:
            skip_model = SkipModel(BestRate(costs), np.maximum(-losses[:, :NODES], 0.0), drafted)
            if rates[Mode.MODEL] > rates[Mode.PLAIN]:
                # Each round has the better of both, so free drafters alone are no option.
                rates.pop(Mode.FREE, None)
    with_model = replace(costs, sunk=costs.sunk + first)
    expand = _look_ahead(with_model, children, drafting, max_levels)
    keep = {Mode.FREE: BestRate(costs), Mode.MODEL: BestRate(with_model)}
    unshared = catch_up * (1.0 - 1.0 / shape.stay)
    return Prediction(rates, forecast_rate, plain, catch_up, unshared, expand, keep, skip_model)


def _allows_node(costs: RoundCosts, first: float) -> bool:
    """Return whether a round with one node keeps its limit. first: seconds of a model's first
    level."""
    return costs.limit == math.inf or costs.sunk + first + float(costs.verify[1]) <= costs.limit


def _round_costs(state: SmartState, shape: Shape) -> tuple[RoundCosts, float]:
    """Of a round without a model, and the seconds of a plain one."""
    size = shape.size
    cost = state.cost
    verify = cost.verify_curve(size, size, NODES * shape.drafting + 1, shape.context)
    plain = state.overhead.of(size, False) + float(verify[0])
    costs = RoundCosts(
        tokens=size,
        sunk=state.overhead.of(size, True),
        levels=cost.draft_seconds(np.arange(1 + WIDEST * shape.drafting), shape.context),
        verify=verify,
        limit=shape.longest * plain,
    )
    return costs, plain


def _first_level_seconds(state: SmartState, shape: Shape) -> tuple[float, float]:
    """Return seconds of a model's first level, a share of catching up with what the model has
    missed included, and of the catching up. It is shared among the rounds that the requests
    stay."""
    waiting = [shape.waiting - shape.missed, shape.waiting]
    regular, whole = state.cost.first_seconds(shape.size, waiting, shape.context).tolist()
    return float(regular + (whole - regular) / shape.stay), max(0.0, whole - regular)


def _look_ahead(
    costs: RoundCosts, children: FloatArray, drafting: int, max_levels: int
) -> LookAhead:
    """Return what to expand, where a model drafts for so many requests."""
    widths = 2 ** np.arange((WIDEST * drafting).bit_length())
    below = children[np.minimum(np.arange(1, 1 + max_levels), DEPTHS - 1), :RANKS]
    return LookAhead(costs, widths, below, children[0], drafting)


def _levels(
    children: FloatArray, levels: int, costs: RoundCosts, first: float, drafting: int
) -> tuple[FloatArray, FloatArray]:
    """Losses [levels, nodes] and seconds [levels] of 1, 2, ... `levels` levels, of which each
    expands one node a request. What wider ones add is learned with all else that a mean cannot
    predict."""
    ranks = children.shape[1]
    tree = _expected_tree(children, levels)
    reached = np.arange(len(tree)) // ranks <= np.arange(levels)[:, None]
    losses = np.sort(np.where(reached, -tree, NONE), axis=1)
    further = np.arange(levels, dtype=np.float64) * float(costs.levels[drafting])
    return losses, first + further


def _rate(losses: FloatArray, drafted: FloatArray, costs: RoundCosts, drafting: int) -> float:
    """Return the best rate of all options, where each of `drafting` requests verifies as many nodes
    as the others. losses: [options, nodes] negated gains of one request, ascending; drafted:
    [options] seconds of drafting."""
    losses = losses[:, :NODES] * drafting
    verify = costs.verify[::drafting][: losses.shape[1] + 1]
    sunk = costs.sunk + drafted
    return float(best_rates(losses, costs.tokens, sunk, verify, costs.limit).max())


def _expected_tree(children: FloatArray, levels: int) -> FloatArray:
    """Return forecast probabilities [levels * ranks] of a tree's nodes, where each level expands
    the best node of the level before. children: [DEPTHS, ranks] forecast."""
    rows = children[np.minimum(np.arange(levels), DEPTHS - 1)]
    heads = np.cumprod(np.concatenate((np.ones(1), rows[:-1, 0])))
    result: FloatArray = (heads[:, None] * rows).ravel()
    return result
