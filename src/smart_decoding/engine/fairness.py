"""Fairness between clients: the Virtual Token Counter.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, arXiv 2401.00588, Algorithm 2.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from typing import Generic, Protocol, TypeVar

REMEMBERED = 1024  # counters that are kept: of the latest clients, and of all that wait


class VirtualTokenCounter:
    """Count the tokens served to each client, and select the waiting client with the least count.

    A served token is a row of a forward, since rows are the cost of a forward. A prompt token is
    one row. A decoding round is one row for the last token and one for each drafted node that it
    verifies. So the paper's weights are w_p = w_q = 1 per row. Queues of texts count bytes or
    characters instead.

    Two clients that wait at every selection are charged within 2 M tokens of each other, over any
    interval. M: most tokens that a client is charged from one of its selections until its next: the
    selected item, and rows of its answers meanwhile.

    A client that had nothing waiting starts at the greatest of three counters: its own, the counter
    of the client selected last, and the least counter of the waiting clients. One rule differs: the
    paper uses the client selected last only where no client waits. Here it always counts, or a
    client with ever new names would be selected for ever."""

    def __init__(self) -> None:
        self._counters: dict[str, int] = {}  # the latest client is the last entry
        self._last = ""  # client selected last
        self._level = 0  # its counter

    def arrive(self, clients: Iterable[str], waiting: Collection[str]) -> None:
        """Lift the counters of clients that had nothing waiting: absence gives no credit.

        waiting: clients that wait already. Only the counters of others are forgotten."""
        least = max(min(map(self.served, waiting), default=0), self._level)
        new = {client for client in clients if client not in waiting}
        for client in new:
            self._set(client, max(self.served(client), least))
        spare = (each for each in self._counters if each not in waiting and each not in new)
        for client in list(islice(spare, max(0, len(self._counters) - REMEMBERED))):
            del self._counters[client]

    def select(self, waiting: Collection[str]) -> str:
        """Return the client with the least counter; the one selected last loses a tie.

        waiting: one client at least; all have arrived."""
        counters = self._counters
        self._level = level = min(map(counters.__getitem__, waiting))
        least = (each for each in waiting if counters[each] == level and each != self._last)
        self._last = next(least, self._last)
        return self._last

    def charge(self, client: str, tokens: int) -> None:
        """Count tokens served to a client."""
        self._set(client, self.served(client) + tokens)

    def served(self, client: str) -> int:
        """Return a client's counter. An unknown one counts as the client selected last."""
        return self._counters.get(client, self._level)

    def _set(self, client: str, tokens: int) -> None:
        self._counters.pop(client, None)
        self._counters[client] = tokens
        if client == self._last:
            self._level = tokens


class OfClient(Protocol):
    """An item of a queue. client: the name of its client."""

    client: str


T = TypeVar("T", bound=OfClient)


class ClientQueues(Generic[T]):
    """One queue for each client, so that a selection looks only at their heads."""

    def __init__(self) -> None:
        self._queues: dict[str, deque[T]] = {}  # none is empty

    def append(self, item: T) -> None:
        """Put an item at the end of its client's queue."""
        self._queues.setdefault(item.client, deque()).append(item)

    def appendleft(self, item: T) -> None:
        """Put an item at the front of its client's queue."""
        self._queues.setdefault(item.client, deque()).appendleft(item)

    def remove(self, item: T) -> None:
        """Take an item out. Raise ValueError if it is not here."""
        queue = self._queues.get(item.client, deque())
        queue.remove(item)
        if not queue:
            del self._queues[item.client]

    def popleft(self, client: str) -> T:
        """Take the first item of a client out. Raise KeyError if there is none."""
        queue = self._queues[client]
        item = queue.popleft()
        if not queue:
            del self._queues[client]
        return item

    def clear(self) -> None:
        """Take all items out."""
        self._queues.clear()

    @property
    def clients(self) -> Collection[str]:
        """The clients that have an item here, the first come first."""
        return self._queues.keys()

    def heads(self) -> list[T]:
        """Return the first item of each client."""
        return [queue[0] for queue in self._queues.values()]

    def head(self, client: str) -> T | None:
        """Return the first item of a client, if there is one."""
        queue = self._queues.get(client)
        return queue[0] if queue else None

    def __iter__(self) -> Iterator[T]:
        return (item for queue in self._queues.values() for item in queue)

    def __contains__(self, item: T) -> bool:
        return item in self._queues.get(item.client, ())

    def __len__(self) -> int:
        return sum(map(len, list(self._queues.values())))  # a copy: other threads call this, too
