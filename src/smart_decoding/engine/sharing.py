"""Whose a round is, among clients that share an engine's time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.engine.turns import remember

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Round
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.scheduler import Batch

AGE = 256  # shared rounds after which a time is forgotten, and so measured again
WEIGHT = 0.2  # of a round among those before
OUTLIER = 2.0  # times what was expected: a round that takes longer counts as that
MANY = 2.0  # times the others' mean rows: who has more than that makes a round dear
MOST = 64  # of the shortest rounds that one forward charges at most: a stall is nobody's fault


class Shares:
    """Each of k clients keeps about a k-th of the speed that it has alone, or more.

    A round is charged to its clients: each uses the seconds by which it makes the round longer, and
    may use as many as a round of the cheapest client alone takes. Who has used more is in debt: its
    prompts wait until rounds have paid for it, and the rest of it, too, where that would add to the
    debt. So of two clients the cheaper one's rounds take at most twice, on average, what they take
    alone, and the other has the other half.

    indebted: whose prompts wait in the present round; resting: those of them that sit it out.
    dear: whose latest grammars had masks that take long."""

    def __init__(self) -> None:
        self.indebted: set[str] = set()
        self.resting: set[str] = set()
        self.dear: dict[str, None] = {}
        self._shared = False
        self._owed: dict[str, float] = {}  # seconds used beyond those allowed
        self._allowed = 0.0  # seconds of each client, in the last round
        self._times = RoundTimes()
        self._rows: dict[str, float] = {}  # of a request of each client, in its last round
        self._grammars: dict[str, float] = {}  # mean seconds of a client's masks in a round, lately

    def next_round(self, clients: Collection[str], running: Sequence[Request]) -> None:
        """Says who waits. clients: of all requests, those that do not run yet included."""
        self._shared = len(clients) > 1
        self.forgive()
        if not self._shared:
            return
        for known in (self._rows, self._grammars):
            for who in known.keys() - clients:
                del known[who]
        self.indebted = set(filter(self._is_in_debt, clients))
        if self.indebted:
            self.resting = self._too_dear([request for request in running if request.decodes])

    def forgive(self) -> None:
        """Nobody waits in the present round: all others wait for what these have."""
        self.indebted = set()
        self.resting = set()

    def wait(self, clients: Collection[str], here: Collection[str]) -> bool:
        """Whether all of these would wait if a request of theirs came now. here: clients of all
        requests."""
        is_shared = len({*clients, *here}) > 1
        return is_shared and all(map(self._is_in_debt, clients))

    def _is_in_debt(self, client: str) -> bool:
        return self._owed.get(client, 0.0) > self._allowed

    def _too_dear(self, decoding: Sequence[Request]) -> set[str]:
        """Those in debt that would use more of a round of all that decode than it pays."""
        rows: dict[str, float] = {}
        for request in decoding:
            who = request.client
            rows[who] = rows.get(who, 0.0) + self._rows.get(who, 1.0)
        whole = sum(rows.values())
        usual = self._times.seconds(whole)
        paid = self._payment(usual)

        def too_dear(who: str) -> bool:
            mine = rows.get(who, 0.0)
            masks = self._grammars.get(who, 0.0)
            others = len(rows) - (who in rows)
            # Who has about as many rows as others is not what makes the round dear; small rounds'
            # times may be guesses.
            many = mine * others > MANY * (whole - mine)
            added = usual - self._times.seconds(whole - mine) + masks
            return added > paid and (many or masks > paid)

        return {who for who in self.indebted if too_dear(who)}

    def _payment(self, seconds: float) -> float:
        """What a round pays of a debt: a fair part at least, for what is allowed may be a guess."""
        return max(self._allowed, seconds / (1 + len(self.indebted)))

    def owe(self, client: str, seconds: float) -> None:
        """Charges what is no part of a round."""
        if self._shared:
            self._owed[client] = self._owed.get(client, 0.0) + seconds

    def charge(self, batch: Batch, done: Round, seconds: float) -> None:
        """Charges a round that took so many seconds to the clients in it."""
        self._note_dear(batch)
        grammars = _grammar_seconds(batch)  # taken note of here, whether anybody pays for them
        if not self._shared:
            self.idle(seconds)
            return
        verified = _verified(batch, done)
        for who, part in _parts(verified).items():
            self._rows[who] = part.rows / part.requests
        parts = _parts([*verified, *batch.prefill])
        rows = sum(part.rows for part in parts.values())
        forward = seconds - sum(grammars.values())
        if forward > 0.0:  # else the clock stood still, or these were of a round that failed
            self._times.observe(rows, forward)
        usual = self._times.seconds(rows)
        speed = min(max(forward, 0.0) / usual, OUTLIER) if usual else 0.0
        self._allowed = min(
            speed * self._times.seconds(part.rows) + grammars.get(who, 0.0)
            for who, part in parts.items()
        )
        most = MOST * self._times.least
        for who, part in parts.items():
            added = speed * (usual - self._times.seconds(rows - part.rows))
            self.owe(who, min(added, most) + grammars.get(who, 0.0))
            self._remember(who, grammars.get(who, 0.0))
        self._pay(self._allowed, self._payment(seconds))

    def _note_dear(self, batch: Batch) -> None:
        for request in (*batch.decode, *(request for request, _ in batch.prefill)):
            if request.constraint is None:
                continue
            if request.constraint.dear:
                remember(self.dear, request.client, None)
            elif request.finished:
                self.dear.pop(request.client, None)

    def idle(self, seconds: float) -> None:
        """Nobody waited for others for so long: that pays of all debts."""
        self._pay(seconds, seconds)

    def _remember(self, who: str, grammars: float) -> None:
        """Masks are dear now and then, not in turn."""
        mean = self._grammars.pop(who, 0.0)
        mean += WEIGHT * (grammars - mean)
        if mean > 0.0:
            self._grammars[who] = mean

    def _pay(self, new: float, old: float) -> None:
        """The others have had so many seconds of a new debt, and of one from before the round."""
        left = {
            who: owed - (old if who in self.indebted else new) for who, owed in self._owed.items()
        }
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
        """Of the shortest round; 0 where none is known."""
        return min((time.seconds for time in self._known.values()), default=0.0)

    def seconds(self, rows: float) -> float:
        """Of a round of so many rows; 0 where no round is known."""
        times = list(self._known.values())
        if not times:
            return 0.0
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
    """Of a round: rows and requests."""

    rows: int = 0
    requests: int = 0


def _verified(batch: Batch, done: Round) -> list[tuple[Request, int]]:
    """The rows of each request that decoded."""
    nodes = done.trees.counts(done.kept)
    return [(request, 1 + count) for request, count in zip(batch.decode, nodes, strict=True)]


def _parts(rows: Sequence[tuple[Request, int]]) -> dict[str, _Part]:
    """What is whose of a round of these requests' rows."""
    parts: dict[str, _Part] = {}
    for request, count in rows:
        part = parts.setdefault(request.client, _Part())
        part.rows += count
        part.requests += 1
    return parts


def _grammar_seconds(batch: Batch) -> dict[str, float]:
    """Seconds in the grammars of each client since its last round."""
    seconds: dict[str, float] = {}
    for request in (*batch.decode, *(request for request, _ in batch.prefill)):
        if request.constraint is not None:
            spent = request.constraint.take_seconds()
            seconds[request.client] = seconds.get(request.client, 0.0) + spent
    return seconds
