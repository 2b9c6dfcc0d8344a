"""From blocks to the figures of one arm at one batch size: the `runs` of the JSON.

Needed by `bench`, `robustness` and tools/gpu_check.sh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from smart_decoding.bench.blocks import Answer, Block, Counts
from smart_decoding.bench.results import Paired, decode_speedup
from smart_decoding.measuring.statistics import Pair, Ratio, paired_ratio

POOLED = "all"


def summarise(pairs: Sequence[Paired], seed: int = 0) -> list[dict[str, Any]]:
    """Return one dict of figures for each task of the pairs and one for all of them pooled, `task`
    = 'all' the last."""
    tasks = {**_by_task(pairs), POOLED: pairs}
    return [_figures(task, of_task, seed) for task, of_task in tasks.items()]


def _by_task(pairs: Sequence[Paired]) -> dict[str, list[Paired]]:
    tasks: dict[str, list[Paired]] = {}
    for pair in pairs:
        tasks.setdefault(pair[0].task, []).append(pair)
    return tasks


def _bounds(name: str, ratio: Ratio) -> dict[str, Any]:
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def noise(again: Sequence[Paired], seed: int = 0) -> dict[str, Any]:
    """Return the baseline against itself: what a ratio of 1 looks like on this machine."""
    return _bounds("noise", decode_speedup(again, seed))


def smart_over(both: Sequence[Paired], seed: int = 0) -> dict[str, dict[str, Any]]:
    """Return how much faster `smart` decodes than another contestant, on the blocks that both ran:
    by task, and over all."""
    pairs = {**_by_task(both), POOLED: both}
    return {task: _bounds("smart_over", decode_speedup(of, seed)) for task, of in pairs.items()}


def end_to_end_speedup(pairs: Sequence[Paired], seed: int = 0) -> Ratio:
    """Return the ratio of throughputs with prompts and all rounds included."""
    return paired_ratio(
        [Pair(_overall(a), _overall(b), b.total_tokens, a.task) for a, b in pairs], seed
    )


def _overall(block: Block) -> float:
    return _per(block.total_tokens, block.total_seconds)


def _figures(task: str, pairs: Sequence[Paired], seed: int) -> dict[str, Any]:
    both = [(a.answers[i], b.answers[i]) for a, b in pairs for i in a.answers]
    return {
        "task": task,
        **_throughput(pairs, seed),
        **_round_figures([a for a, _ in pairs]),
        **_times(both),
        **_identity(both),
        "blocks": len(pairs),
        "prompts": len(both),
    }


def _throughput(pairs: Sequence[Paired], seed: int) -> dict[str, Any]:
    counts = sum((ours.counts for ours, _ in pairs), Counts())
    return {
        "tokens_per_s": _per(counts.tokens, counts.seconds),
        **_bounds("speedup", decode_speedup(pairs, seed)),
        **_bounds("end_to_end_speedup", end_to_end_speedup(pairs, seed)),
    }


def _round_figures(blocks: Sequence[Block]) -> dict[str, Any]:
    counts = sum((block.counts for block in blocks), Counts())
    return {
        # of one request
        "tokens_per_round": _per(counts.emitted, counts.rounds * blocks[0].batch_size),
        "rows_per_round": _per(counts.rows, counts.rounds),  # of the batch
        "controller_share": _per(counts.controller_seconds, counts.round_seconds),
        "off_share": _per(counts.off, counts.rounds),
    }


def _times(both: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    """Return the median request's time per token, and the most that one took over the
    baseline's."""
    ratios = [a.tpot / b.tpot for a, b in both if a.tpot > 0 and b.tpot > 0]
    finite = [a.tpot for a, _ in both if math.isfinite(a.tpot)]
    return {
        "tpot_ms": 1e3 * float(np.median(finite)) if finite else math.nan,
        "worst_tpot_ratio": max(ratios, default=math.nan),
    }


def _identity(both: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    differing = sum(a.tokens != b.tokens for a, b in both)
    return {"identical": differing == 0, "differing_prompts": _per(differing, len(both))}


def _per(amount: float, count: float) -> float:
    return amount / count if count else math.nan
