"""The floor of plain decoding: the time in which its weights and cached keys are read once.

On a GPU speedups over plain decoding that takes far longer say little of speculation.

Needed by tools/gpu_check.sh.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from smart_lab.hardware import layer_elements

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

READ_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}  # far more than any cache
CALLS = {"cpu": 1, "cuda": 8}  # in a try, so that a launch and a wait do not count
SECONDS = 0.4
# Plain decoding is near its floor up to so many times it and so many milliseconds, which launches
# take.
NEAR, NEAR_MS = 1.15, 1.0


def bytes_moved(config: ModelConfig, item: int, batch_size: int, context: float) -> float:
    """Return every weight and every cached key and value once; item: bytes of an element."""
    c = config
    layer = layer_elements(c.hidden, c.heads, c.kv_heads, c.head_dim, c.ffn)
    kv = 2 * c.layers * c.kv_heads * c.head_dim
    return item * (c.layers * layer + c.vocab * c.hidden + batch_size * context * kv)


def read_rate(device: torch.device) -> float:
    """GB/s of a sum over memory, the best of repeated tries."""
    size, calls = READ_BYTES[device.type], CALLS[device.type]
    numbers = torch.ones(size // 4, device=device)
    float(numbers.sum())  # at first use libraries and kernels are loaded
    best = float("inf")
    until = time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(calls):
            total = numbers.sum()
        float(total)  # waits
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e-9 * size / best


def near_floor(plain_ms: float, floor_ms: float) -> bool:
    """Return whether plain decoding is fast enough for speedups over it to be quoted."""
    return plain_ms <= NEAR * floor_ms + NEAR_MS
