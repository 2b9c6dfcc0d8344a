"""The default model: transformers' greedy answers in float32, and answers that no batch changes by
a bit."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from smart_decoding.core.costs import CostModel
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, SmartError
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints.loading import load_checkpoint

if TYPE_CHECKING:
    from smart_decoding.engine.outputs import CompletionOutput

pytestmark = pytest.mark.model

MODEL, TIE = "smollm2-135m", 1e-4
QUESTIONS = [
    "Why is the sky blue?",
    "Write a Python function that reverses a list.",
    "Name three rivers in Europe.",
    "What is 12 times 12?",
    "Tell me a story about a dragon and a lighthouse keeper who became friends.",
    "Translate 'good morning' into French.",
    "List the planets.",
    "Explain photosynthesis to a child in two sentences, please.",
]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(
        MODEL, speculative_config=False, dtype=request.param, max_model_len=512, max_num_seqs=8
    )


@pytest.fixture(scope="module")
def prompts(llm: LLM) -> list[list[int]]:
    return [
        llm.tokenizer.encode_chat([{"role": "user", "content": question}]) for question in QUESTIONS
    ]


def tokens_of(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    answers = llm.generate(prompts, params)
    llm.engine.check_integrity()
    return [answer.outputs[0].token_ids for answer in answers]


def tied_positions(
    model: transformers.PreTrainedModel, prompt: list[int], tokens: list[int]
) -> list[int]:
    """Where the teacher-forced model has another best token: float32 and float64 must both call it
    a tie."""
    gaps = []
    for precision in (torch.float32, torch.float64):
        with torch.inference_mode():
            logits = model.to(precision)(torch.tensor([prompt + tokens])).logits[
                0, len(prompt) - 1 : -1
            ]
        gaps.append(logits.max(-1).values - logits[torch.arange(len(tokens)), torch.tensor(tokens)])
        if not gaps[0].any():
            return []
    model.to(torch.float32)
    tied = gaps[0].nonzero().flatten()
    assert gaps[0].max() < TIE
    assert gaps[1][tied].max() < TIE
    return [int(i) for i in tied]


def test_greedy_answers_are_those_of_transformers(llm: LLM, prompts: list[list[int]]) -> None:
    """Each token is the best one after those before it, or ties with it; `generate` itself, which
    takes the longest, is asked for one answer only."""
    if llm.target.dtype != torch.float32:
        pytest.skip("bfloat16 rounds activations in transformers, but not here")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        load_checkpoint(MODEL).tokenizer_source, dtype=torch.float32
    ).eval()
    ours = tokens_of(
        llm, prompts[:3], SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    )
    assert [len(tokens) for tokens in ours] == [40] * 3
    tied = [tied_positions(model, *each) for each in zip(prompts, ours, strict=False)]
    assert sum(map(len, tied)) <= 1  # 0.1 % may be ties: in 120 tokens less than one
    generated = model.generate(
        torch.tensor(prompts[:1]),
        do_sample=False,
        max_new_tokens=40,
        min_new_tokens=40,
        pad_token_id=0,
    )
    theirs = generated[0, len(prompts[0]) :].tolist()
    assert len(theirs) == 40
    first = next((i for i in range(40) if ours[0][i] != theirs[i]), None)
    assert first is None or first in tied[0]


@pytest.mark.parametrize("method", ["eagle", "ngram"])
def test_rounds_in_one_call_change_no_token(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM(
        MODEL,
        speculative_config={"method": method, "policy": "eagle2"},
        max_model_len=512,
        max_num_seqs=8,
        enable_prefix_caching=False,
    )
    cuts: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 100}, {"min_p": 0.05}]
    cuts += [{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.9}]
    params = [SamplingParams(**{"temperature": 0.8, **cut}, max_tokens=32, seed=7) for cut in cuts]
    assert llm.target.native is not None
    verify = llm.target.native.verify
    rounds = []
    monkeypatch.setattr(
        llm.target.native, "verify", lambda batch: rounds.append(verify(batch)) or rounds[-1]
    )
    in_one_call = llm.generate(QUESTIONS[:6], params)
    assert len(rounds) > 5
    monkeypatch.setattr(llm.target, "native", None)
    for ours, theirs in zip(in_one_call, llm.generate(QUESTIONS[:6], params), strict=True):
        assert ours.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert ours.outputs[0].metrics.accepted == theirs.outputs[0].metrics.accepted


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_request_alone_and_in_a_batch_gets_the_same_tokens(
    llm: LLM, prompts: list[list[int]], temperature: float
) -> None:
    params = SamplingParams(
        temperature=temperature, max_tokens=16, seed=7, logprobs=1, ignore_eos=True
    )
    together = llm.generate(prompts, params)
    for i in (2, 4):
        (alone,) = llm.generate([prompts[i]], params)
        assert alone.outputs[0].token_ids == together[i].outputs[0].token_ids
        assert alone.outputs[0].logprobs == together[i].outputs[0].logprobs  # to the last bit


def test_smart_drafts_for_32_requests_where_rows_are_cheap() -> None:
    """With a table in which further rows cost next to nothing, as on a large GPU (until real rounds
    correct it)."""
    cheap = CostModel.from_table({1: {1: 5.0, 512: 5.1}}, {1: 0.01, 512: 0.01})
    llm = LLM(MODEL, speculative_config={"policy": "smart"}, max_model_len=128, max_num_seqs=32)
    llm.take_profile()  # else it may be taken later, and replace the table
    llm.engine.policy.cost = cheap
    prompts = [
        llm.tokenizer.encode_chat([{"role": "user", "content": f"Count to {i}."}])
        for i in range(2, 34)
    ]
    outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True))
    metrics = [output.outputs[0].metrics for output in outputs]
    assert sum(m.verified for m in metrics) > 64
    assert sum(m.accepted for m in metrics) > 8


def test_a_prompt_that_is_refused_leaves_nothing_behind(llm: LLM) -> None:
    for prompts in (["Hello", [1] * 600], ["Hello", []]):
        with pytest.raises(SmartError):
            llm.generate(prompts)
        assert not llm.engine.has_unfinished_requests
    with pytest.raises(ConfigError, match="n=2"):
        next(llm.stream("Hello", SamplingParams(n=2)))
    assert not llm.engine.has_unfinished_requests


def test_a_stream_is_whole_even_if_another_call_runs_its_rounds(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    whole = llm.generate("The tides are", params)[0].outputs[0].text
    pieces = llm.stream("The tides are", params)
    begun = next(pieces)
    llm.generate("Rivers are", params)
    assert begun + "".join(pieces) == whole
    assert len(begun) < len(whole)


def test_two_threads_on_one_model(llm: LLM, prompts: list[list[int]]) -> None:
    """It ended in logits that were not numbers, and then in a segmentation fault."""
    prompts = prompts[:4]
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=0)
    alone = [llm.generate(prompt, params)[0].outputs[0] for prompt in prompts]

    def answer(order: Sequence[int]) -> dict[int, CompletionOutput]:
        return {i: llm.generate(prompts[i], params)[0].outputs[0] for i in order}

    places = range(len(prompts))
    with ThreadPoolExecutor(2) as pool:
        for answers in pool.map(answer, (places, places[::-1])):
            for i in places:
                assert answers[i].token_ids == alone[i].token_ids
                assert answers[i].logprobs == alone[i].logprobs  # to the last bit
    llm.engine.check_integrity()
    assert not llm.engine.has_unfinished_requests
