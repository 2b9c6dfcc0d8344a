"""Pictures of requests: decoded in a thread of their own, and bounded while they wait."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

from smart_decoding.models.text.grammars import stand_back
from smart_decoding.server.errors import ApiError
from smart_decoding.server.turns import Turns, unless_gone

if TYPE_CHECKING:
    from fastapi import Request

    from smart_decoding.multimodal.prompts import MediaPrompt, PlannedPrompt

MOST = 256 * 2**20  # bytes of decoded pictures in requests that wait or run
MOST_OF_ONE = 64 * 2**20  # the same of one client
NICE = 10  # decoding yields processors to rounds


class Pictures:
    """Decodes one picture at a time, of each client in turn. Pillow releases Python's
    lock."""

    def __init__(self) -> None:
        threads = ThreadPoolExecutor(1, "smart-pictures", stand_back, (NICE,))
        self._turns = Turns(threads)
        self._held: Counter[str] = Counter()  # bytes, by client

    def hold(self, client: str, size: int) -> Callable[[], None]:
        """Reserve so many bytes; return a function that releases them. While nothing is held, a
        request of any size fits. Raises ApiError (429) if there is no room."""
        mine = self._held[client]
        full = self._held.total() + size > MOST or (mine and mine + size > MOST_OF_ONE)
        if self._held and size and full:
            message = "too many of your pictures wait for their answers: try again later"
            raise ApiError(429, message, "queue_full")
        self._held[client] += size
        given_back = False

        def give_back() -> None:
            nonlocal given_back
            if not given_back:
                given_back = True
                self._held[client] -= size
                self._held += Counter()  # without clients that hold none any more

        return give_back

    async def decoded(
        self, request: Request, plan: PlannedPrompt, cache_salt: str = ""
    ) -> MediaPrompt:
        """Decode a prompt's pictures. Raises ApiError if the client hangs up, ConfigError for
        damaged ones."""
        if not plan.pictures:
            return plan.decoded()
        return await unless_gone(request, self._in_turns(request.state.client, plan, cache_salt))

    async def _in_turns(self, client: str, plan: PlannedPrompt, cache_salt: str) -> MediaPrompt:
        """Decode a prompt's pictures; each picture or frame is a turn of its own."""
        steps = plan.steps(cache_salt)
        prompt: MediaPrompt | None = None
        while prompt is None:
            prompt = await self._turns.run(client, partial(next, steps))
        return prompt
