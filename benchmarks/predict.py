"""Does a replay predict this machine's speedups?

    python -m smart_lab bench --record others.smart --skip 40 --limit 20 --max-tokens 96
    python benchmarks/predict.py others.smart [--seconds 30] [--batch-sizes 1,2,4,8,16,32] [--json
        FILE]
    python benchmarks/predict.py others.smart --against RESULTS.json

First the costs are measured anew (forwards as by `smart profile`, and rounds beyond their
forwards), then every policy is replayed on the recording; its own seconds are timed as it decides,
with caches emptied as forwards empty them. Only then the same policies run live, in turn, on the
first 40 prompts of each task, none of which is in the recording.

With --against nothing runs live: RESULTS.json is what smart bench --json wrote. It holds the
profile that was taken before that run, and the speedups that were measured on its own prompts, with
far more blocks than fit here.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from smart_decoding.bench.data import load_task
from smart_decoding.bench.options import BenchOptions, parse_setting
from smart_decoding.bench.results import Results
from smart_decoding.bench.runner import encode, load, measure
from smart_decoding.bench.summary import POOLED, noise, summarise
from smart_decoding.core.cost import CostModel
from smart_decoding.profiling.measure import measure as profile
from smart_decoding.speculation import ROUND_OVERHEAD, level_drafter
from smart_lab.recorder import measure_host
from smart_lab.replay import HostCosts, replay
from smart_lab.simulate import enough
from smart_lab.trace import Trace, read_trace

POLICIES = {
    "off": ("off", {}),
    "smart": ("smart", {}),
    "paper": ("paper", {}),
    "5 nodes": ("eagle2", {"depth": 2, "top_k": 3, "total_tokens": 6}),
}
LEVEL_BYTES, FORWARD_BYTES = (
    16 << 20,
    256 << 20,
)  # what a drafted level and a verification read, about


class Cold:
    """A policy that finds the caches as they are behind a forward. Its clock stands still
    meanwhile, and counts the processor's time, which others on the machine disturb less."""

    def __init__(self, policy: Any) -> None:
        self._policy, self.name, self._idle = policy, policy.name, 0.0
        self._memory = np.ones(FORWARD_BYTES // 8)

    def __getattr__(self, call: str) -> Any:
        size = {"frontier": LEVEL_BYTES, "select": LEVEL_BYTES, "observe": FORWARD_BYTES}.get(
            call, 0
        )

        def called(*arguments: Any) -> Any:
            started = time.thread_time()
            self._memory[: size // 8].sum()
            self._idle += time.thread_time() - started
            return getattr(self._policy, call)(*arguments)

        if call == "foresee":
            raise AttributeError(call)
        return called

    def clock(self) -> float:
        return time.thread_time() - self._idle


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="of live measurement per batch size"
    )
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32")
    parser.add_argument("--against", type=Path, metavar="RESULTS.json")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes = [int(word) for word in args.batch_sizes.split(",")]
    trace = read_trace(args.trace)
    rows = against(trace, args.against) if args.against else live(trace, sizes, args.seconds)
    worst = max(rows, key=lambda row: abs(row["error"]))
    within = sum(abs(row["error"]) <= 0.1 for row in rows)
    print(
        f"{within} of {len(rows)} within 10 %; largest error: {worst['error']:+.1%} "
        f"({worst['policy']}, batch {worst['batch_size']})"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=1))


def against(trace: Trace, path: Path) -> list[dict[str, Any]]:
    """Predictions of a finished benchmark, from the profile that it started with."""
    results = Results.read(path)
    assert results.cost is not None, f"{path} holds no profile"
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
    low, high = (
        float(measured[name] or "nan") for name in ("speedup_low", "speedup_high")
    )  # none of a single block
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
        f"batch {size:2}  {policy[:44]:44} predicted {value:.3f}  measured {speedup:.3f} ({low:.3f}-{high:.3f}) "
        f" error {row['error']:+.1%}",
        flush=True,
    )
    return row


def live(trace: Trace, sizes: Sequence[int], seconds: float) -> list[dict[str, Any]]:
    """Predictions of what then runs here."""
    options = BenchOptions(policies=("off", "smart"), batch_sizes=sizes, limit=40, max_tokens=96)
    llm = load(options)
    prompts = encode(llm, {task: load_task(task, options.limit) for task in options.tasks}, options)
    arm, plain = llm.sharing_weights({"policy": "eagle2"}), llm.sharing_weights(False)
    started = time.perf_counter()
    config = llm.engine.config
    drafter = level_drafter(arm.speculation.drafter)
    cost = CostModel.fit(profile(llm.target, drafter, config.pages, 32, 15.0), ROUND_OVERHEAD)
    others = [
        p
        for task in options.tasks
        for p in encode(llm, {task: load_task(task, 48)[40:]}, options)[task]
    ][:8]
    host = measure_host(plain.engine, arm.engine, others)
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
        engines = {
            name: llm.sharing_weights(
                {"policy": policy, **given} if name != "off" else False
            ).engine
            for name, (policy, given) in POLICIES.items()
        }
        found = measure(engines, prompts, size, time.perf_counter() + seconds)
        print(f"batch {size}: the baseline against itself gives {noise(found.again)['noise']:.3f}")
        for name in list(POLICIES)[1:]:
            pairs = [(cycle[name], cycle["off"]) for cycle in found.cycles]
            figures = next(figures for figures in summarise(pairs) if figures["task"] == POOLED)
            rows.append(row_of(name, size, rates[name, size] / rates["off", size], figures))
    return rows


if __name__ == "__main__":
    main()
