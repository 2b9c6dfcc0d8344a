"""Worlds in which `ablate` replays: machines and drafters that differ from the profile.

A world changes the costs that policies assume, the real seconds of steps, or the drafter's
proposals. Each contestant meets the same changes, on a machine made anew from one seed.

Needed by `ablate --worlds`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.costs import CostModel, Curve
from smart_lab.ablations import BUMPS, MOST_WRONG, askew, bent
from smart_lab.replay import Machine, Prompts, StepCosts
from smart_lab.unsteady import Unsteady

if TYPE_CHECKING:
    from smart_lab.recording import Recording

AS_PROFILED = "as profiled"
WRONG = 2.0  # times what steps take
SLOWER = 1.5
PROMPTS = Prompts(256, 0.75)  # as an engine on a CPU has measured them
LASTS = 3000.0  # tokens, on average, until a machine changes its speed
CONTEXTS = (100, 2000)  # tokens of prompts, by turns
FAR_CONTEXTS = (200, 8000)
NOBODYS = -1  # a token that no target chooses


@dataclass(frozen=True, slots=True)
class World:
    """A recording on a machine. recording: answers in their order. assumed: the costs that policies
    start from. machine: real seconds of steps, new for each contestant."""

    recording: Recording
    assumed: CostModel
    machine: Callable[[], Machine]


Make = Callable[["Recording", "CostModel", int, int], World]


def as_profiled(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """Return the world of the profile."""
    return World(recording, cost, lambda: StepCosts(cost, batch_size))


def misjudged(factor: float) -> Make:
    """Make rows and levels `factor` times as expensive in the profile as on the machine."""

    def make(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
        world = as_profiled(recording, cost, batch_size, seed)
        return replace(world, assumed=askew(cost, factor, factor))

    return make


def unsteady(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """Let the machine's speed change by half, now and then."""
    states = [cost, slower(cost, SLOWER)]
    return World(recording, cost, lambda: Unsteady(states, batch_size, LASTS, seed=seed))


def turning_head(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """The drafter is never right in the middle third of the answers."""
    third = len(recording.answers) // 3
    bad = range(third, 2 * third)
    # An answer may come several times: the bad ones get trees of their own.
    good = recording.take([i for i in range(len(recording.answers)) if i not in bad])
    spoiled = recording.take(bad)
    spoiled = replace(spoiled, token=np.full_like(spoiled.token, NOBODYS))
    both = good.followed_by(spoiled)
    rest = len(good.answers)
    answers = [*both.answers[:third], *both.answers[rest:], *both.answers[third:rest]]
    return as_profiled(replace(both, answers=answers), cost, batch_size, seed)


def mixed_contexts(lengths: Sequence[int]) -> Make:
    """Every other prompt is long. Acceptance stays what it was."""

    def make(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
        answers = [
            replace(answer, prompt_length=lengths[i % len(lengths)])
            for i, answer in enumerate(recording.answers)
        ]
        return as_profiled(replace(recording, answers=answers), cost, batch_size, seed)

    return make


def unknown_costs(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """Nothing was measured: policies start from a guess."""
    return replace(as_profiled(recording, cost, batch_size, seed), assumed=CostModel.default())


def wrong_in_places(where: str, share: float) -> Make:
    """Make the profile wrong for some rows only: one of BUMPS."""

    def make(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
        world = as_profiled(recording, cost, batch_size, seed)
        return replace(world, assumed=bent(cost, where, share, batch_size))

    return make


def with_prompts(recording: Recording, cost: CostModel, batch_size: int, seed: int) -> World:
    """Read prompts beside the other answers, whenever one leaves the batch."""
    return World(recording, cost, lambda: StepCosts(cost, batch_size, prompts=PROMPTS))


def slower(cost: CostModel, factor: float) -> CostModel:
    """Return a machine on which everything takes `factor` times as long."""

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
    **{
        f"costs {share:+.0%} {where}": wrong_in_places(where, share)
        for where in BUMPS
        for share in (-MOST_WRONG, MOST_WRONG)
    },
    "costs unknown": unknown_costs,
    "prompts beside answers": with_prompts,
    "short and long contexts": mixed_contexts(CONTEXTS),
    "short and very long contexts": mixed_contexts(FAR_CONTEXTS),
}
