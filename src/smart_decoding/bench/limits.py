"""What this machine can do at best, measured: bytes read and FLOPs per second, to hold achieved rates against."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

READ_BYTES = 1 << 28  # far more than any cache
SIDE = 1024  # of the square matrices that are multiplied
SECONDS = 0.4  # for each limit


def measure_limits(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The best of repeated tries: GB/s of a sum over 256 MB, GFLOP/s of torch's matrix product in `dtype`."""
    numbers = torch.ones(READ_BYTES // 4, device=device)
    left, right = (torch.randn(SIDE, SIDE, device=device).to(dtype) for _ in range(2))
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    read = _best(lambda: numbers.sum(), wait)
    product = _best(lambda: left @ right, wait)
    return {"gb_per_s": 1e-9 * READ_BYTES / read, "gflop_per_s": 1e-9 * 2 * SIDE**3 / product}


def shares(run: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, float]:
    """A run's achieved rates as shares of the limits."""
    return {f"{name.split('_')[0]}_share": run[name] / limit for name, limit in limits.items() if limit > 0}


def _best(work: Callable[[], object], wait: Callable[[], object]) -> float:
    """Least seconds of one call."""
    best, until = float("inf"), time.perf_counter() + SECONDS
    work()
    wait()
    while time.perf_counter() < until:
        start = time.perf_counter()
        work()
        wait()
        best = min(best, time.perf_counter() - start)
    return best
