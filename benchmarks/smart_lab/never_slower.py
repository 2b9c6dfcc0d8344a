"""Never slower, by simulation: `smart` against plain decoding in worlds drawn at random.

    python -m smart_lab never-slower answers.smart --worlds 200

A world is a machine's costs, what `smart` believes of them, how good the head is, the batch (a
queue that is refilled, or a closed batch whose answers end one by one), the answers' lengths, and
neighbours that come and go. `smart` starts afresh in each. Of prompts the head's reading counts
alone, as both policies read them with the target.

A round's plain equivalent is what plain decoding takes for its tokens on the same machine at the
same moment. Printed are, over worlds, the ratio of plain equivalents to seconds, the same of the
worst 64 rounds in a row, and what the slowest request pays.

Needed by docs/results.md, "Where it loses".
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from smart_decoding.bench.options import check_outputs
from smart_decoding.bench.provenance import write_json
from smart_decoding.cli.arguments import whole_numbers, words
from smart_decoding.core.batch import Round
from smart_lab.ablate import contestant
from smart_lab.ablations import askew
from smart_lab.machines import costs_of
from smart_lab.replay import Walk, draft, judged
from smart_lab.trace import Trace, read_trace
from smart_lab.unsteady import Turns, noisy
from smart_lab.worlds import NOBODYS, SLOWER

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.tree import FloatArray, IntArray
    from smart_lab.recording import Recording

WINDOW = 64  # rounds
QUEUE, ROUNDS = 4, 256  # batches at least; rounds of plain decoding at least, nearly


@dataclass(frozen=True, slots=True)
class World:
    """closed: whether answers that end make room for no others. wrong: factors of what the profile
    says rows and levels cost. damage: share of the drafted tokens that are spoiled. longest: tokens
    of an answer. neighbour: tokens between its comings and goings; 0: there is none."""

    seed: int
    machine: str
    size: int
    closed: bool
    wrong: tuple[float, float]
    damage: float
    longest: int
    neighbour: float

    @classmethod
    def drawn(cls, seed: int, machines: Sequence[str], sizes: Sequence[int]) -> World:
        rng = np.random.default_rng(seed)
        factors = np.exp(rng.uniform(-1, 1, 2) * np.log(1.5)) if rng.random() < 0.5 else np.ones(2)
        return cls(
            seed,
            str(rng.choice(machines)),
            int(rng.choice(sizes)),
            bool(rng.random() < 0.5),
            (float(factors[0]), float(factors[1])),
            float(rng.random()) if rng.random() < 0.5 else 0.0,
            int(rng.choice([16, 32, 64, 96])),
            float(rng.uniform(200, 3000)) if rng.random() < 0.5 else 0.0,
        )

    def recording(self, recorded: Recording) -> Recording:
        """Return the answers to decode, their trees spoiled."""
        rng = np.random.default_rng([self.seed, 1])
        usable = [answer for answer in recorded.answers if answer.positions > 0]
        count = self.size * max(QUEUE, ROUNDS // self.longest)
        chosen = rng.choice(len(usable), count, replace=count > len(usable))
        answers = [
            replace(answer, tokens=answer.tokens[: self.longest], limit=self.longest)
            for answer in (usable[i] for i in chosen)
        ]
        token = recorded.token.copy()
        token[rng.random(len(token)) < self.damage] = NOBODYS
        return replace(recorded, answers=answers, token=token)


class ClosedWalk(Walk):
    """Batch after batch: answers that end make room for no others before all have ended."""

    def advance(self, emitted: IntArray, drafted: bool) -> None:
        self.at = self.at + emitted
        self.pending = emitted.copy() if drafted else self.pending + emitted
        stays = self.left > 0
        self.answer, self.at, self.pending = (
            each[stays] for each in (self.answer, self.at, self.pending)
        )
        if not len(self.at):
            self.begin()


def measured(
    trace: Trace, costs: Mapping[str, CostModel], name: str, world: World
) -> dict[str, Any]:
    """Return one world's figures under a policy."""
    cost = costs[world.machine]
    recording = world.recording(trace.recording)
    policy = contestant(name, trace, askew(cost, *world.wrong))
    walk = (ClosedWalk if world.closed else Walk)(recording, world.size)
    neighbour = Turns(2, world.neighbour or np.inf, np.random.default_rng([world.seed, 2]))
    noise = np.random.default_rng([world.seed, 3])
    seconds: list[float] = []
    plains: list[float] = []
    equivalents: list[float] = []
    paid = np.zeros(len(recording.answers))  # seconds of an answer's rounds
    plainly = np.zeros(len(recording.answers))  # of plain rounds for its tokens
    while walk.running:
        answer = walk.answer.copy()
        done = draft(policy, walk)
        size = done.batch.size
        context = done.batch.mean_context
        rows = size + len(done.kept)
        slowness = (1.0, SLOWER)[neighbour.now]
        levels = [slowness * each for each in cost.levels_seconds(size, done.widths, context)]
        verify = slowness * float(cost.verify_seconds(size, rows, context))
        plain = slowness * float(cost.verify_seconds(size, size, context))
        beyond = cost.overhead_seconds if done.rule is not None else 0.0
        truth, emitted = judged(done, walk)
        took = verify + sum(levels) + beyond  # without noise, of which the policy alone knows
        verify = noisy(verify, noise)
        levels = [noisy(each, noise) for each in levels]
        policy.observe(
            Round(
                done.batch, done.rule, done.trees, done.kept, *truth, done.widths, levels, rows,
                verify, beyond,
            )
        )  # fmt: skip
        walk.advance(emitted, done.rule is not None)
        tokens = int(emitted.sum())
        neighbour.advance(tokens)
        seconds.append(took)
        plains.append(plain)
        equivalents.append(plain * tokens / size)
        paid[answer] += took
        plainly[answer] += plain * emitted
    slow = paid[paid > 0] / plainly[paid > 0]
    lost = np.cumsum(np.array(seconds) - equivalents) / np.mean(plains)
    return {
        **asdict(world),
        "ratio": sum(equivalents) / sum(seconds),
        "drawdown": float((lost - np.minimum.accumulate(np.append(0.0, lost))[:-1]).max()),
        "late": sum(equivalents[WINDOW:]) / max(sum(seconds[WINDOW:]), 1e-9),
        "window": _worst_window(np.array(equivalents), np.array(seconds)),
        "slowest": float(slow.max()),
        "rounds": len(seconds),
    }


def _worst_window(equivalents: FloatArray, seconds: FloatArray) -> float:
    """Return the least ratio of WINDOW rounds in a row; of all rounds where they are fewer."""
    count = min(WINDOW, len(seconds))
    sums = [np.convolve(each, np.ones(count), "valid") for each in (equivalents, seconds)]
    return float((sums[0] / sums[1]).min())


def report(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a table: a line for each batch size, and one for all."""
    lines = [
        f"{'batch':>6}{'worlds':>8}{'mean':>8}{'worst':>8}{'5 %':>8}{'below 0.99':>12}"
        f"{'window 5 %':>12}{'worst':>8}{'slowest request: 95 %':>24}{'worst':>8}"
    ]
    for size in (*sorted({row["size"] for row in found}), None):
        rows = [row for row in found if size in (None, row["size"])]
        ratio, window, slowest = (
            np.array([row[key] for row in rows]) for key in ("ratio", "window", "slowest")
        )
        mean = np.exp(np.log(ratio).mean())
        lines.append(
            f"{size or 'all':>6}{len(rows):>8}{mean:>8.3f}{ratio.min():>8.3f}"
            f"{np.quantile(ratio, 0.05):>8.3f}{(ratio < 0.99).mean():>12.2f}"
            f"{np.quantile(window, 0.05):>12.3f}{window.min():>8.3f}"
            f"{np.quantile(slowest, 0.95):>24.2f}{slowest.max():>8.2f}"
        )
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recording, the worlds, and who decodes."""
    add = parser.add_argument
    add("trace", type=Path, help="a recording by `bench --record`")
    add("names", nargs="*", default=["smart"], metavar="NAME", help="policies or variants")
    machines = "of benchmarks/results, `recorded`, or cards (default: all measured ones and l40s)"
    add("--machines", type=words, default=(), metavar="A,B", help=machines)
    add("--batch-sizes", type=whole_numbers, default=(1, 2, 4, 8, 16, 32), metavar="1,4")
    add("--worlds", type=int, default=200, metavar="N")
    add("--seed", type=int, default=0)
    add("--processes", type=int, default=2)
    add("--json", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """Print a table for each policy. Raises ConfigError for unknown names and unusable files."""
    check_outputs((args.json,))
    trace = read_trace(args.trace)
    costs = costs_of(args.machines, trace.cost)
    worlds = [
        World.drawn(seed, list(costs), args.batch_sizes)
        for seed in range(args.seed, args.seed + args.worlds)
    ]
    results = {}
    for name in args.names:
        contestant(name, trace, next(iter(costs.values())))
        with ProcessPoolExecutor(
            args.processes, initializer=_begin, initargs=(trace, costs)
        ) as pool:
            each = pool.map(_measured, [name] * len(worlds), worlds)
            results[name] = list(tqdm(each, total=len(worlds), desc=name, leave=False))
        print(f"{name}\n{report(results[name])}")
    if args.json is not None:
        write_json(args.json, results)
    return 0


_known: tuple[Trace, Mapping[str, CostModel]]  # of a worker process


def _begin(trace: Trace, costs: Mapping[str, CostModel]) -> None:
    global _known
    _known = trace, costs


def _measured(name: str, world: World) -> dict[str, Any]:
    return measured(*_known, name, world)
