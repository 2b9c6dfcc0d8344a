"""The keyed noise: its distribution, its independence along every axis, and golden values that hold
it still."""

import numpy as np
import pytest
from scipy import stats

from smart_decoding.models.sampling.noise import (
    BITS,
    G_MAX,
    G_MIN,
    fewest_bits,
    gumbel,
    gumbel_of_bits,
    noise_key,
    uniform_bits,
)

N = 100_000

GOLDEN_KEYS = [2558736989570252433, 7125996428116321486, 14223306778419486747, 2382355835852487523]
GOLDEN_BITS = [62834013, 1176987144, 3260808359, 3888634868]
GOLDEN_GUMBEL = [-1.4409488439559937, -0.2581137418746948, 1.289280891418457, 2.308746337890625]


def test_golden_values_never_change():
    assert [
        int(k) for k in np.ravel(noise_key([0, 1, -5, 2**63 - 1], [0, 1, 2, 3], [0, 7, 100, 4095]))
    ] == GOLDEN_KEYS
    assert uniform_bits(noise_key(42, 0, 3), [0, 1, 49151, 128255]).tolist() == GOLDEN_BITS
    assert gumbel(noise_key(42, 0, 3), [0, 1, 49151, 128255]).tolist() == GOLDEN_GUMBEL


def axis_noise(axis: str) -> np.ndarray:
    """Noise along one axis, the others fixed; small consecutive integers, the hard case for a
    hash."""
    i = np.arange(N)
    seed, sample, position, token = (
        i if axis == name else 3 for name in ("seed", "sample", "position", "token")
    )
    return np.ravel(gumbel(noise_key(seed, sample, position), token))


AXES = ("seed", "sample", "position", "token")


@pytest.mark.parametrize("axis", AXES)
def test_noise_is_gumbel_along_every_axis(axis):
    assert stats.kstest(axis_noise(axis), stats.gumbel_r.cdf).pvalue > 1e-3


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("lag", [1, 2, 3, 64])
def test_neighbours_along_an_axis_are_uncorrelated(axis, lag):
    ranks = stats.gumbel_r.cdf(axis_noise(axis))
    assert abs(np.corrcoef(ranks[:-lag], ranks[lag:])[0, 1]) < 4.5 / np.sqrt(N)


@pytest.mark.parametrize("changed", [0, 1, 2])
def test_rows_whose_keys_differ_in_one_part_are_jointly_uniform(changed):
    base = [11, 2, 9]
    other = [11, 2, 9]
    other[changed] += 1
    tokens = np.arange(N)
    a, b = (uniform_bits(noise_key(*key), tokens) >> np.uint64(BITS - 4) for key in (base, other))
    counts = np.bincount((a * np.uint64(16) + b).astype(np.int64), minlength=256)
    assert stats.chisquare(counts).pvalue > 1e-3


def test_the_parts_of_a_key_are_not_interchangeable():
    keys = [
        int(noise_key(*k))
        for k in [(1, 2, 3), (1, 3, 2), (2, 1, 3), (3, 2, 1), (1, 2, 4), (0, 0, 0), (0, 0, 1)]
    ]
    assert len(set(keys)) == len(keys)


def test_noise_broadcasts_keys_over_tokens():
    keys = noise_key(5, 0, np.arange(4))
    tokens = np.arange(7)
    table = gumbel(keys[:, None], tokens)
    assert table.shape == (4, 7)
    assert table.dtype == np.float32
    assert table[2, 5] == gumbel(noise_key(5, 0, 2), 5)


def test_the_extremes_of_the_noise_are_known_and_finite():
    low, high = gumbel_of_bits([0, 2**BITS - 1])
    assert (float(low), float(high)) == (G_MIN, G_MAX)
    assert np.isfinite([G_MIN, G_MAX]).all()
    assert 22 < G_MAX < 23


def test_fewest_bits_is_a_safe_and_close_bound():
    rng = np.random.default_rng(0)
    for noise in [*rng.uniform(G_MIN, G_MAX, 300), G_MIN - 1, G_MAX, G_MAX + 2]:
        bits = fewest_bits(noise)
        if bits > 0:
            assert gumbel_of_bits(bits - 1) < noise
        if (
            bits < 2**BITS and noise < 15
        ):  # close: only a few parts in 1e4 more candidates than needed
            assert gumbel_of_bits(min(bits + 2**BITS // 1000, 2**BITS - 1)) >= noise or bits == 0
