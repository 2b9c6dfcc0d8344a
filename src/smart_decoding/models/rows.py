"""The rows of a forward in one piece of a GPU's memory, as kernels there read them, and the ways to
a device and back. kernels/ops.py has them for the CPU kernels, torch_layers.py for plain torch."""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Rows

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
    """The size that so many rows are padded to where a graph runs them; more are not."""
    return BUCKETS[bisect.bisect_left(BUCKETS, rows)] if rows <= BUCKETS[-1] else rows


def device_rows(rows: Rows, device: torch.device) -> DeviceRows:
    """Brings the rows to a device."""
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
    wanted = rows.token[:0] if rows.logit_rows is None else rows.logit_rows
    parts = (rows.token, rows.position, wanted, head, rows.ancestors, rows.pages)
    whole = upload(np.concatenate(parts, dtype=np.int32, casting="same_kind"), device)
    sizes = [len(rows), len(rows), len(wanted), sum(map(len, parts[3:]))]
    token, position, logit_rows, meta = torch.split(whole, sizes)
    return DeviceRows(token, position, logit_rows, meta, size, tiles)


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on a device; a GPU gets it through pinned memory, and nobody waits for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def download(tensor: Tensor) -> NDArray[Any]:
    """The tensor on the host, which waits for the device: the one way back."""
    array: NDArray[Any] = tensor.cpu().numpy()
    return array
