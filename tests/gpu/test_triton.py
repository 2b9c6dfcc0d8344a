"""Triton's kernels by its interpreter (make test-gpu-path), against float64 and the reference."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is to interpret: make test-gpu-path", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed here: make test-gpu-path")

from smart_decoding.engine.rows import build_rows
from smart_decoding.models.torch import triton_ops
from smart_decoding.models.torch.graphs import GraphedLayers
from smart_decoding.models.torch.layers import KVCache
from smart_decoding.models.torch.torch_layers import TorchLayers, TorchOps
from smart_decoding.models.torch.triton_ops import TritonOps, splits_of
from smart_lab.gpu_parity import PAGES, cache_for, context_of, exact, random_rows

from ..parity.checkpoints import VOCAB, Memory, decoder, plain_rows, random_trees, span

# query heads, heads of keys, width
HEADS = [(6, 2, 24), (7, 1, 64), (2, 2, 80), (8, 1, 128), (4, 1, 256)]


@pytest.mark.parametrize("window", [0, 1, 20, 70])
@pytest.mark.parametrize("most_splits", [1, 4])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), HEADS)
def test_attention_is_that_of_float64(
    heads: int,
    kv_heads: int,
    width: int,
    most_splits: int,
    window: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton_ops, "MOST_SPLITS", most_splits)
    torch.manual_seed(0)
    for seed in range(2):
        rows = random_rows(np.random.default_rng([seed, heads]))
        cache = cache_for(rows, kv_heads, width, torch.float32)
        q = torch.randn(len(rows), heads, width)
        keys, values = cache.keys[0], cache.values[0]
        got = TritonOps().attend(q, context_of(rows, width), keys, values, window)
        wanted = exact(q, keys, values, rows, window)
        torch.testing.assert_close(got.double(), wanted, rtol=0, atol=3e-6)
        if most_splits == 1:  # the reference is held to the same
            plain = TorchOps().attend(q, context_of(rows, width), keys, values, window)
            torch.testing.assert_close(plain.double(), wanted, rtol=0, atol=3e-6)


def test_attention_in_half_precision_is_near() -> None:
    """In float16: the interpreter multiplies the bits of bfloat16."""
    torch.manual_seed(0)
    rows = random_rows(np.random.default_rng(5))
    cache = cache_for(rows, 2, 64, torch.float16)
    q = torch.randn(len(rows), 8, 64, dtype=torch.float16)
    got = TritonOps().attend(q, context_of(rows, 64), cache.keys[0], cache.values[0])
    wanted = exact(q, cache.keys[0], cache.values[0], rows)
    assert (got.double() - wanted).abs().max() < 0.003


def test_small_batches_are_split_and_large_ones_are_not() -> None:
    assert splits_of(1, 8) == 32
    assert splits_of(64, 8) == 4
    assert splits_of(320, 8) == 1
    assert splits_of(1, 8) * 8 >= triton_ops.BLOCKS - 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("width", [16, 24, 128, 256])
def test_queries_and_cached_keys_are_the_references(
    width: int, normed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    rows = random_rows(np.random.default_rng(7))
    norms = torch.rand(2, width, dtype=dtype) if normed else (None, None)
    w: Any = SimpleNamespace(
        heads=6, kv_heads=2, head_dim=width, eps=1e-5, q_norm=norms[0], k_norm=norms[1]
    )
    w.angle = width // 2 if normed else 0
    qkv = torch.randn(len(rows), 10 * width, dtype=dtype)
    context = context_of(rows, 2 * width)  # of two kinds of layers
    caches = []
    queries = []
    for ops in (TorchOps(), TritonOps()):
        cache = KVCache.empty(1, 2, PAGES, width, dtype, torch.device("cpu"), False)
        queries.append(ops.write(qkv, w, context, cache.keys[0], cache.values[0]))
        caches.append(cache)
    near = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 0.06}
    torch.testing.assert_close(queries[1], queries[0], **near)
    torch.testing.assert_close(caches[1].keys, caches[0].keys, **near)
    torch.testing.assert_close(caches[1].values, caches[0].values, rtol=0, atol=0)


@pytest.mark.parametrize("gelu", [False, True])
def test_the_gate_is_the_references(gelu: bool) -> None:
    gate_up = torch.randn(5, 2 * 1100)
    torch.testing.assert_close(TritonOps().gate(gate_up, gelu), TorchOps().gate(gate_up, gelu))


@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gemma3"])
def test_a_model_on_these_kernels_computes_the_same(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In recordings: a prompt of two pages, then trees of two requests beside another prompt."""
    monkeypatch.setattr(triton_ops, "BLOCKS", 16)
    plain = decoder(name, False)
    model = decoder(name, False)
    assert isinstance(model._layers, TorchLayers)
    eager = TorchLayers((layer.weights for layer in model._layers.each), TritonOps())
    model._layers = GraphedLayers(eager, lambda run: run)
    tokens = np.random.default_rng(0).integers(0, VOCAB, 40)
    memory = Memory(4)
    tables = [memory.pages(60), memory.pages(60)]
    trees = random_trees(1, 2, 9)
    spans = [span(tokens[20:21], 20, t, len(trees.nodes_of(i))) for i, t in enumerate(tables)]
    spans.append(span(tokens[:7], 0, memory.pages(7)))
    for rows in (
        plain_rows(*(span(tokens[:20], 0, table) for table in tables)),
        build_rows(spans, trees, [True, True, False]).rows,
    ):
        wanted = plain.forward(rows, (1, 2))
        got = model.forward(rows, (1, 2))
        torch.testing.assert_close(got.logits, wanted.logits, rtol=0, atol=1e-4)
        torch.testing.assert_close(got.features, wanted.features, rtol=0, atol=1e-4)
