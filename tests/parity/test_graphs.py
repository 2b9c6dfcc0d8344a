"""CUDA graphs without a GPU: buckets, by a recorder that runs all again."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import Tensor

from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import build_rows
from smart_decoding.models.torch import graphs as graphs_module
from smart_decoding.models.torch.graphs import GraphedLayers
from smart_decoding.models.torch.rows import BUCKETS
from smart_decoding.models.torch.torch_layers import TorchLayers, TorchOps, rms_norm, rotate

from .checkpoints import (
    MODELS,
    VOCAB,
    Memory,
    decoder,
    plain_rows,
    random_trees,
    span,
)

if TYPE_CHECKING:
    from smart_decoding.models.families.decoder import Decoder
    from smart_decoding.models.torch.layers import Context, LayerWeights

TOKENS = np.random.default_rng(0).integers(0, VOCAB, 400)


class Replays:
    """Records nothing, runs it again; counts that."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        def replay() -> None:
            self.count += 1
            run()

        return replay


class ReadsMeta(TorchOps):
    """The definition, row by row, of what kernels make of `DeviceRows`, which they find where the
    recording found it."""

    def write(
        self, qkv: Tensor, w: LayerWeights, context: Context, keys: Tensor, values: Tensor
    ) -> Tensor:
        there = context.on_device
        assert len(qkv) in (there.size, len(context.rows))
        q, k, v = qkv.view(len(qkv), -1, w.head_dim).split([w.heads, w.kv_heads, w.kv_heads], 1)
        cosine, sine = (each[:, w.angle : w.angle + w.head_dim // 2] for each in context.rotation)
        k = rotate(rms_norm(k, w.k_norm, w.eps), cosine, sine)
        for row, slot in enumerate(there.meta[: len(qkv)].tolist()):
            if slot >= 0:
                keys[:, slot // PAGE, slot % PAGE] = k[row]
                values[:, slot // PAGE, slot % PAGE] = v[row]
        return rotate(rms_norm(q, w.q_norm, w.eps), cosine, sine)

    def attend(
        self,
        q: Tensor,
        context: Context,
        keys: Tensor,
        values: Tensor,
        window: int = 0,
        sinks: Tensor | None = None,
    ) -> Tensor:
        there = context.on_device
        meta = there.meta.numpy()
        _, length, begin, end = meta[: 4 * there.size].reshape(4, there.size)
        out = torch.full_like(q, torch.nan)  # padding is nobody's
        for first, count, table in meta[4 * there.size :][: 3 * there.tiles].reshape(3, -1).T:
            for row in range(first, first + count):
                at = np.arange(length[row])
                slots = meta[table + at // PAGE] * PAGE + at % PAGE
                slots = np.append(slots, meta[begin[row] : end[row]])[-window:]
                slots = torch.from_numpy(slots).long()
                k, v = (part.flatten(1, 2)[:, slots] for part in (keys, values))
                groups = q[row].view(len(keys), -1, q.shape[2])
                scores = groups @ k.transpose(1, 2) * q.shape[2] ** -0.5
                if sinks is not None:
                    scores = torch.cat((scores, sinks.view(len(keys), -1, 1)), dim=-1)
                weights = scores.softmax(-1)[..., : len(slots)]
                out[row] = (weights @ v).view_as(q[row])
        return out.flatten(1)


def with_graphs(model: Decoder) -> Replays:
    assert isinstance(model._layers, TorchLayers)
    replays = Replays()
    eager = TorchLayers((layer.weights for layer in model._layers.each), ReadsMeta())
    model._layers = GraphedLayers(eager, replays)
    return replays


@pytest.mark.parametrize("name", MODELS)
def test_graphs_compute_the_same(name: str) -> None:
    """A prompt's rows, then trees of two requests beside another prompt, then single rows: twice,
    so that what forwards have left in the buffers is shown to harm nobody."""
    eager = decoder(name, False)
    model = decoder(name, False)
    replays = with_graphs(model)
    for _ in range(2):
        memory = Memory(4)
        tables = [memory.pages(60), memory.pages(60)]
        prompts = plain_rows(*(span(TOKENS[:30], 0, table) for table in tables))
        trees = random_trees(1, 2, 9)
        spans = [span(TOKENS[30:31], 30, t, len(trees.nodes_of(i))) for i, t in enumerate(tables)]
        spans.append(span(TOKENS[:7], 0, memory.pages(7)))
        for rows in (
            prompts,
            build_rows(spans, trees, [True, True, False])[0],
            plain_rows(*spans[:1]),
        ):
            before = replays.count
            expected = eager.forward(rows, (1, 2))
            got = model.forward(rows, (1, 2))
            torch.testing.assert_close(got.logits, expected.logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(got.features, expected.features, rtol=0, atol=1e-4)
            assert replays.count - before == 1


def test_products_see_the_bucket(monkeypatch: pytest.MonkeyPatch) -> None:
    model = decoder("llama", False)
    with_graphs(model)
    sizes = set()
    linear = torch.nn.functional.linear

    def counting(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.add(len(x))
        return linear(x, *rest)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    rows = plain_rows(span(TOKENS[:11], 0, Memory(1).pages(11)))
    rows.logit_rows = np.array([3])
    model.forward(rows)
    assert sizes == {16, 1}  # the last: the output matrix


@pytest.mark.parametrize("many", ["rows", "pages"])
def test_what_no_buffer_has_room_for_is_run_eagerly(
    many: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = decoder("llama", False)
    replays = with_graphs(model)
    if many == "pages":
        monkeypatch.setattr(graphs_module, "META", 20)
    count = 3 if many == "pages" else BUCKETS[-1] + 1
    rows = plain_rows(span(TOKENS[:count], 0, Memory(1).pages(count)))
    expected = decoder("llama", False).forward(rows)
    torch.testing.assert_close(model.forward(rows).logits, expected.logits, rtol=0, atol=1e-4)
    assert not replays.count
    assert model.steps == BUCKETS


def test_where_recording_fails_kernels_are_launched_one_by_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fail(run: Callable[[], None]) -> Callable[[], None]:
        raise RuntimeError("no such luck")

    model = decoder("llama", False)
    assert isinstance(model._layers, TorchLayers)
    model._layers = GraphedLayers(model._layers, fail)
    rows = plain_rows(span(TOKENS[:3], 0, Memory(1).pages(3)))
    expected = decoder("llama", False).forward(rows)
    with caplog.at_level(logging.WARNING, "smart.graphs"):
        for _ in range(2):
            torch.testing.assert_close(
                model.forward(rows).logits, expected.logits, rtol=0, atol=1e-4
            )
    assert caplog.text.count("no CUDA graphs") == 1


def test_split_sums_stay_in_float32() -> None:
    matmul = torch.backends.cuda.matmul
    matmul.allow_bf16_reduced_precision_reduction = True
    decoder("llama", False)
    assert not matmul.allow_bf16_reduced_precision_reduction


def test_a_layers_parts_go_when_they_are_joined() -> None:
    """No two layers' parts are in memory at a time, beside their copies."""
    weights = [layer.weights for layer in decoder("llama", False)._layers.each]
    parts: list[weakref.ref[Tensor]] = []

    def loading() -> Iterator[LayerWeights]:
        for w in weights:
            assert all(part() is None for part in parts)
            (network,) = w.networks
            network = replace(network, gate=network.gate.clone(), up=network.up.clone())
            w = replace(w, qkv=[w.qkv[0].clone()], networks=[network])
            parts.extend(map(weakref.ref, (*w.qkv, network.gate, network.up)))
            yield w
            del w

    TorchLayers(loading(), TorchOps())
    assert len(parts) == 3 * len(weights)
