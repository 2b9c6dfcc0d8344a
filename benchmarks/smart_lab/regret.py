"""Policies in the simulated world against full knowledge: regret."""

from __future__ import annotations

import argparse
import json

from smart_decoding.core.cost import CostModel
from smart_decoding.core.policies import make_policy
from smart_lab.simulation import World, full_knowledge, run

# Shapes of measured machines: seconds of a forward by rows (2 CPU cores in bf16; per-row costs;
# cheap rows on a GPU).
CPU_1 = {1: 21.6, 2: 24.1, 4: 21.9, 8: 24.8, 16: 30.6, 32: 45.3, 64: 74.2}
CPU_4 = {4: 23.1, 8: 27.2, 16: 33.7, 32: 51.4, 64: 87.8, 128: 149.0, 256: 267.0}
DRAFT = {1: 1.2, 4: 1.4, 8: 1.7, 16: 2.3, 64: 5.0, 128: 9.0}
MACHINES = {
    "cpu, flat to 8 rows": CostModel.from_table({1: CPU_1, 4: CPU_4}, DRAFT),
    "linear rows": CostModel.from_table({1: {1: 10.0, 64: 220.0}}, DRAFT),
    "cheap rows": CostModel.from_table({1: {1: 30.0, 512: 40.0}}, DRAFT),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long to simulate."""
    parser.add_argument("rounds", type=int, nargs="?", default=400)


def main(args: argparse.Namespace) -> int:
    """Prints a table, then one line of JSON."""
    figures = []
    head = f"{'machine':22}{'batch':>6}{'policy':>14}{'speedup':>9}"
    print(f"{head}{'regret':>8}{'nodes/round':>13}{'off':>6}")
    for machine, costs in MACHINES.items():
        for batch in (1, 4, 16):
            world = World(1, batch, costs)
            span = range(args.rounds // batch)
            best = full_knowledge(world, span)
            plain = run(make_policy("off"), world, span)
            rows = {"full knowledge": best}
            for name in ("smart", "paper", "eagle2", "chain"):
                rows[name] = run(make_policy(name, {"cost": costs}), world, span)
            for name, totals in rows.items():
                regret = 1 - totals.rate / best.rate
                figures.append(
                    {"machine": machine, "batch": batch, "policy": name, "regret": regret}
                )
                print(
                    f"{machine:22}{batch:6}{name:>15}{totals.rate / plain.rate:8.3f}{regret:8.1%}"
                    f"{totals.nodes / len(span):13.1f}{totals.off / len(span):6.0%}"
                )
    print(json.dumps({"regret": figures}))
    return 0
