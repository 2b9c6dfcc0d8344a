"""The published SMART rule (Wang & Zhou, arXiv 2604.09731), as far as it is known, to compare with.

Level by level each candidate u, most probable first, is kept iff

    alpha * c_T * ΔL(u) / ΔC_spec(n) > c_T * L / C_spec(n),

n being the nodes of the request's tree so far; kept candidates are the next level's parents. Each
request has an even share of the budget. C_spec is the fitted family (paper_costs.py); c_T is the
seconds of a plain round at this batch.

Where the paper's text is silent: L starts at 1 (the bonus token); the first candidate is
kept while the costs are fitted through the origin, since C_spec(0) = 0 leaves the rule undefined;
sizes are fitted at batch size and context of the moment, on tree sizes spread like the paper's
about five forward passes.
"""

from __future__ import annotations

import numpy as np

from smart_decoding.core.cost import CostModel
from smart_decoding.core.paper_costs import PaperCosts
from smart_decoding.core.policies.common import (
    TokenIds,
    depth_limits,
    expandable,
    require_int,
    require_number,
    useful,
)
from smart_decoding.core.policies.protocol import OFF, BatchState, DraftPlan, StatelessPolicy
from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.errors import ConfigError

FIT_NODES = (1, 4, 16, 32, 64)
FAMILIES = {"published": False, "offset": True}
L_TREES = ("published", "node_sum")


class _Tree:
    """One request's tree so far: size, paths, expected length L, and which nodes have children."""

    def __init__(self) -> None:
        self.nodes = 0
        self.paths = 0
        self.length = 1.0
        self.inner: set[int] = set()


class Paper(StatelessPolicy):
    """The published rule. alpha: trust in the drafter. budget: nodes over the whole batch. family:
    cost functions through the origin ('published') or with offsets ('offset'). l_tree: mean over
    paths, or sum over nodes."""

    name = "paper"

    def __init__(
        self,
        cost: CostModel | None = None,
        alpha: float = 0.8,
        budget: int = 200,
        family: str = "published",
        l_tree: str = "published",
        max_levels: int = 8,
        children: int = 8,
        eos_token_ids: TokenIds = (),
    ) -> None:
        if family not in FAMILIES:
            raise ConfigError(f"family must be one of {', '.join(FAMILIES)}, not {family!r}")
        if l_tree not in L_TREES:
            raise ConfigError(f"l_tree must be one of {', '.join(L_TREES)}, not {l_tree!r}")
        self.cost: CostModel = cost or CostModel.default()
        self.alpha = require_number("alpha", alpha, 0.0, 1.0)
        self.budget = require_int("budget", budget, 1, 100_000)
        self.offsets = FAMILIES[family]
        self.mean_over_paths = l_tree == "published"
        self.max_levels = require_int("max_levels", max_levels, 1, 64)
        self.children = require_int("children", children, 1, 256)
        self.eos = frozenset(eos_token_ids)
        self._fits: dict[tuple[int, int], tuple[PaperCosts, float]] = {}
        self._trees: list[_Tree] = []
        self._kept: list[int] = []
        self._tested = 0

    def plan(self, batch: BatchState) -> DraftPlan:
        """As many levels as the longest request may use; trees begin anew."""
        limits = depth_limits(batch)
        levels = min(self.max_levels, int(limits.max(initial=0)))
        self._trees = [_Tree() for _ in range(batch.size)]
        self._kept = []
        self._tested = 0
        return DraftPlan(True, levels, self.children, batch.size * self.children) if levels else OFF

    def frontier(
        self, plan: DraftPlan, batch: BatchState, trees: DraftTrees, level: int
    ) -> IntArray | None:
        """The nodes of the level that the rule keeps."""
        kept = self._test_new(batch, trees)
        if level >= plan.levels or not kept:
            return None
        nodes = np.intersect1d(expandable(trees, level, depth_limits(batch), self.eos), kept)
        return nodes if len(nodes) else None

    def select(self, plan: DraftPlan, batch: BatchState, trees: DraftTrees) -> IntArray:
        """All nodes that the rule kept."""
        self._test_new(batch, trees)
        return np.sort(np.array(self._kept, np.int64))

    def _test_new(self, batch: BatchState, trees: DraftTrees) -> list[int]:
        """Applies the rule to nodes drafted since the last call, most probable first; returns those
        kept now."""
        first = self._tested
        self._tested = len(trees)
        if first == len(trees):
            return []
        worth = np.flatnonzero(useful(trees, depth_limits(batch), self.eos))
        worth = worth[worth >= first]
        costs, plain = self._costs(batch)
        share = max(1, self.budget // batch.size)
        before = set(self._kept)
        kept: list[int] = []
        for node in worth[np.lexsort((worth, -trees.path_prob[worth]))]:
            parent = int(trees.parent[node])
            tree = self._trees[trees.owner[node]]
            if tree.nodes >= share or (parent != ROOT and parent not in before):
                continue
            if self._keep(tree, parent, float(trees.path_prob[node]), costs, plain):
                kept.append(int(node))
                before.add(int(node))
        self._kept += kept
        return kept

    def _keep(
        self, tree: _Tree, parent: int, path_prob: float, costs: PaperCosts, plain: float
    ) -> bool:
        extends_leaf = parent != ROOT and parent not in tree.inner
        paths = tree.paths + (not extends_leaf)
        gain = path_prob / (paths if self.mean_over_paths else 1)
        spent = costs.seconds(tree.nodes)
        step = costs.slope(tree.nodes + 1)
        if spent > 0 and self.alpha * plain * gain * spent <= plain * tree.length * step:
            return False
        tree.nodes += 1
        tree.paths = paths
        tree.length += gain
        tree.inner.add(parent)
        return True

    def _costs(self, batch: BatchState) -> tuple[PaperCosts, float]:
        """The fitted family and the plain round's seconds at this batch size and (coarsely)
        context."""
        context = int(batch.context.mean()) // 256 * 256 + 128
        key = (batch.size, context)
        if key not in self._fits:
            cost = self.cost
            size = batch.size
            nodes = np.array(FIT_NODES)
            verify = cost.verify_seconds(size, size * (1 + nodes), context)
            draft = cost.draft_seconds(size * nodes, context)
            draft += cost.first_seconds(size, 0, context) - cost.draft_seconds(size, context)
            plain = float(cost.verify_seconds(size, size, context))
            fitted = PaperCosts.fit(nodes.astype(np.float64), draft, verify, self.offsets)
            self._fits[key] = (fitted, plain)
        return self._fits[key]
