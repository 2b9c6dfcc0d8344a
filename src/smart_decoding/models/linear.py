"""A linear map in two forms: the CPU kernels, and torch (CUDA, or a CPU without kernels)."""

from __future__ import annotations

import copy

from torch import Tensor
from torch.nn import functional as F

from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.weights import Arena, Matrix, as_tensor, pack, unpack
from smart_decoding.models.torch_layers import rms_norm


class Linear:
    """y = x W^T + b for W [out, in], optionally with an RMS norm before it."""

    def __init__(
        self,
        weight: Matrix,
        native: bool,
        arena: Arena | None = None,
        norm: Tensor | None = None,
        eps: float = 0.0,
        bias: Tensor | None = None,
    ) -> None:
        self.rows = len(weight)
        self._native = native
        self._eps = eps
        self._norm = norm
        self.bias = bias
        if not native:
            self._weight = as_tensor(weight)
            return
        arena = arena or Arena(0)
        self.packed = pack([weight], arena)
        self._hint = arena.hint
        self._norm = None if norm is None else norm.float().contiguous()
        self.bias = None if bias is None else bias.float().contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """[rows, in] -> [rows, out]; float32 on the CPU kernels, else in the weight's dtype."""
        if self._native:
            norm = None if self._norm is None else (self._norm, self._eps)
            return kernels.linear(x, self.packed, norm, self.bias, hint=self._hint)
        return F.linear(rms_norm(x, self._norm, self._eps), self._weight, self.bias)

    def without_norm(self) -> Linear:
        """The same map without the norm before it, sharing the weight."""
        twin = copy.copy(self)
        twin._norm = None
        return twin

    def rows_of(self, index: Tensor) -> Tensor:
        """The weight's rows at `index` [n]: [n, in], float32 on the CPU kernels. Saves tied
        embeddings a second copy."""
        if not self._native:
            return self._weight[index]
        return unpack(self.packed, index)
