"""From cycles of blocks to the rows of the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from smart_decoding.bench.blocks import Block, Counts
from smart_decoding.bench.options import BASELINE, OURS
from smart_decoding.measuring.statistics import Pair, Ratio, paired_ratio

if TYPE_CHECKING:
    from smart_decoding.bench.cycles import Cycle

Paired = tuple[Block, Block]  # an arm's block and another arm's of the same cycle


@dataclass(frozen=True, slots=True)
class Row:
    """A policy at a batch size. speedup: over plain decoding; smart_over: of `smart` over this
    policy, None for `smart` and plain decoding; tokens_per_round: of one request; differing: share
    of answers that are not plain decoding's; partial: whether time ran out."""

    policy: str
    batch_size: int
    tokens_per_s: float
    speedup: Ratio
    smart_over: Ratio | None
    differing: float
    tokens_per_round: float
    blocks: int
    partial: bool


@dataclass(frozen=True, slots=True)
class Results:
    """The rows, plain decoding's first at each batch size. plain_torch: why the CPU kernels did
    not run on a CPU, None where they did."""

    rows: Sequence[Row]
    plain_torch: str | None = None


def rows_of(cycles: Sequence[Cycle], batch_size: int, partial: bool) -> list[Row]:
    """Return a row for each policy; there must be a cycle."""
    return [_row(label, cycles, batch_size, partial) for label in cycles[0]]


def _row(label: str, cycles: Sequence[Cycle], batch_size: int, partial: bool) -> Row:
    pairs = [(cycle[label], cycle[BASELINE]) for cycle in cycles]
    compared = OURS in cycles[0] and label not in (OURS, BASELINE)
    over = [(cycle[OURS], cycle[label]) for cycle in cycles] if compared else []
    counts = sum((block.counts for block, _ in pairs), Counts())
    same = [
        answer.tokens == plain.answers[index].tokens
        for block, plain in pairs
        for index, answer in block.answers.items()
    ]
    return Row(
        label,
        batch_size,
        tokens_per_s=counts.tokens / counts.seconds if counts.seconds else float("nan"),
        speedup=decode_speedup(pairs),
        smart_over=decode_speedup(over) if compared else None,
        differing=1 - sum(same) / len(same),
        tokens_per_round=counts.emitted / max(1, counts.rounds * batch_size),
        blocks=len(pairs),
        partial=partial,
    )


def decode_speedup(pairs: Sequence[Paired], seed: int = 0) -> Ratio:
    """Return the ratio of decode-only throughputs."""
    return paired_ratio(
        [Pair(a.tokens_per_s, b.tokens_per_s, max(1.0, b.counts.tokens), a.task) for a, b in pairs],
        seed,
    )
