"""Peers measured: each in a process of its own, one after another, in turn with our plain and our
smart decoding.

All answer the same prompts with the same weights, greedily, to the same number of tokens. Only
prompts count whose plain answer neither ends nor loops before that, so that forcing the length
favours nobody. A peer that cannot be installed or fails is reported with its reason. While one
process computes, the others wait for their next line.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.blocks import Prompt, run_block
from smart_decoding.bench.load import in_turn
from smart_decoding.bench.statistics import Pair, Ratio, paired_ratio
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ModelError, SmartError
from smart_lab.peers.catalogue import ENVIRONMENTS, Peer, environments_of, python_in, wanted
from smart_lab.peers.environment import python_for
from smart_lab.peers.weights import weights_for

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_lab.options import LabOptions
    from smart_lab.resume import Progress

CHUNKS, MOST = (
    6,
    12,
)  # chunks of prompts at every batch size: at least so many, and at batch 1 the most
CONTEXT = 2048  # tokens of a sequence that peers make room for
PAUSE = 0.3  # seconds between two engines: threads of the one before may still spin
LOADING, ANSWERING = 300.0, 180.0  # seconds until a worker is given up
WARM_UP_TOKENS = 8
WORKERS = Path(__file__).with_name("workers")
OURS = ("plain", "smart")


@dataclass(frozen=True, slots=True)
class Timed:
    """One chunk answered: seconds and tokens of decoding alone, seconds before it, the answers."""

    seconds: float
    tokens: int
    prefill_seconds: float
    answers: list[list[int]]

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else float("nan")


class Worker:
    """A peer's process. Raises ModelError with its reason when it fails or stays silent."""

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

    def answer(self, prompts: Sequence[Sequence[int]], tokens: int) -> Timed:
        reply = self.ask(job_of(prompts, tokens), ANSWERING)
        return Timed(reply["seconds"], reply["tokens"], reply["prefill_seconds"], reply["answers"])

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


def measure_peers(
    options: LabOptions,
    ours: Mapping[str, Engine],
    prompts: Mapping[str, Sequence[Prompt]],
    progress: Progress,
) -> list[dict[str, Any]]:
    """A dict for each peer: name, version, precision and 'runs', or 'error' in words. ours: 'plain'
    and 'smart'."""
    peers, given = wanted(options.peers), environments_of(options.peer_env)
    prepared = {
        peer.name: _prepared(peer, options, given) for peer in peers
    }  # nothing is installed between timings
    chosen = lasting(ours["plain"], in_turn(prompts), options.max_tokens)
    results = []
    for peer in peers:
        name = f"peer {peer.name}"
        kept = progress.units(name)
        result = kept[0] if kept else {"name": peer.name, "runs": [], **prepared[peer.name]}
        if "python" in result:
            result = _measured(peer, options, result, ours, chosen)
        if not kept and "error" not in result:  # what failed is tried again when a run goes on
            progress.add(name, result)
        results.append(result)
    return results


def lasting(engine: Engine, prompts: Sequence[Prompt], tokens: int) -> list[Prompt]:
    """Prompts whose plain answer has so many tokens before its end or a loop."""
    size = min(8, engine.config.max_num_seqs, len(prompts))
    kept = []
    for start in range(0, len(prompts), size):
        chunk = prompts[start : start + size]
        block = run_block(engine, chunk, [*prompts[start + size :], *prompts[:start]], len(chunk))
        kept += [p for p in chunk if len(block.answers[p.index].tokens) >= tokens]
    return kept


def answer_ours(engine: Engine, prompts: Sequence[Sequence[int]], tokens: int) -> Timed:
    """Our engine under the peers' protocol: all prompts at once; decoding counts once each has its
    first token."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    started = time.perf_counter()
    requests = [
        engine.add_request(f"peer-{i}", prompt, params)[0] for i, prompt in enumerate(prompts)
    ]
    while not all(request.output for request in requests):
        engine.step()
    at, before = time.perf_counter(), sum(len(request.output) for request in requests)
    while engine.has_unfinished_requests:
        engine.step()
    ended = time.perf_counter()
    answers = [list(request.output) for request in requests]
    return Timed(ended - at, sum(map(len, answers)) - before, at - started, answers)


def compare(
    worker: Worker,
    ours: Mapping[str, Engine],
    prompts: Sequence[Prompt],
    batch_size: int,
    tokens: int,
) -> dict[str, Any]:
    """The peer and ours in turn over chunks of `batch_size` prompts. Raises ModelError if there are
    too few."""
    chunks = [
        [p.tokens for p in prompts[i : i + batch_size]] for i in range(0, len(prompts), batch_size)
    ]
    chunks = [chunk for chunk in chunks if len(chunk) == batch_size][
        : max(CHUNKS, MOST // batch_size)
    ]
    if not chunks:
        raise ModelError(
            f"only {len(prompts)} prompts have answers that last: "
            "raise --limit or lower --max-tokens"
        )
    answers = {name: partial(answer_ours, engine) for name, engine in ours.items()}
    contestants: dict[str, Callable[..., Timed]] = {"peer": worker.answer, **answers}
    for answer in contestants.values():
        answer(chunks[0], WARM_UP_TOKENS)
    timed: dict[str, list[Timed]] = {name: [] for name in contestants}
    names = list(contestants)
    for number, chunk in enumerate(chunks):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            time.sleep(PAUSE)
            timed[name].append(contestants[name](chunk, tokens))
    return peer_run(timed, batch_size)


def peer_run(timed: Mapping[str, Sequence[Timed]], batch_size: int) -> dict[str, Any]:
    """Rates, our speedups over the peer with their intervals, and how far the answers agree."""

    def total(name: str) -> float:
        return sum(t.tokens for t in timed[name]) / sum(t.seconds for t in timed[name])

    def prefill(name: str) -> float:
        return 1e3 * sum(t.prefill_seconds for t in timed[name]) / len(timed[name])

    def over_peer(name: str) -> Ratio:
        return paired_ratio(
            [
                Pair(a.rate, b.rate, b.tokens)
                for a, b in zip(timed[name], timed["peer"], strict=True)
            ]
        )

    smart, plain = over_peer("smart"), over_peer("plain")
    agreed = [
        _agreement(a, b)
        for theirs, mine in zip(timed["peer"], timed["plain"], strict=True)
        for a, b in zip(theirs.answers, mine.answers, strict=True)
    ]
    return {
        "batch_size": batch_size,
        "chunks": len(timed["peer"]),
        "tokens_per_s": total("peer"),
        **{f"{name}_tokens_per_s": total(name) for name in OURS},
        "speedup": smart.value,
        "speedup_low": smart.low,
        "speedup_high": smart.high,
        "plain_speedup": plain.value,
        "plain_speedup_low": plain.low,
        "plain_speedup_high": plain.high,
        "prefill_ms": prefill("peer"),
        "plain_prefill_ms": prefill("plain"),
        "same": sum(agreed) / len(agreed),
    }


def _prepared(peer: Peer, options: LabOptions, given: Mapping[str, Path]) -> dict[str, Any]:
    """The Python and the weights of a peer, or why there are none."""
    try:
        folder = given.get(peer.environment)
        python = python_in(folder) if folder else python_for(ENVIRONMENTS[peer.environment])
        return {"python": str(python), "weights": str(weights_for(peer.weights, options.model))}
    except SmartError as error:
        return {"error": str(error)}


def _measured(
    peer: Peer,
    options: LabOptions,
    prepared: Mapping[str, Any],
    ours: Mapping[str, Engine],
    prompts: Sequence[Prompt],
) -> dict[str, Any]:
    sizes = [size for size in options.batch_sizes if peer.largest is None or size <= peer.largest]
    result: dict[str, Any] = {"name": peer.name, "version": "?", "precision": "?", "runs": []}
    left_out = [str(size) for size in options.batch_sizes if size not in sizes]
    if left_out:
        result["note"] = f"not offered at batch {', '.join(left_out)}"
    if not sizes:
        return result
    fitting = [p for p in prompts if len(p.tokens) + options.max_tokens <= CONTEXT]
    try:
        with Worker(
            Path(prepared["python"]),
            WORKERS / peer.worker,
            _settings(peer, options, prepared, sizes),
        ) as worker:
            result.update(worker.about)
            for size in sizes:
                result["runs"].append(compare(worker, ours, fitting, size, options.max_tokens))
    except SmartError as error:
        result["error"] = str(error)
    return result


def _settings(
    peer: Peer, options: LabOptions, prepared: Mapping[str, Any], sizes: Sequence[int]
) -> dict[str, Any]:
    cores = (
        sorted(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else list(range(os.cpu_count() or 1))
    )
    weights = prepared["weights"]
    precision = (
        options.dtype if peer.weights != "gguf-as-is" else Path(weights).stem.rpartition(".")[2]
    )
    return {
        "weights": weights,
        "dtype": options.dtype,
        "precision": precision,
        "context": CONTEXT,
        "sequences": max(sizes),
        "threads": len(cores),
        "cores": ",".join(map(str, cores)),
        **peer.options,
    }


def _environment(threads: int) -> dict[str, str]:
    """Ours, but for what would lead the peer's Python to our packages."""
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


def _agreement(theirs: Sequence[int], ours: Sequence[int]) -> float:
    """Share of an answer before the first token that differs."""
    length = min(len(theirs), len(ours))
    same = next((i for i in range(length) if theirs[i] != ours[i]), length)
    return same / length if length else 0.0
