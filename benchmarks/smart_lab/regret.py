"""Policies in the simulated world against full knowledge and against plain decoding: regret.

The drafter is good all the time, hopeless all the time, or turns bad and good again. With
`--against OLD.json` (an earlier run's `--json`) each line says how much the rate has changed.

    python -m smart_lab regret --policies smart,"no calibration","no exploration"

Needed by benchmarks/README.md and for changes of the core: tests/lab/test_regret.py.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from smart_decoding.bench.options import BASELINE
from smart_decoding.cli.arguments import whole_numbers, words
from smart_decoding.core.costs import CostModel
from smart_decoding.files import write_json
from smart_lab.ablate import contestant
from smart_lab.provenance import check_outputs
from smart_lab.recording import Recording
from smart_lab.simulation import Totals, World, best_rounds, run, total
from smart_lab.trace import Trace

# Shapes of measured machines: milliseconds of a forward by rows (2 CPU cores in bf16; per-row
# costs; cheap rows on a GPU).
CPU_1 = {1: 21.6, 2: 24.1, 4: 21.9, 8: 24.8, 16: 30.6, 32: 45.3, 64: 74.2}
CPU_4 = {4: 23.1, 8: 27.2, 16: 33.7, 32: 51.4, 64: 87.8, 128: 149.0, 256: 267.0}
DRAFT = {1: 1.2, 4: 1.4, 8: 1.7, 16: 2.3, 64: 5.0, 128: 9.0}
MACHINES = {
    "cpu, flat to 8 rows": CostModel.from_table({1: CPU_1, 4: CPU_4}, DRAFT),
    "linear rows": CostModel.from_table({1: {1: 10.0, 64: 220.0}}, DRAFT),
    "cheap rows": CostModel.from_table({1: {1: 30.0, 512: 40.0}}, DRAFT),
}
BAD = range(300, 700)
SCENARIOS: Mapping[str, Callable[[int], bool]] = {
    "good": lambda _: True,
    "hopeless": lambda _: False,
    "bad for a while": lambda index: index not in BAD,
}
WORSE = 0.01  # of the rate: larger losses are marked
NOTHING = Trace(Recording.of(()), {})  # recorded: what policies start from


@dataclass(frozen=True, slots=True)
class Trial:
    """One world, whose drafter may turn bad."""

    machine: str
    batch_size: int
    seed: int
    rounds: int
    policies: tuple[str, ...]


def simulated(cell: Trial) -> list[dict[str, Any]]:
    """Return each policy's rate over full knowledge's and over plain decoding's, in each
    scenario."""
    costs = MACHINES[cell.machine]
    span = range(cell.rounds)
    known = best_rounds(World(cell.seed, cell.batch_size, costs), span)
    rows = []
    for scenario, good in SCENARIOS.items():
        world = World(cell.seed, cell.batch_size, costs, good)
        plain = run(contestant(BASELINE, NOTHING, costs), world, span)
        each = Totals(plain.tokens / len(span), plain.seconds / len(span), 0, 1)
        best = total(known[index] if good(index) else each for index in span)
        for policy in cell.policies:
            found = run(contestant(policy, NOTHING, costs), world, span)
            rows.append(
                {
                    "machine": cell.machine,
                    "batch_size": cell.batch_size,
                    "scenario": scenario,
                    "policy": policy,
                    "seed": cell.seed,
                    "over_best": found.rate / best.rate,
                    "over_plain": found.rate / plain.rate,
                    "off_share": found.off / len(span),
                    "nodes": found.nodes / len(span),
                }
            )
    return rows


def means(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[Any, ...], dict[str, float]]:
    """(machine, batch size, scenario, policy) -> the figures' means over seeds."""
    keys = ("machine", "batch_size", "scenario", "policy")
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    figures = ("over_best", "over_plain", "off_share", "nodes")
    return {
        group: {name: float(np.mean([row[name] for row in of_group])) for name in figures}
        for group, of_group in groups.items()
    }


def table(found: Mapping[tuple[Any, ...], Mapping[str, float]], before: Any = None) -> str:
    """Return a line for each world and policy."""
    changed = "   change" if before else ""
    lines = [
        f"{'machine':20} {'batch':>5}  {'drafter':16}{'policy':>33}"
        f"{'over plain':>12}{'over full knowledge':>21}{'nodes':>8}{'off':>6}{changed}"
    ]
    for group, row in found.items():
        machine, batch, scenario, policy = group
        line = f"{machine:20} {batch:5}  {scenario:16}{policy:>33}{row['over_plain']:12.3f}"
        line += f"{row['over_best']:21.3f}{row['nodes']:8.1f}{row['off_share']:6.0%}"
        if before and group in before:
            change = row["over_plain"] / before[group]["over_plain"] - 1
            line += f"{change:+9.1%}{'  WORSE' if change < -WORSE else ''}"
        lines.append(line)
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the simulation."""
    add = parser.add_argument
    add("--rounds", type=int, default=1200)
    add("--seeds", type=int, default=1, help="worlds whose mean is printed")
    add("--batch-sizes", type=whole_numbers, default=(1, 4, 16), metavar="1,4")
    named = "policies, or variants of `smart` as `ablate` knows them"
    add("--policies", type=words, default=("smart",), metavar="A,B", help=named)
    add("--against", type=Path, metavar="OLD.json", help="an earlier run, to compare with")
    add("--processes", type=int, default=2)
    add("--json", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """Print a table; 1 if anything is worse than before by more than a hundredth."""
    check_outputs((args.json,))
    before = means(json.loads(args.against.read_text())["regret"]) if args.against else None
    cells = [
        Trial(machine, size, seed, args.rounds, tuple(args.policies))
        for machine in MACHINES
        for size in args.batch_sizes
        for seed in range(1, args.seeds + 1)
    ]
    with ProcessPoolExecutor(args.processes) as pool:
        done = tqdm(pool.map(simulated, cells), total=len(cells), desc="simulating", leave=False)
        rows = [row for of_cell in done for row in of_cell]
    text = table(means(rows), before)
    print(text)
    if args.json is not None:
        write_json(args.json, {"regret": rows})
    return int("WORSE" in text)
