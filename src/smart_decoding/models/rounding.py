"""Weights rounded to 8 or 4 bits when they are loaded: to the nearest, in groups of 32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import numpy as np
import torch

from smart_decoding.kernels.weights import Matrix, QuantizedTensor

_GROUP = 32
_PART = 4096  # rows that are rounded at once: all of a vocabulary's in float32 would be gigabytes
# 4 bits with a scale and a least value, and 8 bits with a scale, as in GGUF files. What turns
# states into logits, and tokens into states, has 8 bits in both.
FORMATS = {"int8": "Q8_0", "int4": "Q4_1"}
_BY_TOKEN = ("lm_head.weight", "model.embed_tokens.weight")


class RoundedWeights(Mapping[str, Matrix]):
    """A checkpoint's weights, its matrices quantised as `scheme` says: int8 or int4.

    Matrices whose rows are no whole groups stay what they are."""

    def __init__(self, weights: Mapping[str, Matrix], scheme: str) -> None:
        self._weights = weights
        self._scheme = scheme

    def __getitem__(self, name: str) -> Matrix:
        weight = self._weights[name]
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
    """Bytes of weights of these shapes under a scheme, those that stay what they are in
    bfloat16."""
    return sum(_bytes_of(shape, _format_of(name, shape, scheme)) for name, shape in shapes.items())


def _bytes_of(shape: tuple[int, ...], format_: str | None) -> int:
    if format_ is None:
        return 2 * prod(shape)
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[format_]]
    return prod(shape) // weights * size


def _format_of(name: str, shape: tuple[int, ...], scheme: str) -> str | None:
    if len(shape) != 2 or shape[1] % _GROUP:
        return None
    return FORMATS["int8" if name in _BY_TOKEN else scheme]
