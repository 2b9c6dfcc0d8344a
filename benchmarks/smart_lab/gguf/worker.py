"""The common part of the engines' processes: JSON lines, and a loop that keeps places full.

They run in environments of their own, so this imports only the standard library. In: a line
of settings, then a line per job {"prompts": [[id, ...], ...], "tokens": count, "places": count}.
Out: a line that says it is ready, with its version, then one per job.

Needed by vllm_worker.py and openvino_worker.py, which gguf/engines.py starts.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

Settings = dict[str, Any]
Answer = Callable[..., dict[str, Any]]


class Steps(Protocol):
    """An engine that takes requests at any time, and works on all of them step by step."""

    def add(self, number: int, prompt: list[int]) -> None:
        """One more request."""

    def step(self) -> Iterable[tuple[int, list[int], bool]]:
        """Number of a request, its tokens so far, and whether it ended."""


def serve(load: Callable[[Settings], tuple[dict[str, str], Answer]]) -> None:
    """Load once, then answer until there are no more lines. What libraries print goes to standard
    error."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        print(json.dumps(reply), file=replies, flush=True)

    try:
        about, answer = load(json.loads(sys.stdin.readline()))
        say(about)
        for line in sys.stdin:
            say(answer(**json.loads(line)))
    except Exception as error:  # whatever an engine raises is its result
        say({"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]})
        raise


def answered(engine: Steps, prompts: Sequence[list[int]], places: int) -> dict[str, Any]:
    """Answer prompts, `places` at once. placed, firsts, ends: seconds until each got its place, its
    first tokens and its last one; before: number of its first tokens; steps: with tokens of it."""
    started = time.perf_counter()
    answers: list[list[int]] = []
    placed: list[float] = []
    firsts = [0.0] * len(prompts)
    ends = [0.0] * len(prompts)
    before = [0] * len(prompts)
    steps = [0] * len(prompts)
    running = 0
    while running or len(placed) < len(prompts):
        for prompt in prompts[len(placed) :][: places - running]:
            engine.add(len(placed), prompt)
            placed.append(time.perf_counter() - started)
            answers.append([])
            running += 1
        outputs = engine.step()
        now = time.perf_counter() - started
        for index, tokens, ended in outputs:
            running -= ended
            if len(tokens) == len(answers[index]):
                continue
            steps[index] += 1
            firsts[index] = firsts[index] or now
            ends[index] = now
            before[index] = before[index] or len(tokens)
            answers[index] = tokens
    times = {"placed": placed, "firsts": firsts, "ends": ends, "before": before, "steps": steps}
    return {**times, "answers": answers, "seconds": time.perf_counter() - started}
