"""A head's tensors and layers on its target's device, and what it borrows of the target."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from smart_decoding.kernels.weights import Arena
from smart_decoding.models.graphs import layers_on
from smart_decoding.models.head_shapes import FIRST, layer_prefixes
from smart_decoding.models.layers import Layers, NativeLayers, layer_weights
from smart_decoding.models.linear import Linear

if TYPE_CHECKING:
    from smart_decoding.models.config import ModelConfig
    from smart_decoding.models.head_files import HeadFiles
    from smart_decoding.models.layers import Workspace


class OutputMatrix(Protocol):
    """The target's: [rows, hidden] -> logits [rows, vocab]."""

    def __call__(self, x: Tensor) -> Tensor:
        """Logits, with the target's final norm before the matrix unless it is a module apart."""
        ...

    def without_norm(self) -> OutputMatrix:
        """Without the target's final norm before it."""
        ...

    def rows_of(self, index: Tensor) -> Tensor:
        """Rows of the weight: [n, hidden]."""
        ...


class TargetWeights(Protocol):
    """What a head borrows of its target. native: whether the head runs on the CPU kernels;
    graphs: whether its levels are recorded on a CUDA device; work_dtype: of activations."""

    config: ModelConfig
    native: bool
    graphs: bool
    dtype: torch.dtype
    work_dtype: torch.dtype
    device: torch.device
    workspace: Workspace

    @property
    def final_norm(self) -> Tensor | None:
        """The weight [hidden] of the norm before the output matrix; None if the aux hidden states
        of an EAGLE-1/2 head come through it already."""
        ...

    @property
    def head(self) -> OutputMatrix:
        """The output matrix."""
        ...

    @property
    def embedding(self) -> Linear | Tensor | None:
        """The embeddings, packed or as a table; None if only `embed` knows them."""
        ...

    def embed(self, token: Tensor) -> Tensor:
        """[n, hidden] in the working dtype."""
        ...


class HeadWeights:
    """A head's tensors on the target's device, in its dtype.

    draft_ids: [draft] the tokens it proposes. norms_aux: it normalises each layer's aux hidden
    states before `fc`."""

    def __init__(self, files: HeadFiles, target: TargetWeights) -> None:
        self.files = files
        self.target = target
        self._tensors = {name: each.to(target.device) for name, each in files.weights.items()}
        self.draft_ids = self._tensors["draft_ids"].long()
        self.norms_aux = "fc_norm.0.weight" in self._tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name].to(self.target.dtype)

    def get(self, name: str) -> Tensor | None:
        """The tensor, or None where the head has none of that name."""
        return self[name] if name in self._tensors else None

    def norm(self, name: str) -> Tensor:
        """The weight of a norm, in the dtype that norms are computed with."""
        return self.as_norm(self[name])

    def as_norm(self, weight: Tensor) -> Tensor:
        """The weight in the dtype that norms are computed with: float32 on the CPU kernels."""
        return weight.float().contiguous() if self.target.native else weight

    def ones(self) -> Tensor:
        """[hidden] the weight of norms whose own weight is in the columns of `fc`."""
        shape = self.files.shape
        return self.as_norm(
            torch.ones(shape.hidden, dtype=self.target.dtype, device=self.target.device)
        )

    @cached_property
    def fc(self) -> Tensor:
        """[hidden, inputs], the weights of norms before it folded into its columns."""
        fc = self._tensors["fc.weight"]
        if self.norms_aux:
            count = len(self.files.aux_layers)
            scales = [self._tensors[f"fc_norm.{i}.weight"].float() for i in range(count)]
            fc = fc.float() * torch.cat(scales)[None]
        return fc.to(self.target.dtype)

    @cached_property
    def embedding(self) -> Tensor | None:
        """[vocab, hidden] its own embeddings; None where it reads the target's."""
        own = self.get("embed_tokens.weight")
        return None if own is None else own.contiguous()

    @cached_property
    def output(self) -> Tensor:
        """[draft, hidden] the output matrix: its own, or rows of the target's."""
        own = self.get("lm_head.weight")
        rows = self.target.head.rows_of(self.draft_ids) if own is None else own
        return rows.to(self.target.dtype)


@dataclass(frozen=True, slots=True)
class HeadLayers:
    """The layers and `fc`; arena: which has room for the output matrix, on the CPU kernels."""

    layers: Layers
    fc: Linear
    arena: Arena | None


def head_layers(weights: HeadWeights) -> HeadLayers:
    """Packs a head's layers and `fc` where the CPU kernels run them, with room for the output
    matrix."""
    target = weights.target
    shape = weights.files.shape
    each = [
        layer_weights(
            shape, weights.files.weights, prefix, target.dtype, target.device, prefix != FIRST
        )
        for prefix in layer_prefixes(shape.layers)
    ]
    arena = None
    if target.native:
        matrices = [weights.fc, *(tensor for tensor in weights.files.weights.values())]
        arena = Arena(sum(matrix.numel() for matrix in matrices) * target.dtype.itemsize)
    layers: Layers
    if arena is not None:
        layers = NativeLayers(each, arena, target.workspace)
    else:
        layers = layers_on(target.device, each, target.graphs)
    fc = Linear(weights.fc, target.native, arena, bias=weights.get("fc.bias"))
    return HeadLayers(layers, fc, arena)
