"""A llama.cpp built on this machine: its version, its server with given flags, its own benchmarks
of forwards.

Needed by `gguf-speed`, whose files are the README's first table.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from signal import SIGCONT, SIGSTOP
from typing import Any

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.integrations.tuning.llama_cpp import completion
from smart_decoding.integrations.tuning.processes import ServerProcess, free_port
from smart_decoding.kernels import children
from smart_lab.gguf.rates import Reply, Span, reply

SERVER, BENCH, BATCHED = "llama-server", "llama-bench", "llama-batched-bench"
LOADING, ANSWERING = 300.0, 600.0  # seconds until it is given up; of a prompt for each slot
LEAST_BATCH = 2048  # llama.cpp's default of --batch-size
_BUILD = re.compile(
    r"^(CMAKE_BUILD_TYPE|BUILD_SHARED_LIBS|GGML_(?:NATIVE|OPENMP|CPU_REPACK|LLAMAFILE|BLAS|LTO|AVX2"
    r"|AVX512|FMA|F16C|BMI2))"
    r":\w+=(.+)$",
    re.MULTILINE,
)
# Options that environment variables would change behind our back.
_NOT_THEIRS = ("LLAMA_", "GGML_", "OMP_", "GOMP_", "KMP_")


@dataclass(frozen=True, slots=True)
class Program:
    """A llama-server. command: its fixed words; tokens_of: reads the tokens of an answer."""

    name: str
    command: tuple[str, ...]
    tokens_of: Callable[[Mapping[str, Any]], list[int]]


@dataclass(frozen=True, slots=True)
class Sizes:
    """context: tokens of a slot; longest: tokens of a prompt."""

    context: int
    longest: int


@dataclass(frozen=True, slots=True)
class LlamaCpp:
    """The folder of its binaries. Raises ConfigError if one is missing."""

    folder: Path

    def __post_init__(self) -> None:
        require(self.folder, (SERVER, BENCH, BATCHED))

    @property
    def program(self) -> Program:
        """Its server."""
        words = ("--offline", "--no-cache-prompt")
        return Program("llama.cpp", (str(self.folder / SERVER), *words), ids_of)

    def about(self) -> dict[str, Any]:
        """Return its origin, and its instruction sets in its own words."""
        return {**origin(self.folder), "system": self._system()}

    def _system(self) -> str:
        """It names its instruction sets as it starts, here with a model that is not there."""
        command = [str(self.folder / SERVER), "--model", "no-such-model.gguf", "--offline"]
        command += ["--verbosity", "4", "--port", str(free_port())]
        lines = [line for line in _run(command).stderr.splitlines() if "system_info:" in line]
        return lines[-1].partition(" | ")[2].strip(" |") if lines else "unknown"

    def one_sequence(
        self, model: Path, threads: int, rows: Sequence[int], context: int, turns: int
    ) -> dict[int, float]:
        """Return rows -> seconds of a forward of so many new rows of one sequence, with logits of
        the last: the median of `turns`, under the best layout of the weights."""
        found: dict[int, list[float]] = {count: [] for count in rows}
        for repack in ("1", "0"):
            done = call(
                [
                    *(str(self.folder / BENCH), "-m", str(model), "-o", "json", "-r", str(turns)),
                    *("-n", "0", "-p", ",".join(map(str, rows)), "-d", str(context)),
                    *("-t", str(threads), "-fa", "auto", "--repack", repack),
                ]
            )
            for count, seconds in bench_seconds(done).items():
                found[count].append(seconds)
        return {count: min(seconds) for count, seconds in found.items()}

    def many_sequences(
        self, model: Path, threads: int, rows: Sequence[int], context: int, turns: int
    ) -> dict[int, float]:
        """Return seconds of a forward of one row of so many sequences, each giving logits, under
        the best layout of the weights."""
        found: dict[int, list[float]] = {count: [] for count in rows}
        for layout in ((), ("--no-repack",)):
            done = call(
                [
                    *(str(self.folder / BATCHED), "-m", str(model), "--output-format", "jsonl"),
                    *("-npp", str(context), "-ntg", str(turns), "-npl", ",".join(map(str, rows))),
                    *("-pps", "-c", str(max(rows) * (context + turns))),
                    *("--threads", str(threads), *layout),
                ]
            )
            for count, seconds in batched_seconds(done).items():
                found[count].append(seconds)
        return {count: min(seconds) for count, seconds in found.items()}


def require(folder: Path, names: Sequence[str]) -> None:
    """Raise ConfigError if a program is not there."""
    for name in names:
        if not (folder / name).is_file():
            raise ConfigError(
                f"{folder} has no {name}: give the folder of a llama.cpp's binaries, "
                "such as build/bin (docs/lab.md says how to build it)"
            )


def origin(folder: Path) -> dict[str, Any]:
    """Return a server's version and compiler, and its build options if CMake's cache is near."""
    done = call([str(folder / SERVER), "--version"])
    lines = [line for line in done.splitlines() if line.startswith(("version", "built"))]
    cache = folder.parent / "CMakeCache.txt"
    text = cache.read_text(errors="replace") if cache.is_file() else ""
    return {"version": "; ".join(lines), "build": dict(_BUILD.findall(text))}


def bench_seconds(text: str) -> dict[int, float]:
    """Return what `llama-bench -o json` prints: rows -> the median seconds of its repetitions.
    Raises ModelError if it is something else."""
    try:
        runs = json.loads(text[text.index("[") : text.rindex("]") + 1])
        return {int(run["n_prompt"]): statistics.median(run["samples_ns"]) * 1e-9 for run in runs}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{BENCH} printed no JSON of its runs: {_last(text)}") from error


def batched_seconds(text: str) -> dict[int, float]:
    """Return what `llama-batched-bench --output-format jsonl` prints: sequences -> seconds of a
    step. Raises ModelError if it is something else."""
    runs = [json.loads(line) for line in text.splitlines() if line.startswith('{"n_kv_max"')]
    if not runs:
        raise ModelError(f"{BATCHED} printed no JSON lines of its runs: {_last(text)}")
    return {int(run["pl"]): run["t_tg"] / run["tg"] for run in runs}


def ids_of(answer: Mapping[str, Any]) -> list[int]:
    """Return the tokens in llama-server's answer."""
    return list(answer["tokens"])


def command_of(
    program: Program, model: Path, port: int, flags: Sequence[str], slots: int, sizes: Sizes
) -> list[str]:
    """Return the words that start a server."""
    return [
        *program.command,
        *("--model", str(model)),
        *("--host", "127.0.0.1", "--port", str(port), "--parallel", str(slots)),
        *("--ctx-size", str(slots * sizes.context)),
        # The prompts of all slots in one batch.
        *("--batch-size", str(max(LEAST_BATCH, slots * sizes.longest))),
        *("--cache-ram", "0"),
        *flags,
    ]


class Server:
    """A running llama-server. Without requests it is stopped by a signal: threads that wait for
    work would disturb others. Raises ModelError with its last words if it does not start or
    fails."""

    def __init__(
        self, program: Program, model: Path, flags: Sequence[str], slots: int, sizes: Sizes
    ) -> None:
        """flags: words of its command line."""
        self._slots, self._tokens_of = slots, program.tokens_of
        port = free_port()
        command = command_of(program, model, port, flags, slots, sizes)
        self._server = ServerProcess(command, port, environment(), LOADING)
        self._server.signal(SIGSTOP)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.close()

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> Reply:
        """Answer prompts greedily, as many at once as there are slots, in the server's own queue,
        up to `tokens` tokens each."""
        body = {**completion(prompts, tokens), "return_tokens": True}
        self._server.signal(SIGCONT)
        started = time.perf_counter()
        waves = -(-len(prompts) // self._slots)
        found = self._server.ask("/completion", body, ANSWERING * waves)
        seconds = time.perf_counter() - started
        self._server.signal(SIGSTOP)
        return reply_of(found, prompts, tokens, seconds, self._tokens_of)


def reply_of(
    found: Any,
    prompts: Sequence[Sequence[int]],
    most: int,
    seconds: float,
    tokens_of: Callable[[Mapping[str, Any]], list[int]] = ids_of,
) -> Reply:
    """Return llama-server's answers, by its own clock except the total seconds. most: tokens of an
    answer that were requested. Raises ModelError for a prompt that was not computed in full."""
    items = found if isinstance(found, list) else [found]
    items = sorted(items, key=lambda one: one.get("index", 0))  # in order without an index
    answers = [tokens_of(one) for one in items]
    spans, counts, rounds = [], [], 0
    for one, answer, prompt in zip(items, answers, prompts, strict=True):
        times = one["timings"]
        if times["prompt_n"] != len(prompt):
            raise ModelError(
                f"{SERVER} computed {times['prompt_n']} tokens of a prompt of {len(prompt)}"
            )
        count = len(answer)
        if one.get("stopped_limit"):  # ik_llama.cpp returns one token of the last round
            count = max(count, min(most, times["predicted_n"]))
        counts.append(count)
        spans.append(Span(times["prompt_ms"] / 1e3, times["predicted_ms"] / 1e3, count - 1))
        # Its counts may include drafts behind an end.
        rounds += max(0, times["predicted_n"] - 1 - times.get("draft_n_accepted", 0))
    return reply(spans, seconds, rounds, answers, counts)


def call(command: Sequence[str]) -> str:
    """Return both streams of a program that ends by itself. Raises ModelError if it fails."""
    done = _run(command)
    if done.returncode != 0:
        reason = _last(done.stderr or done.stdout)
        raise ModelError(f"{Path(command[0]).name} ended with {done.returncode}: {reason}")
    return f"{done.stderr}\n{done.stdout}"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment(), check=False
    )


def environment() -> dict[str, str]:
    """Return the user's without variables that would change a rival."""
    own = children.environment()
    return {name: text for name, text in own.items() if not name.startswith(_NOT_THEIRS)}


def _last(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines or ["it said nothing"])[-1][:200]
