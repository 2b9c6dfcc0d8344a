"""The CPU kernels that choose tokens of logits, which are contiguous float32 rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.kernels.library import library
from smart_decoding.kernels.memory import address
from smart_decoding.kernels.ops import pointer

MOST_K = 64
NOT_DRAWN = -1
_DRAW = np.dtype(
    [(name, np.int64) for name in ("row", "seed", "sample", "position", "k")]
    + [(name, np.float64) for name in ("scale", "floor", "below")]
)


def argmax(x: Tensor, which: NDArray[np.int64]) -> NDArray[np.int64]:
    """First index of the largest entry of the rows `which` of x [rows, n]: [which]; -1 where it is
    not finite."""
    out = np.empty(len(which), np.int64)
    library().smart_argmax(
        x.data_ptr(),
        which.ctypes.data,
        len(which),
        x.shape[1],
        out.ctypes.data,
        torch.get_num_threads(),
    )
    return out


def top_k(
    x: Tensor,
    k: int,
    scale: Tensor | None = None,
    keys: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Ids (int64) and softmax probabilities of the k largest entries of x * scale (float32 [rows],
    default 1).

    Both are [rows, k]. keys (uint64 bits as int64 [rows]; 0: none): the noise of noise.py for
    `tokens` [n] is added to these rows' scores; their probabilities are the softmax of the k noisy
    scores."""
    scale = torch.ones(len(x)) if scale is None else scale
    ids = torch.empty(len(x), k, dtype=torch.int64)
    probs = torch.empty(len(x), k)
    library().smart_top_k(
        x.data_ptr(),
        len(x),
        x.shape[1],
        k,
        scale.data_ptr(),
        pointer(keys),
        pointer(tokens),
        ids.data_ptr(),
        probs.data_ptr(),
        torch.get_num_threads(),
    )
    return ids, probs


class Draw(NamedTuple):
    """What is drawn of a row, given by its address.

    Only among the k largest (0: all; at most MOST_K; NOT_DRAWN: the maximum is all that is wanted),
    those of at least `floor`, and of at least the maximum + `below`."""

    row: int
    seed: int
    sample: int
    position: int
    k: int
    scale: float
    floor: float
    below: float


class Drawn(NamedTuple):
    """best: [rows] first maximum, -1 where it is not finite. kept: [rows] the score below which
    top-k cuts. token: [rows] the token, -1 where the choice is too close for the kernels."""

    best: NDArray[np.int64]
    kept: NDArray[np.float64]
    token: NDArray[np.int64]


def draw(draws: Sequence[Draw], n: int) -> Drawn:
    """The argmax of row * scale + noise for rows of n float32, each as its `Draw` says."""
    count = len(draws)
    what = np.array(draws, _DRAW)
    drawn = Drawn(np.empty(count, np.int64), np.empty(count), np.empty(count, np.int64))
    library().smart_draw(address(what), count, n, *map(address, drawn), torch.get_num_threads())
    return drawn


def mass(
    row: NDArray[np.float32], best: float, scale: float, floor: float, value: float
) -> tuple[float, float]:
    """The sum of exp((row - best) * scale) over the entries of at least `floor`, and over those of
    them beyond `value`, to about 1e-6."""
    out = np.empty(2)
    library().smart_mass(address(row), len(row), best, scale, floor, value, address(out))
    return float(out[0]), float(out[1])
