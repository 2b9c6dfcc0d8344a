"""SMART for engines that verify chains: how many tokens to draft, and how many of each request's
drafts to verify.

Such an engine drafts up to K tokens a request and verifies them in its next step. What is chosen
here is K, before a draft model runs, and then, over the whole batch, which drafts are worth their
rows: the exact choice of `core.choice`, by probabilities from `chain_acceptance` and costs from
`chain_costs`. Everything is keyed by the engine's request ids and reads no clock, so that every
rank that were to run it would decide alike.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.choice import best_rates, best_size, ranked
from smart_decoding.core.exploration import RUN, Exploration
from smart_decoding.integrations.chain_acceptance import ChainAcceptance
from smart_decoding.integrations.chain_costs import StepCosts
from smart_decoding.integrations.disabling import DISABLED, NEWCOMERS_RUN, DraftModelSwitch

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

KEEP_LENGTH = 8  # steps that a chosen K is kept for while the batch stays the same


@dataclass
class Counters:
    """What has happened, as numbers that only grow; exported as metrics by these names."""

    steps_on: int = 0  # steps that verified drafts
    steps_off: int = 0  # decoding steps that did not
    drafted: int = 0  # tokens that the drafter proposed
    verified: int = 0
    accepted: int = 0
    explorations: int = 0  # steps that explored
    rests: int = 0  # steps in which the draft model ran no pass at all
    seconds: float = 0.0  # spent on deciding and learning
    lengths: dict[int, int] = field(default_factory=dict)  # K -> steps drafted with it


@dataclass(slots=True)
class Step:
    """One step of the engine. verified, accepted: draft tokens by request id (requests without
    drafts may be left out).

    batch: sequences in it. levels: passes of a draft model after it (DISABLED: not even the first).
    clean: it prefilled nothing. greedy: request ids at temperature 0, None for all. exploring: what
    `Chains.take_exploring` said before it was scheduled."""

    batch: int
    levels: int
    verified: Mapping[str, int]
    accepted: Mapping[str, int] = field(default_factory=dict)
    clean: bool = True
    greedy: frozenset[str] | None = None
    exploring: bool = False


@dataclass(frozen=True, slots=True)
class _Length:
    """The best K above 0 and its tokens per second, and those if the draft model had seen all."""

    length: int
    rate: float
    everyone: float


class Chains:
    """Chooses lengths of chains for one engine.

    lengths: the values of K that may be chosen, 0 included. model: whether a draft model runs (else
    drafts are free). exploration_budget: share of the time that may go into exploring the mode
    predicted worse. may_disable: whether DISABLED may be answered, which the engine must know to
    obey."""

    def __init__(
        self, lengths: Sequence[int], model: bool, exploration_budget: float = 0.005
    ) -> None:
        self.lengths = tuple(sorted({0, *lengths}))
        self.model = model
        self.costs = StepCosts()
        self.acceptance = ChainAcceptance(self.lengths[-1])
        self.counters = Counters()
        self.exploration = Exploration(exploration_budget)
        self.switch = DraftModelSwitch()
        self.may_disable = False
        self._on = False  # whether verifying drafts is predicted best
        self._rate = 0.0  # tokens per second of what is
        self._exploring = False  # whether the coming step is another one
        self._kept = _Length(0, 0.0, 0.0)
        self._kept_batch = 0
        self._kept_steps = 0  # that it is still kept for

    # --- before drafting ---

    def length(self, ids: Sequence[str]) -> int:
        """K: how many tokens to draft for each of the requests `ids`, to be verified in the step
        after this one; DISABLED: none, and the draft model runs no pass."""
        if not self.model:
            return self.lengths[-1]
        if not ids or not self.costs.known:
            return 0
        if self.may_disable and not self.switch.known:
            return DISABLED
        best = self._best_length(ids)
        batch = len(ids)
        plain = self.costs.plain(batch)
        if self.may_disable:
            self.switch.decide(best.everyone, self.switch.rate(plain, batch))
        disabled = self.switch.disabled
        able = any(map(self.switch.can_draft, ids))
        without = self.switch.rate(plain, batch) if disabled else batch / plain
        on = able and not disabled and best.rate > without
        self._rate = best.rate if on else without
        self._exploring = able and self._explores(on, NEWCOMERS_RUN if disabled else RUN)
        if on != self._exploring:
            return best.length
        self.acceptance.relax(ids)
        if able and not disabled:
            return 0
        self.switch.miss(ids)
        return DISABLED

    def _best_length(self, ids: Sequence[str]) -> _Length:
        batch = len(ids)
        if self._kept_batch != batch or self._kept_steps == 0:
            self._kept = self._new_length(ids)
            self._kept_batch = batch
            self._kept_steps = KEEP_LENGTH
        self._kept_steps -= 1
        return self._kept

    def _new_length(self, ids: Sequence[str]) -> _Length:
        """The K with the most tokens per second, if what it will draft is then verified as far as
        it pays.

        Whether the draft model is disabled is decided by what it could do if it had seen all
        requests; K by those that it can draft for."""
        paths = self.acceptance.paths(ids, [self.lengths[-1]] * len(ids), [True] * len(ids))
        everyone = self._rates(paths)
        seen = [self.switch.can_draft(id_) for id_ in ids]
        rates = everyone if all(seen) else self._rates(paths * np.array(seen)[:, None])
        best = int(rates.argmax())
        return _Length(self.lengths[1 + best], float(rates[best]), float(everyone.max()))

    def _rates(self, paths: FloatArray) -> FloatArray:
        """[lengths above 0] tokens per second with each K. paths: [requests, longest]."""
        batch, longest = paths.shape
        lengths = np.array(self.lengths[1:])
        drafted = np.arange(longest) < lengths[:, None, None]
        losses = np.sort(-(paths * drafted).reshape(len(lengths), -1), axis=1)
        drafting = self.costs.extra(batch).per_level * lengths
        seconds = self._seconds(batch, batch * longest)
        return best_rates(losses, batch, drafting, seconds, math.inf)

    def _seconds(self, batch: int, drafts: int) -> FloatArray:
        """[1 + drafts] of a step that verifies 0, 1, ... drafts, without drafting."""
        extra = self.costs.extra(batch)
        seconds: FloatArray = self.costs.plain(batch) + extra.per_draft * np.arange(1.0 + drafts)
        seconds[1:] += extra.fixed
        return seconds

    def _explores(self, on: bool, rounds: int = RUN) -> bool:
        """Whether the coming step leaves the mode predicted best: verifying drafts, or not."""
        if on != self._on:
            self._on = on
            self.exploration.stop()
        if not self.exploration.left and not self.exploration.wait:
            self.exploration.begin(rounds)
        return self.exploration.left > 0

    # --- after drafting ---

    def trim(
        self,
        ids: Sequence[str],
        drafted: Sequence[int],
        greedy: Sequence[bool],
        room: Sequence[int],
    ) -> list[int]:
        """How many of each request's `drafted` tokens to verify in the coming step: [requests].

        greedy: [requests] whether it samples at temperature 0. room: tokens that can still be of
        use."""
        self.counters.drafted += sum(drafted)
        seen = map(self.switch.can_draft, ids)
        each = zip(drafted, room, seen, strict=True)
        drafts = [max(min(d, r), 0) if complete else 0 for d, r, complete in each]
        if not self.costs.known or not any(drafts):
            return [0] * len(ids)
        batch = len(ids)
        paths = self.acceptance.paths(ids, drafts, greedy)
        order = ranked(paths.ravel())
        gains = paths.ravel()[order]
        seconds = self._seconds(batch, len(gains))
        count, rate = best_size(gains, batch, 0.0, seconds)
        if not self.model:
            self._rate = rate
            self._exploring = self._explores(count > 0)
        if self._exploring:  # at least one: a cost predicted too high is measured again
            count = 0 if self._on else best_size(gains, batch, 0.0, seconds, least=1)[0]
        owners = order[:count] // self.acceptance.longest
        kept: list[int] = np.bincount(owners, minlength=batch).tolist()
        every = zip(ids, drafts, kept, strict=True)
        self.acceptance.relax(id_ for id_, had, has in every if had and not has)
        return kept

    def take_exploring(self) -> bool:
        """Whether the step that is about to be scheduled explores; asked once per step, before it
        is."""
        exploring = self._exploring
        self._exploring = False
        return exploring

    # --- after the step ---

    def observe(self, step: Step, seconds: float | None) -> None:
        """Learns from a step that took `seconds` (None: not to be relied upon)."""
        verified = sum(step.verified.values())
        self._count(step, verified)
        if verified:
            self.counters.verified += verified
            self.counters.accepted += self.acceptance.learn(
                step.verified, step.accepted, step.greedy
            )
        if not step.batch:
            return
        if not step.clean:
            seconds = None
        if seconds is not None:
            self._observe_costs(step, verified, seconds)
        if step.exploring:
            loss = self._loss(step, verified, seconds)
            self.exploration.observe(loss, self.costs.plain(step.batch))
        elif seconds is not None:
            self.exploration.observe_best()

    def _count(self, step: Step, verified: int) -> None:
        counters = self.counters
        if verified:
            counters.steps_on += 1
        elif step.batch:
            counters.steps_off += 1
        if step.levels == DISABLED:
            counters.rests += 1
        elif self.model and step.batch:
            counters.lengths[step.levels] = counters.lengths.get(step.levels, 0) + 1
        counters.explorations += step.exploring

    def _observe_costs(self, step: Step, verified: int, seconds: float) -> None:
        if step.levels != DISABLED:
            self.costs.observe(step.batch, verified, step.levels if self.model else 0, seconds)
        elif not verified:
            self.switch.observe(self.costs, step.batch, seconds)

    def _loss(self, step: Step, verified: int, seconds: float | None) -> float:
        """Seconds that a step of an exploration lost against what is predicted best.

        Drafting is charged to the step that verifies. One that was disturbed, or not timed, takes
        what is predicted: a process that was stopped must not lose the explorations of hours."""
        extra = self.costs.extra(step.batch)
        levels = max(step.verified.values(), default=0) if self.model else 0
        took = float(self._seconds(step.batch, verified)[-1]) + extra.per_level * levels
        if seconds is not None:
            drafted_now = max(step.levels, 0) if self.model else 0
            took = min(took, seconds + extra.per_level * (levels - drafted_now))
        return took - (step.batch + sum(step.accepted.values())) / self._rate

    def forget(self, alive: Mapping[str, object]) -> None:
        """Drops what is known of requests that are not in `alive`."""
        self.acceptance.forget(alive)
        self.switch.forget(alive)
