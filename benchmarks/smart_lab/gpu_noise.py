"""The noise of draws as triton_sampling.py computes it, for tests and gpu_parity.py.

Needed by gpu_parity.py and by tests/gpu.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from smart_decoding.models.torch import triton_sampling

if TYPE_CHECKING:
    from torch import Tensor


@triton.jit
def noise_kernel(keys, tokens, bits, gumbel, size, block: tl.constexpr):
    n = tl.program_id(1) * block + tl.arange(0, block)
    inside = n < size
    key = tl.load(keys + tl.program_id(0))
    found = triton_sampling._uniform_bits(key, tl.load(tokens + n, mask=inside, other=0))
    to = tl.program_id(0) * size + n
    tl.store(bits + to, found, mask=inside)
    tl.store(gumbel + to, triton_sampling._gumbel(found), mask=inside)


def noise(keys: Tensor, tokens: Tensor, block: int = 1024) -> tuple[Tensor, Tensor]:
    """[keys, tokens] int64 random bits, and the float32 Gumbel noise made of them, where the int64
    keys and tokens lie. block: of tokens, in one program."""
    size = len(tokens)
    bits = keys.new_empty(len(keys), size)
    gumbel = torch.empty_like(bits, dtype=torch.float32)
    grid = (len(keys), triton.cdiv(size, block))
    noise_kernel[grid](keys, tokens, bits, gumbel, size, block=block)
    return bits, gumbel
