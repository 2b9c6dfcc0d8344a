"""One block of prompts on a server, measured while all its slots are busy.

As one answer ends, the next prompt starts. The clock stops when no prompt is left for a slot: the
last answers of a block run with fewer neighbours, and faster, than the load that is measured.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from smart_decoding.integrations.tuning.settings import Trial


@dataclass(frozen=True, slots=True)
class Answered:
    """One request. prompt, tokens: of its prompt and answer; drafted, accepted: of its drafts;
    decoding: seconds from its first token to its last, None for all that it took."""

    prompt: int
    tokens: int
    drafted: int = 0
    accepted: int = 0
    decoding: float | None = None


@dataclass(frozen=True, slots=True)
class _Timed:
    answer: Answered
    started: float
    ended: float

    def share(self, stop: float) -> float:
        """Return the part of its tokens that came before `stop`, if they came evenly."""
        took = self.ended - self.started if self.answer.decoding is None else self.answer.decoding
        late = max(0.0, self.ended - stop)
        return 1.0 if late == 0.0 else max(0.0, 1.0 - late / took) if took > 0 else 0.0


def trial(
    prompts: Sequence[Any],
    load: int,
    ask: Callable[[Any], Answered],
    clock: Callable[[], float] = time.perf_counter,
) -> Trial:
    """Return the figures of a block. ask: answers one prompt, in a thread. Raises what it does."""
    waiting, lock = list(reversed(prompts)), threading.Lock()
    found: list[_Timed] = []
    stops: list[float] = []

    def slot() -> None:
        while True:
            with lock:
                if not waiting:
                    stops.append(clock())
                    return
                prompt = waiting.pop()
            started = clock()
            answer = ask(prompt)
            with lock:
                found.append(_Timed(answer, started, clock()))

    begun = clock()
    slots = min(load, len(prompts))
    threads = ThreadPoolExecutor(slots)
    try:
        work = [threads.submit(slot) for _ in range(slots)]
        for each in wait(work, return_when=FIRST_EXCEPTION).done:
            each.result()
    finally:  # broken off, they fail with their server, which the caller ends
        waiting.clear()
        threads.shutdown(wait=False)
    return _counted(found, begun, min(stops))


def _counted(found: Sequence[_Timed], begun: float, stop: float) -> Trial:
    shares = [each.share(stop) for each in found]
    weighted = list(zip([each.answer for each in found], shares, strict=True))
    return Trial(
        sum(share * answer.tokens for answer, share in weighted),
        stop - begun,
        sum(share * answer.drafted for answer, share in weighted),
        sum(share * answer.accepted for answer, share in weighted),
        sum(answer.prompt + answer.tokens / 2 for answer, _ in weighted) / len(weighted),
    )
