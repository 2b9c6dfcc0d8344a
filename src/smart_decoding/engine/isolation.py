"""After a round that raised: finds the requests at fault, ends them, and lets the others go on."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.engine_thread import Rounds
    from smart_decoding.engine.request import Request

log = logging.getLogger("smart.engine")

GIVE_UP = 3  # failures in a row that no request survived: then the engine itself is broken


class Isolation:
    """Runs the requests of a failed round alone. Those that raise again end, the others go on.

    Tokens do not depend on the batch, so the survivors' answers are the same as without the
    failure. failures: in a row, that no request survived.
    """

    def __init__(self, rounds: Rounds) -> None:
        self.failures = 0
        self._rounds = rounds

    def after_failed_round(self, error: Exception) -> None:
        """Raises `error` if the engine itself is to blame."""
        log.info("a round has failed; trying its requests one by one", exc_info=error)
        engine = self._rounds.engine
        queue = engine.scheduler.waiting
        suspects = engine.suspend() or list(queue)  # it may have failed before it took one
        others = [request for request in queue if request not in suspects]
        survivors = []
        for suspect in suspects:
            queue.clear()
            if suspect.finished:  # in the very round that failed, or with another answer of its job
                self._rounds.emit(suspect)
                continue
            queue.append(suspect)
            if self._survives(suspect):
                survivors.append(suspect)
            engine.suspend()
        for request in [request for request in self._rounds.owners if request.finished]:
            self._rounds.emit(request)
        queue.clear()
        self.failures = 0 if survivors else self.failures + 1
        if self.failures >= GIVE_UP:
            self._check_engine(error)
        for request in (*survivors, *others):
            if not request.finished:
                queue.append(request)

    def _survives(self, request: Request) -> bool:
        """Runs it alone, through a round of each kind: its prompt's, and a decoding one."""
        try:
            if len(request.tokens) != len(request.prompt) + len(request.output):
                raise RuntimeError("it failed while its new tokens were taken in")
            rounds = request.metrics.rounds
            progress = -1
            while (
                not request.finished
                and request.metrics.rounds == rounds
                and request.table.length > progress
            ):
                progress = request.table.length if request.ready() else -1
                self._rounds.step()
        except Exception as error:
            self._rounds.fail(request, error)
            return False
        return True

    def _check_engine(self, error: Exception) -> None:
        """After failures in a row, which may have been the requests' own: tries what must work."""
        try:
            warm_up(self._rounds.engine)
        except Exception:
            raise error from None
        self.failures = 0


def warm_up(engine: Engine) -> None:
    """One short answer, in this thread: the first client does not pay for compilation and first
    touches of memory.

    Raises ConfigError if not even that fits in.
    """
    room = engine.config.max_model_len
    if room < 3:
        raise ConfigError(
            f"max_model_len={room} is not allowed for a server: it must be at least 3"
        )
    params = SamplingParams(temperature=0, max_tokens=2)
    (request,) = engine.add_request("warm-up", [0] * min(8, room - 2), params)
    try:
        while not request.finished:
            engine.step()
    finally:
        engine.abort(request.id)  # of no effect if it is over
