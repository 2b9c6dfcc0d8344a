"""The floor of plain decoding on a GPU: the time in which memory is read once. Speedups over plain
decoding that takes far longer say little of speculation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from smart_decoding.core.policies.off import Off

if TYPE_CHECKING:
    from smart_decoding.bench.traffic import Sizes

# Plain decoding is worth comparing with up to so many times its floor and so many milliseconds,
# which launches take.
NEAR, NEAR_MS = 1.15, 1.0
PLAIN, FLOOR = "speedup", "floor_speedup"  # what a headline may be, as runs name it


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
