"""What is left of the gap to oracle, and what each ingredient of `smart` gives: by replay, nothing
runs live.

    python -m smart_lab bench --record answers.smart --limit 40 --max-tokens 96
    python benchmarks/replayed.py answers.smart [--profile FRESH.json] [--stale OLD.json] [--plots
        FOLDER] [--json FILE]

FRESH is the truth about costs (default: the recording's own profile); OLD is what a policy believes
that starts from a profile of another day. Both are files as `smart profile` caches them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smart_decoding.bench.plots import drawn
from smart_decoding.core.cost import CostModel
from smart_lab.figures import ablations, oracle
from smart_lab.questions import SHORT, Bench, ablation, gap, paper
from smart_lab.replay import HostCosts
from smart_lab.sweep import Sweep
from smart_lab.trace import Trace, read_trace


def table(results: Mapping[int, Mapping[str, Any]]) -> str:
    names = [
        name for name, value in next(iter(results.values())).items() if isinstance(value, float)
    ]
    lines = [f"{'':44}" + "".join(f"{size:>8}" for size in results)]
    lines += [
        f"{name:44}" + "".join(f"{row[name]:8.3f}" for row in results.values()) for name in names
    ]
    return "\n".join(lines)


def pictures(gaps: Mapping[int, Any], parts: Mapping[int, Any], folder: Path) -> None:
    replayed = {str(size): {"gap": gaps[size], "ablations": parts[size]} for size in gaps}
    for figure in (oracle(replayed), ablations(replayed)):
        drawn(figure).savefig(folder / f"{figure.key}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("trace", type=Path)
    parser.add_argument("--profile", type=Path)
    parser.add_argument("--stale", type=Path)
    parser.add_argument("--batch-sizes", default="1,2,4,8,16,32")
    parser.add_argument("--answers", type=int, help="use the first so many only")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plots", type=Path)
    args = parser.parse_args()
    trace = read_trace(args.trace)
    if args.answers:
        trace = Trace(
            trace.recording.take(range(args.answers)),
            trace.about,
            trace.eos_token_ids,
            trace.cost,
            trace.host,
            trace.prior,
        )
    cost = CostModel.from_dict(json.loads(args.profile.read_text())) if args.profile else trace.cost
    stale = CostModel.from_dict(json.loads(args.stale.read_text())) if args.stale else trace.cost
    assert cost is not None and stale is not None, "the recording has no profile: give --profile"
    host = trace.host or HostCosts.of(cost)
    sweep = Sweep(trace.recording, SHORT, trace.eos_token_ids)
    results: dict[str, dict[int, Any]] = {"gap": {}, "ablations": {}, "paper": {}}
    for size in (int(word) for word in args.batch_sizes.split(",")):
        bench, started = Bench(trace, cost, host, size), time.perf_counter()
        results["gap"][size] = gap(bench, stale, sweep)
        results["ablations"][size] = ablation(bench, stale)
        results["paper"][size] = paper(bench)
        print(f"batch {size}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
        if args.json is not None:
            args.json.write_text(
                json.dumps({"host": str(host), "cost": cost.to_dict(), **results}, indent=1)
            )
    print(f"{len(trace.recording.answers)} answers, {trace.recording.positions} positions; {host}")
    print(f"\nspeedup over plain decoding, by batch size\n{table(results['gap'])}")
    for size, row in results["gap"].items():
        print(f"  batch {size}: {row['best fixed is']} is the best of {len(SHORT)} fixed settings")
    print(f"\none ingredient exchanged\n{table(results['ablations'])}")
    print("\nsmart_paper: best, published defaults' neighbour, worst of 60 settings")
    for size, rows in results["paper"].items():
        near = next(
            r
            for r in rows
            if (r["alpha"], r["family"], r["l_tree"]) == (0.8, "published", "published")
        )
        print(f"  batch {size}: {rows[0]}  {near['speedup']:.3f}  {rows[-1]['speedup']:.3f}")
    if args.plots is not None:
        pictures(results["gap"], results["ablations"], args.plots)


if __name__ == "__main__":
    main()
