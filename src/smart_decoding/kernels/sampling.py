"""The CPU kernels that choose tokens of logits, which are contiguous float32 rows."""

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
    """First index of the largest entry of the rows `which` of x [rows, n]: [which]; -1 where it is
    not finite."""
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
    given = (x, len(x), x.shape[1], k, scale, keys, tokens)
    library().smart_top_k(*given, ids, probs, torch.get_num_threads())
    return ids, probs


class Draw(NamedTuple):
    """What is drawn of a row, given by its address; position: of the token in its answer.

    Only among the k largest (0: all; NOT_DRAWN: only the maximum is required) and at least the
    maximum + `below`; of these, only those with less than top_p of their probability above."""

    row: int
    seed: int
    sample: int
    position: int
    k: int
    scale: float
    below: float
    top_p: float


class Drawn(NamedTuple):
    """best: [rows] first maximum, -1 where it is not finite. token: [rows] the token, -1 where
    rounding would decide."""

    best: NDArray[np.int64]
    token: NDArray[np.int64]


def draw_structs(draws: Sequence[Draw]) -> NDArray[np.void]:
    """[draws] the same as the kernels read them."""
    return np.array(draws, _DRAW)


def draw(draws: NDArray[np.void], n: int) -> Drawn:
    """Return the argmax of row * scale + noise for rows of n float32, each as its `Draw` says."""
    count = len(draws)
    drawn = Drawn(np.empty(count, np.int64), np.empty(count, np.int64))
    library().smart_draw(draws, count, n, *drawn, torch.get_num_threads())
    return drawn
