"""Never slower, by simulation: `smart` against plain decoding in worlds drawn at random.

    python -m smart_lab never-slower answers.smart --worlds 200

A world is a machine's costs, what `smart` believes of them, how good the head is, the batch (a
queue that is refilled, or a closed batch whose answers end one by one), the kind of text, the
answers' lengths, whether prompts are read in rounds of their own or beside answers, and neighbours
that come and go. `smart` starts afresh in each, and plain decoding runs in the same world.

Printed are, over worlds, plain decoding's seconds over those of `smart`, the worst 64 rounds in a
row, what single requests pay in rounds without prompts, and what `smart` believed of its rounds. In
queues, and of 64 rounds, plain equivalents count: what plain decoding takes for a round's tokens on
the same machine at the same moment.

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

from smart_decoding.bench.options import BASELINE
from smart_decoding.cli.arguments import whole_numbers, words
from smart_decoding.core.batch import Round
from smart_decoding.files import write_json
from smart_lab.ablate import contestant
from smart_lab.ablations import BUMPS, MOST_WRONG, NOWHERE, askew, bent
from smart_lab.figures import MODEL, NGRAMS, OWN, SLOW, Figures, beliefs, requests, slowdowns
from smart_lab.machines import costs_of
from smart_lab.provenance import check_outputs
from smart_lab.replay import READ, Prompts, Walk, draft, judged
from smart_lab.trace import Trace, read_trace
from smart_lab.unsteady import Turns, noisy
from smart_lab.worlds import NOBODYS, SLOWER

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.tree import FloatArray
    from smart_lab.recording import Recording

WINDOW = 64  # rounds
QUEUE, ROUNDS = 4, 256  # batches at least; rounds of plain decoding at least, nearly
CHUNKS = (64, 256)  # tokens of prompts in a round: beside other clients' answers a quarter
SHARES = (0.6, 0.9)  # what rows of prompts cost, of the table's seconds
ALL = "all"
UNION = "both"
DRAFTERS = (MODEL, NGRAMS, UNION)


@dataclass(frozen=True, slots=True)
class World:
    """closed: whether answers that end make room for no others. wrong: factors of what the profile
    says rows and levels cost. damage: share of the drafted tokens that are spoiled. longest: tokens
    of an answer. neighbour: tokens between its comings and goings; 0: there is none. bump: where
    the profile is wrong for some rows only (one of BUMPS, or nowhere), by which share of what they
    take. prompts: how they are read. text: the kind of all answers; none: all kinds. drafters: one
    of DRAFTERS."""

    seed: int
    machine: str
    size: int
    closed: bool
    wrong: tuple[float, float]
    damage: float
    longest: int
    neighbour: float
    bump: tuple[str, float] = (NOWHERE, 0.0)
    prompts: Prompts = READ
    text: str = ""
    drafters: str = MODEL

    @classmethod
    def drawn(
        cls, seed: int, machines: Sequence[str], sizes: Sequence[int], recorded: Recording
    ) -> World:
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
            (str(rng.choice(list(BUMPS))), float(rng.uniform(-MOST_WRONG, MOST_WRONG)))
            if rng.random() < 0.5
            else (NOWHERE, 0.0),
            Prompts(int(rng.choice(CHUNKS)), float(rng.uniform(*SHARES)))
            if rng.random() < 0.5
            else READ,
            str(rng.choice(["", *sorted({a.task for a in recorded.answers if a.positions > 0})])),
            str(rng.choice(DRAFTERS)) if recorded.ngrams is not None else MODEL,
        )

    @property
    def traits(self) -> list[str]:
        """Return which lines of a report the world belongs to."""
        wrong = self.bump[0] != NOWHERE or self.wrong != (1.0, 1.0)
        return [
            ALL,
            f"batch {self.size}",
            "closed batches" if self.closed else "queues",
            "with prompts" if self.prompts.chunk else "prompts read",
            *(["closed, prompts"] if self.closed and self.prompts.chunk else []),
            *(["queue, prompts"] if not self.closed and self.prompts.chunk else []),
            "wrong tables" if wrong else "right tables",
            f"wrong {self.bump[0]}",
            "spoiled heads" if self.damage else "good heads",
            self.text or "all kinds of text",
            f"drafters: {self.drafters}",
        ]

    def recording(self, recorded: Recording) -> Recording:
        """Return the answers to decode, their trees spoiled."""
        rng = np.random.default_rng([self.seed, 1])
        usable = [a for a in recorded.answers if a.positions > 0 and self.text in ("", a.task)]
        count = self.size * max(QUEUE, ROUNDS // self.longest)
        chosen = rng.choice(len(usable), count, replace=count > len(usable))
        answers = [
            replace(answer, tokens=answer.tokens[: self.longest], limit=self.longest)
            for answer in (usable[i] for i in chosen)
        ]
        if self.drafters == NGRAMS:
            assert recorded.ngrams is not None
            return replace(recorded.ngrams, answers=answers)
        token = recorded.token.copy()
        token[rng.random(len(token)) < self.damage] = NOBODYS
        ngrams = recorded.ngrams if self.drafters == UNION else None
        return replace(recorded, answers=answers, token=token, ngrams=ngrams)

    def assumed(self, cost: CostModel) -> CostModel:
        """Return what `smart` believes of a machine's costs."""
        return bent(askew(cost, *self.wrong), *self.bump, self.size)


@dataclass(slots=True)
class Played:
    """A policy in a world. seconds, equivalents: [rounds]; figures: of `Figures`."""

    seconds: FloatArray
    equivalents: FloatArray
    figures: dict[str, Any]


def measured(
    trace: Trace, costs: Mapping[str, CostModel], name: str, world: World
) -> dict[str, Any]:
    """Return one world's figures under a policy."""
    cost = costs[world.machine]
    recording = world.recording(trace.recording)
    ours, plain = (
        played(contestant(each, trace, world.assumed(cost)), recording, cost, world)
        for each in (name, BASELINE)
    )
    # At a queue's end policies leave different answers unfinished.
    known = plain.seconds if world.closed else ours.equivalents
    return {
        **asdict(world),
        "traits": world.traits,
        "ratio": float(known.sum() / ours.seconds.sum()),
        "window": _worst_window(ours.equivalents, ours.seconds),
        "rounds": len(ours.seconds),
        "requests": slowdowns(ours.figures, plain.figures),
        "figures": {k: v for k, v in ours.figures.items() if k != "per_token"},
    }


def played(policy: Policy, recording: Recording, cost: CostModel, world: World) -> Played:
    """Decode a world's answers under a policy."""
    walk = Walk(recording, world.size, world.closed, world.prompts.chunk)
    neighbour = Turns(2, world.neighbour or np.inf, np.random.default_rng([world.seed, 2]))
    noise = np.random.default_rng([world.seed, 3])
    figures = Figures(len(recording.answers))
    seconds: list[float] = []
    equivalents: list[float] = []
    while walk.running:
        done = draft(policy, walk)
        size, context = done.batch.size, done.batch.mean_context
        rows = size + len(done.kept) + done.batch.prefill_rows
        slowness = (1.0, SLOWER)[neighbour.now]
        levels = [slowness * each for each in cost.levels_seconds(size, done.widths, context)]
        plain, verify = (
            slowness * float(cost.verify_seconds(max(size, 1), each, context))
            for each in (size, rows)
        )
        if done.batch.prefill_rows:
            verify = world.prompts.seconds(plain, verify)
        beyond = cost.overhead_seconds if done.rule is not None else 0.0
        truth, emitted = judged(done, walk)
        took = verify + sum(levels) + beyond  # without noise, of which the policy alone knows
        verify = noisy(verify, noise)
        levels = [noisy(each, noise) for each in levels]
        round_ = Round(
            done.batch, done.rule, done.trees, done.kept, *truth, done.widths, levels, rows,
            verify, beyond,
        )  # fmt: skip
        figures.add(policy, round_, walk.answer, emitted, took)
        if size:
            policy.observe(round_)
        walk.advance(emitted, done.rule is not None)
        tokens = int(emitted.sum())
        neighbour.advance(tokens)
        seconds.append(took)
        equivalents.append(took if done.batch.prefill_rows else plain * tokens / size)
    return Played(np.array(seconds), np.array(equivalents), figures.summary(policy))


def _worst_window(equivalents: FloatArray, seconds: FloatArray) -> float:
    """Return the least ratio of WINDOW rounds in a row; of all rounds where they are fewer."""
    count = min(WINDOW, len(seconds))
    sums = [np.convolve(each, np.ones(count), "valid") for each in (equivalents, seconds)]
    return float((sums[0] / sums[1]).min())


def report(found: Sequence[Mapping[str, Any]]) -> str:
    """Return a line for each trait of worlds; then what was believed, and what requests took."""
    lines = [
        f"{'worlds':28}{'count':>7}{'mean':>8}{'worst':>8}{'5 %':>8}{'below 0.99':>12}"
        f"{'window 5 %':>12}{'worst':>8}{'requests <= 1.05':>18}{'95 %':>8}{'slowest':>9}"
    ]
    traits = sorted({trait for row in found for trait in row["traits"]}, key=_natural)
    for trait in traits:
        rows = [row for row in found if trait in row["traits"]]
        ratio, window = (np.array([row[key] for row in rows]) for key in ("ratio", "window"))
        slower = np.concatenate([row["requests"][OWN] for row in rows])
        lines.append(
            f"{trait:28}{len(rows):>7}{np.exp(np.log(ratio).mean()):>8.3f}{ratio.min():>8.3f}"
            f"{np.quantile(ratio, 0.05):>8.3f}{(ratio < 0.99).mean():>12.3f}"
            f"{np.quantile(window, 0.05):>12.3f}{window.min():>8.3f}"
            f"{(slower <= SLOW).mean():>18.3f}{np.quantile(slower, 0.95):>8.3f}{slower.max():>9.2f}"
        )
    believed = beliefs([(row["figures"], row["ratio"]) for row in found])
    return "\n".join(lines) + "\n" + believed + requests([row["requests"] for row in found])


def _natural(trait: str) -> tuple[bool, int, str]:
    """Return a key for sorting: all worlds come last, batch sizes first."""
    size = trait.removeprefix("batch ")
    return trait == ALL, int(size) if size.isdecimal() else 1 << 30, trait


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The recording, the worlds, and who decodes."""
    add = parser.add_argument
    add("trace", type=Path, help="a recording by `bench --record`")
    add("names", nargs="*", default=["smart"], metavar="NAME", help="policies or variants")
    text = "a recording of the same prompts by n-grams, which then draft alone or beside in worlds"
    add("--ngrams", type=Path, metavar="FILE", help=text)
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
    if args.ngrams is not None:
        both = trace.recording.beside(read_trace(args.ngrams).recording)
        trace = replace(trace, recording=both)
    worlds = [
        World.drawn(seed, list(costs), args.batch_sizes, trace.recording)
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
