"""Which drafted nodes of a batch `SMART_EAGLE3` verifies, and whether it drafts: imports no SGLang.

Seconds come from the file that SMART_SGLANG_COSTS names, acceptance from counts that every rank
has: all ranks choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.choice import best_size, ranked
from smart_decoding.core.exploration import Exploration
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.sglang import COSTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from smart_decoding.core.tree import BoolArray, FloatArray, IntArray
    from smart_decoding.integrations.sglang.costs import RoundCosts

MEMORY = 0.99  # per drafted round: older ones fade
PRIOR_WEIGHT = 20.0  # accepted drafts that the drafter's own probabilities are worth at first
BUDGET = 0.005  # share of the time that may go into drafting where it is not predicted to pay


class RowCosts:
    """Seconds of a target's forward by its rows, and of drafting by the batch, from rounds.

    A plain round of a batch is a forward of as many rows; beyond the largest one seconds grow as
    between the last two. What a drafted round takes beyond its forward is drafting."""

    def __init__(self, costs: RoundCosts, steps: int) -> None:
        """Raises ConfigError if `costs` says too little about so many steps."""
        if len(costs.batches) < 2:
            raise ConfigError(
                f"{COSTS}: SMART_EAGLE3 needs plain rounds of two batch sizes or more"
            )
        if steps not in costs.nodes:
            raise ConfigError(f"{COSTS}: 'nodes' lacks {steps}, the steps that SMART_EAGLE3 drafts")
        self._costs = costs
        self._steps = steps
        self._rows = np.array(costs.batches, np.float64)
        plain = [costs.seconds(batch, 0) for batch in costs.batches]
        self._seconds = np.maximum.accumulate(plain)

    def verify(self, rows: IntArray | int) -> FloatArray:
        """Seconds of a forward of so many rows, of any shape."""
        slope = (self._seconds[-1] - self._seconds[-2]) / (self._rows[-1] - self._rows[-2])
        asked = np.asarray(rows, np.float64)
        beyond = np.maximum(asked - self._rows[-1], 0.0)
        inside = np.interp(asked, self._rows, self._seconds)
        return np.asarray(inside + slope * beyond)

    def draft(self, batch: int) -> float:
        """Seconds of all the drafting of a round."""
        rows = batch * self._costs.tokens(self._steps)
        return max(0.0, self._costs.seconds(batch, self._steps) - float(self.verify(rows)))


@dataclass(frozen=True, slots=True)
class _Round:
    """A round whose acceptance is not known yet. expected: accepted drafts by the drafter's own
    probabilities."""

    seconds: float
    expected: float
    explores: bool


class PooledChoice:
    """The nodes of the whole batch that bring the most tokens per second.

    nodes: how many each request drafts."""

    def __init__(self, costs: RowCosts, nodes: int) -> None:
        self.costs = costs
        self._typical = np.zeros(nodes)  # path probabilities, falling, of a mean request
        self._weight = 0.0
        self._accepted = PRIOR_WEIGHT
        self._expected = PRIOR_WEIGHT
        self._exploration = Exploration(BUDGET)
        self._explores = False
        self._rounds: list[_Round] = []

    @property
    def correction(self) -> float:
        """Accepted drafts over those that the drafter's probabilities promise."""
        return self._accepted / self._expected

    def drafts(self, batch: int) -> bool:
        """Whether a batch that is about to run drafts."""
        self._explores = not self._pays(batch)
        if not self._explores:
            self._exploration.stop()
            return True
        if not self._exploration.left and not self._exploration.wait:
            self._exploration.begin()
        if self._exploration.left:
            return True
        self._rounds.append(_Round(float(self.costs.verify(batch)), 0.0, False))
        return False

    def _pays(self, batch: int) -> bool:
        if not self._weight:
            return True
        gains = np.repeat(self._typical / self._weight, batch)
        plain = batch / float(self.costs.verify(batch))
        return self._best(gains, batch, self.correction)[1] > plain

    def _best(self, probs: FloatArray, batch: int, correction: float) -> tuple[int, float]:
        """`best_size` of sorted probabilities, drafting included."""
        gains = np.minimum(correction * probs, 1.0)
        seconds = self.costs.verify(batch + np.arange(len(gains) + 1))
        return best_size(gains, float(batch), self.costs.draft(batch), seconds)

    def choose(self, path_prob: FloatArray) -> BoolArray:
        """[batch, nodes] which of the drafted nodes to verify.

        path_prob: [batch, nodes], by the drafter; a parent's column is before its children's."""
        batch, nodes = path_prob.shape
        probs = np.clip(path_prob.astype(np.float64).ravel(), 0.0, 1.0)
        order = ranked(probs)
        # An exploration takes the drafter at its word: without nodes it would find out nothing.
        size, _ = self._best(probs[order], batch, 1.0 if self._explores else self.correction)
        keep = np.zeros(batch * nodes, np.bool_)
        keep[order[:size]] = True
        self._typical = MEMORY * self._typical + np.sort(probs.reshape(batch, -1))[:, ::-1].mean(0)
        self._weight = MEMORY * self._weight + 1.0
        seconds = float(self.costs.verify(batch + size)) + self.costs.draft(batch)
        self._rounds.append(_Round(seconds, float(probs[order[:size]].sum()), self._explores))
        return keep.reshape(batch, nodes)

    def observe(self, accepted: Sequence[int]) -> None:
        """Drafts that each request of the earliest unreported round has accepted."""
        if not self._rounds:
            return
        round_ = self._rounds.pop(0)
        batch, total = len(accepted), sum(accepted)
        if round_.expected:
            self._accepted = MEMORY * self._accepted + total
            self._expected = MEMORY * self._expected + round_.expected
        if round_.explores:
            plain = float(self.costs.verify(batch))
            loss = round_.seconds - (batch + total) / batch * plain
            self._exploration.observe(loss, plain)
        else:
            self._exploration.observe_best()
