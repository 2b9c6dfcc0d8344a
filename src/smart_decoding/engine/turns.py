"""Whose turn it is among clients that share slots, the prompt tokens of a round, or a thread."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Protocol, TypeVar

REMEMBERED = 1024  # clients whose last turn is known; the others count as newcomers
_NOTHING: Mapping[str, int] = MappingProxyType({})


class Asking(Protocol):
    """What waits. client: for whom; who is not told apart has the same name."""

    client: str


T = TypeVar("T", bound=Asking)


class Turns:
    """The next is who holds least, then whose last turn is longest ago, then who came first."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}  # the latest is the last entry
        self._count = 0

    def choose(self, waiting: Iterable[T], held: Mapping[str, int] = _NOTHING) -> T:
        """Of what waits, in order of arrival and not empty, what is next. held: what each client
        has already."""
        return min(
            waiting, key=lambda each: (held.get(each.client, 0), self._last.get(each.client, 0))
        )

    def taken(self, client: str) -> None:
        """It was this client's turn."""
        self._count += 1
        self._last.pop(client, None)
        self._last[client] = self._count
        if len(self._last) > REMEMBERED:
            del self._last[next(iter(self._last))]
