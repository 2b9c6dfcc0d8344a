"""The CPU kernels that choose tokens from logits: contiguous float32 rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.kernels import abi
from smart_decoding.kernels.library import library

NOT_DRAWN = -1
_DRAW = np.dtype(abi.structure("Draw"))  # an address in place of the row


def argmax(x: Tensor, which: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first index [which] of the largest entry of the rows `which` of x [rows, n]; -1
    where that entry is not finite."""
    out = np.empty(len(which), np.int64)
    library().smart_argmax(x, which, len(which), x.shape[1], out, torch.get_num_threads())
    return out


def top_k(
    x: Tensor,
    k: int,
    scale: Tensor | None = None,
    keys: Tensor | None = None,
    tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ids (int64) and softmax probabilities of the k largest entries of x * scale (float32
    [rows], default 1).

    Both are [rows, k]. keys (uint64 bits as int64 [rows]; 0: none): the noise of noise.py for
    `tokens` [n] is added to these rows' scores; their probabilities are the softmax of the k noisy
    scores."""
    scale = torch.ones(len(x)) if scale is None else scale
    ids = torch.empty(len(x), k, dtype=torch.int64)
    probs = torch.empty(len(x), k)
    inputs = (x, len(x), x.shape[1], k, scale, keys, tokens)
    library().smart_top_k(*inputs, ids, probs, torch.get_num_threads())
    return ids, probs


class Draw(NamedTuple):
    """How a row's token is drawn. row: address of its logits; position: of the token in its answer.

    Candidates are the k largest (0: all; NOT_DRAWN: only the maximum is required) that are at least
    the maximum + `below`; of these, the ones with less than top_p of the probability above them."""

    row: int
    seed: int
    sample: int
    position: int
    k: int
    scale: float
    below: float
    top_p: float


class Drawn(NamedTuple):
    """Drawn tokens. best: [rows] first maximum, -1 where it is not finite. token: [rows] the token,
    -1 where rounding would decide."""

    best: NDArray[np.int64]
    token: NDArray[np.int64]


def draw_structs(draws: Sequence[Draw]) -> NDArray[np.void]:
    """Return the draws as an array [draws] of the kernels' structures."""
    return np.array(draws, _DRAW)


def draw(draws: NDArray[np.void], n: int) -> Drawn:
    """Return the argmax of row * scale + noise for rows of n float32, each as its `Draw` says."""
    count = len(draws)
    drawn = Drawn(np.empty(count, np.int64), np.empty(count, np.int64))
    library().smart_draw(draws, count, n, *drawn, torch.get_num_threads())
    return drawn
