"""A GGUF file's quants as they are stored, and expanded: the same words under every policy."""

from __future__ import annotations

from typing import Any

import pytest

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.kernels.ops import multiplies_bytes
from smart_decoding.llm import LLM

pytestmark = pytest.mark.model

MODEL = "smollm2-135m"
QUESTIONS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "Name three rivers in Europe.",
]
POLICIES: list[dict[str, Any] | bool] = [
    False,
    {"policy": "smart"},
    {"policy": "eagle2", "depth": 4, "total_tokens": 16},
    {"method": "union"},
    {"method": "draft_model", "model": MODEL, "policy": "chain"},
    {"method": "union", "model": MODEL},  # its head
]


def engine(quantization: str | None, activations: str | None = None) -> LLM:
    return LLM(
        MODEL,
        speculative_config=False,
        quantization=quantization,
        activations=activations,
        max_model_len=512,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )


@pytest.fixture(scope="module")
def both() -> tuple[LLM, LLM]:
    return engine(None, "exact"), engine("off")


def test_no_policy_tells_them_apart(both: tuple[LLM, LLM]) -> None:
    found = []
    for llm in both:
        found += [answers_of(llm, config, (0.0, 0.8)) for config in POLICIES]
    assert all(answers == found[0] for answers in found)


def answers_of(
    llm: LLM, config: dict[str, Any] | bool, temperatures: tuple[float, ...]
) -> list[list[int]]:
    """Of all questions at each temperature, in one call: more than run at once."""
    prompts = [
        llm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS
    ]
    params = [
        SamplingParams(temperature=temperature, max_tokens=24, seed=5)
        for temperature in temperatures
        for _ in prompts
    ]
    answers = llm.sharing_weights(config).generate(prompts * len(temperatures), params)
    return [answer.outputs[0].token_ids for answer in answers]


@pytest.mark.skipif(not multiplies_bytes(), reason="this CPU multiplies no bytes")
def test_activations_in_8_bits_are_one_model_under_every_policy() -> None:
    llm = engine(None, "int8")
    found = [answers_of(llm, config, (0.0, 0.8)) for config in POLICIES]
    assert all(answers == found[0] for answers in found)
