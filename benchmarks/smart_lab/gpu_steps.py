"""The steps of gpu_check.py, each in a process of its own. A step yields all that it has found so
far, again and again; "missing" names what it could not measure.

Needed by tools/gpu_check.sh.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from smart_decoding.bench.options import BASELINE
from smart_decoding.engine.kv import PAGE
from smart_decoding.errors import CapacityError
from smart_decoding.files import write_json
from smart_decoding.measuring.machine import versions
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.checkpoints.memory import EngineLimits, need_of, tokens_beside
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.target import DTYPES, TorchTarget
from smart_decoding.profiling.measure import verification
from smart_lab.floor import bytes_moved, near_floor, read_rate
from smart_lab.hardware import acceptances
from smart_lab.options import LabOptions
from smart_lab.provenance import commit, hardware
from smart_lab.replayed_run import (
    PROFILE_SECONDS,
    Replay,
    model_config,
    need_on_gpu,
    random_checkpoint,
)
from smart_lab.simulate import limits_of
from smart_lab.summary import POOLED
from smart_lab.synthetic import synthetic
from smart_lab.trace import Trace

Found = dict[str, Any]
MODEL = "llama-3.1-8b"
CURVE_CONTEXT = 1024
DTYPE = "bfloat16"
RISEN = 1.5  # less may be noise
UTILIZATION = 0.9  # of the GPU's memory
LAUNCHES = ("LaunchKernel", "GraphLaunch")  # as the CUDA runtime and driver name them
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
COPIES = ("cudaMemcpyAsync", "cudaMemcpy", "cuMemcpy")
RIVALS = ("off", "smart", "eagle2", "paper", "pooled_chain")
BOTH_WAYS = 0.2  # of a step's time, for the two ways of drafting


@dataclass(frozen=True, slots=True)
class Scale:
    """The size of the measurements. batches, contexts: of plain decoding; rows: of the curve;
    replayed: batch sizes of the replays with shares of their time; answers, length: of the
    recording; profile_seconds: of profiling."""

    config: ModelConfig
    batches: Sequence[int]
    contexts: Sequence[int]
    rows: Sequence[int]
    replayed: Mapping[int, float]
    answers: int
    length: int
    profile_seconds: float


TINY = ModelConfig("llama", 2, 64, 4, 2, 16, 96, 300, 10_000.0, 1e-5, 2048)
ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512, 768, 1024)


def scale_of(tiny: bool) -> Scale:
    """Return the full size, or one for a rehearsal."""
    if tiny:
        return Scale(TINY, (1, 2), (40,), (1, 4, 16), {1: 0.5, 2: 0.5}, 2, 24, 0.5)
    config = model_config(MODEL)[1]
    shares = {1: 0.25, 16: 0.3, 64: 0.45}
    return Scale(config, (1, 16, 64), (128, 1024, 4096), ROWS, shares, 24, 80, PROFILE_SECONDS)


@dataclass(frozen=True, slots=True)
class Task:
    """The input of a step: results so far, the device, and its deadline on time.perf_counter."""

    known: Mapping[str, Any]
    device: torch.device
    stop: float

    @property
    def tiny(self) -> bool:
        """Whether this is a rehearsal."""
        return bool(self.known["tiny"]) or self.device.type == "cpu"

    @property
    def scale(self) -> Scale:
        """The size of the measurements."""
        return scale_of(self.tiny)


def run_step(name: str, known: Mapping[str, Any], seconds: float, into: Path) -> None:
    """Run a step, and keep what it has found in a file. Raises what the step raises."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    task = Task(known, device, time.perf_counter() + seconds)
    kind, _, detail = name.partition("-")
    for found in STEPS[kind](task, *([detail] if detail else [])):
        write_json(into, found)


def limits(task: Task) -> Iterator[Found]:
    """Return what the machine is, and what it can do at best."""
    found: Found = {
        "device": task.device.type,
        "commit": commit(),
        "versions": versions(),
        "hardware": hardware(),
    }
    yield found
    yield {**found, "limits": {"gb_per_s": read_rate(task.device)}}


def check_parity(task: Task) -> Iterator[Found]:
    """See gpu_parity.py."""
    from smart_lab.gpu_parity import parity  # Triton may be missing

    checks = []
    for check in parity(task.device, task.tiny):
        checks.append(check)
        yield {"checks": checks}


def decode(task: Task) -> Iterator[Found]:
    """Forwards of plain decoding over batch sizes and contexts: milliseconds, and the time in which
    memory is read once; then launches, waits and copies."""
    scale = task.scale
    shapes = [(batch, context) for context in scale.contexts for batch in scale.batches]
    target, pages = _target(task, max(batch * -(-(c + 1) // PAGE) for batch, c in shapes))
    runs = {}
    found: Found = {"points": [], "missing": []}
    for batch, context in shapes:
        run = verification(target, batch, batch, context, pages)
        if run is None or time.perf_counter() > task.stop:
            why = "no memory" if run is None else "no time"
            found["missing"].append(f"{why} for batch {batch} at {context} tokens")
            continue
        point = {"batch_size": batch, "context": context, "ms": median_ms(run)}
        found["points"].append({**point, **_beside_floor(task, point)})
        runs[batch, context] = run
        yield found
    for point, run in zip(found["points"], runs.values(), strict=True):
        try:
            point["counts"] = counted(run)
        except RuntimeError as error:  # a profiler needs rights that a machine may not give
            found["missing"].append(f"launches of {point['batch_size']} rows: {error}")
        yield found


def median_ms(run: Callable[[], object]) -> float:
    """Return the median of 12 calls after two."""
    seconds = []
    for _ in range(14):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return 1e3 * statistics.median(seconds[2:])


def _beside_floor(task: Task, point: Mapping[str, Any]) -> Found:
    rate = task.known.get("limits", {}).get("gb_per_s")
    if rate is None:
        return {"near_floor": False}
    shape = point["batch_size"], point["context"]
    floor_ms = 1e-6 * bytes_moved(task.scale.config, DTYPES[DTYPE].itemsize, *shape) / rate
    held = near_floor(point["ms"], floor_ms)
    return {"floor_ms": floor_ms, "ratio": point["ms"] / floor_ms, "near_floor": held}


def counted(run: Callable[[], object]) -> Counter[str]:
    """Launches, waits and copies of a forward, and operations that torch dispatches."""
    kinds = {torch.profiler.ProfilerActivity.CPU}
    if torch.cuda.is_available():
        kinds.add(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as profile:
        run()
    found: Counter[str] = Counter({"operations": 0, "launches": 0, "waits": 0, "copies": 0})
    for event in profile.events() or ():
        name = event.name
        found["operations"] += name.startswith("aten::")
        found["launches"] += any(part in name for part in LAUNCHES)
        found["waits"] += name in WAITS
        found["copies"] += name.startswith(COPIES)
    return found


def curve(task: Task) -> Iterator[Found]:
    """Milliseconds of verifying rows of one request, and the knee."""
    scale = task.scale
    context = min(CURVE_CONTEXT, scale.config.max_positions // 4)
    target, pages = _target(task, -(-(context + scale.rows[-1]) // PAGE))
    found: Found = {"context": context, "rows": [], "ms": [], "missing": []}
    for rows in scale.rows:
        run = verification(target, 1, rows, context, pages)
        if run is None or time.perf_counter() > task.stop:
            found["missing"].append(f"{'no memory' if run is None else 'no time'} for {rows} rows")
            continue
        found["rows"].append(rows)
        found["ms"].append(median_ms(run))
        found["knee"] = knee_of(found["rows"], found["ms"])
        yield found


def knee_of(rows: Sequence[int], ms: Sequence[float]) -> float | None:
    """Return rows at which the line through the last two points reaches the time of one row: where
    arithmetic takes as long as reading the weights. None while they take less than RISEN times the
    time of one row."""
    if len(rows) < 2 or not ms[-1] > ms[-2] or ms[-1] < RISEN * ms[0]:
        return None
    slope = (ms[-1] - ms[-2]) / (rows[-1] - rows[-2])
    knee = rows[-1] - (ms[-1] - ms[0]) / slope
    return knee if knee > rows[0] else None


def _target(task: Task, pages: int) -> tuple[TorchTarget, int]:
    """Return a model with so many pages of keys and values, or as many as fit on the GPU."""
    config = task.scale.config
    if task.device.type == "cuda":
        checkpoint = Checkpoint(config, {}, Path(), {})
        rows = EngineLimits(0, 0, max(ROWS), config.max_positions)
        need = need_of(checkpoint, DTYPES[DTYPE], task.device, rows)
        pages = min(pages, tokens_beside(need, UTILIZATION, task.device) // PAGE)
    length = config.max_positions
    weights = random_checkpoint(config, task.device)
    target = TorchTarget(weights, DTYPE, task.device, pages, length, allow_slow=True)
    return target, pages


def replay(task: Task, level: str) -> Iterator[Found]:
    """Whole rounds of all contestants, with a published level of acceptance."""
    scale = task.scale
    known = acceptances()[level]
    trace = trace_of(level, scale)
    options = replay_options(task, level)
    sizes, missing = that_fit(task, options, trace)
    found: Found = {"source": known["source"], "tokens_per_round": known["tokens_per_round"]}
    found |= {"runs": [], "missing": missing}
    yield found
    if not sizes:
        return
    options = replace(options, batch_sizes=sizes)
    bench = Replay(options, trace, scale.config, scale.profile_seconds)
    found |= {"cost": bench.cost.to_dict()}
    yield found
    for size, left in _shared(task, sizes, kept=BOTH_WAYS):
        try:
            runs = bench.runs(size, left)
        except CapacityError as error:
            missing.append(str(error))
            continue
        pooled = [run for run in runs if run["task"] == POOLED]
        found["runs"] += [run | _whole_round(task, run, trace) for run in pooled]
        yield found
    found["ways"] = []
    for size, left in _shared(task, sizes):
        try:
            found["ways"].append(bench.ways(size, left))
        except CapacityError as error:
            missing.append(f"the two ways of drafting: {error}")
        yield found


def _whole_round(task: Task, run: Mapping[str, Any], trace: Trace) -> Found:
    """Return milliseconds of a plain round and its floor, at the recording's contexts."""
    if run["policy"] != BASELINE:
        return {}
    answers = trace.recording.answers
    context = statistics.fmean(a.prompt_length + len(a.tokens) / 2 for a in answers)
    size = run["batch_size"]
    point = {"batch_size": size, "context": context, "ms": 1e3 * size / run["tokens_per_s"]}
    return {"plain_ms": point["ms"], **_beside_floor(task, point)}


def _shared(task: Task, sizes: Sequence[int], kept: float = 0.0) -> Iterator[tuple[int, float]]:
    """Return each batch size with its share of the seconds that are left, but for a part that is
    kept."""
    shares = {size: task.scale.replayed[size] for size in sizes}
    stop = task.stop - kept * max(0.0, task.stop - time.perf_counter())
    for size in sizes:
        left = max(0.0, stop - time.perf_counter()) * shares[size] / sum(shares.values())
        del shares[size]
        yield size, left


def trace_of(level: str, scale: Scale) -> Trace:
    """Return a recording with a published level of acceptance."""
    known = acceptances()[level]
    drawn = synthetic(
        known["tokens_per_round"],
        answers=scale.answers,
        length=scale.length,
        context=min(known["context"], scale.config.max_positions // 4),
        tree=known["tree"],
    )
    return Trace(drawn, {"temperature": 0.0})


def replay_options(task: Task, level: str) -> LabOptions:
    """Return how a level is replayed."""
    tree = acceptances()[level]["tree"]
    return LabOptions(
        policies=RIVALS,
        policy_options=(_setting("eagle2", tree), _setting("paper", limits_of(tree))),
        batch_sizes=tuple(task.scale.replayed),
        dtype=DTYPE,
        device=task.device.type,
        allow_slow=True,
    )


def that_fit(task: Task, options: LabOptions, trace: Trace) -> tuple[tuple[int, ...], list[str]]:
    """Return the batch sizes that fit into a GPU's memory, and which do not."""
    sizes = tuple(options.batch_sizes)
    if task.device.type == "cpu":
        return sizes, []
    needs = {size: need_on_gpu(options, trace, task.scale.config, size) for size in sizes}
    lacking = {
        size: f"no memory for batch {size}: {need}"
        for size, need in needs.items()
        if need.tokens > tokens_beside(need, UTILIZATION, task.device)
    }
    return tuple(size for size in sizes if size not in lacking), [*lacking.values()]


def _setting(policy: str, options: Mapping[str, int]) -> str:
    """Return a setting in the form of --policy-options."""
    return f"{policy}:" + ",".join(f"{name}={value}" for name, value in options.items())


STEPS: Mapping[str, Callable[..., Iterator[Found]]] = {
    "limits": limits,
    "parity": check_parity,
    "decode": decode,
    "curve": curve,
    "replay": replay,
}
