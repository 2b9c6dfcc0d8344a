"""Cost tables: interpolation, fitting, correction, garbage, and speed."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import isotonic_regression, nnls

from smart_decoding.core.costs import (
    MEMORY,
    PRIOR,
    Correction,
    CostModel,
    DraftSample,
    ExpertCosts,
    Share,
    VerifySample,
    non_decreasing,
)
from smart_decoding.profiling.fit import fit_costs, non_negative

STAIRCASE = {1: 10.0, 4: 10.0, 5: 25.0, 6: 20.0, 8: 20.0}


def truth(batch: int, rows: int, context: float) -> float:
    return 0.02 + 0.001 * rows + 1e-8 * rows * context + 4e-7 * batch * context


def samples() -> list[VerifySample]:
    grid = [(b, b * r, c) for b in (1, 4) for r in (1, 2, 4, 8, 16) for c in (64, 1024)]
    return [VerifySample(b, r, c, truth(b, r, c)) for b, r, c in grid]


def test_explicit_table_is_taken_as_it_is() -> None:
    cost = CostModel.from_table({1: STAIRCASE}, {1: 1.0, 2: 3.0})
    np.testing.assert_allclose(
        cost.verify_seconds(1, [1, 2, 4, 5, 6, 7], 100), [10, 10, 10, 25, 20, 20]
    )
    np.testing.assert_allclose(cost.draft_seconds([1, 2], 100), [1, 3])


def test_extrapolates_linearly_beyond_the_last_row() -> None:
    cost = CostModel.from_table({1: {1: 1.0, 10: 10.0}})
    np.testing.assert_allclose(cost.verify_seconds(1, [20, 3000], 0), [20, 3000])


def test_batch_is_interpolated_in_log_space_and_held_outside() -> None:
    cost = CostModel.from_table({1: {8: 1.0}, 4: {8: 3.0}})
    assert [float(cost.verify_seconds(b, 8, 0)) for b in (1, 2, 4, 9)] == pytest.approx(
        [1, 2, 3, 3]
    )


def test_curve_is_verify_seconds_over_consecutive_rows() -> None:
    cost = fit_costs(samples()).corrected(VerifySample(2, 9, 300, 0.07))
    curve = cost.verify_curve(2, 3, 700, 300)
    np.testing.assert_allclose(curve, cost.verify_seconds(2, np.arange(3, 703), 300))


def test_fit_recovers_rows_batch_and_context() -> None:
    cost = fit_costs(samples())
    for batch, rows, context in ((1, 3, 500), (4, 24, 2000), (1, 16, 0)):
        assert float(cost.verify_seconds(batch, rows, context)) == pytest.approx(
            truth(batch, rows, context), rel=0.02
        )


@given(st.lists(st.floats(0.001, 1.0), min_size=2, max_size=8))
@settings(max_examples=40, deadline=None)
def test_fit_is_monotone_in_rows(seconds: list[float]) -> None:
    cost = fit_costs([VerifySample(1, 2 * i + 1, 0, s) for i, s in enumerate(seconds)])
    assert (np.diff(cost.verify_seconds(1, np.arange(1, 40), 0)) >= -1e-12).all()


def test_garbage_falls_back_to_the_default() -> None:
    bad = [VerifySample(1, 4, 10, math.nan), VerifySample(0, 4, 10, 1.0), DraftSample(2, 10, 0.0)]
    default = CostModel.default().verify_seconds(1, [1, 50], 10)
    for cost in (fit_costs([]), fit_costs(bad, overhead_seconds=math.nan)):
        np.testing.assert_array_equal(cost.verify_seconds(1, [1, 50], 10), default)
    cost = CostModel.default()
    assert all(cost.corrected(sample) is cost for sample in bad)


def test_correction_learns_shape_and_speed() -> None:
    cost = CostModel.from_table({1: {1: 1.0, 64: 3.0}}, {1: 0.1, 8: 0.1})
    for _ in range(400):
        for rows, seconds in ((1, 2.0), (16, 6.0)):
            cost = cost.corrected(VerifySample(1, rows, 0, seconds))
        cost = cost.corrected(DraftSample(4, 0, 0.3))
    assert float(cost.verify_seconds(1, 1, 0)) == pytest.approx(2.0, rel=0.03)
    assert float(cost.verify_seconds(1, 16, 0)) == pytest.approx(6.0, rel=0.03)
    assert float(cost.draft_seconds(4, 0)) == pytest.approx(0.3, rel=0.03)


def test_one_outlier_moves_little_and_a_new_speed_is_followed() -> None:
    cost = CostModel.from_table({1: {1: 1.0, 64: 2.0}})
    for _ in range(100):
        cost = cost.corrected(VerifySample(1, 8, 0, 1.1))
    before = float(cost.verify_seconds(1, 8, 0))
    assert (
        float(cost.corrected(VerifySample(1, 8, 0, 100.0)).verify_seconds(1, 8, 0)) < 1.1 * before
    )
    for _ in range(40):
        for rows, seconds in ((8, before), (64, 2.0)):
            cost = cost.corrected(VerifySample(1, rows, 0, 2 * seconds))
    assert float(cost.verify_seconds(1, 8, 0)) == pytest.approx(2 * before, rel=0.05)
    assert (
        float(cost.verify_seconds(1, 30, 0)) > 2.5
    )  # the shared speed reaches rows that were never timed


def test_a_state_of_the_memory_is_found_by_rounds_of_few_sizes() -> None:
    """Milliseconds of a shared CPU: in the table's state eight rows cost 10 % more than one, in the
    other 40 %."""
    cost = CostModel.from_table({1: {1: 5.7, 5: 6.0, 8: 6.4, 12: 7.0, 16: 7.6, 24: 9.6, 32: 11.6}})
    other = {6: 4.85, 8: 5.3, 9: 5.5, 10: 5.7}
    rng = np.random.default_rng(0)
    for _ in range(60):
        rows = int(rng.choice(list(other)))
        cost = cost.corrected(
            VerifySample(1, rows, 0, other[rows] * float(np.exp(rng.normal() * 0.03)))
        )
    # Neither count of rows was measured.
    assert float(cost.verify_seconds(1, 4, 0)) == pytest.approx(4.45, rel=0.06)
    assert float(cost.verify_seconds(1, 1, 0)) == pytest.approx(3.8, rel=0.15)
    assert float(cost.verify_seconds(1, 24, 0)) == pytest.approx(9.6, rel=0.06)


def levels() -> list[DraftSample]:
    first = [DraftSample(roots, 100, 4e-4 + 2e-5 * roots, 0) for roots in (1, 2, 8)]
    waiting = [DraftSample(1, 100, 4.2e-4 + 1e-5 * n, n) for n in (1, 8, 64)]
    return [
        *first,
        *waiting,
        *(DraftSample(width, 100, 2e-4 + 3e-5 * width) for width in (1, 2, 8, 16)),
    ]


def test_a_profile_in_which_a_larger_batch_is_faster_can_be_corrected() -> None:
    """Noise can make one row of one request take longer than two of two."""
    verify = {1: [[1, 4], [0.010, 0.012]], 2: [[2, 8], [0.004, 0.006]]}
    model = CostModel.from_dict({**CostModel.default().to_dict(), "verify": verify})
    for _ in range(60):
        model = model.corrected(VerifySample(2, 2, 0.0, 0.0015))
        model = model.corrected(VerifySample(1, 4, 0.0, 0.012))
    assert 0.001 < float(model.verify_seconds(2, 2, 0.0)) < 0.004
    assert (model.verify_curve(2, 2, 7, 0.0) > 0).all()


def test_the_first_level_and_what_waits_for_it_are_apart_from_deeper_levels() -> None:
    cost = fit_costs([*samples(), *levels()])
    assert cost.levels_seconds(2, [6, 4, 8], 100) == pytest.approx(
        [4.8e-4, 3.2e-4, 4.4e-4], rel=0.01
    )
    np.testing.assert_allclose(cost.first_seconds(1, [0, 30], 100), [4.2e-4, 7.2e-4], rtol=0.01)
    for _ in range(300):
        cost = cost.corrected(DraftSample(1, 100, 6e-4, 2))
    assert float(cost.first_seconds(1, 2, 100)) == pytest.approx(6e-4, rel=0.03)
    assert float(cost.draft_seconds(4, 100)) == pytest.approx(3.2e-4, rel=0.01)


def test_without_first_levels_rows_are_rows() -> None:
    cost = CostModel.from_table({1: STAIRCASE}, {1: 1.0, 2: 3.0, 4: 5.0})
    assert cost.levels_seconds(1, [4, 2], 0) == [5.0, 3.0]
    for _ in range(300):
        cost = cost.corrected(DraftSample(1, 0, 6.0, 1))
    assert float(cost.draft_seconds(2, 0)) == pytest.approx(6.0, rel=0.03)


def test_dict_round_trip() -> None:
    cost = fit_costs([*samples(), *levels()], overhead_seconds=1e-4)
    again = CostModel.from_dict(cost.to_dict())
    assert again.to_dict() == cost.to_dict()
    assert again.overhead_seconds == 1e-4
    with pytest.raises((KeyError, ValueError)):
        CostModel.from_dict({"verify": {}})


def test_least_squares_under_bounds_are_scipys() -> None:
    rng = np.random.default_rng(0)
    for trial in range(100):
        features = rng.normal(size=(2 + trial % 9, 2))
        if trial % 10 == 0:
            features[:, 1] = 2 * features[:, 0]
        targets = rng.normal(size=len(features))
        residual = float(np.linalg.norm(features @ non_negative(features, targets) - targets))
        assert residual == pytest.approx(nnls(features, targets)[1], abs=1e-9)
        values = rng.normal(size=1 + trial % 20)
        weights = rng.uniform(0.1, 1.0, len(values))
        expected = isotonic_regression(values, weights=weights).x
        assert non_decreasing(values, weights) == pytest.approx(expected)


def test_all_batches_tell_what_rows_cost() -> None:
    """Two forwards a point, each 15 % off: alone a batch is 11 % off in what rows add."""
    errors = []
    factors = []
    for seed in range(10):
        rng = np.random.default_rng(seed)
        batches = (1, 2, 4, 8, 16, 32)
        grid = [(b, b * r) for b in batches for r in (1, 2, 3, 4, 6, 8, 12) if b * r <= 96]
        noise = np.exp(0.15 * rng.normal(size=(2, len(grid))))
        cost = fit_costs(
            VerifySample(b, rows, 64, truth(b, rows, 64) * (1.1 if b == 4 else 1.0) * float(noisy))
            for each in noise
            for (b, rows), noisy in zip(grid, each, strict=True)
        )
        for b in batches:
            found = cost.verify_seconds(b, [3 * b, b], 64)
            errors.append(math.log(found[0] / found[1] / (truth(b, 3 * b, 64) / truth(b, b, 64))))
        factors.append(float(cost.verify_seconds(4, 16, 64) / cost.verify_seconds(8, 16, 64)))
    assert math.sqrt(np.mean(np.square(errors))) < 0.095
    assert np.mean(factors) == pytest.approx(1.1, rel=0.05)


def test_sizes_that_never_ran_do_not_drift() -> None:
    """What one row takes says the same of speed and memory: the filter must not wander between the
    two along a curve, which would change what many rows are believed to take."""
    rng = np.random.default_rng(1)
    true = CostModel.from_table({1: {1: 10.0, 64: 220.0}})
    cost = true
    for _ in range(1500):
        for rows in (1, 3):
            noise = float(np.exp(0.06 * rng.standard_normal()))
            seconds = noise * float(true.verify_seconds(1, rows, 0))
            cost = cost.corrected(VerifySample(1, rows, 0, seconds))
    many = float(cost.verify_seconds(1, 8, 0) / true.verify_seconds(1, 8, 0))
    assert many == pytest.approx(1.0, abs=0.08)


def test_what_is_never_observed_is_as_uncertain_as_it_was_and_no_more() -> None:
    """Thousands of rounds whose time the memory has no part in must not make one round of few rows
    say everything about it."""
    correction = Correction()
    for _ in range(4000):
        correction = correction.updated(0.1, 0.0, 0.1)
    variance = correction.covariance[MEMORY, MEMORY]
    assert variance == pytest.approx(PRIOR[MEMORY] ** 2, rel=1e-6)
    slower = correction.updated(0.05, 0.02, 0.055)
    assert slower.seconds(np.array([0.02]), 0.02)[0] < 1.5 * 0.02


EXPERTS = ExpertCosts(64, 4, 0.25)


def of_experts(experts: ExpertCosts = EXPERTS) -> CostModel:
    return replace(CostModel.from_table({1: {1: 10.0, 64: 16.3}}), experts=experts)


def test_a_mixtures_rows_cost_what_they_wake() -> None:
    cost = of_experts()
    awake = 64 * (1 - (1 - 4 / 64) ** 8)
    expected = 10.7 + 0.25 * (awake - 4)
    assert float(cost.verify_seconds(1, 8, 0)) == pytest.approx(expected)
    np.testing.assert_allclose(
        cost.verify_curve(2, 2, 40, 7), cost.verify_seconds(2, range(2, 42), 7)
    )
    assert float(cost.verify_seconds(1, 1, 0)) == pytest.approx(10.0)
    all_alike = of_experts(replace(EXPERTS, requests=Share(0.0), nodes=Share(0.0)))
    assert float(all_alike.verify_seconds(4, 64, 0)) == pytest.approx(16.3)
    again = CostModel.from_dict(cost.to_dict())
    assert again.experts == EXPERTS
    with pytest.raises(ValueError, match="experts"):
        CostModel.from_dict({**cost.to_dict(), "experts": {"count": 4, "per_row": 5, "seconds": 1}})


@given(st.integers(1, 8), st.integers(0, 64), st.floats(0, 1), st.floats(0, 1))
def test_more_rows_wake_more_experts(
    batch: int, nodes: int, requests: float, of_nodes: float
) -> None:
    experts = ExpertCosts(32, 4, 1.0, Share(requests), Share(of_nodes))
    awake = [float(experts.awake(batch, rows)) for rows in (batch, batch + nodes)]
    assert 4 - 1e-9 <= awake[0] <= awake[1] + 1e-9 <= 32 + 2e-9


def test_how_far_rows_share_experts_is_learned() -> None:
    truth = replace(EXPERTS, requests=Share(0.8), nodes=Share(0.4))
    real = of_experts(truth)
    cost = of_experts()
    rng = np.random.default_rng(0)
    for _ in range(60):
        for batch, rows in ((1, 1), (4, 4), (4, 12)):
            awake = float(truth.awake(batch, rows)) * float(np.exp(0.02 * rng.standard_normal()))
            seconds = float(real.verify_seconds(batch, rows, 0))
            cost = cost.corrected(VerifySample(batch, rows, 0, seconds, 1, awake))
    assert cost.experts is not None
    assert cost.experts.requests.value == pytest.approx(0.8, abs=0.1)
    assert cost.experts.nodes.value == pytest.approx(0.4, abs=0.1)
    assert float(cost.verify_seconds(4, 20, 0)) == pytest.approx(
        float(real.verify_seconds(4, 20, 0)), rel=0.06
    )
