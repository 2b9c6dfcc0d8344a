"""Keys and values of a transformers model in the engine's KV slots, shown to the model as an
ordinary cache.

`Rows` name the slots that a row reads. For one forward the groups become a batch, right-aligned:
each sequence's committed keys, then its new rows, with padding on the left. Nothing is rolled back
or compacted: a rejected node's slot is simply written again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin

from smart_decoding.engine.kv import PAGE

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.rows import Rows

Bools = NDArray[np.bool_]


@dataclass(slots=True)
class Layout:
    """The layout of one forward's rows and keys.

    It holds `groups` sequences of `queries` rows over `width` keys.

    row: [rows] index in `Rows`; at: [2, rows] its (group, column among the queries).
    read: [groups, width] slots of the keys, 0 where padded; valid: [groups, width]; write: [rows]
    slots of new keys. attended: [groups, queries, width] which keys a row attends to; padding rows
    attend to all, so that no softmax is empty."""

    row: IntArray
    at: IntArray
    read: IntArray
    valid: Bools
    write: IntArray
    attended: Bools
    _on: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @property
    def groups(self) -> int:
        """Sequences."""
        return int(self.read.shape[0])

    @property
    def queries(self) -> int:
        """Rows of each sequence, padding included."""
        return int(self.attended.shape[1])

    @property
    def width(self) -> int:
        """Keys of each sequence, padding included."""
        return int(self.read.shape[1])

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Return on a device of some layers: group and column [rows], write [rows], read
        [groups * width]."""
        if device not in self._on:
            parts = (*self.at, self.write, self.read.reshape(-1))
            self._on[device] = tuple(
                torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in parts
            )
        return self._on[device]


def lay_out(rows: Rows, groups: list[int]) -> Layout:
    """Return the layout of some groups of `rows`.

    A group holds the keys that its rows read: first committed ones, then tree nodes of earlier
    forwards (a draft model's), and last its own rows."""
    parts = [_keys(rows, g) for g in groups]
    count = [part.own for part in parts]
    queries = max(count)
    width = max(len(part.slots) for part in parts)
    read = np.zeros((len(groups), width), np.int64)
    valid = np.zeros((len(groups), width), np.bool_)
    attended = np.ones((len(groups), queries, width), np.bool_)
    for i, part in enumerate(parts):
        left = width - len(part.slots)
        read[i, left:] = part.slots
        valid[i, left:] = True
        attended[i, queries - part.own :, :left] = False
        attended[i, queries - part.own :, left:] = part.attended
    first = [int(rows.query_start_loc[g]) for g in groups]
    row = np.concatenate([np.arange(a, a + n) for a, n in zip(first, count, strict=True)])
    group = np.repeat(np.arange(len(groups)), count)
    column = np.concatenate([np.arange(queries - n, queries) for n in count])
    write = rows.slot_mapping[row].astype(np.int64)
    return Layout(row, np.stack((group, column)), read, valid, write, attended)


@dataclass(slots=True)
class _Keys:
    """Keys of a group. slots: [keys], the last `own` of them its rows; attended: [own, keys]."""

    slots: IntArray
    own: int
    attended: Bools


def _keys(rows: Rows, group: int) -> _Keys:
    a, b = rows.query_start_loc[group : group + 2].tolist()
    context_len = rows.context_len[a:b]
    own = rows.slot_mapping[a:b]
    pages = rows.pages[rows.block_table_start[group] :].astype(np.int64)
    position = np.arange(int(context_len.max()))
    committed = pages[position // PAGE] * PAGE + position % PAGE
    # The first row may read itself through the table; then later rows do, too.
    if committed[context_len[0] - 1] == own[0]:
        committed = committed[: context_len[0] - 1]
    start = rows.ancestors_start[a : b + 1]
    ancestor = rows.ancestors[start[0] : start[-1]]
    reader = np.repeat(np.arange(b - a), np.diff(start))
    earlier = np.setdiff1d(ancestor, own)
    slots = np.concatenate((committed, earlier, own))
    attended = np.ones((b - a, len(slots)), np.bool_)
    attended[:, len(committed) :] = False
    through_table = context_len - len(committed)  # how many of its group's rows a row reads there
    attended[:, len(committed) + len(earlier) :] = np.arange(b - a) < through_table[:, None]
    nodes = slots[len(committed) :]
    order = np.argsort(nodes)
    attended[reader, len(committed) + order[np.searchsorted(nodes[order], ancestor)]] = True
    return _Keys(slots, b - a, attended)


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [slots, heads, head_dim], grown as slots come into use."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = 0
        self.layout: Layout | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Store as many slots as are in use, in the dtype and on the device of the states."""
        self.dtype = key_states.dtype
        self.device = key_states.device
        self.keys = _enlarged(None, key_states, self.slots)
        self.values = _enlarged(None, value_states, self.slots)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the rows' [groups, heads, queries, head_dim]; return [groups, heads, width,
        head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(self.keys) < self.slots:
            self.keys = _enlarged(self.keys, key_states, self.slots)
            self.values = _enlarged(self.values, value_states, self.slots)
        return self._exchange(self.keys, key_states), self._exchange(self.values, value_states)

    def _exchange(self, store: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        layout = self.layout
        assert layout is not None
        group, column, write, read = layout.on(states.device)
        new = states[:, :, 0] if layout.queries == 1 else states[group, :, column]
        # index_copy_ and index_select cost less than general indices, at every layer.
        store.index_copy_(0, write, new)
        keys = store.index_select(0, read)
        return keys.view(layout.groups, layout.width, *store.shape[1:]).transpose(1, 2)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slots source[i] -> target[i]."""
        if self.is_initialized:
            source = source.to(self.keys.device)
            target = target.to(self.keys.device)
            self.keys[target] = self.keys[source]
            self.values[target] = self.values[source]

    def get_seq_length(self) -> int:
        """Return keys before the rows of this forward, padding included."""
        return 0 if self.layout is None else self.layout.width - self.layout.queries

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """Return the keys that a mask covers, and its offset. query_length: rows, or in some
        earlier releases their positions [queries]."""
        queries = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + queries, 0

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its earlier name


class SlotCache(Cache):
    """The cache of a whole model; `show` says what the next forward writes and reads."""

    def __init__(self, layers: int) -> None:
        self.stores = [SlotLayer() for _ in range(layers)]
        super().__init__(layers=list(self.stores))

    def show(self, layout: Layout) -> None:
        """Set the layout of the next forward."""
        needed = int(layout.read.max()) + 1
        for layer in self.stores:
            layer.layout = layout
            if layer.slots < needed:
                layer.slots = max(needed, 2 * layer.slots)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy slots source[i] -> target[i] of every layer."""
        for layer in self.stores:
            layer.move(source, target)


def _enlarged(store: torch.Tensor | None, states: torch.Tensor, slots: int) -> torch.Tensor:
    new = states.new_zeros((slots, states.shape[1], states.shape[3]))
    if store is not None:
        new[: len(store)] = store
    return new
