"""Aux hidden states of the target as a head is given them: arrays, or places in several rounds'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.kernels.memory import address
from smart_decoding.models.torch.rows import upload

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray

Features: TypeAlias = Tensor | NDArray[np.float32]
# Of a request: [rows, width], or several rounds' [requests, width] and its place in them.
FeaturePart: TypeAlias = Features | tuple[Sequence[Features], int]


def stacked(part: FeaturePart) -> Tensor:
    """[rows, width] a part as one tensor."""
    if isinstance(part, Tensor | np.ndarray):
        return torch.as_tensor(part)
    rounds, place = part
    return torch.stack([torch.as_tensor(features[place]) for features in rounds])


def apart(part: FeaturePart) -> FeaturePart:
    """Return the part, copied where it is a small piece of an array that it would keep alive
    whole."""
    if isinstance(part, tuple):
        return part
    if isinstance(part, Tensor):
        return part.clone() if part.untyped_storage().nbytes() > 2 * part.nbytes else part
    return part.copy() if part.base is not None and part.base.nbytes > 2 * part.nbytes else part


def take_rows(features: Features, rows: IntArray) -> Tensor:
    """Return rows of features or outputs: [rows, width], a copy."""
    features = torch.as_tensor(features)
    return features[upload(rows, features.device)]


def readable(part: FeaturePart) -> FeaturePart:
    """Return the part in float32 with rows that lie in one piece, as features of our own targets
    do."""
    first = part if isinstance(part, Tensor | np.ndarray) else part[0][0]
    if isinstance(first, np.ndarray) or (first.dtype == torch.float32 and first.stride(1) == 1):
        return part
    return stacked(part).float().contiguous()


def row_addresses(parts: Sequence[FeaturePart]) -> IntArray:
    """Return the address of each row of readable parts, which must stay alive."""
    found: list[int] = []
    for part in parts:
        if isinstance(part, Tensor | np.ndarray):
            start, step = _first_row(part)
            found += range(start, start + step * len(part), step)
        else:
            rounds, place = part
            found += [start + step * place for start, step in map(_first_row, rounds)]
    return np.array(found, np.int64)


def _first_row(features: Features) -> tuple[int, int]:
    if isinstance(features, Tensor):
        return features.data_ptr(), 4 * features.stride(0)
    return address(features), features.strides[0]
