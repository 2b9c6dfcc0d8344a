"""Gains of policies and variants of `smart` by replay, over several machines' costs and batch
sizes.

    python -m smart_lab ablate answers.smart
    python -m smart_lab ablate answers.smart smart "greedy rule" eagle2:depth=2,top_k=3

A gain is tokens per second over those of another policy (plain decoding by default) on the same
answers in the same order at the same costs. Nothing is timed. With several orders a cell is their
mean, with its standard error in thousandths. Below stand what variants of `smart` believed of their
rounds, and what single requests took.

A rival's name with " tuned" behind it stands for its best setting at each machine's costs and batch
size, found on these very answers: "eagle2 tuned" is the best of all fixed trees and chains.

Needed by docs/controller.md, "What each part gains".
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from smart_decoding.bench.options import BASELINE, parse_setting
from smart_decoding.cli.arguments import whole_numbers, words
from smart_decoding.errors import ConfigError
from smart_decoding.files import write_json
from smart_lab.ablations import ABLATIONS, VARIANTS, smart
from smart_lab.figures import beliefs, requests, slowdowns
from smart_lab.machines import RECORDED, costs_of
from smart_lab.provenance import check_outputs
from smart_lab.recording import interleaved
from smart_lab.replay import replay
from smart_lab.sweep import SHORT, Sweep
from smart_lab.trace import Trace, read_trace
from smart_lab.tuning import RIVALS
from smart_lab.worlds import AS_PROFILED, WORLDS

if TYPE_CHECKING:
    from smart_decoding.bench.options import Arm
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_lab.recording import Recording

QUEUE = 3  # answers of a replay, in batches, at least
ALL = "all machines"


@dataclass(frozen=True, slots=True)
class Cell:
    """One order of the answers on one machine at one batch size in one world, for all
    contestants."""

    machine: str
    batch_size: int
    order: int
    world: str = AS_PROFILED

    @property
    def place(self) -> str:
        """Machine and world."""
        return self.machine if self.world == AS_PROFILED else f"{self.machine}: {self.world}"


class Ablation:
    """A recording, machines and contestants."""

    def __init__(
        self, trace: Trace, costs: Mapping[str, CostModel], names: Sequence[str], answers: int
    ) -> None:
        """answers: replay no more than so many, or as many as the batch needs."""
        self.trace = trace
        self.costs = costs
        self.names = names
        self._answers = answers
        self._tuned: dict[tuple[str, str, int], Arm] = {}

    def replayed(self, cell: Cell) -> dict[str, dict[str, Any]]:
        """Contestant -> what its replay counted, and its tokens per second."""
        recording = ordered(self.trace.recording, cell.order, cell.batch_size, self._answers)
        cost = self.costs[cell.machine]
        world = WORLDS[cell.world](recording, cost, cell.batch_size, cell.order)
        host = self.trace.host if cell.machine == RECORDED else None
        found = {}
        for name in self.names:
            if name in RIVALS:
                arm = self._best(name, cell)
                policy = self.trace.policy(arm.policy, cost, **arm.options)
            else:
                policy = contestant(name, self.trace, world.assumed)
            machine = world.machine()
            result = replay(policy, world.recording, cost, cell.batch_size, host, costs=machine)
            found[name] = {**asdict(result), "tokens_per_s": result.tokens_per_s}
            if name in RIVALS:
                found[name]["setting"] = dict(arm.options)
        return found

    def _best(self, name: str, cell: Cell) -> Arm:
        """Return a rival's best setting, looked for once in each process."""
        key = name, cell.machine, cell.batch_size
        if key not in self._tuned:
            trace = replace(self.trace, cost=self.costs[cell.machine], host=None)
            self._tuned[key] = RIVALS[name](trace, self._sweep, cell.batch_size)
        return self._tuned[key]

    @cached_property
    def _sweep(self) -> Sweep:
        """The fixed trees that rivals are tuned over."""
        return Sweep(self.trace.recording, SHORT, self.trace.eos_token_ids)


def ordered(recording: Recording, order: int, batch_size: int, most: int) -> Recording:
    """Return the answers as recorded (order 0) or shuffled, used again where the queue would be
    short."""
    usable = [answer for answer in recording.answers if answer.positions > 0]
    count = max(min(most, len(usable)), QUEUE * batch_size)
    rng = np.random.default_rng(order)
    answers: list[Any] = []
    while len(answers) < count:
        turn = rng.permutation(len(usable)) if order else np.arange(len(usable))
        answers += [usable[i] for i in turn]
    return replace(recording, answers=answers[:count])


def contestant(name: str, trace: Trace, cost: CostModel) -> Policy:
    """Return a variant of `smart`, or a policy with options ('eagle2:depth=2,top_k=3'). Raises
    ConfigError for a name that is neither."""
    if name in ABLATIONS:
        return ABLATIONS[name](trace, cost)
    if name in VARIANTS:
        return VARIANTS[name](smart(trace, cost))
    arm = parse_setting(name)
    return trace.policy(arm.policy, cost, **arm.options)


def gains(
    found: Mapping[Cell, Mapping[str, Mapping[str, Any]]], name: str, base: str
) -> dict[tuple[str, int], list[float]]:
    """(machine and world, batch size) -> the gain over `base` in each order."""
    result: dict[tuple[str, int], list[float]] = {}
    for cell, rows in found.items():
        gain = rows[name]["tokens_per_s"] / rows[base]["tokens_per_s"]
        result.setdefault((cell.place, cell.batch_size), []).append(gain)
    return result


def table(
    found: Mapping[Cell, Mapping[str, Mapping[str, Any]]], names: Sequence[str], base: str
) -> str:
    """Return a block of lines for each machine and world, then their geometric mean; columns are
    batch sizes."""
    machines = list(dict.fromkeys(cell.place for cell in found))
    sizes = sorted({cell.batch_size for cell in found})
    wide = max(map(len, names)) + 4
    heads = "".join(f"{f'batch {size}':>14}" for size in sizes)
    lines = [f"tokens per second over {base}", f"{'':{wide}}{heads}{'mean':>14}"]
    of_name = {name: gains(found, name, base) for name in names}
    for machine in (*machines, ALL):
        lines.append(machine)
        for name in names:
            cells = list(_cells(of_name[name], machines if machine == ALL else [machine], sizes))
            cells.append(_mean(cells))
            lines.append(f"  {name:{wide - 2}}" + "".join(f"{_cell(c):>14}" for c in cells))
    return "\n".join(lines)


def believed(found: Mapping[Cell, Mapping[str, Mapping[str, Any]]], name: str, base: str) -> str:
    """Return what a contestant believed of its rounds, and what requests took over `base`."""
    cells = [(rows[name], rows[base]) for rows in found.values()]
    known = [(one["figures"], one["tokens_per_s"] / other["tokens_per_s"]) for one, other in cells]
    slower = [slowdowns(one["figures"], other["figures"]) for one, other in cells]
    return f"{name}\n{beliefs(known)}{requests(slower)}"


def _cells(
    values: Mapping[tuple[str, int], Sequence[float]], machines: Sequence[str], sizes: Sequence[int]
) -> Iterator[list[float]]:
    """Yield for each batch size the machines' geometric mean in each order."""
    for size in sizes:
        yield _mean([list(values[machine, size]) for machine in machines])


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    """Return the geometric mean over rows, order by order."""
    mean: list[float] = np.exp(np.log(np.array(rows)).mean(axis=0)).tolist()
    return mean


def _cell(orders: Sequence[float]) -> str:
    mean = float(np.mean(orders))
    if len(orders) < 2:
        return f"{mean:.3f}"
    error = float(np.std(orders, ddof=1)) / math.sqrt(len(orders))
    return f"{mean:.3f} ({1000 * error:.0f})"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recording, who is compared, and where."""
    add = parser.add_argument
    add("trace", type=Path, help="a recording by `bench --record`")
    known = ", ".join([*RIVALS, *ABLATIONS, *VARIANTS])
    named = f"policies, with options if any, tuned rivals, or variants: {known}"
    add("names", nargs="*", default=list(ABLATIONS), metavar="NAME", help=named)
    text = "another recording of the same model, whose answers run beside these by turns"
    add("--beside", type=Path, metavar="FILE", help=text)
    machines = "of benchmarks/results, `recorded`, or cards (default: all measured ones and l40s)"
    add("--machines", type=words, default=(), metavar="A,B", help=machines)
    add("--batch-sizes", type=whole_numbers, default=(1, 2, 4, 8, 16, 32), metavar="1,4")
    where = f"what machine and drafter do, or `all`: {', '.join(WORLDS)}"
    add("--worlds", type=words, default=(AS_PROFILED,), metavar="A,B", help=where)
    add("--orders", type=int, default=1, help="shuffles of the answers, for the spread")
    fewer = "answers replayed at most, where the batch does not need more"
    add("--answers", type=int, default=1000, help=fewer)
    add("--over", default=BASELINE, metavar="NAME", help="whose tokens per second are 1")
    add("--processes", type=int, default=2)
    add("--json", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """Print one table. Raises ConfigError for unknown names and unusable files."""
    check_outputs((args.json,))
    names = list(dict.fromkeys((args.over, *args.names)))
    trace = read_trace(args.trace)
    if args.beside is not None:
        other = read_trace(args.beside).recording
        trace = replace(trace, recording=interleaved(trace.recording, other))
    ablation = Ablation(trace, costs_of(args.machines, trace.cost), names, args.answers)
    for name in set(names) - set(RIVALS):
        contestant(name, ablation.trace, next(iter(ablation.costs.values())))
    worlds = tuple(WORLDS) if args.worlds == ("all",) else args.worlds
    unknown = [world for world in worlds if world not in WORLDS]
    if unknown:
        raise ConfigError(f"unknown world {unknown[0]!r}; known: {', '.join(WORLDS)}")
    cells = [
        Cell(machine, size, order, world)
        for world in worlds
        for machine in ablation.costs
        for size in args.batch_sizes
        for order in range(args.orders)
    ]
    found = run(ablation, cells, args.processes)
    others = [name for name in names if name != args.over]
    print(table(found, others, args.over))
    for name in others:
        print(believed(found, name, args.over))
    if args.json is not None:
        for row in (row for of_cell in found.values() for row in of_cell.values()):
            del row["figures"]["per_token"]
        rows = [{**asdict(cell), "replayed": of_cell} for cell, of_cell in found.items()]
        write_json(args.json, {"over": args.over, "cells": rows})
    return 0


def run(
    ablation: Ablation, cells: Sequence[Cell], processes: int
) -> dict[Cell, dict[str, dict[str, Any]]]:
    """Return all cells, each in one process."""
    with ProcessPoolExecutor(processes, initializer=_begin, initargs=(ablation,)) as pool:
        replayed = pool.map(_replayed, cells)
        results = list(tqdm(replayed, total=len(cells), desc="replaying", leave=False))
    return dict(zip(cells, results, strict=True))


_ablation: Ablation  # of a worker process


def _begin(ablation: Ablation) -> None:
    global _ablation
    _ablation = ablation


def _replayed(cell: Cell) -> dict[str, dict[str, Any]]:
    return _ablation.replayed(cell)
