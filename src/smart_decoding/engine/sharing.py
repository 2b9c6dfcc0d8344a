"""Whose a round is, among clients that share an engine's time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Round
    from smart_decoding.engine.scheduler import Batch

AGE = 256  # shared rounds after which a time is forgotten, and so measured again
WEIGHT = 0.2  # of a round's time among those before
OUTLIER = 2.0  # times what was expected: a round that takes longer counts as that
MOST = 64  # of the shortest rounds that one forward charges at most: a stall is nobody's fault


class Shares:
    """Each of k clients keeps about a k-th of the speed that it has alone, or more.

    A round is charged to its clients: each uses the seconds by which it makes the round longer, and
    may use as many as a round of the cheapest client alone takes. Who has used more rests: it sits
    out rounds until those have paid for it. So of two clients the cheaper one's rounds take at most
    twice, on average, what they take alone, and the other has the other half.

    resting: who sits out the present round."""

    def __init__(self) -> None:
        self.resting: set[str] = set()
        self._shared = False
        self._owed: dict[str, float] = {}  # seconds used beyond those allowed
        self._allowed = 0.0  # seconds of each client, in the last round
        self._times = RoundTimes()

    def next_round(self, clients: Iterable[str]) -> None:
        """Says who rests. clients: of all requests."""
        present = set(clients)
        self._shared = len(present) > 1
        self.resting = set()
        if self._shared:
            self.resting = {who for who in present if self._owed.get(who, 0.0) > self._allowed}

    def owe(self, client: str, seconds: float) -> None:
        """Charges what is no part of a round."""
        if self._shared:
            self._owed[client] = self._owed.get(client, 0.0) + seconds

    def charge(self, batch: Batch, done: Round, seconds: float) -> None:
        """Charges a round that took so many seconds to the clients in it."""
        if not self._shared:
            self._pay(seconds)
            return
        parts = _parts(batch, done)
        whole = _Part(
            sum(part.rows for part in parts.values()),
            sum(part.grammars for part in parts.values()),
        )
        forward = max(seconds - whole.grammars, 1e-9)  # clocks may stand still
        self._times.observe(whole.rows, forward)
        usual = self._times.seconds(whole.rows)
        speed = min(forward / usual, OUTLIER)
        alone = {
            who: speed * self._times.seconds(part.rows) + part.grammars
            for who, part in parts.items()
        }
        self._allowed = min(alone.values())
        most = MOST * self._times.least
        for who, part in parts.items():
            others = self._times.seconds(whole.rows - part.rows)
            self.owe(who, min(speed * (usual - others), most) + part.grammars)
        self._pay(self._allowed)

    def _pay(self, seconds: float) -> None:
        """The others have had so many seconds."""
        left = {who: owed - seconds for who, owed in self._owed.items()}
        self._owed = {who: owed for who, owed in left.items() if owed > 0.0}


class RoundTimes:
    """What shared rounds take, by their rows: as they went lately, and between those linear.

    Fewer rows than any known are believed to be cheap in proportion: then the next round that has
    but them, since all others rest, says what they take."""

    def __init__(self) -> None:
        self._rounds = 0
        self._known: dict[int, _Time] = {}  # by the length of the rows in bits, ascending

    def observe(self, rows: int, seconds: float) -> None:
        """One more round."""
        self._rounds += 1
        known = {k: t for k, t in self._known.items() if self._rounds - t.last <= AGE}
        time = known.setdefault(rows.bit_length(), _Time(rows, seconds))
        time.last = self._rounds
        time.rows += WEIGHT * (rows - time.rows)
        time.seconds += WEIGHT * (min(seconds, OUTLIER * time.seconds) - time.seconds)
        self._known = dict(sorted(known.items()))

    @property
    def least(self) -> float:
        """Of the shortest round. Some round must be known."""
        return min(time.seconds for time in self._known.values())

    def seconds(self, rows: int) -> float:
        """Of a round of so many rows. Some round must be known."""
        times = list(self._known.values())
        last = times[-1]
        if rows > last.rows:
            return last.seconds * rows / last.rows
        known_rows = [0.0, *(time.rows for time in times)]
        return float(np.interp(rows, known_rows, [0.0, *(time.seconds for time in times)]))


@dataclass(slots=True)
class _Time:
    rows: float
    seconds: float
    last: int = 0  # round


@dataclass(slots=True)
class _Part:
    """Of a round: rows, and seconds in grammars."""

    rows: int = 0
    grammars: float = 0.0


def _parts(batch: Batch, done: Round) -> dict[str, _Part]:
    """What of a round is whose."""
    nodes = np.bincount(done.trees.owner[done.kept], minlength=len(batch.decode)).tolist()
    rows = [(request, 1 + count) for request, count in zip(batch.decode, nodes, strict=True)]
    parts: dict[str, _Part] = {}
    for request, count in (*rows, *batch.prefill):
        parts.setdefault(request.client, _Part()).rows += count
    for request in batch.decode:
        if request.constraint is not None:
            parts[request.client].grammars += request.constraint.seconds
    return parts
