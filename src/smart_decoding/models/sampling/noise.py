"""Sampling noise that is a pure function of (request seed, sample index, output position, token
id).

With it, the token drawn at a position depends on the target's logits there and on nothing else: not
on the tree, the batch, the round or the policy (Gumbel-max: argmax(score + Gumbel noise) is a draw
from softmax(score)). A drafter may rank by draft score plus the same noise. Counter-based as in
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); the mixer is the finaliser
of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014), and the bits of one key are that generator's
stream, indexed by the token. Computed in integers and float64, then rounded: the same everywhere.

The golden values of tests/unit/sampling/test_noise.py hold this function still: to change it
changes all answers.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

BITS = 32  # of the uniform; 24 would already distort tokens of probability 1e-6 by several per cent
_STEP = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: SplitMix64's increment

# about 22.87: no noise exceeds it
G_MAX = float(np.float32(-math.log(-math.log1p(-(0.5**BITS) / 2))))
G_MIN = float(np.float32(-math.log(-math.log(0.5**BITS / 2))))  # about -3.13: none is below


def noise_key(seed: ArrayLike, sample: ArrayLike, position: ArrayLike) -> NDArray[np.uint64]:
    """Return one 64-bit key per (seed, sample index, output position), broadcast; position 0 is the
    first output token."""
    with np.errstate(over="ignore"):
        key = _mix(_uint64(seed) + _STEP)
        key = _mix((key ^ _uint64(sample)) + _STEP)
        return np.asarray(_mix((key ^ _uint64(position)) + _STEP))


def uniform_bits(key: ArrayLike, token: ArrayLike) -> NDArray[np.uint64]:
    """32 uniform bits per (key, token id), broadcast."""
    with np.errstate(over="ignore"):
        stream = _uint64(token) * _STEP
        return np.asarray(_mix(stream + (_uint64(key) + _STEP)) >> np.uint64(64 - BITS))


def gumbel_of_bits(bits: ArrayLike) -> NDArray[np.float32]:
    """Gumbel(0, 1) noise, in [G_MIN, G_MAX]; increasing in the bits."""
    # strictly inside (0, 1), exact in float64
    uniform = (np.asarray(bits, np.float64) + 0.5) * 0.5**BITS
    return np.asarray(-np.log(-np.log(uniform)), np.float32)


def gumbel(key: ArrayLike, token: ArrayLike) -> NDArray[np.float32]:
    """Gumbel(0, 1) noise per (key, token id), broadcast."""
    return gumbel_of_bits(uniform_bits(key, token))


def fewest_bits(noise: float) -> int:
    """Return a number of bits below which `gumbel_of_bits` is certainly less than `noise` (float32
    rounding included)."""
    if noise <= G_MIN:
        return 0
    slack = 1e-5  # noise is at most 23, so its float32 rounding is below 1e-6
    return max(math.floor(math.exp(-math.exp(slack - noise)) * 2.0**BITS) - 1, 0)


def _mix(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser, in place: `z` must be a fresh array."""
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def _uint64(x: ArrayLike) -> NDArray[np.uint64]:
    x = np.asarray(x)
    return x if x.dtype == np.uint64 else x.astype(np.int64).astype(np.uint64)
