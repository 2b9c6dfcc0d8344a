"""Weights rounded to 8 or 4 bits when they are loaded: to the nearest, in groups of 32."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from gguf import GGMLQuantizationType, quantize

from smart_decoding.kernels.weights import Matrix, QuantizedTensor

_GROUP = 32
# 4 bits with a scale and a least value, and 8 bits with a scale, as in GGUF files. What turns
# states into logits, and tokens into states, has 8 bits in both.
FORMATS = {"int8": "Q8_0", "int4": "Q4_1"}
_BY_TOKEN = ("lm_head.weight", "model.embed_tokens.weight")


class RoundedWeights(Mapping[str, Matrix]):
    """A checkpoint's weights, its matrices quantised as `scheme` says: int8 or int4.

    Matrices whose rows are no whole groups stay what they are."""

    def __init__(self, weights: Mapping[str, Matrix], scheme: str) -> None:
        self._weights = weights
        self._format = FORMATS[scheme]

    def __getitem__(self, name: str) -> Matrix:
        weight = self._weights[name]
        if isinstance(weight, QuantizedTensor) or weight.dim() != 2 or weight.shape[1] % _GROUP:
            return weight
        format_ = FORMATS["int8"] if name in _BY_TOKEN else self._format
        rows = quantize(np.asarray(weight.float()), GGMLQuantizationType[format_])
        return QuantizedTensor(rows, format_, weight.shape[1])

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)
