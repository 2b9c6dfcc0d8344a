"""A target without weights: its logits are a hash of the whole token prefix, read back from its KV
slots.

A slot holds (token, position) where a real model has a key and a value, and a row sees exactly the
slots that attention would. Hence any mistake in slots, moves, block tables or ancestors changes the
output, which tests compare.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from smart_decoding.engine.kv import PAGE, Ints
from smart_decoding.engine.verification import TargetScores, verify_by_rows
from smart_decoding.models.sampling.noise import uniform_bits
from smart_decoding.models.sampling.sampler import Sampler

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.rows import Rows

EMPTY = -1  # token and position of a slot that was never written


class FakeTarget(Sampler):
    """`pages` KV pages; `spread`: difference between the largest and smallest logit. Features are
    (token, position)."""

    states = snapshots = 0
    verify = verify_by_rows
    clock = staticmethod(time.perf_counter)

    def __init__(
        self,
        pages: int,
        vocab: int = 23,
        eos_token_ids: tuple[int, ...] = (),
        max_positions: int = 4096,
        spread: float = 8.0,
    ) -> None:
        self.vocab = vocab
        self.eos_token_ids = eos_token_ids
        self.max_positions = max_positions
        self._spread = spread
        self.slots = np.full((pages * PAGE, 2), EMPTY, np.int64)
        self.rows = 0  # of all forwards so far

    def forward(self, rows: Rows, aux_layers: tuple[int, ...]) -> TargetScores:
        self.rows += len(rows)
        own = np.stack((rows.token, rows.position), axis=1)
        self.slots[rows.slot_mapping] = own
        requested = np.arange(len(rows)) if rows.logit_rows is None else rows.logit_rows
        logits = np.array(
            [self._logits(self.slots[visible_slots(rows, int(row))]) for row in requested],
            np.float32,
        )
        return TargetScores(
            torch.from_numpy(logits.reshape(-1, self.vocab)), own if aux_layers else None
        )

    def logits_of(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """[vocab] the logits after `tokens`, without any cache: what `forward` must come to."""
        return self._logits(np.stack((np.asarray(tokens), np.arange(len(tokens))), axis=1))

    def move(self, source: Ints, target: Ints) -> None:
        for i, j in zip(source, target, strict=True):
            self.slots[j] = self.slots[i]

    def _logits(self, visible: IntArray) -> NDArray[np.float32]:
        """Return logits that depend on the visible (token, position) pairs in any order, as in
        attention."""
        key = uniform_bits(visible[:, 1], visible[:, 0] + 1).sum(dtype=np.uint64)
        return _drawn(key, self.vocab, self._spread).copy()


@functools.lru_cache(1 << 16)  # each prefix is met under every policy
def _drawn(key: np.uint64, vocab: int, spread: float) -> NDArray[np.float32]:
    noise = uniform_bits(key, np.arange(vocab)).astype(np.float64) * 2.0**-32
    return (spread * noise).astype(np.float32)


def visible_slots(rows: Rows, row: int) -> IntArray:
    """The slots whose keys `row` attends to, in the order of their positions."""
    group = int(np.searchsorted(rows.query_start_loc, row, side="right")) - 1
    position = np.arange(rows.context_len[row])
    direct = (
        rows.pages[rows.block_table_start[group] + position // PAGE].astype(np.int64) * PAGE
        + position % PAGE
    )
    return np.concatenate(
        (direct, rows.ancestors[rows.ancestors_start[row] : rows.ancestors_start[row + 1]])
    )
