"""Quants of GGUF files on the CPU kernels: the same bits as the expanded weights."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, dequantize
from gguf.constants import GGML_QUANT_SIZES

from smart_decoding.kernels import library, ops, weights
from smart_decoding.kernels.weights import (
    PackedWeight,
    QuantizedTensor,
    as_tensor,
    interleaved,
    pack,
)
from smart_decoding.models.checkpoints.rounding import RoundedWeights
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.decoder import Decoder, RoundingDecoder
from smart_decoding.models.families.layer import Experts, FeedForward, LinearAttention
from smart_decoding.models.torch.layers import LayerWeights, NativeLayers, NetworkWeights

from .checkpoints import PAGES, Memory, plain_rows, span
from .kernel_calls import linear

pytestmark = pytest.mark.usefixtures("variant")
KINDS = weights.FORMATS[1:]
K = 512
# bytes of a block that begin a float of 16 bits
HALVES = {
    **{"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    "MXFP4": (),
}


def quants(kind: str, n: int, seed: int = 0) -> QuantizedTensor:
    """Random blocks, their scales about 0.01."""
    rng = np.random.default_rng(seed)
    size, count = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (n, K // size, count), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        halves = (rng.normal(size=(n, K // size, 1)) * 0.01).astype(np.float16)
        blocks[:, :, at : at + 2] = halves.view(np.uint8)
    if kind == "MXFP4":  # exponents, of the least numbers now and then
        blocks[:, :, 0] = rng.choice([0, 1, 2, *range(116, 124)], blocks.shape[:2])
    return QuantizedTensor(blocks.reshape(n, -1), kind, K)


def floats_of(matrix: QuantizedTensor) -> torch.Tensor:
    """The weights by the definition of their format."""
    floats = dequantize(matrix.rows, GGMLQuantizationType[matrix.format])
    return torch.from_numpy(floats).bfloat16()


def assert_same(found: weights.PackedWeight, expected: torch.Tensor) -> None:
    """The same weights, and bit by bit the same products for any number of rows."""
    assert torch.equal(found.rows_of(torch.arange(len(expected))), expected.float())
    x = torch.randn(40, expected.shape[1])
    expanded = pack([expected])
    for rows in (1, 2, 5, 13, 40):
        part = x[:rows].contiguous()
        assert torch.equal(linear(part, found), linear(part, expanded))


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_of_expanded_weights(kind: str) -> None:
    for n in (1, 16, 75):
        matrix = quants(kind, n, seed=n)
        packed = pack([matrix])
        assert packed.struct.strips
        assert torch.equal(as_tensor(matrix), floats_of(matrix))
        assert_same(packed, floats_of(matrix))


def test_stacked_matrices_keep_their_formats() -> None:
    dense = torch.randn(32, K).bfloat16()
    parts = [quants("Q4_K", 64), dense, quants("Q6_K", 32), quants("Q5_1", 32)]
    packed = pack(parts)
    assert packed.struct.strips
    assert packed.nbytes < 128 * K * 0.9 + 32 * K * 2
    assert_same(packed, torch.cat([as_tensor(part) for part in parts]))


def test_rows_of_two_formats_in_one_vector_become_bf16() -> None:
    parts = [quants("Q4_0", 5), quants("Q8_0", 40)]
    packed = pack(parts)
    assert not packed.struct.strips
    assert_same(packed, torch.cat([as_tensor(part) for part in parts]))


@pytest.mark.parametrize("n", [32, 40, 7])
def test_gate_and_up_alternate(n: int) -> None:
    gate, up = quants("Q4_K", n, 1), quants("Q5_K", n, 2)
    order = interleaved(n)
    zero = torch.zeros(1, K, dtype=torch.bfloat16)
    expected = torch.cat([as_tensor(gate), as_tensor(up), zero])[torch.from_numpy(order)]
    assert_same(pack([gate, up], order=order), expected)
    assert_same(pack([as_tensor(gate), as_tensor(up)], order=order), expected)


def test_a_forward_reads_no_more_than_the_file_holds() -> None:
    """Counted for Qwen2.5-Coder-1.5B in Q4_K_M: 28 layers, half of which have two matrices in Q6_K.
    Of the embeddings a forward reads a row a token."""
    ffn, hidden, vocab = 8960, 1536, 151_936
    arena = weights.Arena(0)
    vectors = {name: torch.ones(hidden) for name in ("input_norm", "post_norm")}
    read = held = 4 * hidden  # the last norm
    for finer in ("Q4_K", "Q6_K"):
        qkv = [zeros("Q4_K", hidden, hidden), zeros("Q4_K", 256, hidden), zeros(finer, 256, hidden)]
        rest = {name: zeros("Q4_K", ffn, hidden) for name in ("gate", "up")}
        rest["output"] = zeros("Q4_K", hidden, hidden)
        rest["down"] = zeros(finer, hidden, ffn)
        bias = torch.zeros(hidden + 512)
        networks = [NetworkWeights(*(rest[name] for name in ("gate", "up", "down")))]
        parts = {"qkv": qkv, "qkv_bias": bias, "output": rest["output"], "networks": networks}
        layer = LayerWeights(12, 2, 128, 1e-6, **parts, **vectors)
        packed = NativeLayers([layer], arena)._alive
        both = 4 * (2 * hidden + len(bias))
        read += 14 * (both + sum(each.nbytes for each in packed if isinstance(each, PackedWeight)))
        held += 14 * (both + sum(each.rows.nbytes for each in (*qkv, *rest.values())))
    output = zeros("Q6_K", vocab, hidden)
    read += pack([output], arena).nbytes
    held += output.rows.nbytes
    embeddings = zeros("Q4_K", vocab, hidden).rows.nbytes
    assert held + embeddings == 1_111_370_240  # all tensors of the file
    print(f"{read:,} bytes a forward, {read / held:.3f} of its tensors, embeddings aside")
    assert read < 1.03 * held


def zeros(kind: str, n: int, k: int) -> QuantizedTensor:
    """A row of zeros, n times, in the memory of one: only sizes are looked at."""
    size, count = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    row = np.zeros((1, k // size * count), np.uint8)
    return QuantizedTensor(np.broadcast_to(row, (n, row.shape[1])), kind, k)


def test_some_rows_of_quants() -> None:
    matrix = quants("Q5_0", 64)
    order = np.random.default_rng(0).permutation(64)
    assert torch.equal(as_tensor(matrix[order]), as_tensor(matrix)[torch.from_numpy(order)])
    assert_same(pack([matrix[:33]]), as_tensor(matrix)[:33])


@pytest.mark.parametrize("kind", KINDS)
def test_products_in_8_bits_are_near(kind: str) -> None:
    if not ops.multiplies_bytes():
        pytest.skip("this variant of the kernels has no products of bytes")
    matrix = quants(kind, 75)
    expected = floats_of(matrix)
    packed = pack([matrix], weights.Arena(0, in_bytes=True))
    assert packed.struct.in_bytes
    assert torch.equal(packed.rows_of(torch.arange(75)), expected.float())
    x = torch.randn(21, K)
    found = linear(x, packed)
    exact = linear(x, pack([expected]))
    assert not torch.equal(found, exact)
    assert (found - exact).norm() < 0.01 * exact.norm()
    for rows in (1, 2, 9):  # whatever the company
        assert torch.equal(linear(x[:rows].contiguous(), packed), found[:rows])


def test_products_in_8_bits_need_quants_only() -> None:
    parts = [quants("Q4_K", 64), torch.randn(32, K).bfloat16()]
    packed = pack(parts, weights.Arena(0, in_bytes=True))
    assert packed.struct.strips
    assert not packed.struct.in_bytes
    assert_same(packed, torch.cat([as_tensor(part) for part in parts]))


ALIKE = ("avx512-vnni", "avx512-bf16")  # but that the second multiplies pairs of bf16


@pytest.mark.skipif(not {*ALIKE} <= {*library.runnable()}, reason="this CPU lacks one of the two")
def test_inputs_in_8_bits_are_never_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """So two variants have the same bits, with a head dimension that is not attended in pairs."""
    config = ModelConfig("llama", 2, 64, 4, 2, 16, 96, 70, 1e4, 1e-5, 128, tie_embeddings=True)
    generator = torch.Generator().manual_seed(0)
    shapes = config.expected_shapes().items()
    plain = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes}
    rounded, cpu = RoundedWeights(plain, "int8"), torch.device("cpu")
    rows = plain_rows(span(range(45), 0, Memory(0).pages(45)))
    found = []
    for name in ALIKE:
        monkeypatch.setattr(library, "chosen", functools.partial(str, name))
        decoder = RoundingDecoder(config, rounded, torch.bfloat16, cpu, PAGES, 128, native=True)
        found.append(decoder.forward(rows).logits.clone())
    assert torch.equal(found[0], found[1])


def mixture(clamped: bool) -> ModelConfig:
    each = FeedForward(256, gelu=False, clamped=clamped, bias=clamped)
    experts = Experts(6, per_token=3, normalised=True, each=each, router_bias=clamped)
    return ModelConfig(
        *("qwen3_moe", 2, 256, 4, 2, 16, 96, 70, 1e4, 1e-5, 256),
        qk_norm=not clamped,
        sinks=clamped,
        windows=(40, 0) if clamped else (),
        experts=experts,
    )


HYBRID = ModelConfig(
    *("qwen3_5", 2, 256, 4, 2, 16, 96, 70, 1e4, 1e-5, 256),
    qk_norm=True,
    gated=True,
    rotary_dim=4,
    linear=LinearAttention(2, 4, 16, 16, 4),
    attention_layers=(1,),
)
SPARSE = {"qwen3_moe": mixture(False), "gpt_oss": mixture(True), "qwen3_5": HYBRID}


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("family", SPARSE)
def test_rows_of_quants_have_their_bits_in_any_company(family: str, rounds: bool) -> None:
    """As many rows as a prompt has share an expert's weights, or one alone. An expert has more of
    them than a thread of a dense layer packs alone."""
    if rounds and not ops.multiplies_bytes():
        pytest.skip("this variant of the kernels has no products of bytes")
    config = SPARSE[family]
    generator = torch.Generator().manual_seed(0)
    shapes = config.expected_shapes().items()
    plain = {name: torch.randn(shape, generator=generator) * 0.3 for name, shape in shapes}
    quantised = RoundedWeights({name: w.bfloat16() for name, w in plain.items()}, "int4")
    kind = RoundingDecoder if rounds else Decoder
    limits = (torch.device("cpu"), PAGES, 256)
    decoder = kind(config, quantised, torch.bfloat16, *limits, native=True)
    decoder.hold_states(1)
    tokens = np.random.default_rng(1).integers(0, 70, 150)
    pages = Memory(0).pages(150)
    whole = decoder.forward(plain_rows(span(tokens, 0, pages))).logits.clone()
    for first, last in ((0, 1), (1, 2), (2, 5), (5, 18), (18, 60), (60, 150)):
        chunk = span(tokens[first:last], first, pages, state=0)
        part = decoder.forward(plain_rows(chunk)).logits
        assert torch.equal(part, whole[first:last])
    if not rounds:
        dense = {name: as_tensor(quantised[name]) for name in quantised}
        expanded = kind(config, dense, torch.bfloat16, *limits, native=True)
        found = expanded.forward(plain_rows(span(tokens, 0, pages))).logits
        assert torch.equal(found, whole)
