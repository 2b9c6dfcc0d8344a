"""Keys and values of a transformers model in the engine's KV slots, shown to the model as an
ordinary cache.

The engine says which slots a row may see (`Rows`). For one forward its groups become a batch,
right-aligned: each sequence's committed keys, then its new rows, with padding on the left. Nothing
is ever rolled back or compacted here: a rejected node's slot is simply written again.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers.cache_utils import Cache, CacheLayerMixin

from smart_decoding.core.tree import IntArray
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Rows

Bools = NDArray[np.bool_]


@dataclass(slots=True)
class Layout:
    """Where the rows and keys of one forward lie: `groups` sequences of `queries` rows over `width`
    keys.

    row: [rows] index in `Rows`; at: [2, rows] its (group, column among the queries).
    read: [groups, width] slots of the keys, 0 where padded; valid: [groups, width]; write: [rows]
    slots of new keys. seen: [groups, queries, width] which keys a row may see; padding rows see
    all, so that no softmax is empty."""

    row: IntArray
    at: IntArray
    read: IntArray
    valid: Bools
    write: IntArray
    seen: Bools

    @property
    def groups(self) -> int:
        return int(self.read.shape[0])

    @property
    def queries(self) -> int:
        return int(self.seen.shape[1])

    @property
    def width(self) -> int:
        return int(self.read.shape[1])


def lay_out(rows: Rows, groups: list[int]) -> Layout:
    """The layout of some groups of `rows`. The keys of a group: those that its rows read and that
    lie there already, committed ones and then tree nodes of earlier forwards (a draft model's), and
    last its own rows."""
    parts = [_keys(rows, g) for g in groups]
    count = [part.own for part in parts]
    queries, width = max(count), max(len(part.slots) for part in parts)
    read = np.zeros((len(groups), width), np.int64)
    valid = np.zeros((len(groups), width), np.bool_)
    seen = np.ones((len(groups), queries, width), np.bool_)
    for i, part in enumerate(parts):
        left = width - len(part.slots)
        read[i, left:] = part.slots
        valid[i, left:] = True
        seen[i, queries - part.own :, :left] = False
        seen[i, queries - part.own :, left:] = part.seen
    first = [int(rows.query_start_loc[g]) for g in groups]
    row = np.concatenate([np.arange(a, a + n) for a, n in zip(first, count, strict=True)])
    group = np.repeat(np.arange(len(groups)), count)
    column = np.concatenate([np.arange(queries - n, queries) for n in count])
    return Layout(
        row, np.stack((group, column)), read, valid, rows.slot_mapping[row].astype(np.int64), seen
    )


@dataclass(slots=True)
class _Keys:
    """slots: [keys] of a group, of which the last `own` are its rows; seen: [own, keys]."""

    slots: IntArray
    own: int
    seen: Bools


def _keys(rows: Rows, group: int) -> _Keys:
    a, b = int(rows.query_start_loc[group]), int(rows.query_start_loc[group + 1])
    direct, own = rows.context_len[a:b], rows.slot_mapping[a:b]
    pages = rows.pages[rows.block_table_start[group] :].astype(np.int64)
    position = np.arange(int(direct.max()))
    committed = pages[position // PAGE] * PAGE + position % PAGE
    if (
        committed[direct[0] - 1] == own[0]
    ):  # the first row reads itself through the table, and so do those that follow
        committed = committed[: direct[0] - 1]
    at = rows.ancestors_start[a : b + 1]
    extra, reader = rows.ancestors[at[0] : at[-1]], np.repeat(np.arange(b - a), np.diff(at))
    ancestors = np.setdiff1d(extra, own)
    slots = np.concatenate((committed, ancestors, own))
    seen = np.ones((b - a, len(slots)), np.bool_)
    seen[:, len(committed) :] = False
    seen[:, len(committed) + len(ancestors) :] = (
        np.arange(b - a) < (direct - len(committed))[:, None]
    )
    order = np.argsort(slots[len(committed) :])
    seen[reader, len(committed) + order[np.searchsorted(slots[len(committed) :][order], extra)]] = (
        True
    )
    return _Keys(slots, b - a, seen)


@dataclass(slots=True)
class Indices:
    """A layout's index tensors, on each device that holds layers."""

    layout: Layout
    _on: dict[torch.device, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """group and column [rows], write [rows], read [groups * width]."""
        if device not in self._on:
            parts = (*self.layout.at, self.layout.write, self.layout.read.reshape(-1))
            self._on[device] = tuple(
                torch.from_numpy(np.ascontiguousarray(part)).to(device) for part in parts
            )
        return self._on[device]


class SlotLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer's keys and values, [slots, heads, head_dim], grown as slots come into use."""

    is_sliding = False
    keys: torch.Tensor
    values: torch.Tensor

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.slots = 0
        self.indices: Indices | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = _grown(None, key_states, self.slots)
        self.values = _grown(None, value_states, self.slots)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores the rows' [groups, heads, queries, head_dim]; returns [groups, heads, width,
        head_dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if len(self.keys) < self.slots:
            self.keys = _grown(self.keys, key_states, self.slots)
            self.values = _grown(self.values, value_states, self.slots)
        return self._exchange(self.keys, key_states), self._exchange(self.values, value_states)

    def _exchange(self, store: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        assert self.indices is not None
        layout = self.indices.layout
        group, column, write, read = self.indices.on(states.device)
        new = states[:, :, 0] if layout.queries == 1 else states[group, :, column]
        store.index_copy_(
            0, write, new
        )  # this and index_select cost less than general indices, at every layer
        return (
            store.index_select(0, read)
            .view(layout.groups, layout.width, *store.shape[1:])
            .transpose(1, 2)
        )

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copies slots source[i] -> target[i]."""
        if self.is_initialized:
            source, target = source.to(self.keys.device), target.to(self.keys.device)
            self.keys[target], self.values[target] = self.keys[source], self.values[source]

    def get_seq_length(self) -> int:
        """Keys before the rows of this forward, padding included."""
        return (
            0 if self.indices is None else self.indices.layout.width - self.indices.layout.queries
        )

    def get_mask_sizes(self, query_length: int | torch.Tensor) -> tuple[int, int]:
        """query_length: rows, or in some earlier releases their positions [queries]."""
        queries = query_length if isinstance(query_length, int) else len(query_length)
        return self.get_seq_length() + queries, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its earlier name


class SlotCache(Cache):
    """The cache of a whole model; `show` says what the next forward writes and reads."""

    def __init__(self, layers: int) -> None:
        self.stores = [SlotLayer() for _ in range(layers)]
        super().__init__(layers=list(self.stores))

    def show(self, layout: Layout) -> None:
        indices, needed = Indices(layout), int(layout.read.max()) + 1
        for layer in self.stores:
            layer.indices = indices
            if layer.slots < needed:
                layer.slots = max(needed, 2 * layer.slots)

    def move(self, source: torch.Tensor, target: torch.Tensor) -> None:
        for layer in self.stores:
            layer.move(source, target)


def _grown(store: torch.Tensor | None, states: torch.Tensor, slots: int) -> torch.Tensor:
    new = states.new_zeros((slots, states.shape[1], states.shape[3]))
    if store is not None:
        new[: len(store)] = store
    return new
