"""Work on texts, one piece after another and each client in turn: who sends much waits longer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from smart_decoding.engine.turns import Turns

T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Place:
    client: str
    called: asyncio.Event = field(default_factory=asyncio.Event)


class Lane:
    """One thread's worth of work at a time, so that rounds keep their processors."""

    def __init__(self) -> None:
        self._turns = Turns()
        self._waiting: list[_Place] = []
        self._busy: _Place | None = None

    async def run(self, client: str, work: Callable[[], T]) -> T:
        """What `work` returns, done in another thread when it is this client's turn."""
        place = _Place(client)
        self._waiting.append(place)
        self._call_next()
        try:
            await place.called.wait()
            return await asyncio.to_thread(work)
        finally:
            if self._busy is place:
                self._busy = None
            else:
                self._waiting.remove(place)
            self._call_next()

    def _call_next(self) -> None:
        if self._busy is None and self._waiting:
            self._busy = self._turns.choose(self._waiting)
            self._waiting.remove(self._busy)
            self._turns.taken(self._busy.client)
            self._busy.called.set()
