"""CUDA graphs without a GPU: buckets, by a recorder that runs all again; devices, by torch's fake
tensors."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from smart_decoding.engine.rows import Rows, build_rows
from smart_decoding.models.decoder import Decoder
from smart_decoding.models.graphs import BUCKETS, CudaRecorder, GraphedLayers, graphed
from smart_decoding.models.torch_layers import TorchLayers

from .checkpoints import (
    MODELS,
    PAGES,
    VOCAB,
    Memory,
    config_of,
    decoder,
    plain_rows,
    random_trees,
    reference,
    span,
)

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


def with_graphs(model: Decoder) -> Replays:
    assert isinstance(model._layers, TorchLayers)
    replays = Replays()
    model._layers = GraphedLayers(model._layers, replays)
    return replays


@pytest.mark.parametrize("name", MODELS)
def test_graphs_compute_the_same(name: str) -> None:
    """A prompt's rows, then trees of two requests beside another prompt, then single rows: twice,
    so that what forwards have left in the buffers is seen to harm nobody."""
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
            wanted = eager.forward(rows, (1, 2))
            got = model.forward(rows, (1, 2))
            torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-4)
            torch.testing.assert_close(got.aux_hidden, wanted.aux_hidden, rtol=0, atol=1e-4)
            assert replays.count - before == model.config.layers + 1


def test_linear_layers_see_the_bucket_and_attention_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = decoder("llama", False)
    with_graphs(model)
    seen = set()
    linear = torch.nn.functional.linear
    attend = torch.nn.functional.scaled_dot_product_attention

    def counting(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        seen.add(("linear", len(x)))
        return linear(x, *rest)

    def watching(q: torch.Tensor, *rest: torch.Tensor, **named: object) -> torch.Tensor:
        seen.add(("attention", q.shape[2]))
        return attend(q, *rest, **named)

    monkeypatch.setattr(torch.nn.functional, "linear", counting)
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watching)
    rows = plain_rows(span(TOKENS[:11], 0, Memory(1).pages(11)))
    rows.logit_rows = np.array([3])
    model.forward(rows)
    # Three query heads share one of keys; the last: the output matrix.
    assert seen == {("linear", 16), ("attention", 3 * 11), ("linear", 1)}


def test_more_rows_than_the_largest_bucket_are_run_eagerly() -> None:
    model = decoder("llama", False)
    replays = with_graphs(model)
    count = BUCKETS[-1] + 1
    model.forward(plain_rows(span(TOKENS[:count], 0, Memory(1).pages(count))))
    assert not replays.count
    assert model.steps == BUCKETS


def test_where_recording_fails_kernels_are_launched_one_by_one(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: CudaRecorder, device: torch.device) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(CudaRecorder, "__init__", fail)
    layers = decoder("llama", False)._layers
    assert isinstance(layers, TorchLayers)
    with caplog.at_level(logging.WARNING, "smart.graphs"):
        assert isinstance(graphed([layer.weights for layer in layers.each]), TorchLayers)
    assert "no CUDA graphs" in caplog.text


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "qwen3"])
def test_every_tensor_is_on_the_models_device(name: str, graphs: bool) -> None:
    """Shapes and devices only, "meta" for a GPU: nothing is computed, but what lies on two devices
    is refused."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        weights = {
            key: mode.from_tensor(value) for key, value in reference(name).state_dict().items()
        }
        model = Decoder(
            config_of(name), weights, torch.bfloat16, torch.device("meta"), PAGES, 512, False
        )
        if graphs:
            with_graphs(model)
        trees = random_trees(1, 2, 9)
        spans = [
            span(TOKENS[30:31], 30, np.arange(4, dtype=np.int32), len(trees.nodes_of(i)))
            for i in range(2)
        ]
        rows: Rows = build_rows(
            [*spans, span(TOKENS[:7], 0, np.arange(1, dtype=np.int32))], trees, [True] * 3
        )[0]
        out = model.forward(rows, (1, 2))
    assert out.logits.device.type == out.aux_hidden.device.type == "meta"
    assert out.logits.shape == (3 + len(trees), VOCAB)
    assert out.aux_hidden.shape == (
        len(rows),
        2 * model.config.hidden,
    )
