"""Whether to draft deeper, and how wide: the value of stopping against every (further levels,
width) by forecast.

Looking one level ahead is not enough: a first level may pay only together with the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from smart_decoding.core.choice import NONE, best_rates
from smart_decoding.core.forecast import expected_subtree
from smart_decoding.core.tree import FloatArray

RANKS = 4  # forecast children of each node; the others bring next to nothing


@dataclass(frozen=True, slots=True)
class LookAheadCosts:
    """tokens: of a plain round. sunk: seconds of drafting so far. levels: [widths] seconds of a
    level of each width. verify: seconds of verifying 0, 1, ... candidates, at least
    `LookAhead.columns(...) + 1` of them. limit: seconds that the round may last."""

    tokens: float
    sunk: float
    levels: FloatArray
    verify: FloatArray
    limit: float


class LookAhead:
    """Forecasts below a frontier, from the mean children [depth, rank] (`Forecast.children`).

    What does not depend on the drafted nodes is computed once per (level, further levels, widths)
    and kept."""

    def __init__(self, children: FloatArray) -> None:
        self.children = children
        self._tables: dict[tuple[int, int], FloatArray] = {}
        self._below: dict[tuple[int, int], FloatArray] = {}
        self._by_option: dict[tuple[int, int, tuple[int, ...]], FloatArray] = {}

    def width(
        self,
        present: FloatArray,
        frontier: FloatArray,
        widths: tuple[int, ...],
        level: int,
        ahead: int,
        costs: LookAheadCosts,
    ) -> int:
        """How many nodes of the sorted `frontier` [max(widths)] to expand next: 0 where no deeper
        tree beats stopping.

        present: accept_prob of the candidates there are, in any order."""
        below = self._losses(level, ahead, widths)
        options = len(below)
        candidates = len(present) + below.shape[1] * below.shape[2]
        losses = np.full((options + 1, candidates), NONE)  # the last option: stop
        np.negative(present, out=losses[:, : len(present)])
        losses[:options, len(present) :] = (below * frontier[:, None]).reshape(options, -1)
        sunk = np.full(options + 1, costs.sunk)
        sunk[:options] += np.multiply.outer(np.arange(1, ahead + 1), costs.levels).ravel()
        losses.sort(axis=1)
        verify = costs.verify[: candidates + 1]
        rates = best_rates(losses, costs.tokens, sunk, verify, costs.limit)
        best = int(rates.argmax())
        return widths[best % len(widths)] if rates[best] > rates[-1] else 0

    def below(self, level: int, ahead: int) -> FloatArray:
        """[ahead * RANKS] forecast probabilities of the descendants of a node of `level`, given
        that node."""
        tree = self._below.get((level, ahead))
        if tree is None:
            tree = expected_subtree(self.children, level + 1, ahead, RANKS)
            self._below[level, ahead] = tree
        return tree

    def table(self, levels: int, reach: int) -> FloatArray:
        """[levels, reach * RANKS] `below` of levels 1, 2, ...; what looks less far ahead is the
        beginning of a row."""
        table = self._tables.get((levels, reach))
        if table is None:
            table = np.stack([self.below(level + 1, reach) for level in range(levels)])
            self._tables[levels, reach] = table
        return table

    @staticmethod
    def columns(present: int, frontier: int, ahead: int) -> int:
        """Candidates that a look-ahead scans."""
        return present + frontier * ahead * RANKS

    def _losses(self, level: int, ahead: int, widths: tuple[int, ...]) -> FloatArray:
        """[ahead * widths, frontier, ahead * RANKS] minus the forecast probability of each
        candidate below each frontier node, given that node; NONE where an option does not reach."""
        key = (level, ahead, widths)
        losses = self._by_option.get(key)
        if losses is None:
            tree = self.below(level, ahead)
            reached = np.arange(len(tree)) // RANKS < np.arange(1, ahead + 1)[:, None]
            expanded = np.arange(widths[-1]) < np.array(widths)[:, None]
            inside = reached[:, None, None, :] & expanded[None, :, :, None]
            losses = np.where(inside, -tree, NONE).reshape(-1, widths[-1], len(tree))
            self._by_option[key] = losses
        return losses
