"""Does a replay predict this machine's speedups?

    smart bench --record others.smart --skip 40 --limit 20 --max-tokens 96
    python benchmarks/predict.py others.smart [--seconds 30] [--batch-sizes 1,2,4,8,16,32] [--json FILE]

First the costs are measured anew (forwards as by `smart profile`, and rounds beyond their forwards), then every policy
is replayed on the recording; its own seconds are timed as it decides, with caches emptied as forwards empty them. Only
then the same policies run live, in turn, on the first 40 prompts of each task, none of which is in the recording.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from smart_decoding.bench.data import load_task
from smart_decoding.bench.options import BenchOptions
from smart_decoding.bench.recorder import measure_host
from smart_decoding.bench.replay import replay
from smart_decoding.bench.runner import encode, load, measure
from smart_decoding.bench.simulate import enough
from smart_decoding.bench.summary import POOLED, noise, summarise
from smart_decoding.bench.trace import read_trace
from smart_decoding.core.cost import CostModel
from smart_decoding.profiling.measure import measure as profile
from smart_decoding.speculation import ROUND_OVERHEAD

POLICIES = {
    "off": ("off", {}),
    "smart": ("smart", {}),
    "smart_paper": ("smart_paper", {}),
    "5 nodes": ("likelihood", {"depth": 2, "top_k": 3, "total_tokens": 6}),
}
LEVEL_BYTES, FORWARD_BYTES = 16 << 20, 256 << 20  # what a drafted level and a verification read, about


class Cold:
    """A policy that finds the caches as they are behind a forward; a clock that stands still meanwhile."""

    def __init__(self, policy: Any) -> None:
        self._policy, self.name, self._idle = policy, policy.name, 0.0
        self._memory = np.ones(FORWARD_BYTES // 8)

    def __getattr__(self, call: str) -> Any:
        size = {"frontier": LEVEL_BYTES, "select": LEVEL_BYTES, "observe": FORWARD_BYTES}.get(call, 0)

        def called(*arguments: Any) -> Any:
            started = time.perf_counter()
            self._memory[: size // 8].sum()
            self._idle += time.perf_counter() - started
            return getattr(self._policy, call)(*arguments)

        if call == "foresee":
            raise AttributeError(call)
        return called

    def clock(self) -> float:
        return time.perf_counter() - self._idle


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("--seconds", type=float, default=30.0, help="of live measurement per batch size")
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    sizes = [int(word) for word in args.batch_sizes.split(",")]
    trace = read_trace(args.trace)
    options = BenchOptions(policies=("off", "smart"), batch_sizes=sizes, limit=40, max_tokens=96)
    llm = load(options)
    prompts = encode(llm, {task: load_task(task, options.limit) for task in options.tasks}, options)
    arm, plain = llm.sharing_weights({"policy": "likelihood"}), llm.sharing_weights(False)
    started = time.perf_counter()
    config = llm.engine.config
    cost = CostModel.fit(profile(llm.target, arm.speculation.model, config.pages, 32, 15.0), ROUND_OVERHEAD)
    others = [p for task in options.tasks for p in encode(llm, {task: load_task(task, 48)[40:]}, options)[task]][:8]
    host = measure_host(plain.engine, arm.engine, others)
    print(f"costs measured in {time.perf_counter() - started:.0f} s; {host}")

    predicted: dict[tuple[str, int], float] = {}
    started, rounds = time.perf_counter(), 0
    for size in sizes:
        recording = enough(trace.recording, size)
        rates = {}
        for name, (policy, given) in POLICIES.items():
            made = Cold(trace.policy(policy, cost, **given))
            most = max(60, 250 // size) if name != "off" else 30
            own = replay(made, recording, cost, size, host, made.clock, rounds=most)
            found = replay(trace.policy(policy, cost, **given), recording, cost, size, host)
            found.seconds += found.rounds * own.own_seconds / own.rounds
            rates[name], rounds = found.tokens_per_s, rounds + found.rounds
            print(f"batch {size:2}  {name:12} own {1e3 * own.own_seconds / own.rounds:.3f} ms a round", flush=True)
        predicted |= {(name, size): rate / rates["off"] for name, rate in rates.items()}
    print(f"{rounds} rounds replayed in {time.perf_counter() - started:.0f} s", flush=True)

    rows = []
    for size in sizes:
        engines = {
            name: llm.sharing_weights({"policy": policy, **given} if name != "off" else False).engine
            for name, (policy, given) in POLICIES.items()
        }
        found = measure(engines, prompts, size, time.perf_counter() + args.seconds)
        itself = noise(found.again)["noise"]
        for name in list(POLICIES)[1:]:
            pairs = [(cycle[name], cycle["off"]) for cycle in found.cycles]
            live = next(figures for figures in summarise(pairs) if figures["task"] == POOLED)
            error = predicted[name, size] / live["speedup"] - 1
            rows.append({"policy": name, "batch_size": size, "predicted": predicted[name, size], "error": error,
                         "measured": live["speedup"], "low": live["speedup_low"], "high": live["speedup_high"],
                         "noise": itself, "blocks": live["blocks"]})  # fmt: skip
            print(f"batch {size:2}  {name:12} predicted {predicted[name, size]:.3f}  measured {live['speedup']:.3f} "
                  f"({live['speedup_low']:.3f}-{live['speedup_high']:.3f})  error {error:+.1%}  "
                  f"[baseline against itself {itself:.3f}, {live['blocks']} blocks]", flush=True)  # fmt: skip
    worst = max(rows, key=lambda row: abs(row["error"]))
    print(f"largest error: {worst['error']:+.1%} ({worst['policy']}, batch {worst['batch_size']})")
    if args.json is not None:
        args.json.write_text(json.dumps({"host": str(host), "cost": cost.to_dict(), "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
