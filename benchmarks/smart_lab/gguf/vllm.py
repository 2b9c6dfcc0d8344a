"""vLLM's CPU build on the same weights, widened to bf16, which is what it reads.

Needed by `gguf-speed --vllm` and so by results/xeon-amx/README.md ("with a queue, and in vLLM").
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from smart_decoding.errors import ModelError
from smart_decoding.models.loading import load_checkpoint
from smart_lab.gguf.rates import Reply, Span, reply
from smart_lab.gguf.tuning import NGRAM, PLAIN

NAME = "vLLM"
WORKER = Path(__file__).with_name("vllm_worker.py")
LOADING, ANSWERING = 300.0, 180.0  # seconds until a worker is given up
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
            "context": context,
            "sequences": slots,
            "threads": len(cores),
            "cores": ",".join(map(str, cores)),
            "stops": list(map(int, checkpoint.config.eos_token_ids)),
        }
        with ExitStack() as stack:
            self._workers = {
                mode: stack.enter_context(Worker(python, WORKER, {**settings, **options}))
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


class Worker:
    """Another engine's process, which speaks JSON lines. Raises ModelError with its reason when it
    fails or stays silent."""

    def __init__(self, python: Path, script: Path, settings: Mapping[str, Any]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [str(python), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(settings["threads"]),
        )
        self._lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.about = self.ask(settings, LOADING)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the process, by force if it does not end by itself."""
        try:
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """The worker's reply to a line."""
        try:
            print(json.dumps(message), file=self._process.stdin, flush=True)
            reply: dict[str, Any] = json.loads(self._lines.get(timeout=seconds))
        except queue.Empty:
            self._fail(f"no answer within {seconds:.0f} s")
        except (OSError, ValueError):
            self._fail(self._last_words())
        if "error" in reply:
            self._fail(reply["error"])
        return reply

    def _fail(self, reason: str) -> Any:
        self._process.kill()
        self.close()
        raise ModelError(reason)

    def _last_words(self) -> str:
        self._process.wait(timeout=10)
        self._errors.seek(0)
        lines = [
            line.strip()
            for line in self._errors.read().decode(errors="replace").splitlines()
            if line.strip()
        ]
        return (
            f"it ended with {self._process.returncode}: {(lines or ['it said nothing'])[-1][:200]}"
        )

    def _listen(self) -> None:
        for line in self._process.stdout or ():
            self._lines.put(line)
        self._lines.put("")  # the end: not JSON


def job_of(prompts: Sequence[Sequence[int]], tokens: int) -> dict[str, Any]:
    """The line that has them answered."""
    return {"prompts": [list(map(int, prompt)) for prompt in prompts], "tokens": tokens}


def _environment(threads: int) -> dict[str, str]:
    """Ours, but for what would lead its Python to our packages."""
    ours = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    return {
        **ours,
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
