"""The cost families of the SMART paper (Wang & Zhou, arXiv 2604.09731), for the policy `paper`
only.

    C_draft(n) = lambda n + beta          C_verify(n) = gamma (exp(delta n^rho) - 1) + eta

n is the number of drafted nodes of one request. As published beta = eta = 0; `offsets` fits them
too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

_MAX_EXPONENT = 50.0
GRID = 129  # values of each of the two constants that are searched
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
        """C_spec at a tree of `nodes` nodes."""
        if nodes <= 0:
            return self.beta + self.eta
        exponent = min(self.delta * math.pow(nodes, self.rho), _MAX_EXPONENT)
        return self.lam * nodes + self.beta + self.gamma * math.expm1(exponent) + self.eta

    def slope(self, nodes: int) -> float:
        """d C_spec / d n at `nodes` >= 1: lambda + gamma delta rho n^(rho - 1) exp(delta n^rho)."""
        n = max(nodes, 1)
        exponent = min(self.delta * math.pow(n, self.rho), _MAX_EXPONENT)
        power = self.gamma * self.delta * self.rho * math.pow(n, self.rho - 1)
        return self.lam + power * math.exp(exponent)

    @classmethod
    def fit(
        cls, nodes: FloatArray, draft: FloatArray, verify: FloatArray, offsets: bool
    ) -> PaperCosts:
        """Least squares over measured (nodes, draft seconds, verify seconds), arrays of shape
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
    """gamma, delta, rho and eta by least squares. For each delta and rho the best gamma and eta >=
    0 are known; these two are searched on a grid, which is laid ever closer around its best."""
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
