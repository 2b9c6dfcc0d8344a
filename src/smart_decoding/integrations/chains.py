"""SMART for engines that verify chains: how many tokens to draft, and how many of each request's
drafts to verify.

Such an engine drafts up to K tokens a request and verifies them in its next step. What is chosen
here is K, before a draft model runs, and then, over the whole batch, which drafts are worth their
rows: the exact choice of `core.choice`, by probabilities from `core.calibration` and costs from
`chain_costs`. Everything is keyed by the engine's request ids and reads no clock, so that every
rank that were to run it would decide alike.

A draft's confidence is its request's recent share of accepted drafts, and requests of equal
confidence are one class: the choice is made over classes and depths, in plain Python, since an
engine's step leaves no room for more.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

from smart_decoding.core.calibration import BINS, DEPTHS, KINDS, Calibration
from smart_decoding.core.probing import Prober
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray
from smart_decoding.integrations.chain_costs import StepCosts
from smart_decoding.integrations.resting import REST, Rests

MARGIN = 1.01  # what verifying drafts must promise over a plain step
CONFIDENCE = 0.5  # of a request that has not verified anything, at first
GAIN = 0.2  # of a request's running share of accepted drafts
# per step that a request's drafts are left out: what is known of it fades to what is usual
RELAX = 0.02
FIRST_PROBES = 3.0  # plain steps' worth of time that may go into probes at once, at the start
KEEP_LENGTH = 8  # steps that a chosen K is kept for while the batch stays the same
EARLY, LEARN_EVERY = (
    8,
    16,
)  # steps: after the first EARLY ones it learns from many at once: a millisecond each time
_SAMPLED, _GREEDY = np.eye(KINDS)[:2]  # shares of the kinds of requests in a batch of one kind
FAILED, PARTLY, WHOLE = range(3)  # how a request's last draft went: calibrated apart

Class: TypeAlias = tuple[int, int, bool]  # how the last draft went, bin of the confidence, greedy
Cuts: TypeAlias = dict[Class, int]  # deepest draft that is verified


@dataclass
class Counters:
    """What has happened, as numbers that only grow."""

    steps_on: int = 0  # steps that verified drafts
    steps_off: int = 0  # decoding steps that did not
    drafted: int = 0  # tokens that the drafter proposed
    verified: int = 0
    accepted: int = 0
    probes: int = 0
    rests: int = 0  # steps in which the draft model ran no pass at all
    seconds: float = 0.0  # spent on deciding and learning
    lengths: dict[int, int] = field(default_factory=dict)  # K -> steps drafted with it


@dataclass(slots=True)
class Step:
    """One step of the engine. verified, accepted: draft tokens by request id (requests without
    drafts may be left out).

    batch: sequences in it. levels: passes of a draft model after it (REST: not even the first).
    clean: it prefilled nothing. greedy: request ids at temperature 0, None for all. probe: what
    `Chains.take_probe` said before it was scheduled."""

    batch: int
    levels: int
    verified: Mapping[str, int]
    accepted: Mapping[str, int] = field(default_factory=dict)
    clean: bool = True
    greedy: frozenset[str] | None = None
    probe: bool = False


@dataclass(slots=True)
class _Request:
    """share: running share of accepted drafts. bin: its calibration bin. last: how the last draft
    went."""

    share: float
    bin: int
    last: int = PARTLY

    def move(self, gain: float, towards: float) -> None:
        self.share += gain * (towards - self.share)
        self.bin = _bin(self.share)


class Chains:
    """Chooses lengths of chains for one engine.

    lengths: the values of K that may be chosen, 0 included. model: whether a draft model runs (else
    drafts are free). probe_budget: share of the time that may go into checking the mode that is
    believed worse."""

    def __init__(self, lengths: Sequence[int], model: bool, probe_budget: float = 0.005) -> None:
        self.lengths = tuple(sorted({0, *lengths}))
        self.model = model
        self.costs = StepCosts()
        self.calibration = Calibration()
        self.counters = Counters()
        self.prober = Prober(probe_budget)
        self.rests = Rests(probe_budget)
        self.may_rest = False  # whether REST may be answered, which the engine must know to obey
        self._requests: dict[str, _Request] = {}
        self._usual = _Request(CONFIDENCE, _bin(CONFIDENCE))  # a request that is new
        self._on = True  # the mode that is believed best
        self._ask = False  # whether a draft model that is off drafts, to see
        self._probe = False  # whether the coming step goes against the believed mode
        self._rate = 0.0  # tokens per second of the believed mode
        self._length = (0, 0, 0)  # batch, K, steps left
        self._pause = 0  # steps that a draft model which is on still pauses for
        self._waiting: list[
            tuple[float, int, bool, int, int]
        ] = []  # share, last, greedy, verified, accepted
        self._learned = 0  # steps
        self._paths: dict[Class, list[float]] = {}  # P(first 1, 2, ... drafts are accepted)

    # --- before drafting ---

    def length(self, ids: Sequence[str]) -> int:
        """K: how many tokens to draft for each of the requests `ids`, to be verified in the step
        after this one; REST: none, and the draft model runs no pass."""
        if not self.model:
            return self.lengths[-1]
        if not self.costs.known:
            return 0
        if self.may_rest and self.rests.trial():
            return REST
        batch, length, left = self._length
        if batch != len(ids) or left <= 0:
            length, left = self._best_length(ids), KEEP_LENGTH
        self._length = (len(ids), length, left - 1)
        if self.may_rest and (self.rests.listening or self.rests.asleep):
            return self._heard(ids, length)
        if self.may_rest and not any(map(self.rests.whole, ids)):
            return REST  # there is nobody that it could draft for
        if self._pause:
            self._pause -= 1
            return 0
        return self._probed(length, ids)

    def _heard(self, ids: Sequence[str], length: int) -> int:
        """At least one token while the draft model is listened to, else REST if it is asleep."""
        batch = len(ids)
        plain, (fixed, per_draft, per_level) = self.costs.plain(batch), self.costs.extra(batch)
        price = (
            plain + fixed + per_level + per_draft * batch - batch / self.rests.rate(plain, batch)
        )
        self._ask = self.rests.listens(ids, max(price, 0.0))
        if self._ask:
            return max(length, self.lengths[1])
        if self.rests.asleep:
            self.rests.miss(ids)
            return REST
        return length

    def _best_length(self, ids: Sequence[str]) -> int:
        """The K with the most tokens per second, if what it will draft is then verified as far as
        it pays.

        Whether the draft model rests is decided by what it could do for requests that have missed
        nothing; K by those that it can draft for."""
        batch, longest = len(ids), self.lengths[-1]
        best, value = self._best(ids, [longest] * batch)
        if not self.may_rest:
            return best
        self.rests.decide(value, self.rests.rate(self.costs.plain(batch), batch))
        heard = [longest if self.rests.whole(id_) else 0 for id_ in ids]
        return best if all(heard) else self._best(ids, heard)[0]

    def _best(self, ids: Sequence[str], drafts: Sequence[int]) -> tuple[int, float]:
        """The best K and its tokens per second, with at most so many `drafts` of each request."""
        batch = len(ids)
        classes = self._classes(ids, drafts, [True] * batch)
        per_level = self.costs.extra(batch)[2]
        best, best_value = 0, MARGIN * batch / self.costs.plain(batch)
        for length in self.lengths[1:] if classes else ():
            _, value, _ = self._cuts(classes, batch, length, per_level * length)
            if value > best_value:
                best, best_value = length, value
        return best, best_value

    def _probed(self, length: int, ids: Sequence[str]) -> int:
        """`length`, or now and then the other mode: a draft model that is off drafts one token, to
        see whether it has become better; one that is on pauses for two steps, of which the second
        is plain and tells what that costs."""
        batch = len(ids)
        plain, (fixed, per_draft, per_level) = self.costs.plain(batch), self.costs.extra(batch)
        if length == 0:
            self._relax(ids)
            self._ask = self.prober.due(fixed + per_level + per_draft * batch)
            return self.lengths[1] if self._ask else 0
        loss = max(2.0 * (plain - batch / self._rate), 0.0) if self._rate else 0.0
        if self._rate and self.prober.due(loss):
            self.prober.probe_round(loss)
            self._pause = 1
            return 0
        return length

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
        drafts = [max(min(d, r), 0) for d, r in zip(drafted, room, strict=True)]
        if self.may_rest:
            drafts = [d if self.rests.whole(id_) else 0 for id_, d in zip(ids, drafts, strict=True)]
        self.counters.drafted += sum(drafted)
        if not self.costs.known or not any(drafts):
            return [0] * len(ids)
        batch = len(ids)
        plain = batch / self.costs.plain(batch)
        cuts, value, likeliest = self._cuts(
            self._classes(ids, drafts, greedy), batch, max(drafts), 0.0
        )
        on = value > MARGIN * plain
        self._rate = max(value, plain)
        if self.model:
            asked, self._ask = self._ask, False
            listens = self.may_rest and bool(self.rests.listening or self.rests.asleep)
            self._probe = asked and not listens  # which is paid for already
            if not on:
                cuts = dict.fromkeys(cuts, int(asked))
        elif on != self._on:
            self._on = on
            self.prober.mode_changed()
        keys = [self._class(id_, g) for id_, g in zip(ids, greedy, strict=True)]
        kept = [min(d, cuts.get(key, 0)) if d else 0 for key, d in zip(keys, drafts, strict=True)]
        if not self.model:
            kept = (
                self._probed_free(kept, keys, drafts, likeliest)
                if not on
                else self._probed_plain(kept, plain)
            )
        self._relax(id_ for id_, had, has in zip(ids, drafts, kept, strict=True) if had and not has)
        return kept

    def _probed_free(
        self, kept: list[int], keys: list[Class], drafts: list[int], likeliest: Class
    ) -> list[int]:
        """Off: nothing, or now and then the likeliest request's first token, and all behind it once
        that went well."""
        none = [0] * len(kept)
        chosen = next(
            i for i, (key, d) in enumerate(zip(keys, drafts, strict=True)) if d and key == likeliest
        )
        count = drafts[chosen] if self.prober.hope > 0 else 1
        fixed, per_draft, _ = self.costs.extra(len(kept))
        self._probe = self.prober.due(fixed + per_draft * count)
        if self._probe:
            none[chosen] = count
        return none

    def _probed_plain(self, kept: list[int], plain: float) -> list[int]:
        """On: what was chosen, or now and then nothing, to see what a plain step costs."""
        self._probe = self.prober.due(max(len(kept) / plain - len(kept) / self._rate, 0.0))
        return [0] * len(kept) if self._probe else kept

    def _relax(self, ids: Iterable[str]) -> None:
        for id_ in ids:
            if id_ in self._requests:
                self._requests[id_].move(RELAX, self._usual.share)

    def take_probe(self) -> bool:
        """Whether the step that is about to be scheduled is a probe; asked once per step, before it
        is."""
        probe, self._probe = self._probe, False
        return probe

    # --- the choice ---

    def _class(self, id_: str, greedy: bool) -> Class:
        state = self._requests.get(id_, self._usual)
        return state.last, state.bin, greedy

    def _classes(
        self, ids: Sequence[str], drafts: Sequence[int], greedy: Sequence[bool]
    ) -> dict[Class, list[int]]:
        """Class -> its requests' numbers of drafts, of those that have any."""
        classes: dict[Class, list[int]] = defaultdict(list)
        for id_, count, sure in zip(ids, drafts, greedy, strict=True):
            if count:
                classes[self._class(id_, sure)].append(count)
        return classes

    def _cuts(
        self, classes: Mapping[Class, list[int]], batch: int, most: int, sunk: float
    ) -> tuple[Cuts, float, Class]:
        """(deepest draft to verify by class, tokens per second with it, the likeliest class); at
        least one is verified.

        Drafts of a class at one depth are worth the same and cost the same, so the best set never
        splits them."""
        entries = []
        for key, counts in classes.items():
            path = self._path(key)
            for depth in range(1, min(max(counts), most) + 1):
                entries.append(
                    (-path[depth - 1], depth, key, sum(count >= depth for count in counts))
                )
        entries.sort(key=lambda entry: entry[:2])
        fixed, per_draft, _ = self.costs.extra(batch)
        seconds = self.costs.plain(batch) + fixed + sunk
        tokens, cuts, best, best_value = float(batch), dict.fromkeys(classes, 0), 0, 0.0
        for index, (gain, _, _, count) in enumerate(entries, start=1):
            tokens -= gain * count
            seconds += per_draft * count
            if tokens / seconds > best_value:
                best, best_value = index, tokens / seconds
        for _, depth, key, _ in entries[:best]:
            cuts[key] = depth
        return cuts, best_value, entries[0][2]

    def _path(self, key: Class) -> list[float]:
        """Calibrated probabilities that a request's first 1, 2, ... drafts are all accepted."""
        path = self._paths.get(key)
        if path is None:
            last, bin_, greedy = key
            steps = self.calibration.curve(last, _GREEDY if greedy else _SAMPLED)[:, bin_].tolist()
            path, reached = [], 1.0
            for depth in range(self.lengths[-1]):
                reached *= steps[min(depth, DEPTHS - 1)]
                path.append(reached)
            self._paths[key] = path
        return path

    # --- after the step ---

    def observe(self, step: Step, seconds: float | None) -> None:
        """Learns from a step that took `seconds` (None: not to be relied upon)."""
        verified = sum(step.verified.values())
        if verified:
            self.counters.steps_on += 1
            self._learn(step)
        elif step.batch:
            self.counters.steps_off += 1
        if step.levels == REST:
            self.counters.rests += 1
        elif self.model and step.batch:
            self.counters.lengths[step.levels] = self.counters.lengths.get(step.levels, 0) + 1
        if seconds is None or not step.clean or not step.batch:
            if step.probe:
                self.counters.probes += 1
                self.prober.lost()
            return
        if step.levels == REST:
            if step.probe:
                self._probed_round(step, verified, seconds)
            if not verified:
                self.rests.observe(self.costs, step.batch, seconds)
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
        """Accounts for a probe. One step is too noisy to tell that plain decoding is better: only
        its loss counts, and a process that was stopped meanwhile must not lose its probes of hours
        to come."""
        self.counters.probes += 1
        tokens = step.batch + sum(step.accepted.values())
        loss = min(seconds - tokens / self._rate, self.costs.plain(step.batch))
        self.prober.probe_round(loss if verified else max(loss, 0.0))

    def _learn(self, step: Step) -> None:
        for id_, drafted in step.verified.items():
            if not drafted:
                continue
            right = min(step.accepted.get(id_, 0), drafted)
            state = self._requests.get(id_)
            if state is None:
                state = self._requests[id_] = _Request(self._usual.share, self._usual.bin)
            greedy = step.greedy is None or id_ in step.greedy
            self._waiting.append((state.share, state.last, greedy, drafted, right))
            share = right / (right + 1) if right < drafted else 1.0
            state.move(GAIN, share)
            state.last = WHOLE if right == drafted else PARTLY if right else FAILED
            self._usual.move(0.01, share)
            self.counters.verified += drafted
            self.counters.accepted += right
        self._learned += 1
        if self._learned <= EARLY or self._learned % LEARN_EVERY == 0:
            self._calibrate()

    def _calibrate(self) -> None:
        """What was verified since the last time: beyond the first rejection all is censored."""
        share, last, greedy, verified, accepted = (
            np.array(column) for column in zip(*self._waiting, strict=True)
        )
        self._waiting.clear()
        tested = np.minimum(verified, accepted + 1)
        trees = _chains(tested, share, last)
        every = np.arange(len(trees))
        self.calibration.observe(trees, every, trees.depth <= accepted[trees.owner], greedy)
        self._paths.clear()

    def forget(self, alive: Mapping[str, object]) -> None:
        """Drops what is known of requests that are not in `alive`."""
        self._requests = {id_: state for id_, state in self._requests.items() if id_ in alive}
        self.rests.forget(alive)


def _chains(drafts: IntArray, confidence: FloatArray, source: IntArray) -> DraftTrees:
    """Chains of drafts[i] nodes for request i, each node with its request's confidence."""
    total = int(drafts.sum())
    owner = np.repeat(np.arange(len(drafts)), drafts)
    index = np.arange(total)
    depth = index - np.repeat(np.cumsum(drafts) - drafts, drafts) + 1
    prob = confidence[owner]
    return DraftTrees(
        len(drafts),
        owner,
        np.zeros(total, np.int64),
        np.where(depth == 1, -1, index - 1),
        depth,
        prob,
        prob**depth,
        np.full(total, np.nan),
        source[owner],
    )


def _bin(share: float) -> int:
    """The calibration's bin of a confidence in [0, 1]: uniform in the arcsine of its root."""
    return min(
        int(math.asin(math.sqrt(min(max(share, 0.0), 1.0))) * (2.0 / math.pi) * BINS), BINS - 1
    )
