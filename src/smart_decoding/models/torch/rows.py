"""The rows of a forward as plain torch reads them, and in one piece of a GPU's memory as kernels
there do, and the ways to a device and back. kernels/ops.py has them for the CPU kernels."""

from __future__ import annotations

import bisect
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.engine.kv import PAGE

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Ints, Rows

# Rows that a graph runs at once: as many as tensor cores multiply at once anyway. More are run
# eagerly: prompts, which launches do not slow.
BUCKETS = (1, 2, 4, *range(8, 64, 8), *range(64, 321, 16))
TILE = 8  # rows of a group that read their keys together


@dataclass(frozen=True, slots=True)
class DeviceRows:
    """Rows on a device, brought there in one piece.

    token, position: [rows] int32. logit_rows: as in `Rows`, int32, empty for all. meta: int32, what
    kernels read: [4, size] slot (-1: no row), context_len, where its ancestors' slots begin and end
    in `meta`, of each row; [3, tiles] first row, rows (0: no tile), where the block table begins in
    `meta`, of each tile of up to TILE rows of a group; then ancestors and block tables."""

    token: Tensor
    position: Tensor
    logit_rows: Tensor
    meta: Tensor
    size: int
    tiles: int


def bucket(rows: int) -> int:
    """Return the size that so many rows are padded to where a graph runs them; more are not."""
    return BUCKETS[bisect.bisect_left(BUCKETS, rows)] if rows <= BUCKETS[-1] else rows


def device_rows(rows: Rows, device: torch.device) -> DeviceRows:
    """Bring the rows to a device."""
    size = bucket(len(rows))
    starts = rows.query_start_loc
    each = -(-np.diff(starts) // TILE)  # tiles of a group
    count = int(each.sum())
    tiles = count if size > BUCKETS[-1] else size
    group = np.repeat(np.arange(len(each)), each)
    first = starts[group] + TILE * (np.arange(count) - (np.cumsum(each) - each)[group])
    head = np.zeros(4 * size + 3 * tiles, np.int32)
    of_row = head[: 4 * size].reshape(4, size)
    of_tile = head[4 * size :].reshape(3, tiles)
    of_row[0] = -1
    ancestors = rows.ancestors_start + len(head)
    of_row[:, : len(rows)] = rows.slot_mapping, rows.context_len, ancestors[:-1], ancestors[1:]
    table = rows.block_table_start[group] + len(head) + len(rows.ancestors)
    of_tile[:, :count] = first, np.minimum(TILE, starts[group + 1] - first), table
    with_logits = rows.token[:0] if rows.logit_rows is None else rows.logit_rows
    parts = (rows.token, rows.position, with_logits, head, rows.ancestors, rows.pages)
    whole = upload(np.concatenate(parts, dtype=np.int32, casting="same_kind"), device)
    sizes = [len(rows), len(rows), len(with_logits), sum(map(len, parts[3:]))]
    token, position, logit_rows, meta = torch.split(whole, sizes)
    return DeviceRows(token, position, logit_rows, meta, size, tiles)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """Return the array on a device; a GPU gets it through pinned memory, and nobody waits for
    it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def download(tensor: Tensor) -> NDArray[Any]:
    """Return the tensor on the host, which waits for the device: the one way back."""
    array: NDArray[Any] = tensor.cpu().numpy()
    return array


Slots: TypeAlias = tuple[Tensor, Tensor]  # pages, and offsets in them


class GroupedRows:
    """The rows of a forward as `TorchOps` read them.

    own: [rows] where each row's key goes. groups: of each group its rows, the slots [k] that it
    reads, and how many positions each of them lies behind each row's own [rows, k] int32; NOTHING
    where the row does not read it."""

    NOTHING = torch.iinfo(torch.int32).max

    def __init__(self, rows: Rows, device: torch.device) -> None:
        def slots(of: Ints) -> Slots:
            at = torch.from_numpy(of.astype(np.int64)).to(device)
            return at // PAGE, at % PAGE

        self.own = slots(rows.slot_mapping)
        self.groups: list[tuple[slice, Slots, Tensor]] = []
        for g, (first, last) in enumerate(itertools.pairwise(rows.query_start_loc.tolist())):
            context = rows.context_len[first:last, None]
            at = np.arange(context.max(), dtype=np.int32)
            pages = rows.pages[rows.block_table_start[g] + at // PAGE]
            starts = rows.ancestors_start[first : last + 1]
            begin, end = starts[:-1, None], starts[1:, None]
            nodes = np.arange(starts[0], starts[-1], dtype=np.int32)
            read = np.concatenate((pages * PAGE + at % PAGE, rows.ancestors[nodes]))
            nothing = np.int32(self.NOTHING)
            of_context = np.where(at < context, context + end - begin - 1 - at, nothing)
            own = np.where((nodes >= begin) & (nodes < end), end - 1 - nodes, nothing)
            behind = torch.from_numpy(np.concatenate((of_context, own), axis=1)).to(device)
            self.groups.append((slice(first, last), slots(read), behind))
