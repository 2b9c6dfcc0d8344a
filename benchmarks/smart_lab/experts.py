"""What it brings to price a mixture's experts: replay with routers drawn at random.

    python -m smart_lab experts answers.smart --batch-sizes 1,4,8

Acceptance is recorded; which experts a row wakes is drawn. An `independent` router draws each row's
anew. A `correlated` one prefers those of the row before on its path, so that neighbours share. A
forward takes the seconds of its rows, and of each expert that any of them wakes.

Contestants are `smart` with costs by experts, with costs by rows as measured on one repeated token
(which wakes one row's experts) or on rows of random tokens, plain decoding, and chains of fixed
lengths.

Needed by docs/controller.md, "Mixtures of experts".
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from smart_decoding.bench.options import BASELINE, OURS, parse_setting
from smart_decoding.cli.arguments import whole_numbers
from smart_decoding.core.costs import CostModel, Curve, ExpertCosts
from smart_decoding.core.tree import ROOT
from smart_decoding.files import write_json
from smart_lab.ablate import ordered
from smart_lab.provenance import check_outputs
from smart_lab.replay import StepCosts, replay
from smart_lab.trace import Trace, read_trace

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.tree import BoolArray
    from smart_lab.recording import Recording
    from smart_lab.replay import Drafted, Walk

PLAIN = 0.1  # seconds of a forward of one row
FURTHER_ROW = 0.02  # of one row's, that arithmetic and attention of a further row take
LEVEL = 0.06  # of one row's, that a level of the drafter takes
MOST_ROWS = 256
LAYERS = 4  # whose routers are drawn: all others wake as many experts in the mean
ANSWERS = 40
CONTESTANTS = ("smart", "one token", "random tokens", "chain:length=1", "chain:length=2",
               "chain:length=3")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Mixture:
    """count, per_row: experts of a layer, and those of a row; share: part of one row's forward that
    reads its experts."""

    count: int
    per_row: int
    share: float

    @property
    def expert(self) -> float:
        """Seconds of a further expert in each layer."""
        return PLAIN * self.share / self.per_row


# A token of the first reads 1.22 billion dense weights and 1.81 billion of experts.
MODELS = {"qwen3-30b-a3b": Mixture(128, 8, 0.6), "gpt-oss-20b": Mixture(32, 4, 0.49)}
ROUTERS = {"independent": 0.0, "correlated": 0.35}  # what a parent's experts add to their scores


class Router:
    """Draws which experts each row has, a function of the answer, the place and the tokens: every
    policy meets the same ones."""

    def __init__(self, mixture: Mixture, kept: float) -> None:
        self._mixture = mixture
        self._kept = kept
        self._known: dict[tuple[int, ...], BoolArray] = {}

    def experts(self, answer: int, at: int, branch: tuple[int, ...]) -> BoolArray:
        """Return [LAYERS, count] the experts of an answer's token `at`, or of a branch of other
        tokens behind it."""
        key = (answer, at, *branch)
        found = self._known.get(key)
        if found is None:
            found = self._drawn(key, self._before(answer, at, branch))
            self._known[key] = found
        return found

    def _before(self, answer: int, at: int, branch: tuple[int, ...]) -> BoolArray | None:
        if branch:
            return self.experts(answer, at, branch[:-1])
        return self.experts(answer, at - 1, ()) if at else None

    def _drawn(self, key: tuple[int, ...], before: BoolArray | None) -> BoolArray:
        mixture = self._mixture
        score = np.random.default_rng(key).random((LAYERS, mixture.count))
        if before is not None:
            score += self._kept * before
        chosen = np.zeros(score.shape, np.bool_)
        best = np.argpartition(-score, mixture.per_row - 1, axis=1)[:, : mixture.per_row]
        np.put_along_axis(chosen, best, True, axis=1)
        return chosen


class RoutedCosts(StepCosts):
    """Costs of a machine's steps, experts included."""

    def __init__(self, cost: CostModel, batch_size: int, router: Router) -> None:
        super().__init__(replace(cost, experts=None), batch_size)
        assert cost.experts is not None
        self._experts = cost.experts
        self._router = router

    def experts(self, done: Drafted, walk: Walk) -> float:
        awake = np.zeros((LAYERS, self._experts.count), np.bool_)
        answers, places = walk.answer.tolist(), walk.at.tolist()
        for answer, at in zip(answers, places, strict=True):
            awake |= self._router.experts(answer, at, ())
        trees = done.trees
        if not len(done.kept):
            return float(awake.sum(axis=1).mean())
        right = (trees.token == walk.truth(trees.owner, trees.depth)).tolist()
        # where on the answer's path each node or its last ancestor there is, and the tokens behind
        way: dict[int, tuple[int, tuple[int, ...]]] = {}
        owners, parents, tokens = trees.owner.tolist(), trees.parent.tolist(), trees.token.tolist()
        for node in done.kept.tolist():
            owner, parent = owners[node], parents[node]
            at, branch = (places[owner], ()) if parent == ROOT else way[parent]
            on_path = right[node] and not branch
            way[node] = (at + 1, ()) if on_path else (at, (*branch, tokens[node]))
            awake |= self._router.experts(answers[owner], *way[node])
        return float(awake.sum(axis=1).mean())

    def verify(self, rows: int, context: float, beyond: float = 0.0, experts: float = 0.0) -> float:
        further = float(self._experts.further_seconds(experts))
        return super().verify(rows, context, beyond) + further


def true_costs(mixture: Mixture) -> CostModel:
    """Return a machine's costs."""
    rows = {1: PLAIN, MOST_ROWS: PLAIN * (1 + FURTHER_ROW * (MOST_ROWS - 1))}
    level = {1: PLAIN * LEVEL, 64: 2 * PLAIN * LEVEL}
    experts = ExpertCosts(mixture.count, mixture.per_row, mixture.expert)
    return replace(CostModel.from_table({1: rows}, level), experts=experts)


@dataclass(frozen=True, slots=True)
class Case:
    """A model, how its router draws, and how many requests are answered at once."""

    model: str
    router: str
    batch_size: int


def rates(trace: Trace, case: Case, names: Sequence[str]) -> dict[str, float]:
    """Return each contestant's tokens per second over plain decoding's."""
    mixture = MODELS[case.model]
    cost = true_costs(mixture)
    recording: Recording = ordered(trace.recording, 1, case.batch_size, ANSWERS)
    found = {}
    for name in (BASELINE, *names):
        policy = contestant(name, trace, cost, case.batch_size)
        machine = RoutedCosts(cost, case.batch_size, Router(mixture, ROUTERS[case.router]))
        result = replay(policy, recording, cost, case.batch_size, costs=machine)
        found[name] = result.tokens_per_s
    return {name: found[name] / found[BASELINE] for name in names}


def contestant(name: str, trace: Trace, cost: CostModel, batch_size: int) -> Policy:
    """Return one of CONTESTANTS, or a policy with options, by the costs that it begins with."""
    if name == "one token":
        return trace.policy(OURS, replace(cost, experts=None))
    if name == "random tokens":
        rows = np.arange(batch_size, MOST_ROWS)
        seconds = cost.verify_curve(batch_size, batch_size, len(rows), 0.0)  # all draw anew
        curve = Curve(tuple(rows.tolist()), tuple(seconds.tolist()))
        return trace.policy(OURS, CostModel({batch_size: curve}, cost.draft))
    arm = parse_setting(name)
    return trace.policy(arm.policy, cost, **arm.options)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the recording, the models, and who decodes."""
    add = parser.add_argument
    add("trace", type=Path, help="a recording by `bench --record`")
    add("names", nargs="*", default=CONTESTANTS, metavar="NAME", help="policies, or of ours")
    add("--batch-sizes", type=whole_numbers, default=(1, 2, 4, 8), metavar="1,4")
    add("--processes", type=int, default=2)
    add("--json", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """Print a line for each model, router and batch size: tokens per second over plain
    decoding's."""
    check_outputs((args.json,))
    trace = read_trace(args.trace)
    for name in args.names:
        contestant(name, trace, true_costs(MODELS["gpt-oss-20b"]), 1)  # checked before the work
    cases = [
        Case(model, router, size)
        for model in MODELS
        for router in ROUTERS
        for size in args.batch_sizes
    ]
    with ProcessPoolExecutor(args.processes) as pool:
        each = pool.map(rates, [trace] * len(cases), cases, [args.names] * len(cases))
        found = list(tqdm(each, total=len(cases), leave=False))
    print(f"{'tokens per second over plain':40}" + "".join(f"{name:>16}" for name in args.names))
    for case, rate in zip(cases, found, strict=True):
        place = f"{case.model}, {case.router}, batch {case.batch_size}"
        print(f"{place:40}" + "".join(f"{rate[name]:16.3f}" for name in args.names))
    if args.json is not None:
        rows = [asdict(case) | rate for case, rate in zip(cases, found, strict=True)]
        write_json(args.json, {"experts": rows})
    return 0
