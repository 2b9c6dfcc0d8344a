"""The published SMART rule (Wang & Zhou, arXiv 2604.09731), as far as it is known, to compare with.

The rule itself is `selection.MarginalRatio`: a candidate is kept iff its expected gain over its
cost exceeds the present ratio. Each request has an even share of the budget. C_spec is the fitted
family (paper_costs.py). c_T, the seconds of a plain round, is on both sides and cancels.

Where the paper's text is silent: L starts at 1 (the bonus token); the first candidate is
kept while the costs are fitted through the origin, since C_spec(0) = 0 leaves the rule undefined;
sizes are fitted at batch size and context of the moment, on tree sizes spread like the paper's
about five forward passes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.cost import CostModel
from smart_decoding.core.paper_costs import PaperCosts
from smart_decoding.core.policies.base import (
    StatelessPolicy,
    require_int,
    require_number,
    token_array,
)
from smart_decoding.core.rule import TreeRule
from smart_decoding.core.selection import MarginalRatio
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.policies.base import BatchState, TokenIds

FIT_NODES = (1, 4, 16, 32, 64)
FAMILIES = {"published": False, "offset": True}
L_TREES = ("published", "node_sum")


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
        self._ends = token_array(eos_token_ids)
        self._rules: dict[tuple[int, int], MarginalRatio] = {}

    def plan(self, batch: BatchState) -> TreeRule | None:
        """As many levels as the longest request may use."""
        limits = batch.limits
        levels = min(self.max_levels, int(limits.max(initial=0)))
        if not levels:
            return None
        rule = self._rule(batch)
        return TreeRule(levels, self.children, limits, self._ends, rule, rule)

    def _rule(self, batch: BatchState) -> MarginalRatio:
        """The rule at the fitted costs of this batch size and (coarsely) context."""
        context = int(batch.context.mean()) // 256 * 256 + 128
        key = (batch.size, context)
        if key not in self._rules:
            costs = self._fit(batch.size, context)
            sizes = range(max(1, self.budget // batch.size) + 1)
            spent = np.array([costs.seconds(n) for n in sizes])
            step = np.array([costs.slope(n) for n in sizes])
            self._rules[key] = MarginalRatio(self.alpha, spent, step, self.mean_over_paths)
        return self._rules[key]

    def _fit(self, size: int, context: int) -> PaperCosts:
        cost = self.cost
        nodes = np.array(FIT_NODES)
        verify = cost.verify_seconds(size, size * (1 + nodes), context)
        draft = cost.draft_seconds(size * nodes, context)
        draft += cost.first_seconds(size, 0, context) - cost.draft_seconds(size, context)
        return PaperCosts.fit(nodes.astype(np.float64), draft, verify, self.offsets)
