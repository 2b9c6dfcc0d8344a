"""What this machine can do at best, measured: bytes read and FLOPs per second, to hold achieved
rates against."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from smart_decoding.bench.floor import over_floor
from smart_decoding.bench.traffic import Sizes, achieved

READ_BYTES = {
    "cpu": 1 << 28,
    "cuda": 1 << 30,
}  # far more than any cache, and on a GPU than a launch takes
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied
CALLS = {"cpu": 1, "cuda": 8}  # in a try, so that a launch and a wait do not count
SECONDS = 0.4  # for each limit


def measure_limits(dtype: torch.dtype, device: torch.device) -> dict[str, float]:
    """The best of repeated tries: GB/s of a sum, GFLOP/s of torch's matrix product in `dtype`."""
    size, side = READ_BYTES[device.type], SIDE[device.type]
    numbers = torch.ones(size // 4, device=device)
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    wait = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    calls = CALLS[device.type]
    read = _best(lambda: numbers.sum(), wait, calls)
    product = _best(lambda: left @ right, wait, calls)
    return {"gb_per_s": 1e-9 * size / read, "gflop_per_s": 1e-9 * 2 * side**3 / product}


def rated(
    runs: Sequence[Mapping[str, Any]],
    sizes: Sizes,
    limits: Mapping[str, float],
    device: torch.device,
) -> list[dict[str, Any]]:
    """The runs of one batch size with their achieved rates, those as shares of the limits, and on a
    GPU what `over_floor` says."""
    found = [{**run, **achieved(run, sizes)} for run in runs]
    found = [{**run, **shares(run, limits)} for run in found]
    return over_floor(found, sizes, limits["gb_per_s"]) if device.type == "cuda" else found


def shares(run: Mapping[str, Any], limits: Mapping[str, float]) -> dict[str, float]:
    """A run's achieved rates as shares of the limits."""
    return {
        f"{name.split('_')[0]}_share": run[name] / limit
        for name, limit in limits.items()
        if limit > 0
    }


def _best(work: Callable[[], object], wait: Callable[[], object], calls: int) -> float:
    """Least seconds of one call, of so many in a row."""
    best = float("inf")
    work()  # at first use libraries and kernels are loaded
    wait()
    until = time.perf_counter() + SECONDS
    while best == float("inf") or time.perf_counter() < until:
        start = time.perf_counter()
        for _ in range(calls):
            work()
        wait()
        best = min(best, (time.perf_counter() - start) / calls)
    return best
