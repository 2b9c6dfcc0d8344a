"""Weights rounded to 8 or 4 bits, when they are loaded or a head is written: to the nearest, in
groups of 32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

from smart_decoding.kernels.weights import Matrix, QuantizedTensor
from smart_decoding.models.families.layer import RATES, ROUTER

_GROUP = 32
_PART = 4096  # rows that are rounded at once: all of a vocabulary's in float32 would be gigabytes
# 4 bits with a scale and a least value, and 8 bits with a scale, as in GGUF files. What turns
# states into logits, and tokens into states, has 8 bits in both.
ROUNDED = {"int8": "Q8_0", "int4": "Q4_1"}
_GROUP_BYTES = {"Q8_0": 34, "Q4_1": 20}
_BY_TOKEN = ("lm_head.weight", "model.embed_tokens.weight")


class RoundedWeights(Mapping[str, Matrix]):
    """A checkpoint's weights, its matrices quantised as `scheme` says: int8 or int4.

    Matrices whose rows are no whole groups stay what they are. So do those that choose experts, and
    those that say how fast states decay and learn."""

    def __init__(self, weights: Mapping[str, Matrix], scheme: str) -> None:
        self._weights = weights
        self._scheme = scheme

    def __getitem__(self, name: str) -> Matrix:
        return self._rounded(name, self._weights[name])

    def first_rows(self, name: str, count: int) -> Matrix:
        """Return the first rows of a matrix. No others are rounded."""
        return self._rounded(name, self._weights[name][:count])

    def _rounded(self, name: str, weight: Matrix) -> Matrix:
        format_ = _format_of(name, tuple(weight.shape), self._scheme)
        if isinstance(weight, QuantizedTensor) or format_ is None:
            return weight
        from gguf import GGMLQuantizationType, quantize  # imported late: it is slow

        kind = GGMLQuantizationType[format_]
        parts = [quantize(np.asarray(part.float()), kind) for part in torch.split(weight, _PART)]
        return QuantizedTensor(np.concatenate(parts), format_, weight.shape[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)


def rounded_bytes(shapes: Mapping[str, tuple[int, ...]], scheme: str) -> int:
    """Return bytes of weights of these shapes under a scheme, those that stay what they are in
    bfloat16."""
    return sum(_bytes_of(shape, _format_of(name, shape, scheme)) for name, shape in shapes.items())


def stored(weights: Mapping[str, Matrix]) -> dict[str, Tensor]:
    """Return weights as safetensors can hold them: quants as their bytes, uint8 [n, bytes]."""
    return {
        name: torch.from_numpy(weight.rows) if isinstance(weight, QuantizedTensor) else weight
        for name, weight in weights.items()
    }


def restored(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Matrix]:
    """Return what `stored` made of `RoundedWeights` under a scheme.

    Raises ValueError for bytes that are no whole groups."""
    return {name: _restored(name, tensor, scheme) for name, tensor in tensors.items()}


def _restored(name: str, tensor: Tensor, scheme: str) -> Matrix:
    if tensor.dtype != torch.uint8:
        return tensor
    format_ = _format(name, scheme)
    size = _GROUP_BYTES[format_]
    if tensor.ndim != 2 or tensor.shape[1] % size:
        raise ValueError(f"{name} {list(tensor.shape)} holds no whole groups of {size} bytes")
    return QuantizedTensor(tensor.numpy(), format_, tensor.shape[1] // size * _GROUP)


def bytes_per_weight(scheme: str) -> float:
    """Of matrices that are rounded so."""
    return _GROUP_BYTES[ROUNDED[scheme]] / _GROUP


def _bytes_of(shape: tuple[int, ...], format_: str | None) -> int:
    if format_ is None:
        return 2 * prod(shape)
    return prod(shape) // _GROUP * _GROUP_BYTES[format_]


def _format_of(name: str, shape: tuple[int, ...], scheme: str) -> str | None:
    if len(shape) != 2 or shape[1] % _GROUP or name.endswith((ROUTER, *RATES)):
        return None
    return _format(name, scheme)


def _format(name: str, scheme: str) -> str:
    return ROUNDED["int8" if name in _BY_TOKEN else scheme]
