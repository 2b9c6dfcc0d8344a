"""An HTTP request on its way: a job of the engine thread, whose chunks the event loop collects."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from smart_decoding.engine.jobs import Chunk, Job

if TYPE_CHECKING:
    from smart_decoding.server.errors import ApiError


@dataclass(eq=False, slots=True)
class HttpJob(Job):
    """One HTTP request. Its asks share their parameters: answer i of prompt p has index p * n + i.

    id: unique, ours; request_id: may be the client's. closed: no more chunks are wanted.
    """

    chunks: asyncio.Queue[Chunk | ApiError] = field(default_factory=asyncio.Queue)
    closed: bool = False

    @property
    def n(self) -> int:
        """Answers to each prompt."""
        return self.asks[0].params.n
