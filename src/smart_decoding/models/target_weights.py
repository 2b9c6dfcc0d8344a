"""What a draft head borrows of its target."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from smart_decoding.models.config import ModelConfig
    from smart_decoding.models.layers import Workspace
    from smart_decoding.models.linear import Linear


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
