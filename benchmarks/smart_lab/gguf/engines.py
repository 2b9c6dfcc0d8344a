"""Engines in environments of their own: vLLM's CPU build and OpenVINO GenAI, each in processes that
speak JSON lines.

Needed by `gguf-speed --vllm` and `--openvino`.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smart_decoding.errors import ModelError
from smart_decoding.integrations.tuning.settings import PLAIN
from smart_decoding.kernels import children
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_lab.gguf.rates import Reply, Span, reply
from smart_lab.gguf.tuning import NGRAM

FOLDER = Path(__file__).parents[2]  # of the laboratory
LOADING, ANSWERING = 300.0, 180.0  # seconds until a worker is given up


def _expanded(model: Path) -> Path:
    """Return a folder of our cache with the file's weights in bf16."""
    return Path(load_checkpoint(model).tokenizer_source)


def _itself(model: Path) -> Path:
    return model.absolute()


@dataclass(frozen=True, slots=True)
class Rival:
    """An engine. package: required in its environment; worker: the module of its process; weights:
    the files that it reads for a GGUF file, `reads` in words; modes: name -> number of proposed
    tokens; fixed: whether the number is set at loading."""

    name: str
    package: str
    worker: str
    weights: Callable[[Path], Path]
    reads: str
    modes: Mapping[str, int]
    fixed: bool

    @property
    def option(self) -> str:
        """The command line's option for its Python."""
        return self.name.lower()


VLLM = Rival(
    "vLLM",
    "vLLM for CPUs",
    "smart_lab.gguf.vllm_worker",
    _expanded,
    "in bf16",
    {PLAIN: 0, NGRAM: 4},
    fixed=True,
)
OPENVINO = Rival(
    "OpenVINO",
    "OpenVINO GenAI",
    "smart_lab.gguf.openvino_worker",
    _itself,
    "from the file, in its own quants",
    {PLAIN: 0, "prompt lookup of 3": 3, "prompt lookup of 5": 5},
    fixed=False,
)
RIVALS = (VLLM, OPENVINO)


class Processes:
    """A rival's processes, one for all modes that can share it. Raises ModelError with the reason
    of one that fails."""

    def __init__(
        self,
        rival: Rival,
        python: Path,
        model: Path,
        slots: int,
        context: int,
        stops: Sequence[int],
    ) -> None:
        """python: of the rival's environment. model: a GGUF file. stops: tokens that end an
        answer."""
        self._rival = rival
        cores = sorted(os.sched_getaffinity(0))
        settings = {
            "weights": str(rival.weights(model)),
            "context": context,
            "sequences": slots,
            "threads": len(cores),
            "cores": ",".join(map(str, cores)),
            "stops": list(map(int, stops)),
        }
        module = ("-m", rival.worker)
        with ExitStack() as stack:
            self._workers = {
                ahead: stack.enter_context(Worker(python, module, {**settings, "ahead": ahead}))
                for ahead in dict.fromkeys(map(self._loaded, rival.modes.values()))
            }
            self._stack = stack.pop_all()

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def version(self) -> str:
        """Return the engine's version."""
        return str(self._workers[0].about["version"])

    def answer(
        self, mode: str, places: int, prompts: Sequence[Sequence[int]], tokens: int
    ) -> Reply:
        """Answer prompts greedily, `places` at once, up to `tokens` tokens each."""
        ahead = self._rival.modes[mode]
        job = {**job_of(prompts, tokens), "places": places}
        job |= {} if self._rival.fixed else {"ahead": ahead}
        waves = -(-len(prompts) // places)
        return reply_of(self._workers[self._loaded(ahead)].ask(job, ANSWERING * waves))

    def _loaded(self, ahead: int) -> int:
        """Return the drafts that a process is loaded for: how many, or whether any."""
        return ahead if self._rival.fixed else min(ahead, 1)


def reply_of(found: Mapping[str, Any]) -> Reply:
    """Return a worker's answer, counted as for our engine."""
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

    def __init__(self, python: Path, words: Sequence[str], settings: Mapping[str, Any]) -> None:
        """words: the rest of its command line."""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        self._process = subprocess.Popen(
            [str(python), *words],
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
        """End the process, by force if it does not end by itself."""
        try:
            self._process.stdin.close()  # type: ignore[union-attr]
            self._process.wait(timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def ask(self, message: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the worker's reply to a line."""
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
    """Return the line that has them answered."""
    return {"prompts": [list(map(int, prompt)) for prompt in prompts], "tokens": tokens}


def _environment(threads: int) -> dict[str, str]:
    """The user's, but its Python finds the laboratory alone of our packages."""
    ours = {name: value for name, value in children.environment().items() if name != "PYTHONHOME"}
    return {
        **ours,
        "PYTHONPATH": str(FOLDER),
        "PYTHONSAFEPATH": "1",
        "OMP_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
    }
