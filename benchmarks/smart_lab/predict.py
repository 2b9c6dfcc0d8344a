"""Does a replay predict this machine's speedups?

    python -m smart_lab bench --record others.smart --skip 40 --limit 20 --max-tokens 96
    python -m smart_lab predict others.smart
    python -m smart_lab predict others.smart --against RESULTS.json

First the costs are measured anew (forwards as by `profile`, and rounds beyond their
forwards), then every policy is replayed on the recording; its own seconds are timed as it decides,
with caches emptied as forwards empty them. Only then the same policies run live, in turn, on the
first 40 prompts of each task, none of which is in the recording.

With --against nothing runs live: RESULTS.json is what smart bench --json wrote. It holds the
profile that was taken before that run, and the speedups that were measured on its own prompts, with
far more blocks than fit here.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding.bench.cycles import AGAIN, measure
from smart_decoding.bench.data import load_task
from smart_decoding.bench.options import BenchOptions, check_outputs, parse_setting
from smart_decoding.bench.runner import encode, load
from smart_decoding.bench.summary import POOLED, noise, summarise
from smart_decoding.cli.arguments import whole_numbers
from smart_decoding.core.cost import CostModel
from smart_decoding.errors import ConfigError
from smart_decoding.profiling.measure import Measurement
from smart_decoding.profiling.profile import ROUND_OVERHEAD
from smart_decoding.speculation import level_drafter
from smart_lab.recorder import measure_host
from smart_lab.replay import HostCosts, replay
from smart_lab.results import LabResults
from smart_lab.simulate import enough
from smart_lab.trace import Trace, read_trace

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Prompt
    from smart_decoding.llm import LLM

POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "off": ("off", {}),
    "smart": ("smart", {}),
    "paper": ("paper", {}),
    "5 nodes": ("eagle2", {"depth": 2, "top_k": 3, "total_tokens": 6}),
}
FORWARD_BYTES = 256 << 20  # what a verification reads
READ_BEFORE = {"observe": FORWARD_BYTES}


class Cold:
    """A policy that finds the caches as they are behind a forward. Its clock stands still
    meanwhile, and counts the processor's time, which others on the machine disturb less."""

    def __init__(self, policy: Any) -> None:
        self.name = policy.name
        self._policy = policy
        self._idle = 0.0
        self._memory = np.ones(FORWARD_BYTES // 8)

    def __getattr__(self, call: str) -> Any:
        if call == "foresee":
            raise AttributeError(call)
        size = READ_BEFORE.get(call, 0)

        def called(*arguments: Any) -> Any:
            started = time.thread_time()
            self._memory[: size // 8].sum()
            self._idle += time.thread_time() - started
            return getattr(self._policy, call)(*arguments)

        return called

    def clock(self) -> float:
        """Seconds of this thread but for those that emptied the caches."""
        return time.thread_time() - self._idle


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recording, and what it is compared with."""
    add = parser.add_argument
    add("trace", type=Path, help="a recording of other prompts, by `bench --record`")
    add("--seconds", type=float, default=30.0, help="of live measurement per batch size")
    add("--batch-sizes", type=whole_numbers, default=(1, 2, 4, 8, 16, 32), metavar="1,4")
    add("--against", type=Path, metavar="RESULTS.json", help="instead of running live")
    add("--json", type=Path)


def main(args: argparse.Namespace) -> int:
    """Prints a line for each policy and batch size. Raises ConfigError for unusable files."""
    check_outputs((args.json,))
    trace = read_trace(args.trace)
    if args.against:
        rows = against(trace, args.against)
    else:
        rows = live(trace, args.batch_sizes, args.seconds)
    worst = max(rows, key=lambda row: abs(row["error"]))
    within = sum(abs(row["error"]) <= 0.1 for row in rows)
    print(
        f"{within} of {len(rows)} within 10 %; largest error: {worst['error']:+.1%} "
        f"({worst['policy']}, batch {worst['batch_size']})"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))
    return 0


def against(trace: Trace, path: Path) -> list[dict[str, Any]]:
    """Predictions of a finished benchmark, from the profile that it started with."""
    results = LabResults.read(path)
    if results.cost is None:
        raise ConfigError(f"{path} holds no profile: give a run of smart")
    host = trace.host or HostCosts.of(results.cost)
    rows = []
    for size in results.batch_sizes:
        plain = predicted(trace, "off", {}, results.cost, host, size)
        for run in [run for run in results.contestants if run["batch_size"] == size]:
            policy, given = parsed(run)
            rate = predicted(trace, policy, given, results.cost, host, size)
            rows.append(row_of(run["policy"], size, rate / plain, run))
    return rows


def parsed(run: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """A run's policy and its options: of eagle2(depth=2,top_k=3), or of a tuned one from its
    `setting`."""
    label = run["policy"].rstrip(")").replace("(", ":", 1)
    arm = parse_setting(f"{label.split()[0]}:{run['setting']}" if run.get("setting") else label)
    return arm.policy, dict(arm.options)


def predicted(
    trace: Trace, policy: str, given: Mapping[str, Any], cost: CostModel, host: HostCosts, size: int
) -> float:
    """Tokens per second, the policy's own seconds included."""
    recording, made = enough(trace.recording, size), trace.policy(policy, cost, **given)
    found = replay(made, recording, cost, size, host, rounds=max(80, 2500 // size))
    cold = Cold(made)  # by now it has fitted what it fits once
    own = replay(cold, recording, cost, size, host, cold.clock, rounds=max(40, 250 // size))
    return found.tokens / (found.seconds + found.rounds * own.own_seconds / own.rounds)


def row_of(policy: str, size: int, value: float, measured: Mapping[str, Any]) -> dict[str, Any]:
    """One line of the comparison, printed."""
    speedup = float(measured["speedup"])
    bounds = (measured[name] for name in ("speedup_low", "speedup_high"))
    low, high = (float(bound or "nan") for bound in bounds)  # none of a single block
    row = {
        "policy": policy,
        "batch_size": size,
        "predicted": value,
        "measured": speedup,
        "low": low,
        "high": high,
        "blocks": measured["blocks"],
        "error": value / speedup - 1,
    }
    print(
        f"batch {size:2}  {policy[:44]:44} predicted {value:.3f}  "
        f"measured {speedup:.3f} ({low:.3f}-{high:.3f})  error {row['error']:+.1%}",
        flush=True,
    )
    return row


def live(trace: Trace, sizes: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Predictions of what then runs here."""
    policies = tuple(dict.fromkeys(policy for policy, _ in POLICIES.values()))
    options = BenchOptions(policies=policies, batch_sizes=sizes, limit=40, max_tokens=96)
    llm = load(options)
    prompts = encode(llm, {task: load_task(task, options.limit) for task in options.tasks}, options)
    started = time.perf_counter()
    cost, host = _costs(llm, options)
    print(f"costs measured in {time.perf_counter() - started:.0f} s; {host}")
    started = time.perf_counter()
    rates = {
        (name, size): predicted(trace, policy, given, cost, host, size)
        for size in sizes
        for name, (policy, given) in POLICIES.items()
    }
    print(f"predicted in {time.perf_counter() - started:.0f} s", flush=True)
    rows = []
    for size in sizes:
        for name, figures in _measured(llm, prompts, size, seconds).items():
            rows.append(row_of(name, size, rates[name, size] / rates["off", size], figures))
    return rows


def _costs(llm: LLM, options: BenchOptions) -> tuple[CostModel, HostCosts]:
    """A fresh profile, and the seconds of rounds beyond their forwards, on further prompts."""
    arm = llm.sharing_weights({"policy": "eagle2"})
    plain = llm.sharing_weights(False)
    drafter = level_drafter(arm.speculation.drafter)
    measured = Measurement(llm.target, drafter, llm.engine.config.pages, 32, 15.0).run()
    further = {task: load_task(task, 48)[40:] for task in options.tasks}
    others = [p for of_task in encode(llm, further, options).values() for p in of_task][:8]
    host = measure_host(plain.engine, arm.engine, others)
    return CostModel.fit(measured, ROUND_OVERHEAD), host


def _measured(
    llm: LLM, prompts: Mapping[str, Sequence[Prompt]], size: int, seconds: float
) -> dict[str, dict[str, Any]]:
    """What each policy but the baseline did live at a batch size."""
    engines = {}
    for name, (policy, given) in POLICIES.items():
        speculation = {"policy": policy, **given} if name != "off" else False
        engines[name] = llm.sharing_weights(speculation).engine
    engines[AGAIN] = llm.sharing_weights(False).engine
    found = measure(engines, prompts, size, time.perf_counter() + seconds)
    print(f"batch {size}: the baseline against itself gives {noise(found.again)['noise']:.3f}")
    figures = {}
    for name in list(POLICIES)[1:]:
        of_tasks = summarise([(cycle[name], cycle["off"]) for cycle in found.cycles])
        figures[name] = next(each for each in of_tasks if each["task"] == POOLED)
    return figures
