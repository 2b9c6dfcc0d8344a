"""A small world to run policies in without a model: tests compare them with full knowledge there.

Each expanded node gets children whose draft probabilities depend on how hard the request is at the
moment; their true acceptance is a known distortion of them. Everything is a function of the seed,
so all policies meet the same rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.batch import BatchState, Round
from smart_decoding.core.calibration import path_products
from smart_decoding.core.rule import NO_NODES
from smart_decoding.core.selection import best_size, ranked
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray, accept

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel
    from smart_decoding.core.policies.base import Policy
    from smart_decoding.core.rule import TreeRule

CHILDREN = 8
TRUST = np.array(
    [0.0, 0.9, 0.82, 0.7, 0.62, 0.55, 0.5]
)  # true acceptance over draft_prob, by depth
CONTEXT = 200
NOISE = 65536
WAITING = 256  # rows at most that wait for a request while nothing is drafted


@dataclass(frozen=True, slots=True)
class Totals:
    """Expected tokens, seconds, verified nodes and rounds without drafting, over a run."""

    tokens: float
    seconds: float
    nodes: int
    off: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


class World:
    """`batch` requests for ever. `good(round)` says whether the drafter is in order (else it is
    shuffled: as confident, never right). `costs` is the truth about time, and
    `overhead` the seconds that a speculating round takes beyond."""

    def __init__(
        self,
        seed: int,
        batch: int,
        costs: CostModel,
        good: Callable[[int], bool] = lambda _: True,
        ease: float = 0.7,
        overhead: float = 0.0,
    ) -> None:
        self.seed, self.batch, self.costs, self.good, self.ease = seed, batch, costs, good, ease
        self.overhead = overhead
        rng = np.random.default_rng(seed)
        steps = rng.normal(size=(4096, batch))
        self.noise = rng.normal(size=NOISE)
        self.mood = np.zeros(
            (4096, batch)
        )  # how predictable the text is at the moment: a slow wave per request
        for t in range(1, 4096):
            self.mood[t] = 0.9 * self.mood[t - 1] + 0.45 * steps[t]

    def state(self, catch_up: int = 0) -> BatchState:
        """Return the batch before a round."""
        size = self.batch
        return BatchState(
            np.full(size, CONTEXT),
            np.full(size, 10_000),
            np.zeros(size),
            np.ones(size, bool),
            catch_up_rows=catch_up,
        )

    def expand(
        self, round_index: int, trees: DraftTrees, parents: IntArray, children: int, depth: int
    ) -> None:
        """Append `children` nodes below each of `parents`; at depth 1 below each root."""
        owner = np.arange(self.batch) if depth == 1 else trees.owner[parents]
        mood = self.mood[round_index % 4096][owner] + self.ease
        # Looked up by the parent's path, so that the same node is the same in every policy's tree.
        place = (
            _places(trees, parents, self.batch) * 40503 + round_index * 7919 + depth * 104729
        ) % NOISE
        top = 1.0 / (1.0 + np.exp(-(mood + 1.6 * self.noise[place])))
        share = 0.55 ** np.arange(1, CHILDREN)
        prob = np.concatenate(
            (top[:, None], (1 - top)[:, None] * share / share.sum() * 0.85), axis=1
        )
        prob = -np.sort(-prob, axis=1)[:, :children]
        count = prob.shape[1]
        token = np.tile(np.arange(count), len(owner))
        trees.append(np.repeat(owner, count), token, np.repeat(parents, count), prob.ravel())

    def true_prob(self, trees: DraftTrees, round_index: int) -> FloatArray:
        """[nodes] probability that the target chooses the node, its parent accepted."""
        trust = TRUST[np.minimum(trees.depth, len(TRUST) - 1)]
        result: FloatArray = trees.draft_prob * trust * self.good(round_index)
        return result

    def walk(
        self, trees: DraftTrees, round_index: int, kept: IntArray
    ) -> tuple[IntArray, IntArray]:
        """(root_next [batch], next_token [nodes]): one verification of `kept`, drawn from the true
        probabilities."""
        rng = np.random.default_rng([self.seed, round_index, 99])
        true = self.true_prob(trees, round_index)
        pruned = trees.take(kept)
        draws = rng.random(self.batch + len(trees))

        def sample(rows: list[int]) -> list[int]:
            tokens = []
            for row in rows:
                node = -1 if row < self.batch else int(kept[row - self.batch])
                mine = trees.parent == node
                if node < 0:
                    mine &= trees.owner == row
                children = np.flatnonzero(mine)
                edge = np.cumsum(true[children])
                hit = np.flatnonzero(draws[row if node < 0 else self.batch + node] < edge)
                tokens.append(int(trees.token[children[hit[0]]]) if len(hit) else CHILDREN + 1)
            return tokens

        result = accept(pruned, sample)
        next_token = np.full(len(trees), -1, np.int64)
        next_token[kept] = result.next_token
        return result.root_next, next_token


def run(policy: Policy, world: World, rounds: range) -> Totals:
    """Run a policy through `rounds` of the world as an engine would. Tokens are expectations, not
    draws."""
    tokens = seconds = 0.0
    nodes = off = catch_up = 0
    for index in rounds:
        batch = world.state(catch_up)
        rule = policy.plan(batch)
        trees = DraftTrees.empty(world.batch)
        widths: list[int] = []
        times: list[float] = []
        kept = NO_NODES
        if rule is not None:
            widths, times = _draft(rule, batch, world, index, trees)
            kept = rule.select(trees)
        root_next, next_token = world.walk(trees, index, kept)
        verify = float(world.costs.verify_seconds(world.batch, world.batch + len(kept), CONTEXT))
        rows, beyond = world.batch + len(kept), world.overhead if rule else 0.0
        policy.observe(
            Round(
                batch, rule, trees, kept, next_token, root_next, widths, times, rows, verify, beyond
            )
        )
        tokens += world.batch + _path_gain(trees, world.true_prob(trees, index))[kept].sum()
        seconds += verify + sum(times) + beyond
        nodes, off = nodes + len(kept), off + (rule is None)
        catch_up = 0 if widths else min(catch_up + world.batch, WAITING * world.batch)
    return Totals(float(tokens), seconds, nodes, off)


def full_knowledge(
    world: World, rounds: range, levels: int = 6, widths: tuple[int, ...] = (1, 2, 4, 8)
) -> Totals:
    """Return the best of plain decoding and every (levels, width) each round, knowing all true
    probabilities beforehand."""
    found = []
    size = world.batch
    plain = float(world.costs.verify_seconds(size, size, CONTEXT))
    for index in rounds:
        best = (size / plain, float(size), plain, 0)
        for width in widths if world.good(index) else ():
            trees, sunk = DraftTrees.empty(size), 0.0
            parents = np.full(size, -1)
            for level in range(1, levels + 1):
                world.expand(index, trees, parents, CHILDREN, level)
                sunk += float(world.costs.draft_seconds(len(parents), CONTEXT))
                gain = _path_gain(trees, world.true_prob(trees, index))
                order = ranked(gain)
                curve = world.costs.verify_curve(size, size, len(trees) + 1, CONTEXT)
                n, value = best_size(gain[order], size, sunk, curve)
                best = max(
                    best, (value, size + float(gain[order[:n]].sum()), sunk + float(curve[n]), n)
                )
                deepest = np.flatnonzero(trees.depth == level)
                parents = np.sort(deepest[ranked(gain[deepest])[: width * size]])
        found.append((*best[1:], int(best[3] == 0)))
    tokens, seconds, nodes, off = map(sum, zip(*found, strict=True))
    return Totals(tokens, seconds, nodes, off)


def _draft(
    rule: TreeRule, batch: BatchState, world: World, index: int, trees: DraftTrees
) -> tuple[list[int], list[float]]:
    parents: IntArray = np.full(world.batch, -1)
    widths, times = [], []
    for level in range(1, rule.levels + 1):
        world.expand(index, trees, parents, rule.children, level)
        rows = len(parents) + (batch.catch_up_rows if level == 1 else 0)
        widths.append(rows)
        times.append(float(world.costs.draft_seconds(rows, CONTEXT)))
        parents = rule.frontier(trees, level)
        if not len(parents):
            break
    return widths, times


def _path_gain(trees: DraftTrees, conditional: FloatArray) -> FloatArray:
    """[nodes] probability that the target chooses the whole path."""
    return path_products(trees.parent, conditional, int(trees.depth.max(initial=0)))


def _places(trees: DraftTrees, parents: IntArray, batch: int) -> IntArray:
    """Return a place in [0, NOISE) for each parent that depends on its request and token path
    only."""
    place = np.arange(batch) if not len(trees) else trees.owner[parents].copy()
    at = parents.copy()
    while (at >= 0).any():
        inside = at >= 0
        place[inside] = (place[inside] * 31 + trees.token[at[inside]] + 7) % NOISE
        at[inside] = trees.parent[at[inside]]
    return place
