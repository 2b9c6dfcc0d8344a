"""The published SMART rule (Wang & Zhou, arXiv 2604.09731), as far as it is known, to compare with.

The rule itself is `selection.MarginalRatio`: a candidate is kept iff its expected gain over its
cost exceeds the present ratio. Each request has an even share of the budget. C_spec is the fitted
family below. c_T, the seconds of a plain round, is on both sides and cancels.

The paper's text leaves some choices open; these are ours. L starts at 1 (the bonus token). If costs
are fitted through the origin, the first candidate is kept, since C_spec(0) = 0 leaves the rule
undefined. Costs are fitted at the present batch size and context, on five sizes of whole trees: the
paper uses about five forward passes. C_draft(n) is fitted on trees of n nodes a request, as deep as
allowed and equally wide at each level (`level_widths`). C_verify(n) is fitted on the rows of their
verification. The number of levels matters to the fit; their widths hardly do.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.costs import CostModel
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
    from smart_decoding.core.batch import BatchState
    from smart_decoding.core.policies.base import TokenIds
    from smart_decoding.core.tree import FloatArray, IntArray

# --- the published cost families ------------------------------------------------------------------
#
# The cost families of the SMART paper (Wang & Zhou, arXiv 2604.09731), for the policy `paper` only.
#
#     C_draft(n) = lambda n + beta          C_verify(n) = gamma (exp(delta n^rho) - 1) + eta
#
# n is the number of drafted nodes of one request. As published beta = eta = 0; `offsets` fits them
# too.


_MAX_EXPONENT = 50.0
GRID = 129  # values of each of the two searched constants
ZOOMS = 8
SHRINK = 0.25


@dataclass(frozen=True, slots=True)
class PaperCosts:
    """Fitted constants, in seconds per round."""

    lam: float
    beta: float
    gamma: float
    delta: float
    rho: float
    eta: float

    def seconds(self, nodes: int) -> float:
        """Return C_spec of a tree of `nodes` nodes."""
        if nodes <= 0:
            return self.beta + self.eta
        exponent = min(self.delta * math.pow(nodes, self.rho), _MAX_EXPONENT)
        return self.lam * nodes + self.beta + self.gamma * math.expm1(exponent) + self.eta

    def slope(self, nodes: int) -> float:
        """Return d C_spec / d n at `nodes` >= 1, which is
        lambda + gamma delta rho n^(rho - 1) exp(delta n^rho)."""
        n = max(nodes, 1)
        exponent = min(self.delta * math.pow(n, self.rho), _MAX_EXPONENT)
        power = self.gamma * self.delta * self.rho * math.pow(n, self.rho - 1)
        return self.lam + power * math.exp(exponent)

    @classmethod
    def fit(
        cls, nodes: FloatArray, draft: FloatArray, verify: FloatArray, offsets: bool
    ) -> PaperCosts:
        """Fit by least squares to measured (nodes, draft seconds, verify seconds), arrays of shape
        [samples], nodes >= 1."""
        n = np.asarray(nodes, np.float64)
        columns = np.stack((n, np.ones_like(n)), axis=1) if offsets else n[:, None]
        line = np.linalg.lstsq(columns, np.asarray(draft, np.float64), rcond=None)[0]
        gamma, delta, rho, eta = _fit_verify(n, np.asarray(verify, np.float64), offsets)
        beta = float(line[1]) if offsets else 0.0
        return cls(float(max(line[0], 0.0)), beta, gamma, delta, rho, eta)


def _fit_verify(
    n: FloatArray, seconds: FloatArray, offsets: bool
) -> tuple[float, float, float, float]:
    """Return gamma, delta, rho and eta by least squares. For each delta and rho the best gamma and
    eta >= 0 follow. Delta and rho are searched on a grid, which is narrowed around its best point
    ZOOMS times."""
    low = np.array([-12.0, -4.0])  # of the logarithms of delta and rho
    high = np.array([3.0, 0.7])
    centre, reach = (low + high) / 2, (high - low) / 2
    for _ in range(ZOOMS):
        ends = np.clip([centre - reach, centre + reach], low, high)
        axes = np.exp(np.linspace(ends[0], ends[1], GRID))
        delta, rho = axes[:, :1, None], axes[:, 1, None]
        grown = np.expm1(np.minimum(delta * n**rho, _MAX_EXPONENT))  # [delta, rho, samples]
        gamma = grown @ seconds / (grown**2).sum(axis=-1)
        eta = np.zeros_like(gamma)
        if offsets:
            mean = grown.mean(axis=-1)
            about = grown - mean[..., None]
            squares = np.maximum((about**2).sum(axis=-1), np.finfo(float).tiny)
            slope = np.maximum(about @ seconds / squares, 0.0)
            free = seconds.mean() - slope * mean
            gamma = np.where(free > 0, slope, gamma)
            eta = np.maximum(free, 0.0)
        errors = ((gamma[..., None] * grown + eta[..., None] - seconds) ** 2).sum(axis=-1)
        at = np.unravel_index(np.argmin(errors), errors.shape)
        best = (gamma[at], axes[at[0], 0], axes[at[1], 1], eta[at])
        centre = np.log(best[1:3])
        reach = reach * SHRINK
    gamma_, delta_, rho_, eta_ = map(float, best)
    return gamma_, delta_, rho_, eta_


FIT_NODES = (1, 4, 16, 32, 64)  # of a request, in the trees that costs are fitted on
FAMILIES = {"published": False, "offset": True}
L_TREES = ("published", "node_sum")


class Paper(StatelessPolicy):
    """Follows the published rule. alpha: trust in the drafter. budget: nodes over the whole batch.
    family: cost functions through the origin ('published') or with offsets ('offset'). l_tree: mean
    over paths ('published') or sum over nodes ('node_sum')."""

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
        self._cost = cost or CostModel.default()
        self.alpha = require_number("alpha", alpha, 0.0, 1.0)
        self.budget = require_int("budget", budget, 1, 100_000)
        self.offsets = FAMILIES[family]
        self.mean_over_paths = l_tree == "published"
        self.max_levels = require_int("max_levels", max_levels, 1, 64)
        self.children = require_int("children", children, 1, 256)
        self._ends = token_array(eos_token_ids)
        self._rules: dict[tuple[int, int], MarginalRatio] = {}

    @property
    def cost(self) -> CostModel:
        """The costs that rules are fitted to."""
        return self._cost

    @cost.setter
    def cost(self, model: CostModel) -> None:
        self._cost = model
        self._rules.clear()

    def plan(self, batch: BatchState) -> TreeRule | None:
        """Return the rule, with as many levels as the longest request may use."""
        rule = self._rule(batch)
        return TreeRule.of(batch.limits, self.max_levels, self.children, self._ends, rule, rule)

    def _rule(self, batch: BatchState) -> MarginalRatio:
        """Return the rule at the fitted costs of this batch size and of a rounded context."""
        context = int(batch.mean_context) // 256 * 256 + 128
        key = (batch.size, context)
        if key not in self._rules:
            costs = fitted_costs(self._cost, batch.size, context, self.max_levels, self.offsets)
            sizes = range(max(1, self.budget // batch.size) + 1)
            spent = np.array([costs.seconds(n) for n in sizes])
            step = np.array([costs.slope(n) for n in sizes])
            self._rules[key] = MarginalRatio(self.alpha, spent, step, self.mean_over_paths)
        return self._rules[key]


def level_widths(nodes: int, levels: int) -> IntArray:
    """Return the number of nodes of each level, in the tree of `nodes` that costs are fitted on."""
    deep = min(nodes, levels)
    return nodes // deep + (np.arange(deep) < nodes % deep)


def fitted_costs(
    cost: CostModel, batch: int, context: float, levels: int, offsets: bool
) -> PaperCosts:
    """Return the paper's families, in seconds of a round of `batch` requests. They are fitted on
    trees of FIT_NODES nodes a request in at most `levels` levels."""
    draft = []
    for nodes in FIT_NODES:
        expanded = batch * level_widths(nodes, levels)[:-1]
        draft.append(sum(cost.levels_seconds(batch, [batch, *expanded.tolist()], context)))
    sizes = np.array(FIT_NODES)
    verify = cost.verify_seconds(batch, batch * (1 + sizes), context)
    return PaperCosts.fit(sizes.astype(np.float64), np.array(draft), verify, offsets)
