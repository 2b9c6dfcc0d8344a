"""SMART for engines that verify chains: how many tokens to draft, and how many of each request's drafts to verify.

Such an engine drafts up to K tokens a request and verifies them in its next step. What is chosen here is K, before a
draft model runs, and then, over the whole batch, which drafts are worth their rows: the exact scan of `core.choice`
over probabilities from `core.calibration`, at costs from `chain_costs`. Everything is keyed by the engine's request
ids, uses numpy only and reads no clock, so that every rank that were to run it would decide alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.choice import best_size, ranked
from smart_decoding.core.probing import Prober
from smart_decoding.core.tree import BoolArray, DraftTrees, FloatArray, IntArray
from smart_decoding.integrations.chain_costs import StepCosts

MARGIN = 1.02  # what verifying drafts must promise over a plain step
CONFIDENCE = 0.5  # of a request that has not verified anything, at first
GAIN = 0.2  # of a request's running share of accepted drafts
RELAX = 0.02  # per step that a request's drafts are left out: what is known of it fades to what is usual
FIRST_PROBES = 3.0  # plain steps' worth of time that may go into probes at once, at the start
KEEP_LENGTH = 8  # steps that a chosen K is kept for while the batch stays the same
FAILED, PARTLY, WHOLE = range(3)  # how a request's last draft went: calibrated apart


@dataclass
class Counters:
    """What has happened, as numbers that only grow."""

    steps_on: int = 0  # steps that verified drafts
    steps_off: int = 0  # decoding steps that did not
    drafted: int = 0  # tokens that the drafter proposed
    verified: int = 0
    accepted: int = 0
    probes: int = 0
    seconds: float = 0.0  # spent on deciding and learning
    lengths: dict[int, int] = field(default_factory=dict)  # K -> steps drafted with it


@dataclass(slots=True)
class Step:
    """One step of the engine. verified, accepted: draft tokens by request id (requests without drafts may be left out).

    batch: sequences in it. levels: passes of a draft model after it. clean: it prefilled nothing. greedy: request ids
    at temperature 0, None for all. probe: what `Chains.take_probe` said before it was scheduled."""

    batch: int
    levels: int
    verified: Mapping[str, int]
    accepted: Mapping[str, int] = field(default_factory=dict)
    clean: bool = True
    greedy: frozenset[str] | None = None
    probe: bool = False


@dataclass(slots=True)
class _Request:
    confidence: float
    last: int = PARTLY


class Chains:
    """Chooses lengths of chains for one engine.

    lengths: the values of K that may be chosen, 0 included. model: whether a draft model runs (else drafts are free).
    probe_budget: share of the time that may go into checking the mode that is believed worse."""

    def __init__(self, lengths: Sequence[int], model: bool, probe_budget: float = 0.005) -> None:
        self.lengths = tuple(sorted({0, *lengths}))
        self.model = model
        self.costs = StepCosts()
        self.calibration = Calibration()
        self.counters = Counters()
        self.prober = Prober(probe_budget)
        self._requests: dict[str, _Request] = {}
        self._start = CONFIDENCE
        self._on = True  # the mode that is believed best
        self._ask = False  # whether a draft model that is off drafts, to see
        self._probe = False  # whether the coming step goes against the believed mode
        self._rate = 0.0  # tokens per second of the believed mode
        self._length = (0, 0, 0)  # batch, K, steps left
        self._pause = 0  # steps that a draft model which is on still pauses for

    # --- before drafting ---

    def length(self, ids: Sequence[str]) -> int:
        """K: how many tokens to draft for each of the requests `ids`, to be verified in the step after this one."""
        if not self.model:
            return self.lengths[-1]
        if not self.costs.known:
            return 0
        batch, length, left = self._length
        if batch != len(ids) or left <= 0:
            length, left = self._best_length(ids), KEEP_LENGTH
        self._length = (len(ids), length, left - 1)
        if self._pause:
            self._pause -= 1
            return 0
        return self._probed(length, len(ids))

    def _best_length(self, ids: Sequence[str]) -> int:
        """The K with the most tokens per second, if what it will draft is then verified as far as it pays."""
        batch, longest = len(ids), self.lengths[-1]
        trees = self._score(ids, [longest] * batch, np.ones(batch, np.bool_))
        plain, (fixed, per_draft, per_level) = self.costs.plain(batch), self.costs.extra(batch)
        best, best_value = 0, MARGIN * batch / plain
        for length in self.lengths[1:]:
            gains = -np.sort(-trees.accept_prob[trees.depth <= length])
            _, value = best_size(
                gains, batch, per_level * length, _seconds(plain, fixed, per_draft, len(gains)), least=1
            )
            if value > best_value:
                best, best_value = length, value
        return best

    def _probed(self, length: int, batch: int) -> int:
        """`length`, or now and then the other mode: a draft model that is off drafts one token, to see whether it has
        become better; one that is on pauses for two steps, so that the second is a plain one and tells what plain costs."""
        plain, (fixed, per_draft, per_level) = self.costs.plain(batch), self.costs.extra(batch)
        if length == 0:
            self._ask = self.prober.due(fixed + per_level + per_draft * batch)
            return self.lengths[1] if self._ask else 0
        loss = max(2.0 * (plain - batch / self._rate), 0.0) if self._rate else 0.0
        if self._rate and self.prober.due(loss):
            self.prober.probe_round(loss)
            self._pause = 1
            return 0
        return length

    # --- after drafting ---

    def trim(self, ids: Sequence[str], drafted: Sequence[int], greedy: BoolArray, room: Sequence[int]) -> list[int]:
        """How many of each request's `drafted` tokens to verify in the coming step: [requests].

        greedy: [requests] whether it samples at temperature 0. room: tokens that can still be of use."""
        drafts = [max(min(d, r), 0) for d, r in zip(drafted, room, strict=True)]
        total, batch = sum(drafts), len(ids)
        self.counters.drafted += sum(drafted)
        if not total or not self.costs.known:
            return [0] * batch
        trees = self._score(ids, drafts, greedy)
        order = ranked(trees.accept_prob)
        plain, (fixed, per_draft, _) = self.costs.plain(batch), self.costs.extra(batch)
        seconds = _seconds(plain, fixed, per_draft, total)
        count, value = best_size(trees.accept_prob[order], batch, 0.0, seconds, least=1)
        believed = value > MARGIN * batch / plain
        self._rate = max(value, batch / plain)
        kept = order[:count] if believed else order[:0]
        if self.model:
            self._probe, self._ask = self._ask, False
            if self._probe and not believed:
                kept = np.flatnonzero(trees.depth == 1)
        else:
            kept = self._probed_free(trees, order, seconds, kept)
        lengths: list[int] = np.bincount(trees.owner[kept], minlength=batch).tolist()
        self._relax(id_ for id_, had, has in zip(ids, drafts, lengths, strict=True) if had and not has)
        return lengths

    def _probed_free(self, trees: DraftTrees, order: IntArray, seconds: FloatArray, kept: IntArray) -> IntArray:
        """`kept`, or now and then what tells about the other mode: nothing, or the drafts of one request."""
        if (len(kept) > 0) != self._on:
            self._on = not self._on
            self.prober.mode_changed()
        other = order[:0] if self._on else self._one_request(trees, order)
        self._probe = self.prober.due(max(float(seconds[len(other)]) - trees.batch / self._rate, 0.0))
        return other if self._probe else kept

    def take_probe(self) -> bool:
        """Whether the step that is about to be scheduled is a probe; asked once per step, before it is."""
        probe, self._probe = self._probe, False
        return probe

    def _one_request(self, trees: DraftTrees, order: IntArray) -> IntArray:
        """What a probe of free drafts verifies: the likeliest first token, and all behind it once that went well."""
        nodes = trees.nodes_of(int(trees.owner[order[0]]))
        return nodes if self.prober.hope > 0 else nodes[:1]

    def _relax(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            if id_ in self._requests:
                state = self._requests[id_]
                state.confidence += RELAX * (self._start - state.confidence)

    def _score(self, ids: Sequence[str], drafts: Sequence[int], greedy: BoolArray) -> DraftTrees:
        """The drafts as trees with accept_prob; a draft's confidence is its request's recent share of accepted ones."""
        states = [self._requests.get(id_) for id_ in ids]
        confidence = np.array([self._start if s is None else s.confidence for s in states])
        source = np.array([PARTLY if s is None else s.last for s in states])
        trees = _chains(np.asarray(drafts, np.int64), confidence, source)
        self.calibration.score(trees, greedy)
        return trees

    # --- after the step ---

    def observe(self, step: Step, seconds: float | None) -> None:
        """Learns from a step that took `seconds` (None: not to be relied upon)."""
        verified = sum(step.verified.values())
        if verified:
            self.counters.steps_on += 1
            self._learn(step)
        elif step.batch:
            self.counters.steps_off += 1
        if self.model:
            self.counters.lengths[step.levels] = self.counters.lengths.get(step.levels, 0) + 1
        if seconds is None or not step.clean or not step.batch:
            return
        if step.probe:
            self._probed_round(step, verified, seconds)
        else:
            self.prober.ordinary_round(seconds)
        started = self.costs.known
        self.costs.observe(step.batch, verified, step.levels if self.model else 0, seconds)
        if self.costs.known and not started:
            self.prober.credit = FIRST_PROBES * self.costs.plain(step.batch)

    def _probed_round(self, step: Step, verified: int, seconds: float) -> None:
        """Accounts for a probe. One step is too noisy to tell that plain decoding is better: only its costs are noted."""
        self.counters.probes += 1
        tokens = step.batch + sum(step.accepted.values())
        loss = seconds - tokens / self._rate
        self.prober.probe_round(loss if verified else max(loss, 0.0))

    def _learn(self, step: Step) -> None:
        ids = [id_ for id_, count in step.verified.items() if count]
        drafts = np.array([step.verified[id_] for id_ in ids])
        accepted = np.array([min(step.accepted.get(id_, 0), step.verified[id_]) for id_ in ids])
        greedy = np.array([step.greedy is None or id_ in step.greedy for id_ in ids])
        trees = self._score(ids, drafts.tolist(), greedy)
        seen = np.flatnonzero(trees.depth <= accepted[trees.owner] + 1)  # beyond the first rejection all is censored
        self.calibration.observe(trees, seen, trees.depth[seen] <= accepted[trees.owner[seen]], greedy)
        self.counters.verified += int(drafts.sum())
        self.counters.accepted += int(accepted.sum())
        for id_, drafted, right in zip(ids, drafts.tolist(), accepted.tolist(), strict=True):
            state = self._requests.setdefault(id_, _Request(self._start))
            share = right / (right + 1) if right < drafted else 1.0
            state.confidence += GAIN * (share - state.confidence)
            state.last = WHOLE if right == drafted else PARTLY if right else FAILED
            self._start += 0.01 * (share - self._start)

    def forget(self, alive: Mapping[str, object]) -> None:
        """Drops what is known of requests that are not in `alive`."""
        self._requests = {id_: state for id_, state in self._requests.items() if id_ in alive}


def _chains(drafts: IntArray, confidence: FloatArray, source: IntArray) -> DraftTrees:
    """Chains of drafts[i] nodes for request i, each node with its request's confidence."""
    total = int(drafts.sum())
    owner = np.repeat(np.arange(len(drafts)), drafts)
    first = np.repeat(np.cumsum(drafts) - drafts, drafts)
    index = np.arange(total)
    depth = index - first + 1
    prob = confidence[owner]
    return DraftTrees(
        len(drafts), owner, np.zeros(total, np.int64), np.where(depth == 1, -1, index - 1), depth,
        prob, prob**depth, np.full(total, np.nan), source[owner],
    )  # fmt: skip


def _seconds(plain: float, fixed: float, per_draft: float, most: int) -> FloatArray:
    """[most + 1] seconds of a step that verifies 0, 1, ... drafts."""
    seconds: FloatArray = plain + fixed + per_draft * np.arange(most + 1)
    seconds[0] = plain
    return seconds
