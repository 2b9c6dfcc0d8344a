"""The exact choice: with the cost of a forward given for every number of rows, the best set of
nodes is a prefix of the candidates sorted by accept_prob, and one scan over the prefix sums finds
it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray, IntArray

NONE = math.inf  # in place of a loss: there is no candidate, and no size reaches so far
_ONE = np.float64(1.0).view(np.int64)


def ranked(accept_prob: FloatArray) -> IntArray:
    """Indices by falling probability ([n], in [0, 1]), ties to the lower index: parents come before
    their children.

    One integer sort: the bits of a non-negative float order like the float, and its lowest bits,
    beyond any meaning (a relative 2^-39 for 8192 candidates), carry the index."""
    mask = (1 << max(len(accept_prob) - 1, 1).bit_length()) - 1
    keys: IntArray = _ONE - accept_prob.view(np.int64)
    keys &= ~mask
    keys |= np.arange(len(keys))
    keys.sort()
    keys &= mask
    return keys


def best_size(
    gains: FloatArray,
    tokens: float,
    sunk: float,
    seconds: FloatArray,
    limit: float = math.inf,
    least: int = 0,
) -> tuple[int, float]:
    """(n, value): how many of the sorted `gains` [m] to verify for the most tokens per second, and
    that rate.

    value(n) = (tokens + gains[:n].sum()) / (sunk + seconds[n]); `seconds` is [m + 1], of any shape.
    Sizes beyond `limit` seconds are out, except n = 0; sizes below `least` are out. Ties go to the
    smaller n."""
    values = np.empty(len(gains) + 1)
    values[0] = 0.0
    np.cumsum(gains, out=values[1:])
    values += tokens
    total = seconds + sunk
    values /= total
    if limit < math.inf:
        values[1:][total[1:] > limit] = -1.0
    n = int(values[least:].argmax()) + least
    return n, float(values[n])


def best_rates(
    losses: FloatArray, tokens: float, sunk: FloatArray, seconds: FloatArray, limit: float
) -> FloatArray:
    """[options] what `best_size` reaches with each row of `losses` [options, m]: negated gains,
    ascending.

    NONE in it marks what is no candidate. sunk: [options]; seconds: [m + 1], as there."""
    rates = np.zeros((len(losses), losses.shape[1] + 1))
    np.cumsum(losses, axis=1, out=rates[:, 1:])
    total = sunk[:, None] + seconds
    np.subtract(tokens, rates, out=rates)
    rates /= total
    if limit < math.inf:
        rates[:, 1:][total[:, 1:] > limit] = -1.0
    result: FloatArray = rates.max(axis=1)
    return result
