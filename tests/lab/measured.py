"""A small fixed result of `smart bench`."""

from __future__ import annotations

from typing import Any

FIXED_LONG = "eagle2(depth=5,top_k=10,total_tokens=60)"


def run_of(
    policy: str,
    batch: int,
    task: str,
    speedup: float,
    low: float | None,
    high: float | None,
    **more: Any,
) -> Any:
    return {
        "policy": policy,
        "batch_size": batch,
        "task": task,
        "dtype": "bf16",
        "temperature": 0.0,
        "identical": True,
        "tokens_per_s": 80.0 * batch * speedup,
        "speedup": speedup,
        "speedup_low": low,
        "speedup_high": high,
        "tokens_per_round": 1.5,
        "rows_per_round": 4.0 * batch,
        "partial": False,
        **more,
    }


def results() -> dict[str, Any]:
    runs = []
    for batch in (1, 4):
        noise = {"noise": 1.01, "noise_low": 0.97, "noise_high": 1.04, "noise_pairs": 4}
        for task in ("code", "all"):
            runs.append(run_of("off", batch, task, 1.0, 1.0, 1.0, **noise))
    for task in ("code", "all"):
        over = {"smart_over": 0.95, "smart_over_low": 0.91, "smart_over_high": 0.99}
        runs.append(run_of(FIXED_LONG, 1, task, 1.31, 1.2, 1.4, **over))
        runs.append(run_of(FIXED_LONG, 4, task, 0.62, 0.58, 0.66))
        runs.append(run_of("smart", 1, task, 1.25, 1.15, 1.35))
    runs.append(run_of("smart", 4, "code", 0.9, 0.0, None))
    runs.append(run_of("smart", 4, "all", 0.99, 0.9, 1.07, partial=True))
    origin = {
        "command": "smart bench --policies <a&b>",
        "commit": "abc",
        "hardware": {"cpu": "Some CPU", "cores": 2},
        "weights": {"model": "tiny"},
        "time": "2026-11-24T18:49:56+00:00",
    }
    return {"provenance": origin, "runs": runs}
