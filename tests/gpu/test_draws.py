"""Draws on a GPU by Triton's interpreter (make test-gpu-path): the CPU's tokens, row by row."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton is to interpret: make test-gpu-path", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed here: make test-gpu-path")

from smart_decoding.engine.history import SampleSpec, TokenHistory
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.models.sampling.noise import gumbel, noise_key, uniform_bits
from smart_decoding.models.sampling.ranking import packed_noise
from smart_decoding.models.torch import device_sampling
from smart_lab import gpu_noise
from smart_lab.gpu_parity import draws

VOCAB = 50
PROMPT = [3, 7, 7, 12, 30]
OUTPUT = [5, 7, 5, 5, 41]
EOS = 9
CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 1.7},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "tiny_top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.15},
    "min_p_one": {"min_p": 1.0},
    "top_p_min_p": {"top_p": 0.5, "min_p": 0.3},
    "all": {"temperature": 1.3, "top_k": 12, "top_p": 0.8, "min_p": 0.03},
    "penalties": {"repetition_penalty": 1.4, "presence_penalty": 0.5, "frequency_penalty": 0.8},
    "edits": {
        "temperature": 1.2,
        "logit_bias": {2: 2.5, 9: 3.0, 7: 1.0, 5: -100.0},
        "min_tokens": 8,
        "repetition_penalty": 0.7,
        "min_p": 0.05,
    },
    "greedy": {"temperature": 0},
    "greedy_edits": {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {4: 3.0}},
}


def specs_for(params: list[SamplingParams], rows: int, **changes: Any) -> list[SampleSpec]:
    """Of rows on paths of up to two tokens."""
    history = TokenHistory(PROMPT, OUTPUT)
    given = {"position": len(OUTPUT), "history": history, "eos_ids": (EOS,), **changes}
    return [
        SampleSpec(params[i % len(params)], seed=i - 3, path=[7, i % 9][: i % 3], **given)
        for i in range(rows)
    ]


def test_noise_has_the_bits_of_the_cpu() -> None:
    keys = noise_key(np.array([-5, 7, 2**62]), 3, 11)
    tokens = torch.arange(130_000)
    bits, noise = gpu_noise.noise(torch.from_numpy(keys.view(np.int64)), tokens, block=1 << 16)
    wanted = uniform_bits(keys[:, None], tokens.numpy())
    assert (bits.numpy() == wanted.view(np.int64)).all()
    assert (noise.numpy() == gumbel(keys[:, None], tokens.numpy())).all()


@pytest.mark.parametrize("name", [*CUTS, "mixed"])
def test_a_gpu_draws_the_same_tokens(name: str) -> None:
    rng = np.random.default_rng(3)
    rows = rng.normal(size=(12, VOCAB)).astype(np.float32) * 2
    rows[::5] = rows[::5].round()  # ties
    rows[3, :20] = -np.inf
    kinds = [*CUTS.values()] if name == "mixed" else [CUTS[name]]
    drawn, wanted = draws(rows, specs_for([SamplingParams(**kind) for kind in kinds], len(rows)))
    assert drawn == wanted


def test_top_p_is_a_part_of_what_min_p_keeps() -> None:
    """0.625 of it has the first token, 0.5 of all."""
    rows = np.tile(np.log(np.float32([0.5, 0.3, 0.1, 0.1])), (60, 1))
    drawn, wanted = draws(rows, specs_for([SamplingParams(top_p=0.6, min_p=0.3)], 60))
    assert drawn == wanted == [0] * 60
    drawn, wanted = draws(rows, specs_for([SamplingParams(top_p=0.65, min_p=0.3)], 60))
    assert drawn == wanted
    assert {*drawn} == {0, 1}


@pytest.mark.parametrize("scale", [0.5, 2.0, 6.0])
def test_far_tokens_win_where_they_do_on_a_cpu(scale: float) -> None:
    """Rows of several blocks, most of which need no doubles."""
    rows = np.random.default_rng(1).normal(size=(40, 9000)).astype(np.float32) * scale
    drawn, wanted = draws(rows, specs_for([SamplingParams(), SamplingParams(min_p=1e-4)], 40))
    assert drawn == wanted
    assert len({token // 2048 for token in drawn}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_ties_go_to_the_lowest_id(dtype: torch.dtype) -> None:
    logits = torch.zeros(3, 5000, dtype=dtype)
    logits[0, [4000, 17, 2500]] = 3.0
    logits[1, [4999, 4998]] = 1.0
    assert device_sampling.maxima(logits).tolist() == [17, 4998, 0]


def test_a_grammar_binds_a_gpu_too() -> None:
    class Even:
        def allowed(self, path: list[int]) -> np.ndarray:
            return (np.arange(VOCAB) + len(path)) % 2 == 0

    rows = np.random.default_rng(0).normal(size=(40, VOCAB)).astype(np.float32)
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="a"))
    specs = [SampleSpec(params, i, path=[1] * (i % 2), constraint=Even()) for i in range(40)]
    drawn, wanted = draws(rows, specs)
    assert drawn == wanted
    assert [(token + i) % 2 for i, token in enumerate(drawn)] == [0] * 40


def test_masks_bind_a_gpu_too() -> None:
    rows = np.random.default_rng(0).normal(size=(40, VOCAB)).astype(np.float32) * 3
    few = SamplingParams(allowed_token_ids=[1, 5, 7, 9, 30], presence_penalty=0.4)
    bad = SamplingParams(bad_words=["a"], temperature=0.0)
    bad.bad_words_token_ids = [(7, int(rows[1].argmax())), (3,)]
    drawn, wanted = draws(rows, specs_for([few, bad], 40))
    assert drawn == wanted
    assert set(drawn[::2]) <= {1, 5, 7, 9, 30}
    assert 3 not in drawn[1::2]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_without_a_maximum_are_told(temperature: float) -> None:
    rows = torch.zeros(4, VOCAB)
    rows[1, 4] = torch.nan
    rows[2] = -torch.inf
    rows[3, 2] = torch.inf
    specs = [SampleSpec(SamplingParams(temperature=temperature, top_p=0.9))] * 4
    drawn = device_sampling.draw(rows, np.arange(4), specs)
    assert (drawn < 0).tolist() == [False, True, True, True]


def test_a_drafters_noise_is_the_targets() -> None:
    logits = torch.randn(3, 1500)
    tokens = torch.randperm(9000)[:1500]
    keys = noise_key(np.array([1, 2, 3]), 0, 4)
    keys[1] = 0
    factor = np.array([0.5, 1.0, 2.0], np.float32)
    noise = gumbel(keys[:, None], tokens.numpy()) * (keys != 0)[:, None]
    found = device_sampling.perturbed(
        logits, tokens, torch.from_numpy(packed_noise(factor, keys))
    ).numpy()
    assert np.abs(found - (logits.numpy() * factor[:, None] + noise)).max() < 1e-5
