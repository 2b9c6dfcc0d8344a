"""The CPU kernels one by one against torch."""

import math
from typing import Any

import numpy as np
import pytest
import torch

from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ModelError
from smart_decoding.kernels import library, sampling, weights
from smart_decoding.kernels.memory import address
from smart_decoding.models.sampling.drawing import draw
from smart_decoding.models.sampling.noise import gumbel, noise_key
from smart_decoding.models.torch.layers import KVCache

from .kernel_calls import linear, rms_norm

pytestmark = pytest.mark.usefixtures("variant")
DTYPES = [torch.float32, torch.bfloat16]


def packed(weight: torch.Tensor) -> weights.PackedWeight:
    return weights.pack([weight])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 31, 32, 100])
@pytest.mark.parametrize("k", [2, 96])
def test_linear(n: int, k: int, dtype: torch.dtype) -> None:
    """Right, and each row bitwise the same alone and among any others."""
    torch.manual_seed(n)
    weight = torch.randn(n, k).to(dtype)
    x = torch.randn(40, k)
    bias = torch.randn(n)
    w = packed(weight)
    norm = torch.rand(k) + 0.5
    alone = torch.cat([linear(x[i : i + 1], w, (norm, 1e-5), bias) for i in range(40)])
    rounds = dtype == torch.bfloat16 and library.library().smart_rounds_inputs()
    normed = torch.nn.functional.rms_norm(x, (k,), norm, 1e-5)
    normed, read = (normed.bfloat16(), x.bfloat16()) if rounds else (normed, x)
    expected = normed.double() @ weight.double().T + bias
    tolerance = 1e-2 if rounds else 1e-5  # an input near the middle may round the other way
    torch.testing.assert_close(alone.double(), expected, rtol=tolerance, atol=tolerance)
    for rows in range(1, 41):
        assert torch.equal(linear(x[:rows].contiguous(), w, (norm, 1e-5), bias), alone[:rows])
    plain = linear(x, w)
    torch.testing.assert_close(
        plain.double(), read.double() @ weight.double().T, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("hint", [weights.PAST_CACHES, weights.INTO_L2, weights.INTO_CACHES])
@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_over_panels_that_are_taken_in_blocks(dtype: torch.dtype, hint: int) -> None:
    n, k = 40, 6500  # two blocks and a part of one in bf16 without AVX-512, more elsewhere
    torch.manual_seed(0)
    weight = torch.randn(n, k).to(dtype)
    x = torch.randn(40, k)
    w = packed(weight)
    alone = torch.cat([linear(x[i : i + 1], w, hint=hint) for i in range(40)])
    read = (
        x.bfloat16() if dtype == torch.bfloat16 and library.library().smart_rounds_inputs() else x
    )
    torch.testing.assert_close(
        alone.double(), read.double() @ weight.double().T, rtol=1e-4, atol=1e-3
    )
    for rows in (7, 13, 24, 40):
        assert torch.equal(linear(x[:rows].contiguous(), w, hint=hint), alone[:rows])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [31, 64, 100])
def test_a_packed_weights_rows_can_be_read_back(n: int, dtype: torch.dtype) -> None:
    weight = torch.randn(n, 34).to(dtype)
    index = torch.randperm(n)
    assert torch.equal(packed(weight).rows_of(index), weight[index].float())


@pytest.mark.parametrize("n", [16, 33, 1000])
@pytest.mark.parametrize("k", [1, 5, 16])
def test_top_k(n: int, k: int) -> None:
    torch.manual_seed(n)
    x = torch.randn(7, n) * 3
    ids, probs = sampling.top_k(x, k, torch.full((len(x),), 0.7))
    expected, at = torch.softmax(x.double() * 0.7, -1).topk(k)
    assert torch.equal(ids, at)
    torch.testing.assert_close(probs.double(), expected, rtol=1e-5, atol=1e-9)


def test_top_k_takes_ties_by_index() -> None:
    x = torch.zeros(2, 40)
    x[1, [7, 30, 39]] = 1.0
    ids, probs = sampling.top_k(x, 4)
    assert ids.tolist() == [[0, 1, 2, 3], [7, 30, 39, 0]]
    torch.testing.assert_close(probs[0], torch.full((4,), 1 / 40))


@pytest.mark.parametrize("n", [16, 17, 100, 1003])
def test_argmax_is_the_first_maximum(n: int) -> None:
    rng = np.random.default_rng(n)
    x = torch.from_numpy(rng.integers(0, 4, (50, n)).astype(np.float32))  # every row has many ties
    assert sampling.argmax(x, np.arange(len(x))).tolist() == x.numpy().argmax(1).tolist()
    x = -torch.from_numpy(rng.random((50, n), np.float32)) - 1
    assert sampling.argmax(x, np.arange(len(x))).tolist() == x.numpy().argmax(1).tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 31, 64, 1000])
def test_first_maxima_need_no_logits(n: int, dtype: torch.dtype) -> None:
    """Ties, NaN and infinity included: what `argmax` says of the logits."""
    torch.manual_seed(n)
    x = torch.randint(-2, 3, (40, 32)).float()
    bias = torch.randint(-2, 3, (n,)).float()
    x[7], x[8], x[9] = torch.nan, torch.inf, 0.0
    w = packed(torch.randint(-1, 2, (n, 32)).to(dtype))
    for b in (None, bias, bias - 1000):  # the last one: what pads the weight would be larger
        best = np.empty(40, np.int64)
        alone = np.empty(40, np.int64)
        logits = linear(x, w, bias=b, best=best)
        assert best.tolist() == sampling.argmax(logits, np.arange(40)).tolist()
        assert not linear(x, w, bias=b, best=alone, out=torch.empty(40, 0)).numel()
        assert alone.tolist() == best.tolist()


@pytest.mark.parametrize("d", [1, 16, 50, 96])
def test_rms_norm_into_columns(d: int) -> None:
    x = torch.randn(5, d)
    weight = torch.randn(d)
    out = torch.full((5, d + 9), 7.0)
    rms_norm(x, weight, 1e-5, out, column=4)
    expected = torch.nn.functional.rms_norm(x.double(), (d,), weight.double(), 1e-5)
    torch.testing.assert_close(out[:, 4 : 4 + d].double(), expected, rtol=1e-5, atol=1e-6)
    assert (out[:, :4] == 7).all()
    assert (out[:, 4 + d :] == 7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [16, 64])
def test_move_kv(head_dim: int, dtype: torch.dtype) -> None:
    """In order: a slot may be a source after the slot before it was a target. Kernels move what
    torch does."""
    torch.manual_seed(0)
    plain = KVCache.empty(2, 3, 5, head_dim, dtype, torch.device("cpu"), native=False)
    assert plain.keys.data_ptr() % 64 == plain.values.data_ptr() % 64 == 0
    for tensor in (plain.keys, plain.values):
        tensor.copy_(torch.randn_like(tensor))
    native = KVCache(in_pairs(plain.keys.mT), in_pairs(plain.values), native=True)
    keys = plain.keys.clone()
    values = plain.values.clone()
    source = [20, 21, 79]
    target = [19, 20, 33]
    for s, t in zip(source, target, strict=True):
        for part in (keys, values):
            part[:, :, t // PAGE, t % PAGE] = part[:, :, s // PAGE, s % PAGE]
    for cache in (plain, native):
        cache.move(torch.tensor(source, dtype=torch.int32), torch.tensor(target, dtype=torch.int32))
    assert torch.equal(plain.keys, keys)
    assert torch.equal(plain.values, values)
    assert torch.equal(native.keys, in_pairs(keys.mT))
    assert torch.equal(native.values, in_pairs(values))


def in_pairs(matrices: torch.Tensor) -> torch.Tensor:
    """Pages as products of pairs read them, where these attend: rows of their matrices interleaved
    in pairs."""
    rows, columns = matrices.shape[-2:]
    if not library.library().smart_attends_by_pairs(
        matrices.dtype == torch.bfloat16, rows * columns // PAGE
    ):
        return matrices.clone(memory_format=torch.contiguous_format)
    return matrices.unflatten(-2, (-1, 2)).transpose(-2, -1).reshape(matrices.shape)


@pytest.mark.parametrize("n", [40, 8192])
@pytest.mark.parametrize("spread", [0.5, 4.0])
def test_noisy_top_k_is_what_the_target_would_draw(n: int, spread: float) -> None:
    """Ranked with the target's own noise, a perfect draft's first child is always the target's
    token."""
    torch.manual_seed(n)
    x = torch.randn(12, n) * spread
    rows = np.arange(12)
    temperature = 0.8
    key = noise_key(rows + 5, 0, 7 * rows)
    key[3] = 0  # a greedy row among them
    scale = torch.full((12,), 1 / temperature)
    ids, probs = sampling.top_k(x, 8, scale, torch.from_numpy(key.view(np.int64)), torch.arange(n))
    noise = gumbel(key[:, None], np.arange(n))
    noise[3] = 0.0
    scores = x.double() / temperature + torch.from_numpy(noise)
    expected, order = scores.topk(8)
    assert ids.tolist() == order.tolist()
    among = torch.where(
        torch.arange(12)[:, None] == 3,
        scores,
        torch.full_like(scores, -math.inf).scatter(1, order, expected),
    )
    torch.testing.assert_close(
        probs.double(), among.softmax(-1).gather(1, order), rtol=1e-4, atol=1e-6
    )
    params = SamplingParams(temperature=temperature)
    drawn = draw(
        [x[i].numpy() for i in rows], [SampleSpec(params, int(i) + 5, 0, int(7 * i)) for i in rows]
    )
    assert [a == b for a, b in zip(ids[:, 0].tolist(), drawn, strict=True)].count(False) <= 1


def test_what_rounding_decides_is_left_to_numpy() -> None:
    row = np.zeros(600, np.float32)
    row[200:202] = 30.0, 30.0005
    draws = [
        sampling.Draw(address(row), seed, 0, 0, 0, 1.0, -math.inf, 1.0) for seed in range(20000)
    ]
    drawn = sampling.draw(sampling.draw_structs(draws), len(row))
    assert (drawn.best == 201).all()
    assert 0 < (drawn.token < 0).sum() < 40
    noise = gumbel(noise_key(np.arange(20000), 0, 0)[:, None], [200, 201]) + row[200:202]
    expected = np.where(np.abs(np.subtract(*noise.T)) < 1e-3, -1, 200 + noise.argmax(1))
    assert np.count_nonzero(drawn.token != expected) <= 1  # the border itself is rounded, too


OPTIONS: list[dict[str, float]] = [
    {},
    {"min_p": 0.01},
    {"top_k": 5},
    {"top_k": 64, "top_p": 0.9},
    {"top_k": 70},
    {"top_k": 3001},
    {"top_p": 0.5},
    {"top_p": 0.95, "min_p": 0.001},
    {"top_p": 0.6, "min_p": 0.3},
    {"temperature": 0.0},
]


@pytest.mark.parametrize("temperature", [0.3, 0.8, 2.0])
@pytest.mark.parametrize("spread", [0.0, 1e-4, 1.0, 5.0])
def test_draws_are_the_same_without_the_kernels(
    temperature: float, spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ties and excluded tokens included; together as one by one."""
    rng = np.random.default_rng(3)
    rows = (rng.normal(size=(45, 3001)) * spread).astype(np.float32)
    rows[5, ::2] = -np.inf
    rows[6:8, :2990] = -np.inf  # as a grammar leaves few tokens
    rows[8:10, 1:3000] = -np.inf
    options = [{"temperature": temperature, **OPTIONS[i % len(OPTIONS)]} for i in range(45)]
    specs = [
        SampleSpec(SamplingParams(**o), seed=i - 20, sample=i % 3, position=7 * i)
        for i, o in enumerate(options)
    ]
    together = draw(list(rows), specs)
    assert together == [draw([row], [spec])[0] for row, spec in zip(rows, specs, strict=True)]
    monkeypatch.setattr(library, "unavailable", lambda: "for this test")
    assert together == draw(list(rows), specs)


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 1}, {"top_k": 40, "top_p": 0.9}, {"logit_bias": {5: 1.0}}]
)
def test_a_row_with_a_nan_is_refused(options: dict[str, Any]) -> None:
    row = np.linspace(0, 1, 100, dtype=np.float32)
    for at in (0, 50, 99):
        broken = row.copy()
        broken[at] = np.nan
        with pytest.raises(ModelError):
            draw([row, broken], [SampleSpec(SamplingParams(**options))] * 2)
        greedy = SampleSpec(SamplingParams(temperature=0.0))
        assert draw([broken, row], [greedy, SampleSpec(SamplingParams(**options))])[0] == int(
            np.nanargmax(broken)
        )


@pytest.mark.parametrize("temperature", [1e-5, 1e-4, 1e-3])
def test_scores_too_large_to_tell_apart_are_left_to_numpy(
    temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = np.array([25.0, 25.0 + 0.4 * temperature, *[0.0] * 98], np.float32)
    specs = [SampleSpec(SamplingParams(temperature=temperature), seed=seed) for seed in range(3000)]
    drawn = draw([row] * len(specs), specs)
    assert len({*drawn}) == 2
    monkeypatch.setattr(library, "unavailable", lambda: "for this test")
    assert drawn == draw([row] * len(specs), specs)
