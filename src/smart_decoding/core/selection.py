"""Choosing nodes to expand and to verify: the parts of a `TreeRule`, in numpy.

This is the reference. kernels/csrc/selection.cpp follows the same data, and tests compare the two.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from smart_decoding.core.rule import NO_NODES, TreeRule, expanded_widths
from smart_decoding.core.tree import (
    ROOT,
    BoolArray,
    DraftTrees,
    FloatArray,
    IntArray,
    sibling_ranks,
)


class Selection:
    """Follows rules by their own numpy code: the reference. Kernels have a native form of it."""

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `TreeRule.frontier`."""
        return rule.frontier(trees, level)

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `TreeRule.select`."""
        return rule.select(trees)


# --- the exact choice -----------------------------------------------------------------------------
#
# The cost of a forward is known for every number of rows. So the best set of nodes is a prefix of
# the candidates sorted by accept_prob, and one scan over the prefix sums finds it.


NONE = math.inf  # the loss of a missing candidate: no best prefix reaches it
_ONE = np.float64(1.0).view(np.int64)


def ranked(accept_prob: FloatArray) -> IntArray:
    """Return indices by falling probability ([n], in [0, 1]), ties to the lower index: parents come
    before their children.

    It takes one integer sort: the bits of a non-negative float order like the float. The lowest
    bits carry the index instead (a relative error of 2^-39 for 8192 candidates)."""
    mask = (1 << max(len(accept_prob) - 1, 1).bit_length()) - 1
    keys: IntArray = _ONE - accept_prob.view(np.int64)
    keys &= ~mask
    keys |= np.arange(len(keys))
    keys.sort()
    keys &= mask
    return keys


def best_size(
    gains: FloatArray,
    tokens: float,
    sunk: float,
    seconds: FloatArray,
    limit: float = math.inf,
    least: int = 0,
) -> tuple[int, float]:
    """Return (n, value): how many of the sorted `gains` [m] to verify for the most tokens per
    second, and that rate.

    value(n) = (tokens + gains[:n].sum()) / (sunk + seconds[n]); `seconds` is [m + 1], of any shape.
    Sizes beyond `limit` seconds are out, except n = 0; sizes below `least` are out. Ties go to the
    smaller n."""
    values = np.empty(len(gains) + 1)
    values[0] = 0.0
    np.cumsum(gains, out=values[1:])
    values += tokens
    total = seconds + sunk
    values /= total
    if limit < math.inf:
        values[1:][total[1:] > limit] = -1.0
    n = int(values[least:].argmax()) + least
    return n, float(values[n])


def best_rates(
    losses: FloatArray, tokens: float, sunk: FloatArray, seconds: FloatArray, limit: float
) -> FloatArray:
    """Return the best rate [options] of `best_size` for each row of `losses` [options, m].

    losses: negated gains, ascending; NONE marks a missing candidate. sunk: [options]; seconds:
    [m + 1], as for `best_size`."""
    rates = np.zeros((len(losses), losses.shape[1] + 1))
    np.cumsum(losses, axis=1, out=rates[:, 1:])
    total = sunk[:, None] + seconds
    np.subtract(tokens, rates, out=rates)
    rates /= total
    if limit < math.inf:
        rates[:, 1:][total[:, 1:] > limit] = -1.0
    result: FloatArray = rates.max(axis=1)
    return result


RANKS = 4  # forecast children of each node in a look-ahead; further ones bring next to nothing


@dataclass(frozen=True, slots=True)
class RoundCosts:
    """Tokens and seconds of a round.

    tokens: of a plain round. sunk: seconds before anything is chosen: overhead, and the first level
    where a model drafts. levels: seconds of a further level of 0, 1, ... nodes. verify: seconds of
    verifying 0, 1, ... nodes; its length bounds the nodes. limit: seconds that a round may last, if
    it verifies any node."""

    tokens: float
    sunk: float
    levels: FloatArray
    verify: FloatArray
    limit: float = math.inf

    def drafted(self, trees: DraftTrees) -> float:
        """Return the seconds of the round so far. The levels are added one after the other, as in
        the kernels: numpy's `sum` uses another order from eight on."""
        widths = expanded_widths(trees)[1:]
        drafted = 0.0
        for seconds in self.levels.take(widths[widths > 0]).tolist():
            drafted += seconds
        return self.sunk + drafted

    def best(self, gains: FloatArray, sunk: float, least: int = 0) -> tuple[int, float]:
        """Return how many of the sorted `gains` to verify, and the rate; see `best_size`."""
        gains = gains[: len(self.verify) - 1]
        verify = self.verify[: len(gains) + 1]
        least = min(least, len(gains))
        return best_size(gains, self.tokens, sunk, verify, self.limit, least)


# --- whether the model drafts ---


@dataclass(frozen=True, slots=True)
class SkipModel:
    """Leaves the model out where the free drafters' nodes promise at least the rate that the model
    would reach. Both may propose equal nodes, so with the model the k-th best of a request's nodes
    counts as the better of both k-th best ones.

    keep: chooses the nodes to verify without the model. model: [options, nodes] forecast
    probabilities of a request's nodes, falling, after 1, 2, ... levels. drafted: [options] seconds
    of these levels."""

    keep: BestRate
    model: FloatArray
    drafted: FloatArray

    def applies(self, rule: TreeRule, proposed: DraftTrees) -> bool:
        """See `Skip`. False where none of the nodes pays: the policy has found that the model
        does."""
        costs = self.keep.costs
        nodes = np.flatnonzero(rule.useful(proposed))
        gains = proposed.accept_prob.take(nodes)
        size, rate = costs.best(np.sort(gains)[::-1], costs.sunk)
        if not size:
            return False
        options, most = self.model.shape
        free = _sorted_by_owner(gains, proposed.owner.take(nodes), proposed.batch, most)
        both = np.maximum(self.model[:, None], free[rule.limits > 0]).reshape(options, -1)
        losses = np.sort(-both, axis=1)[:, : len(costs.verify) - 1]
        verify = costs.verify[: losses.shape[1] + 1]
        sunk = costs.sunk + self.drafted
        with_model = best_rates(losses, costs.tokens, sunk, verify, costs.limit).max()
        return bool(rate >= with_model)


def _sorted_by_owner(gains: FloatArray, owner: IntArray, batch: int, most: int) -> FloatArray:
    """Return the largest gains [batch, most] of each request, falling, then zeros."""
    order, rank = _ranked_by_owner(gains, owner)
    inside = rank < most
    best = order[inside]
    result = np.zeros((batch, most))
    result[owner[best], rank[inside]] = gains[best]
    return result


def _ranked_by_owner(prob: FloatArray, owner: IntArray) -> tuple[IntArray, IntArray]:
    """Return indices request by request, the likeliest first, ties to the lower index; and each
    one's rank in its request."""
    order = np.lexsort((-prob, owner))  # stable: ties stay in ascending order
    sorted_owner = owner[order]
    rank = np.arange(len(order)) - np.searchsorted(sorted_owner, sorted_owner)
    return order, rank


# --- nodes to expand ---


@dataclass(frozen=True, slots=True)
class Beam:
    """Expands the best `width` nodes of each request: EAGLE-2, or a chain where `width` is 1."""

    width: int

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`."""
        return best_per_owner(trees, rule.expandable(trees, level), self.width)


@dataclass(frozen=True)
class LookAhead:
    """Expands the likeliest nodes of the whole batch, as many as pay. It compares stopping with one
    more level of every width, by forecast.

    widths: ascending numbers of nodes that may be expanded. below: [levels, RANKS] forecast
    conditional probabilities of the children of a node of level 1, 2, ... first: forecast
    probabilities of a root's children; empty where `foreseen` is not used. requests: number of
    requests that draft."""

    costs: RoundCosts
    widths: IntArray
    below: FloatArray
    first: FloatArray = field(default_factory=lambda: np.zeros(0))
    requests: int = 0

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`."""
        nodes = rule.expandable(trees, level)
        if not len(nodes):
            return nodes
        widths = np.unique(np.minimum(self.widths, len(nodes)))
        accept_prob = trees.accept_prob.take(nodes)
        order = ranked(accept_prob)[: widths[-1]]
        present = trees.accept_prob[rule.useful(trees)]
        below = self.below[level - 1]
        sunk = self.costs.drafted(trees)
        width = self._width(present, accept_prob.take(order), widths, below, sunk)
        return np.sort(nodes.take(order[:width]))

    @cached_property
    def foreseen(self) -> Sequence[int]:
        """Numbers of nodes of level 1, 2, ... that it would expand if all were as forecast."""
        found: list[int] = []
        present = frontier = np.sort(np.tile(self.first, self.requests))[::-1]
        sunk = self.costs.sunk
        for below in self.below if len(frontier) else ():
            widths = np.unique(np.minimum(self.widths, len(frontier)))
            width = self._width(present, frontier, widths, below, sunk)
            if not width:
                break
            found.append(width)
            sunk += float(self.costs.levels[width])
            frontier = np.sort(np.multiply.outer(frontier[:width], below).ravel())[::-1]
            present = np.concatenate((present, frontier))
        return found

    def _width(
        self,
        present: FloatArray,
        frontier: FloatArray,
        widths: IntArray,
        below: FloatArray,
        sunk: float,
    ) -> int:
        """Return how many of the sorted `frontier` to expand; 0 where no width beats stopping."""
        most = 0
        rate = self.costs.best(np.sort(present)[::-1], sunk)[1]
        levels = self.costs.levels.take(widths).tolist()
        for width, seconds in zip(widths.tolist(), levels, strict=True):
            forecast = np.multiply.outer(frontier[:width], below).ravel()
            gains = np.sort(np.concatenate((present, forecast)))[::-1]
            found = self.costs.best(gains, sunk + seconds)[1]
            if found > rate:
                rate = found
                most = width
        return most


@dataclass(frozen=True, slots=True)
class Fixed:
    """Expands a fixed number of nodes of level 1, 2, ... (`widths`) with the largest path_prob: of
    `each` request, or of the whole batch. A device can follow it without the host."""

    widths: Sequence[int]
    each: bool

    @classmethod
    def before(cls, rule: TreeRule) -> Fixed | None:
        """Return the widths of a rule that are known before the round; None if they are not."""
        expand = rule.expand
        further = rule.levels - 1
        if isinstance(expand, Beam):
            return cls([expand.width] * further, True)
        if isinstance(expand, LookAhead) and len(expand.first):
            return cls(expand.foreseen[:further], False)
        return None

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`."""
        nodes = rule.expandable(trees, level)
        if level > len(self.widths) or not len(nodes):
            return NO_NODES
        width = self.widths[level - 1]
        if self.each:
            return best_per_owner(trees, nodes, width, trees.path_prob)
        return np.sort(nodes.take(ranked(trees.path_prob.take(nodes))[:width]))


# --- nodes to verify ---


@dataclass(frozen=True, slots=True)
class KeepBest:
    """Verifies the best `count` nodes of each request."""

    count: int

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `Keep`."""
        return best_per_owner(trees, np.flatnonzero(rule.useful(trees)), self.count)


@dataclass(frozen=True, slots=True)
class BestRate:
    """Verifies the nodes of the whole batch with the most tokens per second: exact for costs of any
    shape (`best_size`). At least `least` nodes, if there are so many."""

    costs: RoundCosts
    least: int = 0

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `Keep`."""
        nodes = np.flatnonzero(rule.useful(trees))
        accept_prob = trees.accept_prob.take(nodes)
        order = ranked(accept_prob)
        gains = accept_prob.take(order)
        size, _ = self.costs.best(gains, self.costs.drafted(trees), self.least)
        return np.sort(nodes.take(order[:size]))


# --- nodes to expand and to verify ---


@dataclass(frozen=True, slots=True)
class Topology:
    """Expands and verifies a fixed tree of child ranks (by draft_prob) for every request, as in
    Medusa and EAGLE-1.

    next: [places, ranks] the place of each place's child of a rank, or -1; place 0 is the root."""

    next: IntArray

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`: the nodes that have children in the topology."""
        nodes = rule.expandable(trees, level)
        place = self._places(trees)[nodes]
        inner: BoolArray = np.any(self.next >= 0, axis=1)
        return nodes[(place >= 0) & inner[place]]

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `Keep`: the nodes of the topology."""
        return np.flatnonzero(rule.useful(trees) & (self._places(trees) >= 0))

    def _places(self, trees: DraftTrees) -> IntArray:
        """Return each node's place [nodes] in the topology, or -1."""
        rank = sibling_ranks(trees)
        place = np.full(len(trees), -1, np.int64)
        ranks = self.next.shape[1]
        for depth in range(1, int(trees.depth.max(initial=0)) + 1):
            nodes = np.flatnonzero((trees.depth == depth) & (rank < ranks))
            above = place[trees.parent[nodes]] if depth > 1 else np.zeros(len(nodes), np.int64)
            inside = above >= 0
            place[nodes[inside]] = self.next[above[inside], rank[nodes[inside]]]
        return place


@dataclass(frozen=True, slots=True)
class MarginalRatio:
    """The published rule of SMART (arXiv 2604.09731), for each request separately. Level by level,
    most probable first, a child of a kept node is kept iff

        alpha * ΔL / ΔC_spec(n + 1) > L / C_spec(n),      ΔL = path_prob / paths

    for n nodes so far. L is 1 plus the mean, over root-to-leaf paths, of the sum of path_prob along
    the path. Kept nodes are expanded, and verified.

    spent: [budget + 1] C_spec of 0, 1, ... nodes of a request, seconds; step: [budget + 1] its
    derivative there. A request keeps no more than `budget` nodes. Where C_spec(0) is 0, the rule is
    undefined for the first candidate, which is kept. mean_over_paths: if False, L is 1 plus the sum
    of path_prob over nodes, and ΔL is path_prob."""

    alpha: float
    spent: FloatArray
    step: FloatArray
    mean_over_paths: bool = True

    def frontier(self, rule: TreeRule, trees: DraftTrees, level: int) -> IntArray:
        """See `Expand`."""
        return np.intersect1d(rule.expandable(trees, level), self._kept(rule, trees, level))

    def select(self, rule: TreeRule, trees: DraftTrees) -> IntArray:
        """See `Keep`."""
        return self._kept(rule, trees, int(trees.depth.max()))

    def _kept(self, rule: TreeRule, trees: DraftTrees, deepest: int) -> IntArray:
        """Return ascending indices of the nodes kept down to `deepest`."""
        useful = np.flatnonzero(rule.useful(trees) & (trees.depth <= deepest))
        order = useful[np.lexsort((useful, -trees.accept_prob[useful], trees.depth[useful]))]
        of_request = [_KeptTree() for _ in range(trees.batch)]
        kept = []
        for node in order.tolist():
            tree = of_request[trees.owner[node]]
            parent = int(trees.parent[node])
            path_prob = float(trees.accept_prob[node])
            if self._keeps(tree, parent, path_prob):
                tree.add(node, parent, path_prob)
                kept.append(node)
        return np.sort(np.array(kept, np.int64))

    def _keeps(self, tree: _KeptTree, parent: int, path_prob: float) -> bool:
        """Return whether the rule keeps a node below `parent`."""
        nodes = len(tree.down) - 1
        if nodes >= len(self.spent) - 1 or parent not in tree.down:
            return False
        spent = float(self.spent[nodes])
        if spent == 0:
            return True
        gain = path_prob / tree.paths_with(parent) if self.mean_over_paths else path_prob
        length = tree.mean_length() if self.mean_over_paths else 1.0 + tree.node_sum
        return self.alpha * gain * spent > length * float(self.step[nodes + 1])


class _KeptTree:
    """The nodes of one request that `MarginalRatio` has kept.

    down: the root and each kept node, with the sum of path_prob from the root to it. inner: kept
    nodes with kept children. paths: number of root-to-leaf paths. path_sum: the sum of `down` over
    leaves. node_sum: the sum of path_prob over nodes."""

    def __init__(self) -> None:
        self.down: dict[int, float] = {ROOT: 0.0}
        self.inner: set[int] = set()
        self.paths = 0
        self.path_sum = 0.0
        self.node_sum = 0.0

    def paths_with(self, parent: int) -> int:
        """Return the number of paths once `parent` has one more child; a leaf's path only gets
        longer."""
        extends_leaf = parent != ROOT and parent not in self.inner
        return self.paths + (not extends_leaf)

    def mean_length(self) -> float:
        """Return L as a mean over paths."""
        return 1.0 + self.path_sum / max(self.paths, 1)

    def add(self, node: int, parent: int, path_prob: float) -> None:
        """Add a kept node."""
        paths = self.paths_with(parent)
        self.down[node] = self.down[parent] + path_prob
        self.path_sum += self.down[node] if paths > self.paths else path_prob
        self.node_sum += path_prob
        self.paths = paths
        self.inner.add(parent)


EXPAND_KINDS = (Beam, LookAhead, Topology, MarginalRatio)
KEEP_KINDS = (KeepBest, BestRate, Topology, MarginalRatio)


def is_data(rule: TreeRule) -> bool:
    """Return whether the rule consists only of the kinds above, which kernels can follow."""
    return type(rule.expand) in EXPAND_KINDS and type(rule.keep) in KEEP_KINDS


def best_per_owner(
    trees: DraftTrees, nodes: IntArray, count: int, prob: FloatArray | None = None
) -> IntArray:
    """Return each request's `count` of `nodes` with the largest accept_prob, or `prob`, ties to the
    lower index; ascending."""
    if not len(nodes):
        return NO_NODES
    prob = trees.accept_prob if prob is None else prob
    order, rank = _ranked_by_owner(prob[nodes], trees.owner[nodes])
    return np.sort(nodes[order[rank < count]])
