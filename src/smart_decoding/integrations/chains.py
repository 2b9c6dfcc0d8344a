"""SMART for engines that verify chains: how many tokens to draft, and how many of each request's
drafts to verify.

Such an engine drafts up to K tokens a request and verifies them in its next step. What is chosen
here is K, before a draft model runs, and then, over the whole batch, which drafts are worth their
rows: the exact choice of `core.choice`, by probabilities from `chain_acceptance` and costs from
`chain_costs`. Everything is keyed by the engine's request ids and reads no clock, so that every
rank that were to run it would decide alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from smart_decoding.core.exploration import Exploration
from smart_decoding.integrations.chain_acceptance import ChainAcceptance, Class
from smart_decoding.integrations.chain_costs import StepCosts
from smart_decoding.integrations.disabling import DISABLED, DraftModelSwitch

MARGIN = 1.01  # predicted speedup that verifying drafts needs over a plain step
FIRST_CREDIT = 3.0  # plain steps' worth of time that may be explored with at once, at the start
KEEP_LENGTH = 8  # steps that a chosen K is kept for while the batch stays the same

Cuts: TypeAlias = dict[Class, int]  # deepest draft that is verified


@dataclass
class Counters:
    """What has happened, as numbers that only grow; exported as metrics by these names."""

    steps_on: int = 0  # steps that verified drafts
    steps_off: int = 0  # decoding steps that did not
    drafted: int = 0  # tokens that the drafter proposed
    verified: int = 0
    accepted: int = 0
    probes: int = 0  # steps that explored
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
class _Choice:
    """The drafts to verify, tokens per second with them, and the class most likely accepted."""

    cuts: Cuts
    rate: float
    likeliest: Class


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
        self.switch = DraftModelSwitch(exploration_budget)
        self.may_disable = False
        self._on = True  # whether verifying drafts is predicted best
        self._asked = False  # whether a draft model that is off drafts, to explore
        self._exploring = False  # whether the coming step leaves the mode predicted best
        self._rate = 0.0  # tokens per second of that mode
        self._length = (0, 0, 0)  # batch, K, steps left
        self._pause = 0  # steps that a draft model which is on still pauses for

    # --- before drafting ---

    def length(self, ids: Sequence[str]) -> int:
        """K: how many tokens to draft for each of the requests `ids`, to be verified in the step
        after this one; DISABLED: none, and the draft model runs no pass."""
        if not self.model:
            return self.lengths[-1]
        if not self.costs.known:
            return 0
        if self.may_disable and self.switch.measures():
            return DISABLED
        length = self._kept_length(ids)
        if self.may_disable and (self.switch.observing or self.switch.disabled):
            return self._observed_length(ids, length)
        if self.may_disable and not any(map(self.switch.can_draft, ids)):
            return DISABLED  # there is nobody that it could draft for
        if self._pause:
            self._pause -= 1
            return 0
        return self._explored_length(ids, length)

    def _kept_length(self, ids: Sequence[str]) -> int:
        batch, length, left = self._length
        if batch != len(ids) or left <= 0:
            length = self._best_length(ids)
            left = KEEP_LENGTH
        self._length = (len(ids), length, left - 1)
        return length

    def _observed_length(self, ids: Sequence[str], length: int) -> int:
        """At least one token while the draft model is observed, else DISABLED if it is."""
        batch = len(ids)
        plain = self.costs.plain(batch)
        fixed, per_draft, per_level = self.costs.extra(batch)
        without = batch / self.switch.rate(plain, batch)
        cost = plain + fixed + per_level + per_draft * batch - without
        self._asked = self.switch.observes(ids, max(cost, 0.0))
        if self._asked:
            return max(length, self.lengths[1])
        if self.switch.disabled:
            self.switch.miss(ids)
            return DISABLED
        return length

    def _best_length(self, ids: Sequence[str]) -> int:
        """The K with the most tokens per second, if what it will draft is then verified as far as
        it pays.

        Whether the draft model is disabled is decided by what it could do if it had seen all
        requests; K by those that it can draft for."""
        batch = len(ids)
        longest = self.lengths[-1]
        best, rate = self._best(ids, [longest] * batch)
        if not self.may_disable:
            return best
        self.switch.decide(rate, self.switch.rate(self.costs.plain(batch), batch))
        drafts = [longest if self.switch.can_draft(id_) else 0 for id_ in ids]
        return best if all(drafts) else self._best(ids, drafts)[0]

    def _best(self, ids: Sequence[str], drafts: Sequence[int]) -> tuple[int, float]:
        """The best K and its tokens per second, with at most so many `drafts` of each request."""
        batch = len(ids)
        classes = self.acceptance.classes(ids, drafts, [True] * batch)
        per_level = self.costs.extra(batch).per_level
        best = 0
        best_rate = MARGIN * batch / self.costs.plain(batch)
        for length in self.lengths[1:] if classes else ():
            rate = self._choose(classes, batch, length, per_level * length).rate
            if rate > best_rate:
                best, best_rate = length, rate
        return best, best_rate

    def _explored_length(self, ids: Sequence[str], length: int) -> int:
        """`length`, or now and then the other mode: a draft model that is off drafts one token, to
        see whether it has become better; one that is on pauses for two steps, of which the second
        is plain and tells what that costs."""
        batch = len(ids)
        if length == 0:
            self.acceptance.relax(ids)
            fixed, per_draft, per_level = self.costs.extra(batch)
            self._asked = self.exploration.due(fixed + per_level + per_draft * batch)
            return self.lengths[1] if self._asked else 0
        if not self._rate:
            return length
        loss = max(2.0 * (self.costs.plain(batch) - batch / self._rate), 0.0)
        if not self.exploration.due(loss):
            return length
        self.exploration.observe(loss)
        self._pause = 1
        return 0

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
        drafts = [max(min(d, r), 0) for d, r in zip(drafted, room, strict=True)]
        if self.may_disable:
            seen = map(self.switch.can_draft, ids)
            drafts = [d if complete else 0 for d, complete in zip(drafts, seen, strict=True)]
        if not self.costs.known or not any(drafts):
            return [0] * len(ids)
        batch = len(ids)
        plain = batch / self.costs.plain(batch)
        classes = self.acceptance.classes(ids, drafts, greedy)
        choice = self._choose(classes, batch, max(drafts), 0.0)
        on = choice.rate > MARGIN * plain
        self._rate = max(choice.rate, plain)
        keys = [self.acceptance.class_of(id_, g) for id_, g in zip(ids, greedy, strict=True)]
        if self.model:
            kept = _cut(self._model_cuts(choice, on), keys, drafts)
        else:
            kept = self._trim_free(choice, on, keys, drafts)
        every = zip(ids, drafts, kept, strict=True)
        self.acceptance.relax(id_ for id_, had, has in every if had and not has)
        return kept

    def _model_cuts(self, choice: _Choice, on: bool) -> Cuts:
        """What was chosen; where drafting is off, nothing, or one token to explore."""
        asked = self._asked
        self._asked = False
        observes = self.may_disable and bool(self.switch.observing or self.switch.disabled)
        self._exploring = asked and not observes  # which is paid for already
        return choice.cuts if on else dict.fromkeys(choice.cuts, int(asked))

    def _trim_free(
        self, choice: _Choice, on: bool, keys: list[Class], drafts: list[int]
    ) -> list[int]:
        if on != self._on:
            self._on = on
            self.exploration.mode_changed()
        if on:
            return self._explored_plain(_cut(choice.cuts, keys, drafts))
        return self._explored_drafts(choice, keys, drafts)

    def _explored_drafts(self, choice: _Choice, keys: list[Class], drafts: list[int]) -> list[int]:
        """Off: nothing, or now and then the likeliest request's first token, and all behind it once
        that went well."""
        kept = [0] * len(keys)
        pairs = enumerate(zip(keys, drafts, strict=True))
        chosen = next(i for i, (key, d) in pairs if d and key == choice.likeliest)
        count = drafts[chosen] if self.exploration.retries > 0 else 1
        extra = self.costs.extra(len(keys))
        self._exploring = self.exploration.due(extra.fixed + extra.per_draft * count)
        if self._exploring:
            kept[chosen] = count
        return kept

    def _explored_plain(self, kept: list[int]) -> list[int]:
        """On: what was chosen, or now and then nothing, to see what a plain step costs."""
        batch = len(kept)
        plain = batch / self.costs.plain(batch)
        self._exploring = self.exploration.due(max(batch / plain - batch / self._rate, 0.0))
        return [0] * batch if self._exploring else kept

    def take_exploring(self) -> bool:
        """Whether the step that is about to be scheduled explores; asked once per step, before it
        is."""
        exploring = self._exploring
        self._exploring = False
        return exploring

    def _choose(
        self, classes: Mapping[Class, list[int]], batch: int, most: int, sunk: float
    ) -> _Choice:
        """The best drafts to verify, at least one of them.

        Drafts of a class at one depth are worth the same and cost the same, so the best set never
        splits them."""
        entries = []
        for key, counts in classes.items():
            path = self.acceptance.path(key)
            for depth in range(1, min(max(counts), most) + 1):
                requests = sum(count >= depth for count in counts)
                entries.append((-path[depth - 1], depth, key, requests))
        entries.sort(key=lambda entry: entry[:2])
        extra = self.costs.extra(batch)
        seconds = self.costs.plain(batch) + extra.fixed + sunk
        tokens = float(batch)
        best = 0
        best_rate = 0.0
        for index, (loss, _, _, requests) in enumerate(entries, start=1):
            tokens -= loss * requests
            seconds += extra.per_draft * requests
            if tokens / seconds > best_rate:
                best, best_rate = index, tokens / seconds
        cuts = dict.fromkeys(classes, 0)
        cuts.update({key: depth for _, depth, key, _ in entries[:best]})
        return _Choice(cuts, best_rate, likeliest=entries[0][2])

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
        if seconds is None or not step.clean or not step.batch:
            if step.exploring:
                self.exploration.observe_unmeasured()
            return
        if step.exploring:
            self._observe_exploration(step, verified, seconds)
        if step.levels == DISABLED:
            if not verified:
                self.switch.observe(self.costs, step.batch, seconds)
            return
        if not step.exploring:
            self.exploration.observe_best(seconds)
        self._observe_costs(step, verified, seconds)

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
        counters.probes += step.exploring

    def _observe_costs(self, step: Step, verified: int, seconds: float) -> None:
        started = self.costs.known
        self.costs.observe(step.batch, verified, step.levels if self.model else 0, seconds)
        if self.costs.known and not started:
            self.exploration.credit = FIRST_CREDIT * self.costs.plain(step.batch)

    def _observe_exploration(self, step: Step, verified: int, seconds: float) -> None:
        """One step is too noisy to tell that plain decoding is better: only its loss counts. And a
        process that was stopped meanwhile must not lose the explorations of hours to come."""
        tokens = step.batch + sum(step.accepted.values())
        loss = min(seconds - tokens / self._rate, self.costs.plain(step.batch))
        self.exploration.observe(loss if verified else max(loss, 0.0))

    def forget(self, alive: Mapping[str, object]) -> None:
        """Drops what is known of requests that are not in `alive`."""
        self.acceptance.forget(alive)
        self.switch.forget(alive)


def _cut(cuts: Cuts, keys: Sequence[Class], drafts: Sequence[int]) -> list[int]:
    """[requests] drafts that are verified."""
    return [min(d, cuts.get(key, 0)) if d else 0 for key, d in zip(keys, drafts, strict=True)]
