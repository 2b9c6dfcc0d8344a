"""Kernels that only other kernels call, as Python functions."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.kernels.library import library
from smart_decoding.kernels.weights import INTO_CACHES, PackedWeight


def linear(
    x: Tensor,
    packed: PackedWeight,
    norm: tuple[Tensor, float] | None = None,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    best: NDArray[np.int64] | None = None,
    hint: int = INTO_CACHES,
) -> Tensor:
    """rms_norm(x) @ weight.T + bias for x [rows, k]; norm ([k] and eps) and bias [n] are
    optional. Returns [rows, n].

    `best` [rows], unless None, receives `argmax` of the result. An empty `out` stays empty: then
    only `best` is computed. hint: see Arena."""
    rows, k = x.shape
    n = packed.n
    y = torch.empty(rows, n) if out is None else out
    scratch = torch.empty(rows, k)
    norm_weight, eps = norm or (None, 0.0)
    inputs = (x, rows, packed.address, n, k, packed.is_bf16, norm_weight, eps, bias, scratch)
    result = (y if y.numel() else None, n, 0)
    library().smart_linear(*inputs, *result, hint, best, torch.get_num_threads())
    return y


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, column: int = 0) -> None:
    """rms_norm of x [rows, d] into columns column .. column + d of out [rows, width]."""
    at = out.data_ptr() + 4 * column
    library().smart_rms_norm(x, weight, eps, len(x), x.shape[1], at, out.shape[1])
