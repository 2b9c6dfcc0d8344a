"""The cost families of the SMART paper (Wang & Zhou, arXiv 2604.09731), for the policy `paper`
only.

    C_draft(n) = lambda n + beta          C_verify(n) = gamma (exp(delta n^rho) - 1) + eta

n is the number of drafted nodes of one request. As published beta = eta = 0; `offsets` fits them
too.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

_MAX_EXPONENT = 50.0


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
    """gamma, delta, rho and eta: the best of several starts, over the logarithms of all four."""
    scale = float(np.mean(seconds))

    def residual(x: FloatArray) -> FloatArray:
        exponent = np.minimum(np.exp(x[1]) * n ** np.exp(x[2]), _MAX_EXPONENT)
        eta = np.exp(x[3]) if offsets else 0.0
        result: FloatArray = np.exp(x[0]) * np.expm1(exponent) + eta - seconds / scale
        return result

    free = 4 if offsets else 3
    starts = itertools.product((-2.0, 0.0), (-4.0, -1.0), (-1.0, 0.0), (-1.0,))
    bounds = ([-12.0, -12.0, -4.0, -12.0][:free], [6.0, 3.0, 0.7, 3.0][:free])
    from scipy.optimize import least_squares  # imported late: it takes half a second

    fits = [least_squares(residual, start[:free], bounds=bounds) for start in starts]
    best = min(fits, key=lambda fit: float(fit.cost)).x
    gamma, delta, rho = (float(v) for v in np.exp(best[:3]))
    return gamma * scale, delta, rho, float(np.exp(best[3])) * scale if offsets else 0.0
