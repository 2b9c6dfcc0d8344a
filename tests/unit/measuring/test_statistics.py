"""Paired ratios: exact where exact, the interval's coverage by simulation."""

import math

import numpy as np
import pytest
from scipy.special import stdtrit

from smart_decoding.measuring.statistics import Pair, paired_ratio, student_t


def test_equal_pairs_give_their_ratio_without_width():
    ratio = paired_ratio([Pair(30.0, 20.0, 10.0)] * 5)
    assert ratio.value == pytest.approx(1.5)
    assert (ratio.low, ratio.high) == (pytest.approx(1.5), pytest.approx(1.5))
    assert ratio.pairs == 5


def test_the_value_is_the_ratio_of_times_for_the_same_work():
    # 100 tokens at 10 and 30 at 10 take 13 s; at 20 and 5 tokens/s they take 5 s + 6 s.
    assert paired_ratio([Pair(20.0, 10.0, 100.0), Pair(5.0, 10.0, 30.0)]).value == pytest.approx(
        13 / 11
    )


def test_drift_of_the_machine_cancels_within_pairs():
    speed = np.linspace(100.0, 10.0, 20)
    ratio = paired_ratio([Pair(1.3 * s, s) for s in speed])
    assert ratio.low == pytest.approx(1.3)
    assert ratio.high == pytest.approx(1.3)


def test_no_pair_is_unknown_and_one_pair_bounds_nothing():
    assert math.isnan(paired_ratio([]).value)
    assert math.isnan(paired_ratio([Pair(float("nan"), 1.0), Pair(1.0, 0.0)]).value)
    one = paired_ratio([Pair(2.0, 1.0)])
    assert (one.value, one.low, one.high, one.pairs) == (2.0, 0.0, math.inf, 1)


def test_intervals_are_reproducible_and_contain_the_value():
    rng = np.random.default_rng(1)
    pairs = [
        Pair(float(x), 1.0, stratum=str(i % 3)) for i, x in enumerate(rng.lognormal(0.2, 0.3, 30))
    ]
    ratio = paired_ratio(pairs, seed=3)
    assert ratio == paired_ratio(pairs, seed=3)
    assert ratio.low < ratio.value < ratio.high


@pytest.mark.parametrize(("pairs", "strata"), [(12, 1), (12, 3), (6, 3), (3, 1), (3, 2), (2, 2)])
def test_the_interval_covers_the_truth_about_95_times_in_100(pairs, strata):
    rng, covered = np.random.default_rng(7), 0
    for _ in range(200):
        noisy = rng.lognormal(math.log(1.4), 0.1, pairs)
        # harmonic mean of a lognormal: exp(mu - sigma^2 / 2)
        ratio = paired_ratio(
            [Pair(x, 1.0, stratum=str(i % strata)) for i, x in enumerate(noisy)], resamples=400
        )
        covered += ratio.low <= 1.4 * math.exp(-(0.1**2) / 2) <= ratio.high
    assert (
        174 <= covered <= 200
    )  # a percentile bootstrap of a few covers a little less than it says


def test_strata_are_resampled_by_themselves():
    # Within a task all ratios agree, so only the mix of tasks could vary; strata keep the mix.
    pairs = [Pair(2.0, 1.0, stratum="a")] * 4 + [Pair(1.0, 1.0, stratum="b")] * 4
    assert paired_ratio(pairs).low == pytest.approx(4 / 3)
    mixed = paired_ratio([Pair(p.policy, p.baseline) for p in pairs])
    assert mixed.low < 1.3


def test_a_task_with_one_block_still_adds_variance():
    pairs = [Pair(2.0, 1.0, stratum="a"), Pair(1.0, 1.0, stratum="b")]
    ratio = paired_ratio(pairs)
    assert ratio.low < ratio.value < ratio.high


@pytest.mark.parametrize("share", [0.9, 0.975, 0.99])
@pytest.mark.parametrize("df", [1, 2, 7, 40, 500, 20_000])
def test_quantiles_of_students_t(df: int, share: float) -> None:
    assert student_t(df, share) == pytest.approx(stdtrit(df, share), rel=1e-9)
