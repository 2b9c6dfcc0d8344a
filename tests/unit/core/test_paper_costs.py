"""The paper's cost families by hand, and what C_draft is fitted on."""

import math

import numpy as np
import pytest

from smart_decoding.core.costs import CostModel, Curve
from smart_decoding.core.policies.paper import (
    FIT_NODES,
    Paper,
    PaperCosts,
    fitted_costs,
)


def test_family_through_the_origin() -> None:
    """lambda = 1 ms, gamma = 20 ms, delta = 0.5, rho = 1.

    C(2) = 2 + 20 (e - 1) = 2 + 34.36564 ms; C'(2) = 1 + 20 * 0.5 * e = 28.18282 ms a node."""
    costs = PaperCosts(0.001, 0.0, 0.02, 0.5, 1.0, 0.0)
    assert costs.seconds(0) == 0.0
    assert costs.seconds(2) == pytest.approx(0.03636564, abs=1e-8)
    assert costs.slope(2) == pytest.approx(0.02818282, abs=1e-8)


def test_family_with_offsets() -> None:
    """beta = 3 ms and eta = 10 ms are added to the value, nothing to the derivative."""
    costs = PaperCosts(0.001, 0.003, 0.02, 0.5, 1.0, 0.01)
    assert costs.seconds(0) == pytest.approx(0.013)
    assert costs.seconds(2) == pytest.approx(0.04936564, abs=1e-8)
    assert costs.slope(2) == pytest.approx(0.02818282, abs=1e-8)


def test_exponent_rho() -> None:
    """rho = 0.5, delta = 0.25, n = 16: delta n^rho = 1, C = 16 + 20 (e - 1) = 50.36564 ms.

    C' = 1 + 20 * 0.25 * 0.5 * 16^-0.5 * e = 1 + 0.625 e = 2.69893 ms a node."""
    costs = PaperCosts(0.001, 0.0, 0.02, 0.25, 0.5, 0.0)
    assert costs.seconds(16) == pytest.approx(0.05036564, abs=1e-8)
    assert costs.slope(16) == pytest.approx(0.00269893, abs=1e-8)


@pytest.mark.parametrize("rho", [0.4, 1.0, 1.3])
def test_slope_is_the_derivative(rho: float) -> None:
    costs = PaperCosts(0.001, 0.003, 0.02, 0.01, rho, 0.01)
    slope = (costs.seconds(51) - costs.seconds(49)) / 2
    assert slope == pytest.approx(costs.slope(50), rel=1e-3)


def test_lambda_is_least_squares() -> None:
    """Through the origin: lambda = (1 * 2 + 2 * 3) / (1 + 4) = 1.6. With an offset: the line
    through both, lambda = 1 and beta = 1."""
    nodes = np.array([1.0, 2.0])
    verify = np.array([1.0, 1.5])
    origin = PaperCosts.fit(nodes, np.array([2.0, 3.0]), verify, False)
    assert (origin.lam, origin.beta, origin.eta) == (pytest.approx(1.6), 0.0, 0.0)
    offset = PaperCosts.fit(nodes, np.array([2.0, 3.0]), verify, True)
    assert (offset.lam, offset.beta) == (pytest.approx(1.0), pytest.approx(1.0))


@pytest.mark.parametrize("offsets", [False, True])
def test_verification_is_recovered(offsets: bool) -> None:
    """Samples of the family itself give the family back."""
    nodes = np.array([1.0, 4.0, 16.0, 32.0, 64.0])
    eta = 0.02 if offsets else 0.0
    verify = 0.01 * np.expm1(0.03 * nodes) + eta
    fitted = PaperCosts.fit(nodes, 0.001 * nodes, verify, offsets)
    for n, seconds in zip(nodes, verify, strict=True):
        assert fitted.seconds(int(n)) == pytest.approx(0.001 * n + seconds, rel=0.01)
    assert fitted.slope(32) == pytest.approx(0.001 + 0.01 * 0.03 * math.exp(0.96), rel=0.05)


# A level of w rows takes 1 + 0.1 w ms; a first level of r requests 3 + 0.5 r ms.
LEVELS = CostModel(
    verify={1: Curve((1, 500), (20e-3, 20e-3))},
    draft=Curve((1, 201), (1.1e-3, 21.1e-3)),
    first=Curve((1, 11), (3.5e-3, 8.5e-3)),
    waiting=Curve((0, 10), (0.0, 1e-3)),
)


def test_drafting_is_fitted_on_whole_trees() -> None:
    """Two requests, trees in up to 4 levels, sizes 1, 4, 16, 32, 64; the first level takes 4 ms.

    Levels beyond the first expand 2 w rows: none; 3 of 2; 3 of 8; 3 of 16; 3 of 32. Drafting takes
    4; 4 + 3 * 1.2 = 7.6; 4 + 3 * 1.8 = 9.4; 4 + 3 * 2.6 = 11.8; 4 + 3 * 4.2 = 16.6 ms.

    Through the origin: sum n d = 4 + 30.4 + 150.4 + 377.6 + 1062.4 = 1624.8, sum n^2 = 5393,
    lambda = 0.301280 ms. One level of 2 n rows would be 4 ms and 0.2 ms for each further node, and
    flat trees of one level no more than 4 ms.

    With an offset: mean n = 23.4, mean d = 9.88; covariance 1624.8 / 5 - 23.4 * 9.88 = 93.768,
    variance 5393 / 5 - 23.4^2 = 531.04: lambda = 0.176574 ms, beta = 9.88 - 23.4 * 0.176574 =
    5.748165 ms."""
    assert FIT_NODES == (1, 4, 16, 32, 64)
    origin = fitted_costs(LEVELS, 2, 100, 4, False)
    assert origin.lam == pytest.approx(0.301280e-3, rel=1e-5)
    offset = fitted_costs(LEVELS, 2, 100, 4, True)
    assert offset.lam == pytest.approx(0.176574e-3, rel=1e-5)
    assert offset.beta == pytest.approx(5.748165e-3, rel=1e-5)


def test_verification_is_fitted_on_all_rows() -> None:
    """Three requests with n nodes each are 3 (1 + n) rows; a row takes 1 ms here, so C_verify(16) =
    51 ms, to within the family's shape."""
    rows = CostModel.from_table({1: {1: 1e-3, 300: 300e-3}}, {1: 1e-9, 300: 1e-9})
    fitted = fitted_costs(rows, 3, 100, 1, True)
    assert fitted.seconds(16) == pytest.approx(51e-3, rel=0.03)


def test_values_of_the_policy() -> None:
    """alpha = 0.8, as published; the budget is of the batch."""
    policy = Paper()
    assert (policy.alpha, policy.budget) == (0.8, 200)
    assert policy.offsets is False
    assert policy.mean_over_paths is True
