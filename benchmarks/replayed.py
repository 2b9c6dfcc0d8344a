"""What is left of the gap to hindsight, and what each ingredient of `smart` gives: by replay, nothing runs live.

    smart bench --record answers.smart --limit 40 --max-tokens 96
    python benchmarks/replayed.py answers.smart [--profile FRESH.json] [--stale OLD.json] [--plots FOLDER] [--json FILE]

FRESH is the truth about costs (default: the recording's own profile); OLD is what a policy believes that starts from a
profile of another day. Both are files as `smart profile` caches them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from smart_decoding.bench.ablations import ABLATIONS, Foreseeing, FrozenCosts, fitted, flat, smart
from smart_decoding.bench.figures import NEUTRAL, Figure, Panel, Point, Series
from smart_decoding.bench.hindsight import hindsight
from smart_decoding.bench.plots import drawn
from smart_decoding.bench.recording import Answer, Recording
from smart_decoding.bench.replay import HostCosts, Replayed, replay
from smart_decoding.bench.simulate import EAGLE_2, enough, name_of
from smart_decoding.bench.sweep import Sweep
from smart_decoding.bench.trace import Trace, read_trace
from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies.protocol import Policy

SHORT = [
    {"depth": depth, "top_k": top_k, "total_tokens": nodes + 1}
    for depth in range(5)
    for top_k in (1, 2, 3, 4, 6, 10)
    for nodes in (1, 2, 3, 4, 5, 6, 8, 12, 16)
    if depth + 1 <= nodes <= top_k + depth * top_k * top_k
]
BUDGETS, ALPHAS = (2, 4, 8, 16, 32), (1.0, 0.8, 0.5)  # nodes per request
LONG = 1500  # tokens of context
FORESEEN = 1000  # rounds of requests: trying all levels beforehand is slow


class Bench:
    """One recording at one batch size."""

    def __init__(self, trace: Trace, cost: CostModel, host: HostCosts, size: int) -> None:
        self.trace, self.cost, self.host, self.size = trace, cost, host, size
        self.recording = enough(trace.recording, size)
        self.plain = self.run(trace.policy("off")).tokens_per_s

    def run(self, policy: Policy, recording: Recording | None = None, rounds: int | None = None) -> Replayed:
        return replay(policy, recording or self.recording, self.cost, self.size, self.host, rounds=rounds)

    def speedup(self, policy: Policy, recording: Recording | None = None) -> float:
        if recording is None:
            return self.run(policy).tokens_per_s / self.plain
        plain = self.run(self.trace.policy("off"), recording).tokens_per_s
        return self.run(policy, recording).tokens_per_s / plain


def gap(bench: Bench, stale: CostModel, sweep: Sweep) -> dict[str, Any]:
    """Question 2 at one batch size: policies, steps of knowledge, hindsight, all over plain decoding."""
    trace, cost = bench.trace, bench.cost
    ranked = sweep.repeated(bench.recording).rank(cost, bench.size, bench.host)
    best = hindsight(bench.recording, cost, bench.size, bench.host)
    rounds = max(100, FORESEEN // bench.size)
    extra = bench.host.seconds(bench.size, True) - bench.host.seconds(bench.size, False)
    known = replace(cost, overhead_seconds=extra)  # what the others learn
    knowing = [smart(trace, known, fitted(trace.recording)) for _ in range(3)]  # each policy gets its own
    fits = bench.speedup(knowing[0])
    few, foreseen = (bench.run(policy, rounds=rounds).tokens_per_s for policy in (knowing[1], Foreseeing(knowing[2])))
    return {
        "likelihood, EAGLE-2's size": bench.speedup(trace.policy("likelihood", **EAGLE_2)),
        "best fixed": ranked[0][1].tokens_per_s / bench.plain,
        "best fixed is": name_of(ranked[0][0]),
        "smart_paper": bench.speedup(trace.policy("smart_paper", cost)),
        "smart from another day's profile": bench.speedup(smart(trace, stale)),
        "smart": bench.speedup(smart(trace, cost)),
        "+ calibration fitted to these answers": fits,
        "+ deeper levels foreseen": fits * foreseen / few,
        "hindsight, a plan": best.reached / bench.plain,
        "hindsight, bound": best.bound / bench.plain,
    }


def ablation(bench: Bench, stale: CostModel) -> dict[str, Any]:
    """Question 3 at one batch size."""
    trace, cost = bench.trace, bench.cost
    rows = {name: bench.speedup(make(trace, cost)) for name, make in ABLATIONS.items()}
    rows["another day's profile, corrected"] = bench.speedup(smart(trace, stale))
    rows["another day's profile, no correction"] = bench.speedup(FrozenCosts(smart(trace, stale)))
    long = at_context(bench.recording, LONG)
    rows[f"at {LONG} tokens of context"] = bench.speedup(smart(trace, cost), long)
    rows[f"at {LONG} tokens, no context in the cost"] = bench.speedup(FrozenCosts(smart(trace, flat(cost))), long)
    return rows


def paper(bench: Bench) -> list[dict[str, Any]]:
    """The published rule over alpha, budget, cost family and length, the fastest first."""
    rounds = max(40, 500 // bench.size)
    plain = bench.run(bench.trace.policy("off"), rounds=rounds).tokens_per_s
    rows = []
    for family in ("published", "offset"):
        for l_tree in ("published", "node_sum"):
            for alpha in ALPHAS:
                for each in BUDGETS:
                    given = {"alpha": alpha, "budget": each * bench.size, "family": family, "l_tree": l_tree}
                    found = bench.run(bench.trace.policy("smart_paper", bench.cost, **given), rounds=rounds)
                    rows.append({**given, "speedup": found.tokens_per_s / plain})
    return sorted(rows, key=lambda row: -row["speedup"])


def at_context(recording: Recording, context: int) -> Recording:
    """The same answers behind longer prompts. Acceptance stays what it was."""
    answers = [Answer(context, a.limit, a.tokens, a.first, a.task) for a in recording.answers]
    return Recording(answers, recording.token, recording.prob, recording.count, recording.child)


def table(results: Mapping[int, Mapping[str, Any]]) -> str:
    names = [name for name, value in next(iter(results.values())).items() if isinstance(value, float)]
    lines = [f"{'':44}" + "".join(f"{size:>8}" for size in results)]
    lines += [f"{name:44}" + "".join(f"{row[name]:8.3f}" for row in results.values()) for name in names]
    return "\n".join(lines)


def pictures(gaps: Mapping[int, Mapping[str, Any]], ablations: Mapping[int, Mapping[str, Any]], folder: Path) -> None:
    sizes = [float(size) for size in gaps]
    level = (1.0, "1×, plain decoding")

    def lines(results: Mapping[int, Mapping[str, Any]], names: list[str]) -> list[Series]:
        return [
            Series(name, NEUTRAL if "hindsight" in name else i, [Point(s, row[name]) for s, row in results.items()])
            for i, name in enumerate(names)
        ]

    shown = ["smart", "best fixed", "smart_paper", "likelihood, EAGLE-2's size", "hindsight, a plan"]
    steps = ["smart", "+ calibration fitted to these answers", "+ deeper levels foreseen", "hindsight, a plan"]
    parts = [
        "smart",
        "no calibration",
        "even budget",
        "greedy rule",
        "stop rule: look back",
        "stop rule: always 8 levels",
    ]
    for key, title, results, names in (
        ("gap", "Policies and hindsight, by replay", gaps, shown),
        ("knowledge", "What knowledge would bring, by replay", gaps, steps),
        ("ablations", "smart with one ingredient exchanged, by replay", ablations, parts),
    ):
        panel = Panel("", "batch size", "speedup", lines(results, names), sizes, True, level=level)
        drawn(Figure(key, title, "", [panel])).savefig(folder / f"replay-{key}.png", dpi=110)


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
        trace = Trace(trace.recording.take(range(args.answers)), trace.about, trace.eos_token_ids, trace.cost,
                      trace.host, trace.prior)  # fmt: skip
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
            args.json.write_text(json.dumps({"host": str(host), "cost": cost.to_dict(), **results}, indent=1))
    print(f"{len(trace.recording.answers)} answers, {trace.recording.positions} positions; {host}")
    print(f"\nspeedup over plain decoding, by batch size\n{table(results['gap'])}")
    for size, row in results["gap"].items():
        print(f"  batch {size}: {row['best fixed is']} is the best of {len(SHORT)} fixed settings")
    print(f"\none ingredient exchanged\n{table(results['ablations'])}")
    print("\nsmart_paper: best, published defaults' neighbour, worst of 60 settings")
    for size, rows in results["paper"].items():
        near = next(r for r in rows if (r["alpha"], r["family"], r["l_tree"]) == (0.8, "published", "published"))
        print(f"  batch {size}: {rows[0]}  {near['speedup']:.3f}  {rows[-1]['speedup']:.3f}")
    if args.plots is not None:
        pictures(results["gap"], results["ablations"], args.plots)


if __name__ == "__main__":
    main()
