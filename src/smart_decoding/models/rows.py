"""The rows of a forward in the two forms that backends read: pointers for the CPU kernels, padded
tensors for torch."""

from __future__ import annotations

from ctypes import Structure
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.engine.kv import PAGE
from smart_decoding.kernels import abi
from smart_decoding.kernels.memory import address

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Rows

_Rows = abi.structure("Rows")


@dataclass(frozen=True, slots=True)
class NativeRows:
    """Pointers for the CPU kernels, and the arrays behind them."""

    struct: Structure
    keep: tuple[object, ...]


def native_rows(rows: Rows, cosine: Tensor, sine: Tensor) -> NativeRows:
    """The rows as the kernels read them. cosine, sine: tables [positions, head_dim / 2]."""
    arrays = (
        rows.query_start_loc,
        rows.block_table_start,
        rows.pages,
        rows.slot_mapping,
        rows.context_len,
        rows.ancestors_start,
        rows.ancestors,
    )
    pointers = map(address, (*arrays, rows.position))
    struct = _Rows(
        len(rows), len(rows.query_start_loc) - 1, *pointers, cosine.data_ptr(), sine.data_ptr()
    )
    return NativeRows(struct, (*arrays, rows.position, cosine, sine))


class GatheredRows:
    """The same rows for backends without ragged attention, on a device: padded to `shape` =
    (groups, q) with a mask.

    page, offset: [rows] where each row's own key goes; key_page, key_offset: [groups, k] where the
    keys that a group reads lie; mask: [groups, q, k]; query: [rows] flat index of each row in
    [groups, q], or, if those are `even`, its own number.
    """

    def __init__(self, rows: Rows, device: torch.device) -> None:
        sizes = np.diff(rows.query_start_loc)
        groups, q = len(sizes), int(sizes.max())
        group_of = np.repeat(np.arange(groups), sizes)
        within = np.arange(len(rows)) - rows.query_start_loc[group_of]
        lists = [self._keys(rows, g) for g in range(groups)]
        k = max(len(slots) for slots, _ in lists)
        k += -k % 8  # as torch's kernels want the rows of a mask aligned
        keys = np.zeros((groups, k), np.int64)
        mask = np.zeros((groups, q, k), np.bool_)
        mask[:, :, 0] = True  # padded queries must read something, or softmax gives NaN
        for g, (slots, seen) in enumerate(lists):
            # what is masked must be of the group itself: another one's NaN would get through
            keys[g] = slots[0]
            keys[g, : len(slots)] = slots
            mask[g, : len(seen), : len(slots)] = seen
        slot = rows.slot_mapping.astype(np.int64)
        parts = (slot // PAGE, slot % PAGE, keys // PAGE, keys % PAGE, mask, group_of * q + within)
        on_device = (torch.from_numpy(part).to(device) for part in parts)
        self.page, self.offset, self.key_page, self.key_offset, self.mask, self.query = on_device
        self.shape = (groups, q)
        self.even = groups * q == len(rows)
        self._bias: dict[int, Tensor] = {}

    def bias(self, heads: int, dtype: torch.dtype) -> Tensor:
        """[groups, 1, heads * q, k] the mask as what is added to scores, the same for so many
        heads."""
        if heads not in self._bias:
            bias = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
            bias.masked_fill_(~self.mask, -torch.inf)
            self._bias[heads] = bias.repeat(1, heads, 1)[:, None]
        return self._bias[heads]

    @staticmethod
    def _keys(rows: Rows, g: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The slots that a group reads, [k], and which of them each of its rows reads, [q, k]."""
        first, last = rows.query_start_loc[g : g + 2].tolist()
        context = rows.context_len[first:last]
        span = int(context.max())
        table = rows.pages[rows.block_table_start[g] :][: -(-span // PAGE)].astype(np.int64)
        slots = (table[:, None] * PAGE + np.arange(PAGE)).reshape(-1)[:span]
        start = rows.ancestors_start
        own = np.unique(rows.ancestors[start[first] : start[last]]).astype(np.int64)
        seen = np.zeros((last - first, span + len(own)), np.bool_)
        seen[:, :span] = np.arange(span) < context[:, None]
        for i, row in enumerate(range(first, last)):
            ancestors = rows.ancestors[start[row] : start[row + 1]]
            seen[i, span + np.searchsorted(own, ancestors)] = True
        return np.concatenate((slots, own)), seen
