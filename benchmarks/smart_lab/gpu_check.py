"""Ten minutes of checks with a GPU (tools/gpu_check.sh), on a machine with torch, Triton and numpy
only.

Every step is a process of its own with a time limit, its share of the time left. A step that fails,
hangs or is killed leaves its findings so far, and the next begins. The results so far are in one
JSON file after each step. The last line sums up:

    GPU_CHECK PASS|FAIL plain/floor=.. smart/eagle2@1,16,64=.. smart/pooled_chain@1,16,64=.. knee=..

plain/floor: plain decoding over the time of reading memory once, at the worst of all batch sizes
and contexts, of forwards and of whole rounds. smart/..: at each batch size, the worse of the
published levels of acceptance. knee: rows at which arithmetic takes as long as reading the weights.

PASS means that all of these hold; FAIL lists the others under why=:
  steps   all of them ended by themselves and measured all that fits into memory;
  parity  the device computes what the CPU's references do, by all checks of a step that ended;
  plain   plain decoding takes at most 1.15 x that floor + 1 ms, everywhere;
  smart   `smart` is at least 0.97 times as fast as plain decoding, eagle2, paper and pooled_chain;
  knee    the curve of verification has one below 1,024 rows;
  gpu     there was a GPU. Without one everything runs at a tiny size: a rehearsal.

The line before it says which way to draft is faster with a head, and what to write into
models/torch/head_levels.py: the device chooses what levels expand, with two waits a round, or the
host, with one for each level.

Nothing here needs more than Python until a step runs.

Needed by tools/gpu_check.sh, which docs/will-it-help.md describes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

TOTAL = 570.0  # seconds, of the ten minutes that a run may take
LEAST = 10.0  # with less left a step is not begun
SHARE = 0.9  # of its time limit, in which a step plans to be done
SAME = 0.97  # a ratio that noise may give where speeds are the same
TAIL = 2000  # characters of what a failed step said
UNUSED = ("tqdm", "safetensors", "safetensors.torch", "tokenizers")
RIVALS = ("eagle2", "pooled_chain")  # whose ratios are in the last line


@dataclass(frozen=True, slots=True)
class Step:
    """A step, and the seconds that it has if no step before it ends early."""

    name: str
    seconds: float


STEPS = (
    Step("limits", 40),
    Step("parity", 95),
    Step("decode", 80),
    Step("curve", 55),
    Step("replay-eagle3", 130),
    Step("replay-msd", 170),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; return 0 for PASS, 3 for FAIL."""
    args = _arguments(arguments)
    if args.step:
        return _run_here(args)
    signal.signal(signal.SIGTERM, _stop)
    found: dict[str, Any] = {"tiny": args.tiny, "steps": {}}
    try:
        run_steps(args.steps, found, args.json, args.seconds)
    except KeyboardInterrupt:
        found["interrupted"] = True
    why, line = verdict(found, args.steps)
    write(args.json, {**found, "why": why, "line": line})
    print(ways(found, args.steps))
    print(line, flush=True)
    return 3 if why else 0


def run_steps(
    steps: Sequence[Step], found: dict[str, Any], path: Path, seconds: float = TOTAL
) -> None:
    """Run the steps one after another, and keep what they found, so far, in a file."""
    stop = time.monotonic() + seconds
    write(path, found)
    for number, step in enumerate(steps):
        share = step.seconds / sum(other.seconds for other in steps[number:])
        left = share * (stop - time.monotonic())
        if left < min(LEAST, step.seconds):
            found["steps"][step.name] = {"status": "left out: no time was left"}
        else:
            _run(step.name, left, found)
        result = found["steps"][step.name]
        print(f"{step.name}: {result['status']} ({result.get('seconds', 0)} s)", flush=True)
        if "device" in found and found["device"] != "cuda":
            found["tiny"] = True
        write(path, found)


def _run(name: str, seconds: float, found: dict[str, Any]) -> None:
    """Run a step in a process, and end it and its children at its time limit."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        known, into, log = (Path(folder) / each for each in ("known.json", "found.json", "log"))
        write(known, found)
        with log.open("wb") as said:
            process = subprocess.Popen(
                command(name, seconds, known, into),
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(found),
                start_new_session=True,
            )
            result = {"status": "interrupted"}
            try:
                code = process.wait(seconds)
                result["status"] = "ok" if code == 0 else f"failed: exit code {code}"
            except subprocess.TimeoutExpired:
                result["status"] = f"failed: not done within {seconds:.0f} s"
            finally:
                _end(process)
                _collect(name, result, found, into)
                found["steps"][name] = {**result, "seconds": round(time.monotonic() - started, 1)}
                if result["status"] != "ok":
                    found["steps"][name]["said"] = log.read_text(errors="replace")[-TAIL:]


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):  # all of them may be gone
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _collect(name: str, result: dict[str, Any], found: dict[str, Any], into: Path) -> None:
    """Add a step's findings to `found`, however the step ended."""
    if not into.exists():
        return
    part = json.loads(into.read_text(encoding="utf-8"))
    if name == "limits":  # of the machine, not of a step
        found.update(part)
    else:
        found[name] = part
    missing = part.get("missing")
    if missing and result["status"] == "ok":
        result["status"] = f"failed: {'; '.join(missing)}"


def command(name: str, seconds: float, known: Path, into: Path) -> list[str]:
    """Return the command that runs a step."""
    options = ["--step", name, "--seconds", f"{SHARE * seconds:.1f}", "--json", str(known)]
    return [sys.executable, "-m", "smart_lab.gpu_check", *options, "--into", str(into)]


def _environment(found: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment of a step: without a GPU Triton is to interpret."""
    more = {"TRITON_INTERPRET": "1"} if found.get("device", "cuda") != "cuda" else {}
    return {**os.environ, **more}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write the JSON file whole or not at all; print an error if it cannot be written."""
    scratch = path.with_name(path.name + ".part")
    try:
        scratch.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        print(f"{path} could not be written: {error.strerror}", file=sys.stderr)


def verdict(found: Mapping[str, Any], steps: Iterable[Step] = STEPS) -> tuple[list[str], str]:
    """Return the failed conditions, and the last line."""
    points = found.get("decode", {}).get("points", [])
    replays = [found[step.name] for step in steps if step.name in found and "replay" in step.name]
    runs = [run for part in replays for run in part.get("runs", [])]
    sizes = sorted({run["batch_size"] for run in runs})
    plain = [run for run in runs if run["policy"] == "off"]
    checks = found.get("parity", {}).get("checks", [])
    gates = [point["near_floor"] for point in points]
    gates += [run.get("near_floor", False) for run in plain]
    knee = found.get("curve", {}).get("knee")
    ended = {step.name: found["steps"].get(step.name, {}).get("status") == "ok" for step in steps}
    holds = {
        "steps": all(ended.values()) and not found.get("interrupted"),
        "parity": ended.get("parity", False) and bool(checks) and all(c["ok"] for c in checks),
        "plain": bool(points) and bool(plain) and all(gates),
        "smart": bool(runs) and all(value >= SAME for value in _smart_over(runs)),
        "knee": knee is not None,
        "gpu": found.get("device") == "cuda" and not found["tiny"],
    }
    why = [name for name, held in holds.items() if not held]
    ratios = [p["ms"] / p["floor_ms"] for p in points if p.get("floor_ms")]
    ratios += [run["plain_ms"] / run["floor_ms"] for run in plain if run.get("floor_ms")]
    at = ",".join(map(str, sizes))
    parts = [f"plain/floor={_said(max(ratios, default=math.nan))}"]
    for rival in RIVALS:
        worst = (_worst(runs, rival, size) for size in sizes)
        parts.append(f"smart/{rival}@{at}={','.join(map(_said, worst)) or '-'}")
    parts.append(f"knee={'-' if knee is None else round(knee)}")
    words = ["FAIL", *parts, f"why={','.join(why)}"] if why else ["PASS", *parts]
    return why, " ".join(["GPU_CHECK", *words])


def ways(found: Mapping[str, Any], steps: Iterable[Step] = STEPS) -> str:
    """Return which way to draft is faster, by the geometric mean over batch sizes and levels of
    acceptance, and the setting that takes it."""
    runs = [run for step in steps for run in found.get(step.name, {}).get("ways", ())]
    if not runs:
        return "DRAFTING not measured"
    over = [_number(run["speedup"]) for run in runs]
    mean = math.prod(over) ** (1 / len(over))
    sure = [run for run in runs if run["speedup_low"] > 1 or run["speedup_high"] < 1]
    each = ",".join(f"{run['batch_size']}:{_said(run['speedup'])}" for run in runs)
    return (
        f"DRAFTING winner={'device' if mean >= 1 else 'host'} set DEVICE_CHOOSES = {mean >= 1} "
        f"device/host={_said(mean)} by batch {each} beyond noise: {len(sure)} of {len(runs)}"
    )


def _smart_over(runs: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Return how much faster `smart` is than each other contestant; NaN where it was not
    measured."""
    for run in runs:
        if run["policy"] == "smart":
            yield _number(run.get("speedup"))
        elif run["policy"] != "off":
            yield _number(run.get("smart_over"))


def _worst(runs: Sequence[Mapping[str, Any]], rival: str, size: int) -> float:
    ratios = [
        _number(run.get("smart_over"))
        for run in runs
        if run["batch_size"] == size and run["policy"].partition("(")[0] == rival
    ]
    return min(ratios, default=math.nan)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _said(value: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else "-"


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("gpu_check.sh", description="Judges a GPU in ten minutes.")
    add = parser.add_argument
    add("--json", type=Path, default=Path("gpu_check.json"), metavar="FILE", help="the results")
    add("--tiny", action="store_true", help="a tiny size, as without a GPU")
    add("--seconds", type=float, default=TOTAL, help="for all steps together")
    named = {step.name: step for step in STEPS}
    add(
        "--steps",
        type=lambda said: [named[name] for name in said.split(",")],
        default=STEPS,
        metavar="A,B",
        help=f"only these of {','.join(named)}",
    )
    add("--step", help=argparse.SUPPRESS)  # in a process of its own
    add("--into", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def _run_here(args: argparse.Namespace) -> int:
    """Run a step in this process."""
    stand_in(UNUSED)
    from smart_lab.gpu_steps import run_step
    from smart_lab.rival_policies import register

    register()
    known = json.loads(args.json.read_text(encoding="utf-8"))
    run_step(args.step, known, args.seconds, args.into)
    return 0


class Unused:
    """A progress bar that shows nothing; of anything else, a name."""

    def __init__(self, items: Iterable[Any] = (), *arguments: Any, **options: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self._items)

    def __enter__(self) -> Unused:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, count: float = 1) -> None:
        """Show nothing."""


class _Absent(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__path__ = []
        self.__spec__ = ModuleSpec(name, None)  # torch asks what is there

    def __getattr__(self, name: str) -> type[Unused]:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused


def stand_in(names: Iterable[str]) -> None:
    """Stands in for packages that are not installed and are imported only."""
    for name in names:
        try:
            __import__(name)
        except ImportError:
            sys.modules[name] = _Absent(name)


def _stop(*signalled: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
