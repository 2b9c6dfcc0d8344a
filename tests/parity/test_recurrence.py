"""Linear attention on torch: states of the same bits however tokens are cut into forwards, and
whatever rows run beside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from smart_decoding.engine.rows import build_rows
from smart_decoding.models.families.layer import LinearAttention
from smart_decoding.models.torch.recurrence import DeltaWeights, RecurrentStates, Steps, mix

from .checkpoints import Memory, plain_rows, random_trees, span

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Rows

CPU = torch.device("cpu")
SHAPES = [LinearAttention(2, 4, 8, 8, 4), LinearAttention(2, 2, 128, 128, 4)]


class Layer:
    """One layer's recurrence on random inputs, a row for each of `count` tokens."""

    def __init__(self, shape: LinearAttention, count: int) -> None:
        generator = torch.Generator().manual_seed(1)

        def random(*size: int) -> torch.Tensor:
            return torch.randn(*size, generator=generator)

        heads = shape.value_heads
        self.weights = DeltaWeights(
            shape,
            rates=torch.empty(0),
            convolution=random(shape.kernel, shape.channels),
            decay=-random(heads).exp(),
            bias=random(heads),
            norm=random(shape.value_dim),
        )
        self.x = random(count, shape.channels)
        self.rates = random(count, 2 * heads)
        self.gate = random(count, shape.values)
        self.memory = RecurrentStates.empty(1, shape, 8, CPU)

    def run(self, rows: Rows, which: list[int]) -> tuple[torch.Tensor, Steps]:
        """which: the token of each row."""
        steps = Steps(rows, CPU)
        parts = (self.x[which], self.rates[which], self.gate[which])
        return mix(*parts, self.weights, steps, self.memory.layers[0], 1e-6), steps

    def state(self, place: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, states = self.memory.layers[0]
        return inputs[place].clone(), states[place].clone()


def assert_equal_states(layer: Layer, place: int, other: int) -> None:
    for got, wanted in zip(layer.state(place), layer.state(other), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", SHAPES, ids=["tiny", "of Qwen3.5"])
def test_outputs_and_states_have_the_same_bits_however_tokens_are_cut(
    shape: LinearAttention,
) -> None:
    count = 60
    layer = Layer(shape, count)
    pages = Memory(1).pages(count)
    tokens = np.arange(count)
    wanted, _ = layer.run(plain_rows(span(tokens, 0, pages, state=0)), [*range(count)])
    for place, sizes in enumerate(([1] * count, [1, 2, 30, 27], [59, 1]), start=1):
        start = 0
        got = []
        for size in sizes:
            part = span(tokens[start : start + size], start, pages, state=place)
            others = [span(tokens[:n], 0, pages, state=5 + i) for i, n in enumerate((7, 31))]
            which = [*range(start, start + size), *range(7), *range(31)]
            got.append(layer.run(plain_rows(part, *others), which)[0][:size])
            start += size
        assert torch.equal(torch.cat(got), wanted)
        assert_equal_states(layer, place, 0)


@pytest.mark.parametrize("shape", SHAPES, ids=["tiny", "of Qwen3.5"])
def test_nodes_have_the_bits_of_plain_decoding_and_change_no_state(shape: LinearAttention) -> None:
    """Ragged trees of three requests, one of which has none."""
    layer = Layer(shape, 60)
    pages = Memory(1).pages(100)
    prompts = (3, 17, 40)
    prefill = [span(range(n), 0, pages, state=i) for i, n in enumerate(prompts)]
    layer.run(plain_rows(*prefill), [token for n in prompts for token in range(n)])
    trees = random_trees(5, 3, 14)
    trees = trees.take(np.flatnonzero(trees.owner != 1), 3)
    node_token = [50 + node % 10 for node in range(len(trees))]
    roots = [span([n], n, pages, len(trees.nodes_of(i)), i) for i, n in enumerate(prompts)]
    rows, last, node_row = build_rows(roots, trees, [True] * 3)
    which = [0] * len(rows)
    for row, prompt in zip(last, prompts, strict=True):
        which[row] = prompt
    for row, token in zip(node_row, node_token, strict=True):
        which[row] = token
    got, steps = layer.run(rows, which)

    def alone(owner: int, path: list[int], place: int) -> torch.Tensor:
        tokens = [*range(prompts[owner] + 1), *(node_token[node] for node in path)]
        for position, token in enumerate(tokens):
            one = span([0], position, pages, state=place)
            out, _ = layer.run(plain_rows(one), [token])
        return out[0]

    for owner in range(3):
        assert torch.equal(got[last[owner]], alone(owner, [], 7))
        assert_equal_states(layer, owner, 7)
    for node in range(len(trees)):
        assert torch.equal(got[node_row[node]], alone(int(trees.owner[node]), trees.path(node), 7))
    accepted = [
        max((trees.path(n) for n in trees.nodes_of(i)), key=len, default=[]) for i in range(3)
    ]
    accepted[2] = accepted[2][:1]
    assert len(accepted[0]) > 1
    steps.advance([[node_row[node] for node in path] for path in accepted])
    for owner, path in enumerate(accepted):
        alone(owner, path, 7)
        assert_equal_states(layer, owner, 7)
