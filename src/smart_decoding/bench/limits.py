"""What this machine can do at best, measured: bytes read and FLOPs per second, to hold achieved
rates against."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

READ_BYTES = {
    "cpu": 1 << 28,
    "cuda": 1 << 30,
}  # far more than any cache, and on a GPU than a launch takes
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied
SECONDS = 0.4  # for each limit


def measure_limits(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The best of repeated tries: GB/s of a sum, GFLOP/s of torch's matrix product in `dtype`."""
    size, side = READ_BYTES[device.type], SIDE[device.type]
    numbers = torch.ones(size // 4, device=device)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    read = _best(lambda: numbers.sum(), wait)
    product = _best(lambda: left @ right, wait)
    return {"gb_per_s": 1e-9 * size / read, "gflop_per_s": 1e-9 * 2 * side**3 / product}


def shares(run: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, float]:
    """A run's achieved rates as shares of the limits."""
    return {
        f"{name.split('_')[0]}_share": run[name] / limit
        for name, limit in limits.items()
        if limit > 0
    }


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
