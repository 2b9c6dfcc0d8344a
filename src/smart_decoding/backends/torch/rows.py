"""The rows of one forward pass: which tokens, at which positions, seeing which keys.

Linear layers see exactly these rows, ragged trees included. A row reads the positions 0 .. direct-1 of its request
through the block table, then the `extra` slots: its ancestors in the draft tree, and itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.backends.torch.kernels import PAGE, RowsStruct

Ints = NDArray[np.int32]


@dataclass
class ForwardInput:
    """Rows of a forward, those of one request next to each other (a group).

    token, position, slot, direct: [rows]; slot = page * PAGE + offset of the row's own key and value.
    extra_at: [rows + 1] offsets into `extra`, slots that follow the directly read positions in order.
    group_row: [groups + 1] first row of each group; group_pages: [groups] offset of its block table in `pages`.
    logit_rows: rows whose logits are wanted, or None for all.
    """

    token: NDArray[np.int64]
    position: NDArray[np.int64]
    slot: Ints
    direct: Ints
    extra_at: Ints
    extra: Ints
    group_row: Ints
    group_pages: Ints
    pages: Ints
    logit_rows: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.token)

    def native(self, cosine: Tensor, sine: Tensor) -> RowsStruct:
        """Pointers for the CPU kernels; valid as long as this object and the two tensors are."""
        arrays = (self.group_row, self.group_pages, self.pages, self.slot, self.direct, self.extra_at, self.extra)
        pointers = [array.__array_interface__["data"][0] for array in arrays]
        return RowsStruct(len(self), len(self.group_row) - 1, *pointers, cosine.data_ptr(), sine.data_ptr())

    @cached_property
    def gathered(self) -> GatheredRows:
        return GatheredRows(self)


class GatheredRows:
    """The same rows for backends without ragged attention: padded to [groups, longest] with a mask.

    keys: [groups, k] slots, mask: [groups, q, k], query: [rows] flat index of each row in [groups, q].
    """

    def __init__(self, rows: ForwardInput) -> None:
        sizes = np.diff(rows.group_row)
        groups, q = len(sizes), int(sizes.max())
        group_of = np.repeat(np.arange(groups), sizes)
        within = np.arange(len(rows)) - rows.group_row[group_of]
        lists = [self._keys(rows, g) for g in range(groups)]
        k = max(len(slots) for slots, _ in lists)
        keys, mask = np.zeros((groups, k), np.int64), np.zeros((groups, q, k), np.bool_)
        mask[:, :, 0] = True  # padded queries must see something, or softmax gives NaN
        for g, (slots, seen) in enumerate(lists):
            keys[g, : len(slots)] = slots
            mask[g, : len(seen), : len(slots)] = seen
        self.keys, self.mask = torch.from_numpy(keys), torch.from_numpy(mask)
        self.query = torch.from_numpy(group_of * q + within)
        self.shape = (groups, q)

    @staticmethod
    def _keys(rows: ForwardInput, g: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        first, last = int(rows.group_row[g]), int(rows.group_row[g + 1])
        direct = rows.direct[first:last]
        span = int(direct.max())
        table = rows.pages[rows.group_pages[g] :][: (span + PAGE - 1) // PAGE].astype(np.int64)
        slots = (table[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:span]
        own = np.unique(rows.extra[rows.extra_at[first] : rows.extra_at[last]]).astype(np.int64)
        seen = np.zeros((last - first, span + len(own)), np.bool_)
        seen[:, :span] = np.arange(span) < direct[:, None]
        for i, row in enumerate(range(first, last)):
            extra = rows.extra[rows.extra_at[row] : rows.extra_at[row + 1]]
            seen[i, span + np.searchsorted(own, extra)] = True
        return np.concatenate((slots, own)), seen
