"""What becomes of drafted trees: which nodes are expanded next, and which are verified.

The numpy form here is the reference. A backend may offer the same in one call (`Chooser`): dozens
of array operations on a few dozen nodes take longer than a level of the drafter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from smart_decoding.core.calibration import Calibration
from smart_decoding.core.choice import best_size, ranked
from smart_decoding.core.lookahead import LookAhead, LookAheadCosts
from smart_decoding.core.policies.common import expandable, useful
from smart_decoding.core.tree import DraftTrees, FloatArray, IntArray, KindArray


@dataclass(slots=True)
class Drafted:
    """The trees of a round and what they are judged by.

    limits, kind: [batch] deepest useful node, and the request's `BatchState.kind`. ends: tokens
    that end an answer. tokens: of a plain round. sunk: seconds of drafting so far. verify: seconds
    of verifying 0, 1, ... nodes, of every number that may be asked for. limit: seconds that the
    round may last. least: verify at least so many nodes, as far as there are. scored: how many
    nodes have their accept_prob already.

    One object serves a whole round: trees, sunk, verify and scored go on, the rest stays as it
    is."""

    trees: DraftTrees
    calibration: Calibration
    limits: IntArray
    kind: KindArray
    ends: IntArray
    tokens: float
    sunk: float
    verify: FloatArray
    limit: float
    least: int = 0
    scored: int = 0


@dataclass(slots=True)
class Growth:
    """A round's whole drafting as data: what `frontier` would answer after each level, and then
    `select`.

    drafted: its trees are still empty. levels: at most. reach: levels to look ahead. widths,
    level_seconds: as for `frontier`. chooser: which will be asked to `select`, and grows the trees
    if it can."""

    chooser: Chooser
    drafted: Drafted
    ahead: LookAhead
    levels: int
    reach: int
    widths: IntArray
    level_seconds: FloatArray


class Chooser(Protocol):
    """Both calls score the trees (sets accept_prob) unless that is done. grows: whether a backend
    can have it follow a `Growth`, level by level, in one call."""

    grows: bool

    def frontier(
        self,
        drafted: Drafted,
        ahead: LookAhead,
        level: int,
        levels: int,
        widths: IntArray,
        level_seconds: FloatArray,
    ) -> IntArray:
        """Ascending indices of the nodes of `level` to expand next; none where no deeper tree beats
        stopping.

        levels: how many further ones to look ahead. widths: ascending numbers of nodes that may be
        expanded (no more than there are). level_seconds: seconds of a level of 0, 1, ... nodes."""
        ...

    def select(self, drafted: Drafted) -> tuple[IntArray, float, float]:
        """Ascending indices of the nodes to verify; tokens per second expected then; and accepted
        nodes expected."""
        ...


class NumpyChooser:
    """The reference."""

    grows = False

    def frontier(
        self,
        drafted: Drafted,
        ahead: LookAhead,
        level: int,
        levels: int,
        widths: IntArray,
        level_seconds: FloatArray,
    ) -> IntArray:
        """The first nodes by accept_prob, as many as the look-ahead says."""
        d = drafted
        trees = d.trees
        _score(d)
        nodes = expandable(trees, level, d.limits, d.ends)
        if not len(nodes):
            return nodes
        few = tuple(sorted({min(width, len(nodes)) for width in widths.tolist()}))
        accept_prob = trees.accept_prob.take(nodes)
        order = ranked(accept_prob)[: few[-1]]
        present = trees.accept_prob[useful(trees, d.limits, d.ends)]
        best = accept_prob.take(order)
        costs = LookAheadCosts(d.tokens, d.sunk, level_seconds.take(few), d.verify, d.limit)
        width = ahead.width(present, best, few, level, levels, costs)
        return np.sort(nodes.take(order[:width]))

    def select(self, drafted: Drafted) -> tuple[IntArray, float, float]:
        """The exact choice."""
        d = drafted
        trees = d.trees
        _score(d)
        nodes = np.flatnonzero(useful(trees, d.limits, d.ends))
        accept_prob = trees.accept_prob.take(nodes)
        order = ranked(accept_prob)
        gains = accept_prob.take(order)
        verify = d.verify[: len(nodes) + 1]
        least = min(d.least, len(nodes))
        size, rate = best_size(gains, d.tokens, d.sunk, verify, d.limit, least)
        return np.sort(nodes.take(order[:size])), rate, float(gains[:size].sum())


def _score(drafted: Drafted) -> None:
    if drafted.scored != len(drafted.trees):
        drafted.calibration.score(drafted.trees, drafted.kind)
