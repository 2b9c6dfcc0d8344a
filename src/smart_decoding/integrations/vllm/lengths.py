"""The draft length of a step, the same for all its requests: the one of most tokens per second.

vLLM drafts K tokens for each request in one step and verifies them in the next. The cost of a step
of each length and the acceptance of its drafts are learned from the steps themselves, without a
profile. Nothing here reads a clock or knows vLLM.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.calibration import HORIZON, RunningMean
from smart_decoding.core.exploration import Exploration

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

LONG = 1000  # steps with drafts for which the usual acceptance is remembered
PRIOR = 0.7  # acceptance at first
PRIOR_WEIGHT = 4.0  # steps that a prior is worth
GUESS = 0.002  # share of a plain step that a draft costs, at first: too little, so that it is tried
CLIP = math.log(2.0)  # one slow step counts as at most twice the usual
ENOUGH = 4  # plain steps before anything is drafted
BETTER = 1.01  # rate over the last length's at which another length takes its place


class AcceptanceByDepth:
    """P(the draft at a depth is accepted | the one before it was), by depth, over all requests.

    Recent steps count most. Where they are few, the long run counts, and where that is short the
    depth above: n-grams fail at the first draft, where nothing matches, and seldom below it. A
    request without drafts counts as one whose first was rejected."""

    def __init__(self, longest: int) -> None:
        self._recent = np.zeros((2, longest))  # shares of requests: accepted, tested
        self._usual = np.zeros((2, longest))

    def observe(self, accepted: Sequence[int], length: int) -> None:
        """Learn from a step that drafted `length` tokens. accepted: [requests] drafts."""
        self._recent *= 1 - 1 / HORIZON
        if not accepted or not length:
            return
        depth = np.arange(1, length + 1)
        right = np.minimum(accepted, length)[:, None]
        step = np.stack(((right >= depth).mean(0), (right >= depth - 1).mean(0)))
        self._recent[:, :length] += step
        self._usual *= 1 - 1 / LONG
        self._usual[:, :length] += step

    def tokens(self) -> FloatArray:
        """Return [1 + longest] expected tokens of a request in a step of each length, the bonus
        token included."""
        usual = [PRIOR]
        for accepted, tested in self._usual.T.tolist():
            usual.append((accepted + usual[-1] * PRIOR_WEIGHT) / (tested + PRIOR_WEIGHT))
        recent = self._recent + PRIOR_WEIGHT * np.array([usual[1:], [1.0] * len(usual[1:])])
        by_depth = recent[0] / recent[1]
        return np.concatenate(([1.0], 1.0 + by_depth.cumprod().cumsum()))


class StepSeconds:
    """Seconds of a step by batch size and draft length.

    Steps of the shortest length are learned around knots, two for each doubling of the batch size;
    longer ones as ratios to them. Unobserved knots are as the nearest observed one."""

    def __init__(self, shortest: int) -> None:
        self._shortest = shortest
        self._plain: dict[int, RunningMean] = {}  # log seconds by knot, ascending
        self._ratio: dict[int, dict[int, RunningMean]] = {}  # of logs, by length and knot
        self.plain_steps = 0

    @property
    def known(self) -> bool:
        """Whether enough steps of the shortest length were observed for predictions."""
        return self.plain_steps >= ENOUGH

    def predict(self, batch: int, length: int) -> float:
        """Return seconds of a step whose `batch` requests verify `length` drafts each."""
        means = [mean.mean for mean in self._plain.values()]
        plain = float(np.interp(_position(batch), list(self._plain), means))
        return math.exp(plain + self._log_ratio(batch, length))

    def observe(self, batch: int, length: int, seconds: float) -> None:
        """Learn from a real step that prefilled nothing. Unusable times change nothing."""
        if not (math.isfinite(seconds) and seconds > 0 and batch > 0):
            return
        knot = _knot(batch)
        if length == self._shortest:
            self.plain_steps += 1
            if knot not in self._plain:
                first = RunningMean(math.log(seconds), CLIP)
                self._plain = dict(sorted({**self._plain, knot: first}.items()))
            mean = self._plain[knot]
            mean.observe(mean.mean + math.log(seconds / self.predict(batch, length)))
        elif self.known:
            excess = math.log(seconds / self.predict(batch, length))
            ratio = self._log_ratio(batch, length) + min(excess, 2 * CLIP)
            knots = self._ratio.setdefault(length, {})
            knots.setdefault(knot, RunningMean(clip=CLIP)).observe(ratio)

    def count(self, batch: int, length: int) -> int:
        """Return how many steps of this length were observed at about this batch size."""
        knots = self._plain if length == self._shortest else self._ratio.get(length, {})
        found = knots.get(_knot(batch))
        return found.count if found else 0

    def _log_ratio(self, batch: int, length: int) -> float:
        if length == self._shortest:
            return 0.0
        knots = self._ratio.get(length)
        if not knots:
            return math.log1p(GUESS * batch * (length - self._shortest))
        return knots[min(knots, key=lambda knot: abs(knot - _position(batch)))].mean


def _position(batch: int) -> float:
    """Return the position of a batch size between the knots, which are at whole numbers."""
    return 2.0 * math.log2(max(batch, 1))


def _knot(batch: int) -> int:
    return round(_position(batch))


@dataclass
class Counters:
    """Counts that only grow, exported as metrics by these names."""

    steps_on: int = 0  # steps that verified drafts
    steps_off: int = 0  # decoding steps that did not
    verified: int = 0
    accepted: int = 0
    explorations: int = 0  # steps that explored
    seconds: float = 0.0  # spent on choosing and learning
    lengths: dict[int, int] = field(default_factory=dict)  # K -> steps drafted with it


@dataclass(slots=True)
class Step:
    """One step of the engine.

    batch: sequences in it. length: K of the step before, whose drafts it verifies. drafts: its own
    K. verified: draft tokens in all. accepted: of each request that decoded. clean: whether it
    prefilled nothing. exploring: whether `length` was an exploration."""

    batch: int
    length: int
    drafts: int
    verified: int = 0
    accepted: Sequence[int] = ()
    clean: bool = True
    exploring: bool = False


class DraftLengths:
    """Chooses K for one engine.

    longest: the largest K. shortest: the smallest, 0 unless no graph has it. exploration_budget:
    share of the time for lengths that are not predicted best."""

    def __init__(self, longest: int, shortest: int = 0, exploration_budget: float = 0.005) -> None:
        self.seconds = StepSeconds(shortest)
        self.acceptance = AcceptanceByDepth(longest)
        self.counters = Counters()
        self.exploration = Exploration(exploration_budget)
        self.exploring = False  # whether the length chosen last explores
        self._best = shortest

    def choose(self, batch: int, lengths: Sequence[int]) -> int:
        """Return K, the tokens to draft for each request, out of the ascending `lengths`. The first
        one is the shortest of all and is tried first."""
        self.exploring = False
        if len(lengths) == 1 or not self.seconds.known:
            return lengths[0]
        best = self._find_best(batch, lengths)
        if best != self._best:
            self._best = best
            self.exploration.stop()
        if not self.exploration.left and self.exploration.wait(batch) <= 0:
            self.exploration.begin(batch)
        if not self.exploration.left:
            return best
        self.exploring = True
        others = [length for length in lengths if length != best]
        return min(others, key=lambda length: self.seconds.count(batch, length))

    def _find_best(self, batch: int, lengths: Sequence[int]) -> int:
        """Return the length of most tokens per second; the last one unless another is clearly
        better."""
        tokens = self.acceptance.tokens()
        rates = {k: float(tokens[k]) / self.seconds.predict(batch, k) for k in lengths}
        best = max(lengths, key=lambda k: rates[k])
        return best if rates[best] > BETTER * rates.get(self._best, 0.0) else self._best

    def observe(self, step: Step, seconds: float | None) -> None:
        """Learn from a step that took `seconds` (None: unreliable)."""
        self._count(step)
        self.acceptance.observe(step.accepted, step.length)
        if not step.batch:
            return
        if seconds is not None and step.clean and step.length == step.drafts:
            self.seconds.observe(step.batch, step.length, seconds)
        if step.exploring and self.seconds.known:
            usual = self.seconds.predict(step.batch, self._best)
            self.exploration.observe(step.batch, self._loss(step), usual)
        else:
            self.exploration.observe_best(step.batch)

    def _count(self, step: Step) -> None:
        counters = self.counters
        counters.verified += step.verified
        counters.accepted += sum(step.accepted)
        counters.steps_on += step.verified > 0
        counters.steps_off += step.batch > 0 and not step.verified
        counters.explorations += step.exploring
        if step.batch:
            counters.lengths[step.drafts] = counters.lengths.get(step.drafts, 0) + 1

    def _loss(self, step: Step) -> float:
        """Return seconds that a step of an exploration lost against the best length. They are
        predicted, so that one step that was stopped for a minute does not use up the budget of
        hours."""
        usual = self.seconds.predict(step.batch, self._best)
        per_token = usual / (step.batch * float(self.acceptance.tokens()[self._best]))
        tokens = step.batch + sum(step.accepted)
        return self.seconds.predict(step.batch, step.length) - tokens * per_token
