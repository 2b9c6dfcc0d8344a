"""Whose turn it is among clients that share slots, the prompt tokens of a round, or a thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Generic, Protocol, TypeVar

REMEMBERED = 1024  # clients of whom something is known; the others count as newcomers
_NOTHING: Mapping[str, int] = MappingProxyType({})


class Asking(Protocol):
    """What waits. client: for whom; who is not told apart has the same name."""

    client: str


T = TypeVar("T", bound=Asking)
V = TypeVar("V")


def remember(known: dict[str, V], client: str, value: V) -> None:
    """Notes something of a client. Of too many the one that was noted first is forgotten."""
    known[client] = value
    if len(known) > REMEMBERED:
        del known[next(iter(known))]


class Turns:
    """The next is who holds least, then whose last turn is longest ago, then who came first.

    Newcomers are before the last one whose turn it was, and behind all others: else a client with
    ever new names would always be the next."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # the latest is the last entry
        self._count = 0

    def choose(self, waiting: Iterable[T], held: Mapping[str, int] = _NOTHING) -> T:
        """Of what waits, in order of arrival and not empty, what is next. held: what each client
        has already."""
        waiting = list(waiting)
        for each in waiting:
            if each.client not in self._last:
                remember(self._last, each.client, self._count - 1)
        return min(
            waiting, key=lambda each: (held.get(each.client, 0), self._last.get(each.client, 0))
        )

    def taken(self, client: str) -> None:
        """It was this client's turn."""
        self._count += 1
        self._last.pop(client, None)
        remember(self._last, client, self._count)


class Waiting(Generic[T]):
    """What waits, in a line for each client: whose turn it is depends on the heads alone."""

    def __init__(self) -> None:
        self._lines: dict[str, deque[T]] = {}  # none is empty

    def append(self, one: T) -> None:
        """At the end of its client's line."""
        self._lines.setdefault(one.client, deque()).append(one)

    def appendleft(self, one: T) -> None:
        """At the front of its client's line."""
        self._lines.setdefault(one.client, deque()).appendleft(one)

    def remove(self, one: T) -> None:
        """Takes one out. Raises ValueError if it does not wait."""
        line = self._lines.get(one.client, deque())
        line.remove(one)
        if not line:
            del self._lines[one.client]

    def clear(self) -> None:
        """Takes all out."""
        self._lines.clear()

    def heads(self) -> list[T]:
        """The first of each client."""
        return [line[0] for line in self._lines.values()]

    def __iter__(self) -> Iterator[T]:
        return (one for line in self._lines.values() for one in line)

    def __contains__(self, one: T) -> bool:
        return one in self._lines.get(one.client, ())

    def __len__(self) -> int:
        return sum(map(len, list(self._lines.values())))  # other threads ask, too
