"""GPTQ and AWQ checkpoints: their 4-bit matrices under Hugging Face's names, in blocks of 32 that
the kernels read.

A weight is scale * (q - zero), both shared by a group of k. Integers of 32 bits hold eight values:
of q along k in GPTQ, along n in AWQ; of zeros along n in both.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.errors import ModelError
from smart_decoding.kernels.weights import Matrix, QuantizedTensor
from smart_decoding.models.weight_files import INTEGERS, Weights

log = logging.getLogger("smart.models")

_BLOCK = 32
_SYMMETRIC = 8  # the zero of symmetric quants
_LAYOUTS = {"gptq": ("gptq", "gptq_v2"), "awq": ("gemm",)}
# AWQ: which of an integer's nibbles holds column 0, 1, ... of its eight
_AWQ_NIBBLES = [0, 4, 1, 5, 2, 6, 3, 7]


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a checkpoint is quantised. method: gptq or awq; group: k that share a scale, -1: all;
    offset: what is added to the zeros in the file; by_activation: columns were quantised in an
    order of their own, and g_idx holds their groups."""

    method: str
    group: int
    offset: int
    is_symmetric: bool
    by_activation: bool


def scheme_of(config: Mapping[str, Any], quantization: str | None) -> Scheme | None:
    """The scheme in a config.json, None if there is none.

    quantization: as asked for. Raises ModelError for schemes that are not supported, and for int8
    or int4 on top of one."""
    given = config.get("quantization_config")
    if given is None:
        return None
    given = given if isinstance(given, Mapping) else {}
    method, bits, group = given.get("quant_method"), given.get("bits"), given.get("group_size", 128)
    is_gptq = method == "gptq"
    layout = given.get("checkpoint_format") or "gptq" if is_gptq else given.get("version")
    layout = str(layout).lower()
    is_known = layout in _LAYOUTS.get(str(method), ()) and bits == 4
    in_groups = isinstance(group, int) and (group == -1 or (group > 0 and group % _BLOCK == 0))
    if not is_known or not in_groups or given.get("is_marlin_format"):
        raise ModelError(
            f"the config option quantization_config is not supported (quant_method {method}, "
            f"{layout}, bits {bits}, group_size {group}): take GPTQ or AWQ (gemm) of 4 bits in "
            "groups of a multiple of 32, or the model in bf16"
        )
    if quantization not in (None, "off"):
        raise ModelError(
            f"the model is quantised already ({method}): leave out quantization={quantization!r}"
        )
    return Scheme(
        method=str(method),
        group=group,
        offset=1 if is_gptq and layout != "gptq_v2" else 0,
        is_symmetric=is_gptq and bool(given.get("sym")),
        by_activation=is_gptq and bool(given.get("desc_act")),
    )


class GroupedWeights(Weights[Matrix]):
    """The tensors of a quantised checkpoint, each read when asked for: X.weight for X.qweight and
    what belongs to it, others as they are.

    known: names that the model has; a bias of zeros that is not among them is left out, which old
    versions of AutoGPTQ wrote. stored: matrices stay quants, else they are expanded to bfloat16,
    as all are whose groups do not fill blocks.
    Raises ModelError, naming the tensor."""

    def __init__(
        self, weights: Weights[Tensor], scheme: Scheme, known: Collection[str], stored: bool
    ) -> None:
        self._weights = weights
        self._scheme = scheme
        self._stored = stored
        ends = ".qweight"
        self._modules = {name.removesuffix(ends) for name in weights if name.endswith(ends)}
        self.shapes = {}
        for name in weights:
            module, _, part = name.rpartition(".")
            if module not in self._modules:
                self.shapes[name] = weights.shapes[name]
            elif part == "qweight":
                self.shapes[f"{module}.weight"] = self._checked_shape(module)
            elif part == "bias" and (name in known or weights[name].any()):
                self.shapes[name] = weights.shapes[name]
        self.dtypes = {
            name: scheme.method if self._is_packed(name) else weights.dtypes[name]
            for name in self.shapes
        }
        if stored and self._is_scattered:
            log.warning(
                "columns were quantised in an order of their own (desc_act), which is not "
                "supported in 4 bits: the matrices are expanded to bf16"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, about: quants in their largest format, others in bfloat16."""
        return sum(
            prod(shape) // _BLOCK * 19
            if self._stored and not self._is_scattered and self._is_packed(name)
            else prod(shape) * torch.bfloat16.itemsize
            for name, shape in self.shapes.items()
        )

    def __getitem__(self, name: str) -> Matrix:
        if name not in self.shapes:
            raise KeyError(name)
        if self._is_packed(name):
            return self._matrix(name.removesuffix(".weight"))
        return self._weights[name]

    @property
    def _is_scattered(self) -> bool:
        return self._scheme.by_activation and self._scheme.group != -1

    def _is_packed(self, name: str) -> bool:
        return name.endswith(".weight") and name.removesuffix(".weight") in self._modules

    def _checked_shape(self, module: str) -> tuple[int, int]:
        """[n, k] of a matrix whose tensors fit each other."""
        shapes = self._weights.shapes
        packed = shapes[f"{module}.qweight"]
        first, second = packed if len(packed) == 2 else (0, 0)
        n, k = (second, 8 * first) if self._scheme.method == "gptq" else (8 * second, first)
        groups = 1 if self._scheme.group == -1 else -(-k // self._scheme.group)
        wanted: dict[str, tuple[int, ...]] = {"scales": (groups, n), "qzeros": (groups, n // 8)}
        if self._scheme.by_activation:
            wanted["g_idx"] = (k,)
        for part, shape in wanted.items():
            name = f"{module}.{part}"
            if shapes.get(name) != shape or n % 8:
                raise ModelError(
                    f"the tensor {name} has shape {shapes.get(name)}; {shape} would fit "
                    f"{module}.qweight {packed} and the group_size {self._scheme.group}"
                )
        for name in (f"{module}.qweight", *(f"{module}.{part}" for part in wanted)):
            if name.endswith(INTEGERS) and self._weights.dtypes[name] != "I32":
                raise ModelError(f"the tensor {name} is {self._weights.dtypes[name]}, not I32")
        return n, k

    def _matrix(self, module: str) -> Matrix:
        nibbles = self._nibbles(f"{module}.qweight")
        if self._scheme.method == "gptq":
            nibbles = nibbles.swapaxes(0, 1)
        q = nibbles.reshape(len(nibbles), -1)
        if self._scheme.method == "awq":
            q = q.T
        scales = self._weights[f"{module}.scales"].T
        zeros = self._zeros(f"{module}.qzeros")
        groups = self._groups(module, q.shape[1])
        exact = bool((scales.half().float() == scales.float()).all())
        if self._stored and exact and _fill_blocks(groups):
            first = groups[::_BLOCK]
            return _quantised(q, scales.half().numpy()[:, first], zeros[:, first])
        floats = scales.float().numpy()[:, groups] * (q.astype(np.int8) - zeros[:, groups])
        return torch.from_numpy(floats).bfloat16()

    def _nibbles(self, name: str) -> NDArray[np.uint8]:
        """The values of a tensor of integers [a, b]: [a, b, 8]."""
        packed = np.ascontiguousarray(self._weights[name].numpy())
        pairs = packed.view(np.uint8).reshape(*packed.shape, 4)
        nibbles = np.stack([pairs & 15, pairs >> 4], axis=-1).reshape(*packed.shape, 8)
        return nibbles[..., _AWQ_NIBBLES] if self._scheme.method == "awq" else nibbles

    def _zeros(self, name: str) -> NDArray[np.int8]:
        """[n, groups], 0 to 16."""
        nibbles = self._nibbles(name)
        stored = nibbles.reshape(len(nibbles), -1).T.astype(np.int8)
        # Some files say gptq, and have the zeros of gptq_v2.
        if self._scheme.is_symmetric and (stored == _SYMMETRIC).all():
            return stored
        return stored + np.int8(self._scheme.offset)

    def _groups(self, module: str, k: int) -> NDArray[np.int64]:
        if not self._scheme.by_activation:
            return np.arange(k) // (k if self._scheme.group == -1 else self._scheme.group)
        name = f"{module}.g_idx"
        groups = self._weights[name].numpy().astype(np.int64)
        count = self._weights.shapes[f"{module}.scales"][0]
        if groups.min() < 0 or groups.max() >= count:
            raise ModelError(f"the tensor {name} names groups that are not among its {count}")
        return groups


def _fill_blocks(groups: NDArray[np.int64]) -> bool:
    first = groups[::_BLOCK]
    return len(groups) % _BLOCK == 0 and bool((first == groups.reshape(-1, _BLOCK).T).all())


def _quantised(
    q: NDArray[np.uint8], scales: NDArray[np.float16], zeros: NDArray[np.int8]
) -> QuantizedTensor:
    """q: [n, k]; scales, zeros: [n, k / 32]. Q4_0 where its zero is the only one, else Q4_Z."""
    n, k = q.shape
    low, high = np.moveaxis(q.reshape(n, -1, 2, _BLOCK // 2), 2, 0)
    parts = [np.ascontiguousarray(scales)[:, :, None].view(np.uint8), low | high << 4]
    is_symmetric = bool((zeros == _SYMMETRIC).all())
    if not is_symmetric:
        parts.insert(1, zeros.astype(np.uint8)[:, :, None])
    rows = np.concatenate(parts, axis=2).reshape(n, -1)
    return QuantizedTensor(rows, "Q4_0" if is_symmetric else "Q4_Z", k)
