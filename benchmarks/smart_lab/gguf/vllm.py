"""vLLM's CPU build on the same weights, widened to bf16, which is what it reads."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from smart_decoding.models.loading import load_checkpoint
from smart_lab.gguf.rates import Reply, Span, reply
from smart_lab.gguf.tuning import NGRAM, PLAIN
from smart_lab.peers.session import ANSWERING, WORKERS, Worker, job_of

NAME = "vLLM"
# How it decodes -> the worker's options: its own n-grams propose four tokens.
MODES: Mapping[str, Mapping[str, Any]] = {PLAIN: {}, NGRAM: {"ngram": 4}}


class Vllm:
    """An engine for each mode, in processes of their own. Raises ModelError with the reason of one
    that fails."""

    def __init__(self, python: Path, model: Path, slots: int, context: int) -> None:
        """python: of vLLM's environment. model: a GGUF file, which is expanded in our cache."""
        checkpoint = load_checkpoint(model)
        cores = sorted(os.sched_getaffinity(0))
        settings = {
            "weights": str(checkpoint.tokenizer_source),
            "dtype": "bf16",
            "context": context,
            "sequences": slots,
            "threads": len(cores),
            "cores": ",".join(map(str, cores)),
            "stops": list(map(int, checkpoint.config.eos_token_ids)),
        }
        with ExitStack() as stack:
            self._workers = {
                mode: stack.enter_context(
                    Worker(python, WORKERS / "run_vllm.py", {**settings, **options})
                )
                for mode, options in MODES.items()
            }
            self._stack = stack.pop_all()

    def __enter__(self) -> Vllm:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def version(self) -> str:
        """Its own word."""
        return str(self._workers[PLAIN].about["version"])

    def answer(
        self, mode: str, places: int, prompts: Sequence[Sequence[int]], tokens: int
    ) -> Reply:
        """So many at once, the next one when one has ended, greedy, up to so many tokens each."""
        job = {**job_of(prompts, tokens), "places": places}
        waves = -(-len(prompts) // places)
        return reply_of(self._workers[mode].ask(job, ANSWERING * waves))


def reply_of(found: Mapping[str, Any]) -> Reply:
    """What a worker told, counted as for our engine."""
    answers = found["answers"]
    times = zip(found["placed"], found["firsts"], found["ends"], found["before"], strict=True)
    spans = [
        Span(first - placed, end - first, len(answer) - before)
        for (placed, first, end, before), answer in zip(times, answers, strict=True)
    ]
    rounds = sum(found["steps"]) - len(answers)
    return reply(spans, found["seconds"], rounds, answers)
