"""What a forward moves and computes, and what this machine can do at best, measured: achieved rates
are held against it.

On a GPU plain decoding has a floor, the time in which memory is read once. Speedups over plain
decoding that takes far longer say little of speculation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from smart_decoding.bench.results import FLOOR, PLAIN
from smart_decoding.core.policies.off import Off

if TYPE_CHECKING:
    from smart_decoding.models.config import ModelConfig

READ_BYTES = {
    "cpu": 1 << 28,
    "cuda": 1 << 30,
}  # far more than any cache, and on a GPU than a launch takes
SIDE = {"cpu": 1024, "cuda": 8192}  # of the square matrices that are multiplied
CALLS = {"cpu": 1, "cuda": 8}  # in a try, so that a launch and a wait do not count
SECONDS = 0.4  # for each limit
# Plain decoding is worth comparing with up to so many times its floor and so many milliseconds,
# which launches take.
NEAR, NEAR_MS = 1.15, 1.0


@dataclass(frozen=True, slots=True)
class Sizes:
    """weights: elements of all matrices that a forward multiplies by; kv: elements that a context
    token keeps; item: bytes of an element."""

    weights: int
    kv: int
    item: int

    @classmethod
    def of(cls, config: ModelConfig, item: int) -> Sizes:
        """The sizes of a decoder of the Llama family."""
        layer = layer_elements(
            config.hidden, config.heads, config.kv_heads, config.head_dim, config.ffn
        )
        kv = 2 * config.layers * config.kv_heads * config.head_dim
        return cls(config.layers * layer + config.vocab * config.hidden, kv, item)

    def moved(self, batch_size: int, context: float) -> float:
        """Bytes: every weight and every cached key and value once."""
        return self.item * (self.weights + batch_size * context * self.kv)


def layer_elements(hidden: int, heads: int, kv_heads: int, head_dim: int, ffn: int) -> int:
    """Elements of the matrices of one layer."""
    return hidden * (2 * head_dim * (heads + kv_heads) + 3 * ffn)


def achieved(run: Mapping[str, Any], sizes: Sizes, limits: Mapping[str, float]) -> dict[str, float]:
    """Mean GB/s and GFLOP/s of a run's verifying forwards (sampling included), and both as shares
    of the limits; NaN where no round was counted.

    FLOPs: products with weights; attention is left out."""
    seconds = 1e-3 * run["verify_ms"]
    amounts = {
        "gb": sizes.moved(run["batch_size"], run["context_tokens"]),
        "gflop": 2 * sizes.weights * run["rows_per_round"],
    }
    found = {}
    for name, amount in amounts.items():
        rate = 1e-9 * amount / seconds if seconds > 0 else math.nan
        found[f"{name}_per_s"] = rate
        found[f"{name}_share"] = rate / limits[f"{name}_per_s"]
    return found


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
    found = [{**run, **achieved(run, sizes, limits)} for run in runs]
    return over_floor(found, sizes, limits["gb_per_s"]) if device.type == "cuda" else found


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


def near_floor(plain_ms: float, floor_ms: float) -> bool:
    """Whether plain decoding is fast enough for speedups over it to be quoted."""
    return plain_ms <= NEAR * floor_ms + NEAR_MS


def over_floor(
    runs: Sequence[Mapping[str, Any]], sizes: Sizes, gb_per_s: float
) -> list[dict[str, Any]]:
    """The runs of one batch size, with what a slow baseline cannot flatter: plain_ms, of a round of
    plain decoding; floor_ms, in which memory is read once at gb_per_s; floor_speedup, over a round
    of that length; headline, the name of the ratio to quote. A run whose task has no baseline stays
    as it is."""
    plain = {run["task"]: run for run in runs if run["policy"] == Off.name}
    return [{**run, **_over_floor(run, plain.get(run["task"]), sizes, gb_per_s)} for run in runs]


def _over_floor(
    run: Mapping[str, Any], plain: Mapping[str, Any] | None, sizes: Sizes, gb_per_s: float
) -> dict[str, Any]:
    if plain is None or not plain["tokens_per_s"] > 0 or not math.isfinite(plain["context_tokens"]):
        return {}
    size = plain["batch_size"]
    plain_ms = 1e3 * size / plain["tokens_per_s"]
    floor_ms = 1e-6 * sizes.moved(size, plain["context_tokens"]) / gb_per_s
    bounds = {name: run.get(f"{PLAIN}{name}") for name in ("", "_low", "_high")}
    return {
        "plain_ms": plain_ms,
        "floor_ms": floor_ms,
        **{
            f"{FLOOR}{name}": None if value is None else value * floor_ms / plain_ms
            for name, value in bounds.items()
        },
        "headline": PLAIN if near_floor(plain_ms, floor_ms) else FLOOR,
    }
