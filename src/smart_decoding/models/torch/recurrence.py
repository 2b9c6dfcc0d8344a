"""Linear attention by the gated delta rule, in plain torch: the reference.

Each row's state follows from that of the row before it on its path: of the token before it in a
prompt, or of a tree node's parent. All states are computed by the same operations in the same
order, whatever rows run beside, so that they have the same bits. This reads a whole state for each
token, which is slow on prompts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.engine.kv import NO_STATE

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Rows
    from smart_decoding.models.families.layer import LinearAttention

Memory: TypeAlias = tuple[Tensor, Tensor]  # a layer's inputs and states
_EPS = 1e-6  # beside the squares of queries and keys


@dataclass
class DeltaWeights:
    """What linear attention has beside its products.

    rates: [2 * value_heads, hidden] of how fast a state decays, and of how much it learns.
    convolution [kernel, channels], decay and bias [value_heads], norm [value_dim]: float32; decay
    is -exp(A_log)."""

    shape: LinearAttention
    rates: Tensor
    convolution: Tensor
    decay: Tensor
    bias: Tensor
    norm: Tensor


@dataclass
class RecurrentStates:
    """What linear attention keeps of each request, at its committed length, in float32.

    inputs: [layers, slots, kernel - 1, channels] the convolution's last ones; states: [layers,
    slots, value_heads, key_dim, value_dim]. The last slot, -1, is of rows that keep nothing."""

    inputs: Tensor
    states: Tensor

    @classmethod
    def empty(
        cls, layers: int, shape: LinearAttention, slots: int, device: torch.device
    ) -> RecurrentStates:
        """Zeros, for so many requests."""
        first = (layers, slots + 1)
        inputs = (*first, shape.kernel - 1, shape.channels)
        states = (*first, shape.value_heads, shape.key_dim, shape.value_dim)
        return cls(torch.zeros(inputs, device=device), torch.zeros(states, device=device))

    @cached_property
    def layers(self) -> list[Memory]:
        """Inputs and states of each layer."""
        return list(zip(self.inputs.unbind(), self.states.unbind(), strict=True))


@dataclass
class _Step:
    """Rows that have as many rows before them on their paths.

    source: [rows] the states that they follow, among those of the step before, or in the first step
    among the groups'; None: all of them, in order. ends: rows that are their group's last committed
    ones, and slots, where their states go."""

    rows: Tensor
    source: Tensor | None
    ends: Tensor
    slots: Tensor


@dataclass
class _Kept:
    """What a layer keeps of tree nodes, [nodes, ...], to compute the states of accepted ones
    again."""

    memory: Memory
    inputs: Tensor
    k: Tensor
    v: Tensor
    keep: Tensor
    learn: Tensor


class Steps:
    """The rows of a forward in the order in which recurrences reach them.

    slots: [groups] where each group's state lies. fresh: groups that begin at the position 0."""

    def __init__(self, rows: Rows, device: torch.device) -> None:
        def index(numbers: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int64, device=device)

        self._index = index
        # without a state: the place behind all others, which nobody reads
        slots = [NO_STATE] * rows.groups if rows.states is None else rows.states.tolist()
        self._parents, last, self._nodes = _paths(rows)
        ends = {row: slots[group] for row, group in last.items()}
        starts = rows.query_start_loc[:-1]
        self.slots = index(slots)
        self.fresh = index([g for g, row in enumerate(starts) if rows.position[row] == 0])
        self.ends = index([*ends])
        self.end_slots = index([*ends.values()])
        self.each = self._steps(len(slots), ends)
        self._windows: dict[int, Tensor] = {}
        self._at = {row: at for at, row in enumerate(self._nodes)}
        self._node_index = index(self._nodes)
        self._kept: list[_Kept] = []

    def _steps(self, groups: int, last: dict[int, int]) -> list[_Step]:
        steps: list[list[int]] = []
        sources: list[list[int]] = []
        at: list[tuple[int, int]] = []  # of each row its step, and its place there
        for row, parent in enumerate(self._parents):
            number, place = (0, -1 - parent) if parent < 0 else (at[parent][0] + 1, at[parent][1])
            if number == len(steps):
                steps.append([])
                sources.append([])
            at.append((number, len(steps[number])))
            steps[number].append(row)
            sources[number].append(place)
        found = []
        before = groups
        for rows, source in zip(steps, sources, strict=True):
            ends = [place for place, row in enumerate(rows) if row in last]
            found.append(
                _Step(
                    self._index(rows),
                    None if source == [*range(before)] else self._index(source),
                    self._index(ends),
                    self._index([last[rows[place]] for place in ends]),
                )
            )
            before = len(rows)
        return found

    @property
    def has_nodes(self) -> bool:
        """Whether rows of tree nodes are among them."""
        return bool(self._nodes)

    def windows(self, kernel: int) -> Tensor:
        """Return where a convolution's inputs lie, [rows, kernel]: numbered through the inputs
        before each group, kernel - 1 of them, and the rows."""
        if kernel not in self._windows:
            before = kernel - 1
            first_row = len(self.slots) * before
            found: list[list[int]] = []
            for row, parent in enumerate(self._parents):
                group = -1 - parent
                past = (
                    found[parent][1:]
                    if parent >= 0
                    else [*range(group * before, (group + 1) * before)]
                )
                found.append([*past, first_row + row])
            self._windows[kernel] = self._index(found)
        return self._windows[kernel]

    def keep(self, memory: Memory, *of_rows: Tensor) -> None:
        """Keep what a layer has of tree nodes, until `advance`; see _Kept."""
        if self._nodes:
            self._kept.append(_Kept(memory, *(each[self._node_index] for each in of_rows)))

    @torch.inference_mode()
    def advance(self, paths: Sequence[Sequence[int]]) -> None:
        """Bring the states of the first groups to the ends of their paths, which are rows of
        accepted nodes."""
        nodes = [[self._at[row] for row in path] for path in paths]
        moves = [
            (slot, self._index(path))
            for slot, path in zip(self.slots.tolist(), nodes, strict=False)
            if path
        ]
        steps = []
        for step in itertools.zip_longest(*nodes):
            going_on = [group for group, node in enumerate(step) if node is not None]
            at = self._index([step[group] for group in going_on])
            steps.append((self.slots[self._index(going_on)], at))
        for kept in self._kept:
            inputs, states = kept.memory
            for slot, path in moves:
                whole = torch.cat((inputs[slot], kept.inputs[path]))
                inputs[slot] = whole[-inputs.shape[1] :]
            for which, at in steps:
                states[which] = _following(
                    states[which], kept.k[at], kept.v[at], kept.keep[at], kept.learn[at]
                )


def _paths(rows: Rows) -> tuple[list[int], dict[int, int], list[int]]:
    """Return the row before each row on its path, or -1 - group where a group begins; the last
    committed row of each group -> the group; and the rows of tree nodes."""
    starts = rows.ancestors_start.tolist()
    ancestors = rows.ancestors.tolist()
    parents: list[int] = []
    last: dict[int, int] = {}
    nodes: list[int] = []
    for group, (first, end) in enumerate(itertools.pairwise(rows.query_start_loc.tolist())):
        root = -1 - group
        row_at: dict[int, int] = {}  # of nodes, by slot
        for row in range(first, end):
            path = ancestors[starts[row] : starts[row + 1]]
            if path:
                parents.append(row_at[path[-2]] if len(path) > 1 else root)
                row_at[path[-1]] = row
                nodes.append(row)
            else:
                parents.append(root)
                root = row
        if root >= 0:
            last[root] = group
    return parents, last, nodes


def mix(
    x: Tensor,
    rates: Tensor,
    gate: Tensor,
    w: DeltaWeights,
    steps: Steps,
    memory: Memory,
    eps: float,
) -> Tensor:
    """Return what linear attention makes of each row, [rows, value_heads * value_dim] in the dtype
    of x.

    x: [rows, channels] what the convolution reads; rates: [rows, 2 * value_heads]; gate: [rows,
    value_heads * value_dim]. memory: the layer's, in which the states of committed rows are
    brought to their ends."""
    shape = w.shape
    inputs, states = memory
    new = x.float()
    mixed = _convolved(new, w.convolution, steps, inputs)
    q, k, v = torch.split(mixed, [shape.keys, shape.keys, shape.values], dim=1)
    each = shape.value_heads // shape.key_heads
    heads = torch.arange(shape.value_heads, device=x.device)
    heads = heads % shape.key_heads if shape.tiled else heads // each  # a key head for each
    q, k = (_normed(part.view(len(x), shape.key_heads, -1))[:, heads] for part in (q, k))
    q = q * shape.key_dim**-0.5
    v = v.view(len(x), shape.value_heads, -1)
    decay, learn = rates.float().chunk(2, dim=1)
    keep = (w.decay * _softplus(decay + w.bias)).exp()
    learn = _sigmoid(learn)
    out = torch.empty_like(v)
    state = states[steps.slots]
    state[steps.fresh] = 0
    for step in steps.each:
        if step.source is not None:
            state = state[step.source]
        at = step.rows
        state = _following(state, k[at], v[at], keep[at], learn[at])
        out[at] = (state * q[at][..., None]).sum(-2)
        if len(step.ends):
            states[step.slots] = state[step.ends]
    steps.keep(memory, new, k, v, keep, learn)
    normed = F.rms_norm(out, w.norm.shape, w.norm, eps)
    gate = gate.float()
    return (normed.flatten(1) * (gate * _sigmoid(gate))).to(x.dtype)


def _convolved(new: Tensor, weight: Tensor, steps: Steps, inputs: Tensor) -> Tensor:
    """Return the convolution of each row with those before it, [rows, channels], after SiLU. The
    last inputs of committed rows go to `inputs`."""
    before = inputs[steps.slots]
    before[steps.fresh] = 0
    whole = torch.cat((before.flatten(0, 1), new))
    windows = steps.windows(len(weight))
    total = weight[0] * whole[windows[:, 0]]
    for part, at in zip(weight[1:], windows.unbind(1)[1:], strict=True):
        total = total + part * whole[at]
    inputs[steps.end_slots] = whole[windows[steps.ends, 1:]]
    return total * _sigmoid(total)


def _sigmoid(x: Tensor) -> Tensor:
    """torch's own has other last bits where it computes a tensor's end without vectors."""
    return 1 / (1 + x.neg().exp())


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), of the same bits in any company, too. A quotient undoes the rounding of 1 + y,
    as in Kahan's log1p."""
    y = x.abs().neg().exp()
    sum_ = 1 + y
    log = torch.where(sum_ == 1, y, sum_.log() * y / (sum_ - 1))
    return x.clamp(min=0) + log


def _normed(x: Tensor) -> Tensor:
    """x / |x| over the last dimension."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPS)


def _following(state: Tensor, k: Tensor, v: Tensor, keep: Tensor, learn: Tensor) -> Tensor:
    """Return the states [n, value_heads, key_dim, value_dim] after one more row each.

    k [n, value_heads, key_dim], v [n, value_heads, value_dim]; keep, learn [n, value_heads]."""
    state = state * keep[..., None, None]
    found = (state * k[..., None]).sum(-2)
    delta = (v - found) * learn[..., None]
    return state + k[..., None] * delta[..., None, :]
