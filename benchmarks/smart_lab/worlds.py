"""Worlds in which `ablate` replays: what a controller meets beside a machine that is as profiled.

A world changes what policies believe of costs, what steps really take, or what the drafter
proposes. Each contestant meets the same changes, on a machine made anew from one seed.

Needed by `ablate --worlds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.costs import Curve
from smart_lab.ablations import askew
from smart_lab.replay import Machine, StepCosts
from smart_lab.unsteady import Unsteady

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_lab.recording import Recording

AS_PROFILED = "as profiled"
WRONG = 2.0  # times what steps take
SLOWER = 1.5
LASTS = 600.0  # tokens, on average, until a machine changes its speed
CONTEXTS = (100, 2000)  # tokens of prompts, by turns
NOBODYS = -1  # a token that no target chooses


@dataclass(frozen=True, slots=True)
class World:
    """recording: answers in their order. believed: the costs that policies start from. machine:
    what steps take, new for each contestant."""

    recording: Recording
    believed: CostModel
    machine: Callable[[], Machine]


Make = Callable[["Recording", "CostModel", int, int], World]


def as_profiled(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """Steps take what the profile says."""
    return World(recording, cost, lambda: StepCosts(cost, batch_size))


def misjudged(factor: float) -> Make:
    """What rows and levels add is `factor` times as expensive in the profile as it is."""

    def make(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
        world = as_profiled(recording, cost, batch_size, seed)
        return replace(world, believed=askew(cost, factor, factor))

    return make


def unsteady(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """The machine's speed changes by half, now and then."""
    states = [cost, slower(cost, SLOWER)]
    return World(recording, cost, lambda: Unsteady(states, batch_size, LASTS, seed=seed))


def turning_head(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """The drafter is never right in the middle third of the answers."""
    third = len(recording.answers) // 3
    bad = range(third, 2 * third)
    # An answer may come several times: the bad ones get trees of their own.
    good = recording.take([i for i in range(len(recording.answers)) if i not in bad])
    spoiled = recording.take(bad)
    return as_profiled(_joined(good, spoiled, third), cost, batch_size, seed)


def _joined(good: Recording, bad: Recording, third: int) -> Recording:
    """The answers of `good`, those of `bad` behind the first `third`, whose nodes are nobody's."""
    answers = [
        *good.answers[:third],
        *(replace(a, first=a.first + good.positions) for a in bad.answers),
        *good.answers[third:],
    ]
    token = np.concatenate((good.token, np.full_like(bad.token, NOBODYS))).astype(np.int64)
    prob = np.concatenate((good.prob, bad.prob))
    roots = (good.count[: good.positions], bad.count[: bad.positions])
    nodes = (good.count[good.positions :], bad.count[bad.positions :])
    count = np.concatenate((*roots, *nodes)).astype(np.int64)
    sizes = np.concatenate((good.sizes, bad.sizes))
    return type(good).from_flat(answers, token, prob, count, sizes, good.free)


def mixed_contexts(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """Every other prompt is long. Acceptance stays what it was."""
    answers = [
        replace(answer, prompt_length=CONTEXTS[i % len(CONTEXTS)])
        for i, answer in enumerate(recording.answers)
    ]
    return as_profiled(replace(recording, answers=answers), cost, batch_size, seed)


def slower(cost: CostModel, factor: float) -> CostModel:
    """A machine on which everything takes `factor` times as long."""

    def scaled(curve: Curve) -> Curve:
        return Curve(curve.rows, tuple(factor * s for s in curve.seconds))

    return type(cost)(
        {batch: scaled(curve) for batch, curve in cost.verify.items()},
        scaled(cost.draft),
        factor * cost.row_token,
        factor * cost.sequence_token,
        factor * cost.draft_token,
        factor * cost.overhead_seconds,
        first=cost.first and scaled(cost.first),
        waiting=cost.waiting and scaled(cost.waiting),
    )


WORLDS: Mapping[str, Make] = {
    AS_PROFILED: as_profiled,
    "costs twice too high": misjudged(WRONG),
    "costs twice too low": misjudged(1 / WRONG),
    "speed changes by half": unsteady,
    "a head that turns bad and good": turning_head,
    "short and long contexts": mixed_contexts,
}
