"""How many drafts of each request are accepted, for engines that verify chains.

A draft's confidence is its request's recent share of accepted drafts. Requests of equal confidence
are one class: choices are made over classes and depths, in plain Python, since an engine's step
leaves no room for more.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from smart_decoding.core.calibration import BINS, DEPTHS, KINDS, Calibration
from smart_decoding.core.running import RunningMean
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray

CONFIDENCE = 0.5  # of a request that has not verified anything, at first
GAIN = 0.2  # of a request's running share of accepted drafts
# Per step that a request's drafts are left out: what is known of it fades to what is usual.
RELAX = 0.02
LEARN_EVERY = 16  # steps, once many have passed: a millisecond each time
FAILED, PARTLY, WHOLE = range(3)  # how a request's last draft went: calibrated apart
_SAMPLED, _GREEDY = np.eye(KINDS)[:2]  # shares of the kinds of requests in a batch of one kind

Class: TypeAlias = tuple[int, int, bool]  # how the last draft went, bin of the confidence, greedy


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


class ChainAcceptance:
    """Learns by request and by class; knows paths of up to `longest` drafts."""

    def __init__(self, longest: int) -> None:
        self.longest = longest
        self.calibration = Calibration()
        self.requests: dict[str, _Request] = {}
        self._usual = RunningMean(CONFIDENCE, seen=1)  # share that new requests begin with
        # Not learned from yet: share, last, greedy, verified, accepted.
        self._waiting: list[tuple[float, int, bool, int, int]] = []
        self._steps = 0  # learned from
        self._paths: dict[Class, FloatArray] = {}

    def paths(
        self, ids: Sequence[str], drafts: Sequence[int], greedy: Sequence[bool]
    ) -> FloatArray:
        """[requests, longest] calibrated probabilities that a request's first 1, 2, ... drafts are
        all accepted; 0 beyond those that it has."""
        rows = [self._path(self._class_of(id_, g)) for id_, g in zip(ids, greedy, strict=True)]
        exists = np.arange(self.longest) < np.array(drafts)[:, None]
        result: FloatArray = np.where(exists, np.array(rows), 0.0)
        return result

    def _class_of(self, id_: str, greedy: bool) -> Class:
        request = self.requests.get(id_)
        if request is None:
            return PARTLY, _bin(self._usual.mean), greedy
        return request.last, request.bin, greedy

    def _path(self, key: Class) -> FloatArray:
        path = self._paths.get(key)
        if path is None:
            last, bin_, greedy = key
            steps = self.calibration.curve(last, _GREEDY if greedy else _SAMPLED)[:, bin_]
            path = steps.take(np.minimum(np.arange(self.longest), DEPTHS - 1)).cumprod()
            self._paths[key] = path
        return path

    def relax(self, ids: Iterable[str]) -> None:
        """The drafts of these requests were left out."""
        for id_ in ids:
            if id_ in self.requests:
                self.requests[id_].move(RELAX, self._usual.mean)

    def learn(
        self,
        verified: Mapping[str, int],
        accepted: Mapping[str, int],
        greedy: Collection[str] | None,
    ) -> int:
        """Learns from a step's drafts by request id; how many were accepted. greedy: ids of greedy
        requests, None for all."""
        total = 0
        for id_, drafted in verified.items():
            if drafted:
                right = min(accepted.get(id_, 0), drafted)
                self._learn_request(id_, drafted, right, greedy is None or id_ in greedy)
                total += right
        self._steps += 1
        if self._steps % min(LEARN_EVERY, 1 + self._steps // LEARN_EVERY) == 0:
            self._calibrate()
        return total

    def _learn_request(self, id_: str, drafted: int, right: int, greedy: bool) -> None:
        request = self.requests.get(id_)
        if request is None:
            request = self.requests[id_] = _Request(self._usual.mean, _bin(self._usual.mean))
        self._waiting.append((request.share, request.last, greedy, drafted, right))
        share = right / (right + 1) if right < drafted else 1.0
        request.move(GAIN, share)
        self._usual.observe(share)
        request.last = WHOLE if right == drafted else PARTLY if right else FAILED

    def _calibrate(self) -> None:
        """What was verified since the last time: beyond the first rejection all is censored."""
        columns = (np.array(column) for column in zip(*self._waiting, strict=True))
        share, last, greedy, verified, accepted = columns
        self._waiting.clear()
        trees = _chains(np.minimum(verified, accepted + 1), share, last)
        every = np.arange(len(trees))
        self.calibration.observe(trees, every, trees.depth <= accepted[trees.owner], greedy)
        self._paths.clear()

    def forget(self, alive: Mapping[str, object]) -> None:
        """Drops what is known of requests that are not in `alive`."""
        self.requests = {id_: request for id_, request in self.requests.items() if id_ in alive}


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
        token=np.zeros(total, np.int64),
        parent=np.where(depth == 1, -1, index - 1),
        depth=depth,
        draft_prob=prob,
        path_prob=prob**depth,
        accept_prob=np.full(total, np.nan),
        source=source[owner],
    )


def _bin(share: float) -> int:
    """The calibration's bin of a confidence in [0, 1]: uniform in the arcsine of its root."""
    angle = math.asin(math.sqrt(min(max(share, 0.0), 1.0)))
    return min(int(angle * (2.0 / math.pi) * BINS), BINS - 1)
