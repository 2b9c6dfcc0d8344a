"""From blocks to the figures of one arm at one batch size: the `runs` of the JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from smart_decoding.bench.blocks import Answer, Block, Counts
from smart_decoding.bench.reliability import Reliability
from smart_decoding.bench.statistics import Pair, Ratio, differing, paired_ratio

POOLED = "all"
Paired = tuple[Block, Block]  # an arm's block and the baseline's block of the same cycle


def summarise(pairs: Sequence[Paired], seed: int = 0) -> list[dict[str, Any]]:
    """One dict of figures for each task of the pairs and one for all of them pooled, `task` = 'all'
    the last: it also has the distributions over rounds."""
    by_task = [_figures(task, of_task, seed) for task, of_task in _by_task(pairs).items()]
    pooled = {**_figures(POOLED, pairs, seed), **_distributions([ours for ours, _ in pairs])}
    return [*by_task, pooled]


def _by_task(pairs: Sequence[Paired]) -> dict[str, list[Paired]]:
    tasks: dict[str, list[Paired]] = {}
    for pair in pairs:
        tasks.setdefault(pair[0].task, []).append(pair)
    return tasks


def _bounds(name: str, ratio: Ratio) -> dict[str, Any]:
    return {name: ratio.value, f"{name}_low": ratio.low, f"{name}_high": ratio.high}


def noise(again: Sequence[Paired], seed: int = 0) -> dict[str, Any]:
    """The baseline against itself: what a ratio of 1 looks like on this machine."""
    ratio = decode_speedup(again, seed)
    return {**_bounds("noise", ratio), "noise_pairs": ratio.pairs}


def smart_over(both: Sequence[Paired], seed: int = 0) -> dict[str, dict[str, Any]]:
    """How much faster `smart` decodes than another contestant, on the blocks that both ran: by
    task, and over all."""
    pairs = {**_by_task(both), POOLED: both}
    return {task: _bounds("smart_over", decode_speedup(of, seed)) for task, of in pairs.items()}


def decode_speedup(pairs: Sequence[Paired], seed: int = 0) -> Ratio:
    """The ratio of decode-only throughputs."""
    return paired_ratio(
        [Pair(a.tokens_per_s, b.tokens_per_s, max(1.0, b.counts.tokens), a.task) for a, b in pairs],
        seed,
    )


def end_to_end_speedup(pairs: Sequence[Paired], seed: int = 0) -> Ratio:
    """The ratio of throughputs with prompts and all rounds included."""
    return paired_ratio(
        [Pair(_overall([a]), _overall([b]), b.total_tokens, a.task) for a, b in pairs], seed
    )


def _figures(task: str, pairs: Sequence[Paired], seed: int) -> dict[str, Any]:
    ours, base = [a for a, _ in pairs], [b for _, b in pairs]
    both = [(a.answers[i], b.answers[i]) for a, b in pairs for i in a.answers]
    return {
        "task": task,
        **_throughput(pairs, seed),
        **_round_figures(ours),
        **_latencies(both),
        **_identity(both),
        **_loops([answer for block in base for answer in block.answers.values()]),
        "blocks": len(pairs),
        "prompts": len(both),
    }


def _throughput(pairs: Sequence[Paired], seed: int) -> dict[str, Any]:
    ours = [a for a, _ in pairs]
    counts = sum((block.counts for block in ours), Counts())
    return {
        "tokens_per_s": _per(counts.tokens, counts.seconds),
        **_bounds("speedup", decode_speedup(pairs, seed)),
        "end_to_end_tokens_per_s": _overall(ours),
        **_bounds("end_to_end_speedup", end_to_end_speedup(pairs, seed)),
    }


def _round_figures(blocks: Sequence[Block]) -> dict[str, Any]:
    counts = sum((block.counts for block in blocks), Counts())
    return {
        # of one request
        "tokens_per_round": _per(counts.emitted, counts.rounds * blocks[0].batch_size),
        "rows_per_round": _per(counts.rows, counts.rounds),  # of the batch
        # verified and rejected, per round of the batch
        "wasted_rows": _per(counts.wasted, counts.rounds),
        "controller_share": _per(counts.controller_seconds, counts.round_seconds),
        "off_share": _per(counts.off, counts.rounds),
        "chain_share": _per(counts.chains, counts.rounds),
        "tree_share": _per(counts.trees, counts.rounds),
        "levels_per_round": _per(counts.levels, counts.rounds),
        "rounds": counts.rounds,
        "verify_ms": 1e3 * _per(counts.verify_seconds, counts.rounds),
        "draft_ms": 1e3 * _per(counts.draft_seconds, counts.rounds),
        "context_tokens": _per(counts.context, counts.rounds),  # of one request, mean over rounds
    }


def _distributions(blocks: Sequence[Block]) -> dict[str, Any]:
    rows: Counter[int] = sum((block.row_counts for block in blocks), Counter())
    levels: Counter[int] = sum((block.level_counts for block in blocks), Counter())
    return {
        "row_counts": dict(sorted(rows.items())),
        "level_counts": dict(sorted(levels.items())),
        "reliability": sum((block.reliability for block in blocks), Reliability()).to_dict(),
    }


def _latencies(both: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    """Medians over requests; the ratios compare the same prompt's answer with the baseline's."""
    ratios = [a.tpot / b.tpot for a, b in both if a.tpot > 0 and b.tpot > 0]
    return {
        "ttft_ms": 1e3 * _median([a.ttft for a, _ in both]),
        "vision_ms": 1e3 * _median([a.vision for a, _ in both]),
        "ttft_ratio": _per(_median([a.ttft for a, _ in both]), _median([b.ttft for _, b in both])),
        "tpot_ms": 1e3 * _median([a.tpot for a, _ in both]),
        "worst_tpot_ratio": max(ratios, default=math.nan),
    }


def _identity(both: Sequence[tuple[Answer, Answer]]) -> dict[str, Any]:
    prompts, tokens, compared = differing([(a.tokens, b.tokens) for a, b in both])
    return {
        "identical": prompts == 0,
        "differing_prompts": _per(prompts, len(both)),
        "differing_tokens": _per(tokens, compared),
    }


def _loops(answers: Sequence[Answer]) -> dict[str, Any]:
    """Of the baseline's answers: shares of answers and tokens that were cut."""
    cut = sum(a.looped for a in answers)
    return {
        "looping_answers": _per(sum(a.looped > 0 for a in answers), len(answers)),
        "looping_tokens": _per(cut, cut + sum(len(a.tokens) for a in answers)),
    }


def _overall(blocks: Sequence[Block]) -> float:
    return _per(sum(b.total_tokens for b in blocks), sum(b.total_seconds for b in blocks))


def _per(amount: float, count: float) -> float:
    return amount / count if count else math.nan


def _median(values: Sequence[float]) -> float:
    finite = [v for v in values if math.isfinite(v)]
    return float(np.median(finite)) if finite else math.nan
