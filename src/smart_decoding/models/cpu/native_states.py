"""Recurrent states as the CPU kernels keep them (States in abi.h)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure
from typing import TYPE_CHECKING

import numpy as np
import torch

from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.memory import address
from smart_decoding.models.torch.layers import zeros

if TYPE_CHECKING:
    from torch import Tensor

    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.rows import Rows
    from smart_decoding.models.families.layer import LinearAttention

_CPU = torch.device("cpu")
ROOM = 8  # accepted rows of a request for which there is room from the beginning


class NativeStates:
    """What linear attention keeps of each request, for `slots` of them, and of a round's nodes.

    A verified node changes no state. What `layers` layers read of it is kept until its round's
    result is known. Accepted nodes then wait for their request's next forward, which begins with
    them: a state is read and written once a round."""

    def __init__(self, layers: int, shape: LinearAttention, slots: int) -> None:
        self._layers = layers
        self._slots = slots
        self._before = shape.kernel - 1
        self._width = shape.row_size
        state = shape.packed_state_size(kernels.COLUMNS)
        self._states = zeros((1, slots, layers * state), torch.float32, _CPU)
        self._waiting = np.zeros(slots, np.int32)
        self._nodes = torch.empty(0)
        self.struct = kernels.States(
            slots=slots,
            layers=layers,
            states=self._states.data_ptr(),
            waiting=address(self._waiting),
        )
        self._inputs = self._with_room(ROOM)

    def _with_room(self, room: int) -> Tensor:
        """Return memory for inputs, so many of which may wait."""
        rows = self._before + room
        inputs = zeros((1, self._slots, self._layers, rows, self._width), torch.float32, _CPU)[0]
        self.struct.room = room
        self.struct.inputs = inputs.data_ptr()
        return inputs

    def prepare(self, depths: IntArray) -> int | None:
        """Return the address of memory for what is kept of a forward's tree nodes, None without
        any; and make room for the longest path. depths: of nodes, and 0 of other rows."""
        nodes = int(np.count_nonzero(depths))
        if not nodes:
            return None
        if (deepest := int(depths.max())) > self.struct.room:
            before = self._inputs
            self._inputs = self._with_room(2 * deepest)
            self._inputs[:, :, : before.shape[2]] = before
        if self._nodes.numel() < (size := self._layers * nodes * self._width):
            self._nodes = torch.empty(size + size // 4)
        return self._nodes.data_ptr()

    def advance(self, model: Structure, rows: Rows, paths: Sequence[Sequence[int]]) -> None:
        """Have the rows of accepted nodes wait, of the last forward's first groups."""
        if rows.states is None:
            return
        is_node = np.diff(rows.ancestors_start) > 0
        number = np.cumsum(is_node) - 1
        kernels.advance(
            model,
            self._nodes,
            int(is_node.sum()),
            rows.states[: len(paths)],
            number[[row for path in paths for row in path]],
            np.array([len(path) for path in paths]),
        )

    def copy(self, source: int, target: int, beyond: int = 0) -> None:
        """Copy all that is kept of a request to another place, without the last `beyond` of the
        rows that wait."""
        self._states[:, target] = self._states[:, source]
        self._inputs[target] = self._inputs[source]
        self._waiting[target] = self._waiting[source] - beyond

    @property
    def address(self) -> int:
        """Address of the structure, valid as long as this object lives."""
        return ctypes.addressof(self.struct)

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """The states, and the inputs [slots, layers, rows, width], in the kernels' layout."""
        return self._states, self._inputs


def snapshots_of(requests: int) -> int:
    """Return how many copies of states are kept beside those of so many requests: two of a lone
    one, behind its prompt and in its answer; none where no request has a state."""
    return (requests + 7) // 4 if requests else 0
