"""The draft length of a step, for engines that only take a length: the one of most tokens per
second. All requests of a step have the same.

Acceptance by depth and seconds by length are learned from the steps themselves. An engine with a
table of measured seconds gives it instead. Nothing here reads a clock: processes that observe the
same choose the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.calibration import HORIZON, RunningMean
from smart_decoding.core.exploration import Exploration

if TYPE_CHECKING:
    from smart_decoding.core.costs import Curve
    from smart_decoding.core.tree import FloatArray

LONG = 1000  # steps with drafts for which the usual acceptance is remembered
OF_TREE = 200  # of a tree: it is seldom tried anew, and what it showed must hold until then
PRIOR = 0.7  # acceptance at first
PRIOR_WEIGHT = 4.0  # steps that a prior is worth
GUESS = 0.002  # share of a plain step that a draft costs, at first: too little, so that it is tried
CLIP = math.log(2.0)  # one slow step counts as at most twice the usual
ENOUGH = 4  # plain steps before anything is drafted
BETTER = 1.01  # rate over the last length's at which another length takes its place


class DepthAcceptance:
    """P(the draft at a depth is accepted | the one before it was), by depth, over all requests.

    Recent steps count most. Where they are few, the long run counts, and where that is short the
    depth above: n-grams fail at the first draft, where nothing matches, and seldom below it. A
    request without drafts counts as one whose first was rejected.

    trees: each length is a tree, longer ones wider too. Each then has acceptance of its own, with
    that of all together as prior."""

    def __init__(self, longest: int, trees: bool = False) -> None:
        self._lengths = np.arange(1 + longest)
        self._row = self._lengths if trees else np.zeros_like(self._lengths)
        self._horizon = OF_TREE if trees else HORIZON  # steps
        shape = 2, 1 + int(self._row[-1]), longest
        self._recent = np.zeros(shape)  # shares of requests: accepted, tested
        self._usual = np.zeros(shape)

    def observe(self, accepted: Sequence[int], length: int) -> None:
        """Learn from a step that verified drafts of `length`. accepted: [requests] drafts."""
        row = self._row[length]
        self._recent[:, row] *= 1 - 1 / self._horizon
        if not len(accepted) or not length:
            return
        depth = np.arange(1, length + 1)
        right = np.minimum(accepted, length)[:, None]
        step = np.stack(((right >= depth).mean(0), (right >= depth - 1).mean(0)))
        self._usual[:, row] *= 1 - 1 / LONG
        for counts in (self._recent, self._usual):
            counts[:, row, :length] += step

    def tokens(self) -> FloatArray:
        """Return [1 + longest] expected tokens of a request in a step of each length, the bonus
        token included."""
        above = [PRIOR]
        for accepted, tested in self._usual.sum(1).T.tolist():
            above.append((accepted + PRIOR_WEIGHT * above[-1]) / (tested + PRIOR_WEIGHT))
        prob: FloatArray = np.array(above[1:])
        for accepted, tested in (self._usual, self._recent):
            prob = (accepted + PRIOR_WEIGHT * prob) / (tested + PRIOR_WEIGHT)
        tokens = 1.0 + prob.cumprod(1).cumsum(1)
        result: FloatArray = np.insert(tokens, 0, 1.0, axis=1)[self._row, self._lengths]
        return result


class StepSeconds:
    """Seconds of a step by batch size and draft length.

    Steps of the shortest length are learned around knots, two for each doubling of the batch size;
    longer ones as ratios to them. Logarithms are linear between knots."""

    def __init__(self, shortest: int = 0) -> None:
        self.shortest = shortest
        # By length and knot: log seconds of the shortest length, log ratios to it of others.
        self._means: dict[int, dict[float, RunningMean]] = {shortest: {}}
        self._given = False

    @classmethod
    def from_table(cls, table: Mapping[int, Curve], longest: int) -> StepSeconds:
        """Return the seconds of lengths 0 to `longest` by a table: batch size -> curve over
        lengths."""
        seconds = cls()
        seconds._given = True
        for batch, curve in table.items():
            logs = np.log(curve.dense(1 + longest))
            logs[1:] -= logs[0]
            for length, log in enumerate(logs.tolist()):
                knots = seconds._means.setdefault(length, {})
                knots[_position(batch)] = RunningMean(log, CLIP, ENOUGH)
        return seconds

    @property
    def known(self) -> bool:
        """Whether enough steps of the shortest length were observed for predictions."""
        return sum(mean.count for mean in self._means[self.shortest].values()) >= ENOUGH

    def predict(self, batch: int, length: int) -> float:
        """Return seconds of a step whose `batch` requests verify drafts of `length`."""
        log = self._mean(batch, self.shortest)
        return math.exp(log if length == self.shortest else log + self._mean(batch, length))

    def observe(self, batch: int, length: int, seconds: float) -> None:
        """Learn from a step that prefilled nothing. Unusable times change nothing."""
        usable = math.isfinite(seconds) and seconds > 0 and batch > 0
        if not usable or (length != self.shortest and not self.known):
            return
        error = math.log(seconds / self.predict(batch, length))
        if length != self.shortest:
            error = min(error, 2 * CLIP)
        expected = self._mean(batch, length)
        knots = self._means.setdefault(length, {})
        mean = knots.setdefault(_knot(batch), RunningMean(expected, CLIP))
        mean.observe(mean.mean + error)

    def least_known(self, batch: int, best: int, lengths: Sequence[int]) -> int | None:
        """Return the length to explore beside `best`; None if none can teach anything.

        Where seconds are given, only acceptance is unknown, and only longer drafts show more."""
        others = [k for k in lengths if k > best or (k < best and not self._given)]
        return min(others, key=lambda length: self._count(batch, length), default=None)

    def _count(self, batch: int, length: int) -> int:
        mean = self._means.get(length, {}).get(_knot(batch))
        return mean.count if mean else 0

    def _mean(self, batch: int, length: int) -> float:
        knots = self._means.get(length)
        if not knots:
            return math.log1p(GUESS * batch * (length - self.shortest))
        places = sorted(knots)
        return float(np.interp(_position(batch), places, [knots[at].mean for at in places]))


def _position(batch: int) -> float:
    """Return the position of a batch size between the knots, which are at whole numbers."""
    return 2.0 * math.log2(max(batch, 1))


def _knot(batch: int) -> int:
    return round(_position(batch))


class DraftLengths:
    """Chooses the length of each step. Lengths are tokens of a chain, or levels of a tree.

    longest: the largest length. exploration_budget: share of the time for lengths that are not
    predicted best. exploring: whether the length chosen last is an exploration."""

    def __init__(
        self,
        longest: int,
        seconds: StepSeconds | None = None,
        exploration_budget: float = 0.005,
        trees: bool = False,
    ) -> None:
        """seconds: None: learned, from length 0 on. trees: see `DepthAcceptance`."""
        self.seconds = seconds or StepSeconds()
        self.acceptance = DepthAcceptance(longest, trees)
        self.exploration = Exploration(exploration_budget)
        self.exploring = False
        self._best = self.seconds.shortest

    def choose(self, batch: int, lengths: Sequence[int]) -> int:
        """Return the length to draft for each request, out of the ascending `lengths`. The first
        one is the shortest of all and is tried first."""
        self.exploring = False
        if len(lengths) == 1 or not self.seconds.known:
            return lengths[0]
        best = self._find_best(batch, lengths)
        if best != self._best:
            self._best = best
            self.exploration.stop()
        other = self.seconds.least_known(batch, best, lengths)
        if other is None:
            return best
        if not self.exploration.left and self.exploration.wait(batch) <= 0:
            self.exploration.begin(batch)
        self.exploring = self.exploration.left > 0
        return other if self.exploring else best

    def _find_best(self, batch: int, lengths: Sequence[int]) -> int:
        """Return the length of most tokens per second; the last one unless another is clearly
        better."""
        tokens = self.acceptance.tokens()
        rates = {k: float(tokens[k]) / self.seconds.predict(batch, k) for k in lengths}
        best = max(lengths, key=lambda k: rates[k])
        return best if rates[best] > BETTER * rates.get(self._best, 0.0) else self._best

    def observe(
        self,
        batch: int,
        length: int,
        accepted: Sequence[int],
        seconds: float | None = None,
        exploring: bool = False,
    ) -> None:
        """Learn from a step whose `batch` requests verified drafts of `length`.

        accepted: drafts of each request that decoded. seconds: None where they are given by a
        table, or unreliable as beside prompts. exploring: of the step's choice."""
        self.acceptance.observe(accepted, length)
        if seconds is not None:
            self.seconds.observe(batch, length, seconds)
        self.pay(batch, length, batch + sum(accepted), exploring)

    def pay(self, batch: int, length: int, tokens: int, exploring: bool) -> None:
        """Pay for a step that explored, or earn budget by one that did not.

        An exploration pays its predicted loss against the best length. One step that was stopped
        for a minute does not use up the budget of hours."""
        if not batch:
            return
        if not exploring or not self.seconds.known:
            self.exploration.observe_best(batch)
            return
        usual = self.seconds.predict(batch, self._best)
        per_token = usual / (batch * float(self.acceptance.tokens()[self._best]))
        loss = self.seconds.predict(batch, length) - tokens * per_token
        self.exploration.observe(batch, loss, usual)
