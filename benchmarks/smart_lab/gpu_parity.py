"""Does a device compute what it should? Triton's kernels against float64 and plain torch, graphs
against kernels launched one by one, draws against the CPU's. The same code runs on a CPU by
Triton's interpreter.

Needed by tools/gpu_check.sh and by tests/gpu.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Rows, Span, build_rows
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.sampling import drawing, noise
from smart_decoding.models.torch import device_sampling, triton_ops
from smart_decoding.models.torch.graphs import GraphedLayers, recorder
from smart_decoding.models.torch.layers import Context, KVCache
from smart_decoding.models.torch.rows import BUCKETS
from smart_decoding.models.torch.torch_layers import TorchLayers, TorchOps
from smart_lab import gpu_noise
from smart_lab.replayed_run import RandomWeights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smart_decoding.models.torch.layers import Layers

Check = dict[str, Any]
PAGES = 120
CONTEXT = 140  # tokens at most: nine pages
MOST_PAGES = 1300  # of five requests of 4,000 tokens
WINDOW = 20  # positions
# query heads, heads of keys, width: as in the tests, and Llama-3.1-8B's and others'
SMALL_HEADS, HEADS = ((6, 2, 24),), ((32, 8, 128), (28, 4, 128), (9, 3, 64), (8, 4, 256))
NEAR = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SAMPLED: Sequence[Mapping[str, Any]] = (
    {"temperature": 1.0},
    {"temperature": 0.6, "top_p": 0.9},
    {"temperature": 1.3, "top_k": 20, "min_p": 0.05},
    {"temperature": 0.8, "logit_bias": {2: 2.5}},
    {"temperature": 0.0},
)
DRAWN = 0.99  # of tokens: sums round differently, which can decide a near-tie


def parity(device: torch.device, tiny: bool) -> Iterator[Check]:
    """Return one check after another: name, error, limit, and whether it holds."""
    torch.manual_seed(0)
    half = torch.float16 if device.type == "cpu" else torch.bfloat16  # the interpreter has no bf16
    if device.type == "cpu":  # few parts: the interpreter is slow
        triton_ops.BLOCKS = 8
    batches = _batches(tiny)
    for dtype in (torch.float32, half):
        for shape in SMALL_HEADS if tiny else HEADS:
            name = f"attention, {shape[0]} heads on {shape[1]} of width {shape[2]}, {dtype}"
            for window, kind in ((0, "ragged trees"), (WINDOW, "with a window")):
                each = (_attention_error(shape, dtype, device, rows, window) for rows in batches)
                yield _check(f"{name}: {kind} against float64", max(each), NEAR[dtype])
    yield from _layer_parts(device, batches[0])
    yield from _buckets(device, BUCKETS[:3] if tiny else BUCKETS)
    yield from _draws(device, 300 if tiny else 128_256)


def _batches(tiny: bool) -> list[Rows]:
    """Return rows of at most MOST_PAGES pages: trees beside a chunk of a prompt."""
    if tiny:
        return [rows_of(np.random.default_rng(0), (7, 3), (9,), 40, MOST_PAGES)]
    rngs = map(np.random.default_rng, range(4))
    contexts = (50, 300, 4000, 4000)
    return [
        rows_of(rng, (59, 0, 20, 11), (70,), context, MOST_PAGES)
        for rng, context in zip(rngs, contexts, strict=True)
    ]


def _check(name: str, error: float, limit: float) -> Check:
    return {"name": name, "error": error, "limit": limit, "ok": bool(error <= limit)}


def random_rows(rng: np.random.Generator, context: int = CONTEXT, pages: int = PAGES) -> Rows:
    """Return trees of some requests beside chunks of prompts, each at a context of up to `context`
    tokens."""
    trees = rng.integers(0, 20, rng.integers(0, 4)).tolist()
    chunks = rng.integers(1, 40, rng.integers(not trees, 3)).tolist()
    return rows_of(rng, trees, chunks, context, pages)


def rows_of(
    rng: np.random.Generator,
    nodes: Sequence[int],
    chunks: Sequence[int],
    context: int = CONTEXT,
    pages: int = PAGES,
) -> Rows:
    """Random trees of so many nodes beside chunks of prompts of so many tokens."""
    free = rng.permutation(pages).astype(np.int32).tolist()
    trees = DraftTrees.empty(len(nodes))
    for owner, count in enumerate(nodes):
        for _ in range(count):
            parent = int(rng.choice([ROOT, *trees.nodes_of(owner)]))
            trees.append([owner], [int(rng.integers(50))], [parent], [0.5])
    spans = []
    for count, below in [*((1, count) for count in nodes), *((count, 0) for count in chunks)]:
        start = int(rng.integers(0, context))
        at = np.arange(start, start + count + below)
        table = np.array([free.pop() for _ in range(-(-(at[-1] + 1) // PAGE))], np.int32)
        slots = (table[at // PAGE] * PAGE + at % PAGE).astype(np.int32)
        spans.append(Span([1] * count, start, slots, table))
    return build_rows(spans, trees, [True] * len(spans)).rows


def read_by(rows: Rows, row: int) -> NDArray[np.int64]:
    """Return the slots that a row reads."""
    group = int(np.searchsorted(rows.query_start_loc, row, "right")) - 1
    at = np.arange(rows.context_len[row])
    pages = rows.pages[rows.block_table_start[group] + at // PAGE]
    own = rows.ancestors[rows.ancestors_start[row] : rows.ancestors_start[row + 1]]
    return np.concatenate((pages * PAGE + at % PAGE, own)).astype(np.int64)


def exact(q: Tensor, keys: Tensor, values: Tensor, rows: Rows, window: int = 0) -> Tensor:
    """[rows, heads * width] attention in float64, row by row. q [rows, heads, width]; keys, values:
    a layer's cache; window: how many positions a row sees, 0: all."""
    heads, width = q.shape[1:]
    q, keys, values = (part.double() for part in (q, keys, values))
    out = torch.zeros_like(q)
    for row in range(len(rows)):
        slots = torch.from_numpy(read_by(rows, row)[-window:]).to(q.device)
        k, v = (part.flatten(1, 2)[:, slots] for part in (keys, values))
        scores = q[row].view(len(keys), -1, width) @ k.transpose(1, 2) * width**-0.5
        out[row] = (scores.softmax(-1) @ v).view(heads, width)
    return out.flatten(1)


def cache_for(
    rows: Rows,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    pages: int = PAGES,
) -> KVCache:
    """Random keys and values where rows read, NaN elsewhere."""
    device = torch.device(device)
    cache = KVCache.empty(1, kv_heads, pages, width, dtype, device, False)
    live = np.unique(np.concatenate([read_by(rows, row) for row in range(len(rows))]))
    at = torch.from_numpy(live).to(device)
    for part in (cache.keys, cache.values):
        part.fill_(torch.nan)
        drawn = torch.randn(1, kv_heads, len(live), width, dtype=dtype)
        part[..., at // PAGE, at % PAGE, :] = drawn.to(device)
    return cache


def context_of(rows: Rows, width: int, device: torch.device | str = "cpu") -> Context:
    """Return a context with random rotary angles."""
    angles = torch.rand(int(rows.position.max()) + 1, width // 2).to(device) * 6
    return Context(rows, angles.cos(), angles.sin())


def _attention_error(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    rows: Rows,
    window: int = 0,
) -> float:
    heads, kv_heads, width = shape
    cache = cache_for(rows, kv_heads, width, dtype, device, MOST_PAGES)
    q = torch.randn(len(rows), heads, width, dtype=dtype).to(device)
    keys, values = cache.keys[0], cache.values[0]
    got = triton_ops.TritonOps().attend(q, context_of(rows, width, device), keys, values, window)
    return _apart(got, exact(q, keys, values, rows, window))


def _layer_parts(device: torch.device, rows: Rows) -> Iterator[Check]:
    """Norms, rotations, writes to the cache, and gates, against plain torch."""
    heads, kv_heads, width = 6, 2, 24
    norms = torch.rand(2, width).to(device)
    norm = {"q_norm": norms[0], "k_norm": norms[1]}
    w: Any = SimpleNamespace(
        heads=heads, kv_heads=kv_heads, head_dim=width, eps=1e-5, angle=0, **norm
    )
    qkv = torch.randn(len(rows), (heads + 2 * kv_heads) * width).to(device)
    context = context_of(rows, width, device)
    caches = [
        KVCache.empty(1, kv_heads, MOST_PAGES, width, torch.float32, device, False)
        for _ in range(2)
    ]
    each = (TorchOps(), triton_ops.TritonOps())
    queries = [
        ops.write(qkv, w, context, cache.keys[0], cache.values[0])
        for ops, cache in zip(each, caches, strict=True)
    ]
    error = max(
        _apart(queries[1], queries[0]),
        _apart(caches[1].keys, caches[0].keys),
        _apart(caches[1].values, caches[0].values),
    )
    yield _check("norms, rotation and the cache, against torch", error, 2e-5)
    gate_up = torch.randn(5, 2 * 1100).to(device)
    for name, gelu in (("SiLU", False), ("GELU", True)):
        got = triton_ops.TritonOps().gate(gate_up, gelu)
        yield _check(f"{name}, against torch", _apart(got, TorchOps().gate(gate_up, gelu)), 2e-5)


def _buckets(device: torch.device, sizes: Sequence[int]) -> Iterator[Check]:
    """Return a model's logits with forwards of every bucket, full and with padding: its kernels
    against plain torch, and graphs against those."""
    config = ModelConfig("llama", 2, 64, 4, 2, 16, 96, 331, 10_000.0, 1e-5, 512)
    pages = 8 * sizes[-1] + PAGES
    weights = RandomWeights(config.expected_shapes(), device)
    model = Decoder(config, weights, torch.float32, device, pages, 512, native=False, graphs=False)
    for part in (model.kv.keys, model.kv.values):
        part.normal_()
    assert isinstance(model._layers, TorchLayers)
    each = [layer.weights for layer in model._layers.each]
    plain = TorchLayers(each, TorchOps())
    eager = TorchLayers(each, triton_ops.TritonOps())
    record = recorder(device) if device.type == "cuda" else lambda run: run
    graphed = GraphedLayers(eager, record)
    for size in sizes:
        errors = []
        for count in sorted({size, max(1, size - 1)}):
            rows = _rows_in_all(np.random.default_rng(count), count, pages)
            reference, launched, replayed = (
                _logits(model, layers, rows) for layers in (plain, eager, graphed)
            )
            errors += [_apart(launched, reference), _apart(replayed, launched)]
        yield _check(f"{size} rows: kernels against torch, graphs", max(errors), 1e-3)


def _logits(model: Decoder, layers: Layers, rows: Rows) -> Tensor:
    model._layers = layers
    logits: Tensor = model.forward(rows).logits
    return logits.clone()


def _rows_in_all(rng: np.random.Generator, count: int, pages: int) -> Rows:
    """So many rows, of trees of up to 20 nodes."""
    nodes = []
    while count:
        nodes.append(int(rng.integers(0, min(20, count))))
        count -= 1 + nodes[-1]
    return rows_of(rng, nodes, (), CONTEXT // 2, pages)


def _draws(device: torch.device, vocab: int) -> Iterator[Check]:
    """Noise, and tokens drawn with it, against the CPU's."""
    keys = noise.noise_key(np.array([-5, 7, 2**62]), 3, 11)
    tokens = np.arange(vocab)
    keys_there = torch.from_numpy(keys.view(np.int64)).to(device)
    found = gpu_noise.noise(keys_there, torch.from_numpy(tokens).to(device))
    bits, gumbel = (each.cpu() for each in found)
    expected = noise.uniform_bits(keys[:, None], tokens).view(np.int64)
    differing = int((bits.numpy() != expected).sum())
    yield _check("noise, bit by bit, against the CPU's", differing, 0)
    error = _apart(gumbel, torch.from_numpy(noise.gumbel(keys[:, None], tokens)))
    yield _check("Gumbel noise, against the CPU's", error, 1e-5)
    rows = (np.random.default_rng(3).normal(size=(60, vocab)) * 2).astype(np.float32)
    params = [SamplingParams(**SAMPLED[i % len(SAMPLED)]) for i in range(len(rows))]
    specs = [SampleSpec(each, seed=i, position=i % 7) for i, each in enumerate(params)]
    drawn, reference = draws(rows, specs, device)
    same = np.mean(np.array(drawn) == np.array(reference))
    yield _check("drawn tokens that differ from the CPU's", 1.0 - float(same), 1.0 - DRAWN)


def draws(
    rows: NDArray[np.float32], specs: Sequence[SampleSpec], device: torch.device | str = "cpu"
) -> tuple[list[int], list[int]]:
    """Return the tokens of rows [rows, vocab] by the kernel, which finds them in another order, and
    by the reference."""
    which = np.arange(len(rows))[::-1].copy()
    shuffled = torch.from_numpy(rows[which]).to(device)
    drawn: list[int] = device_sampling.draw(shuffled, which, specs).tolist()
    return drawn, drawing.draw(list(rows), specs)


def _apart(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference, NaN where something is not a number."""
    return float((got.cpu().double() - expected.cpu().double()).abs().max())
