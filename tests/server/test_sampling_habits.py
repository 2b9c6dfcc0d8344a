"""vLLM's habits of sampling: masks, prompt log probabilities and the model's own defaults, the same
under every policy, in Python and in the server."""

from __future__ import annotations

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from serving import NAME, post, save_tiny_model, serving, slow

from smart_decoding import (
    LLM,
    AsyncLLM,
    ConfigError,
    EngineArgs,
    SamplingParams,
    StructuredOutputsParams,
)

PROMPTS = ["abc abc abc", "some words, some more words", "12 and 12 and 13"]
SHORT = {"dtype": "float32", "max_model_len": 512, "max_num_seqs": 4, "speculative_config": False}


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_masks_are_exact_under_speculation(load: Any, plain: LLM, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, max_tokens=90, seed=5, ignore_eos=True)
    free = [output.outputs[0] for output in plain.generate(PROMPTS, params)]
    params.bad_words = [word for each in free for word in re.findall("[!-~]{1,3}", each.text)[:3]]
    assert params.bad_words
    # Few enough for n-grams to be right now and then, in draws too.
    params.allowed_token_ids = sorted(set(range(256)) - set(free[1].token_ids[::7]))[::16]
    params.prompt_logprobs = 2
    tree = load()
    expected = plain.generate(PROMPTS, params)
    got = tree.generate(PROMPTS, params)
    assert sum(output.outputs[0].metrics.accepted for output in got) > 3
    for mine, whole, before in zip(got, expected, free, strict=True):
        assert mine.outputs[0].token_ids == whole.outputs[0].token_ids != before.token_ids
        assert mine.prompt_logprobs == whole.prompt_logprobs
        assert set(mine.outputs[0].token_ids) <= set(params.allowed_token_ids)
        assert not any(word in mine.outputs[0].text for word in params.bad_words)


def test_what_a_request_asks_of_sampling_has_a_bounded_price(tmp_path: Path) -> None:
    """A bias on all tokens, a thousand stop ids and 20 log probabilities for 8 answers: 3 times as
    long as plain ones on this model, whose forwards take next to nothing."""
    vocab = 32_000
    llm = LLM(save_tiny_model(tmp_path, vocab), **{**SHORT, "max_num_seqs": 8})
    heavy = {
        "logit_bias": dict.fromkeys(range(vocab), 0.01),
        "stop_token_ids": list(range(vocab - 1000, vocab)),
        "min_tokens": 24,
        "logprobs": 20,
    }

    def seconds(**options: Any) -> float:
        params = SamplingParams(n=8, seed=1, max_tokens=24, ignore_eos=True, **options)
        began = time.process_time()
        llm.generate([[5, 6, 7]], params)
        return time.process_time() - began

    plain = min(seconds() for _ in range(4))
    assert min(seconds(**heavy) for _ in range(3)) < 10 * plain


def test_prompt_logprobs_are_those_of_an_answer(load: Any) -> None:
    """What a token had as an answer it has as a part of a prompt, also where the cache knows it."""
    llm = load()
    params = SamplingParams(temperature=0, max_tokens=30, logprobs=1, ignore_eos=True)
    (first,) = llm.generate([[5, 6, 7]], params)
    prompt = first.prompt_token_ids + first.outputs[0].token_ids
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    for _ in range(2):
        (output,) = llm.generate([prompt], params)
        assert output.num_cached_tokens == 0
        assert len(output.prompt_logprobs) == len(prompt)
        assert output.prompt_logprobs[0] is None
        reported = zip(
            prompt[3:], output.prompt_logprobs[3:], first.outputs[0].logprobs, strict=True
        )
        for token, mine, before in reported:
            assert mine[token] == before[token]  # to the last bit
    assert llm.generate([prompt])[0].num_cached_tokens > 0
    assert llm.generate([prompt])[0].prompt_logprobs is None


def test_parameters_may_be_set_later_and_are_checked_when_used(plain: LLM) -> None:
    params = plain.get_default_sampling_params()
    assert params == SamplingParams()
    params.min_tokens = 20
    with pytest.raises(ConfigError, match="min_tokens=20 is not allowed"):
        plain.generate("a", params)
    params.max_tokens = 20
    params.detokenize = False
    (answer,) = plain.generate("a", params)[0].outputs
    assert (answer.text, len(answer.token_ids)) == ("", 20)
    with pytest.raises(AttributeError):
        params.max_token = 5  # type: ignore[attr-defined]


DEFAULTS = {"temperature": 0.6, "top_k": 9, "repetition_penalty": 1.2, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a generation_config.json that says how it likes to be sampled."""
    found = save_tiny_model(tmp_path_factory.mktemp("defaults"))
    path = found / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **DEFAULTS, "top_p": None}))
    return found


def test_generation_config_says_what_the_defaults_are(folder: Path) -> None:
    own = SamplingParams(temperature=0.6, top_k=9, repetition_penalty=1.2, max_tokens=24)
    llm = LLM(folder, **SHORT, seed=3)
    assert llm.get_default_sampling_params() == own
    own.seed = 1
    llm.default_sampling_params["seed"] = 1  # so that both draw alike
    (default,) = llm.generate("abc")
    (same,) = llm.generate("abc", own)
    assert default.outputs[0].token_ids == same.outputs[0].token_ids
    assert len(default.outputs[0].token_ids) == 24
    # Parameters that are given are all there is.
    (greedy,) = llm.generate("abc", SamplingParams(temperature=0, max_tokens=9))
    without = LLM(folder, **SHORT, generation_config="vllm")
    (plain,) = without.generate("abc", SamplingParams(temperature=0, max_tokens=9))
    assert greedy.outputs[0].token_ids == plain.outputs[0].token_ids
    assert without.get_default_sampling_params() == SamplingParams()


def test_generation_config_may_be_elsewhere_overridden_or_wrong(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text('{"top_k": 3, "temperature": 9}')
    wrong = rf"config\.json in {tmp_path}: temperature=9 is not allowed"
    with pytest.raises(ConfigError, match=wrong):
        LLM(folder, **SHORT, generation_config=tmp_path)
    llm = LLM(
        folder,
        **SHORT,
        generation_config=str(tmp_path),
        override_generation_config={"temperature": 0.5},
    )
    assert llm.default_sampling_params == {"top_k": 3, "temperature": 0.5}
    with pytest.raises(ConfigError, match="give auto, vllm, or a folder with"):
        LLM(folder, **SHORT, generation_config=tmp_path / "none")


def test_a_model_that_is_to_be_sampled_has_a_temperature(tmp_path: Path) -> None:
    """transformers' own, where generation_config.json names none, as gpt-oss's."""
    args = EngineArgs()
    path = tmp_path / "generation_config.json"
    for content, expected in (
        ({"do_sample": True}, {"temperature": 1.0}),
        ({"do_sample": True, "temperature": 0.6}, {"temperature": 0.6}),
        ({"do_sample": False}, {}),
        ({}, {}),
    ):
        path.write_text(json.dumps(content))
        assert args.sampling_defaults(tmp_path) == expected


def test_the_server_takes_them_for_what_a_request_leaves_open(folder: Path) -> None:
    def load() -> LLM:
        return LLM(folder, **SHORT, generation_config="auto")

    with serving(load) as server:

        def said(path: str, **body: Any) -> Any:
            answer = post(server, path, json={"model": NAME, "seed": 4, **body}).json()
            return answer["choices"][0], answer["usage"]["completion_tokens"]

        llm = server.llm
        own = SamplingParams(
            temperature=0.6, top_k=9, repetition_penalty=1.2, max_tokens=24, seed=4
        )
        choice, _ = said("/v1/completions", prompt="abc", max_tokens=100)
        (expected,) = llm.generate("abc", own)
        assert choice["text"] == expected.outputs[0].text
        own.temperature = 0.0
        choice, count = said("/v1/completions", prompt="abc", temperature=0, max_tokens=5)
        own.max_tokens = 5
        assert choice["text"] == llm.generate("abc", own)[0].outputs[0].text
        messages = [{"role": "user", "content": "Hi"}]
        _, count = said("/v1/chat/completions", messages=messages, ignore_eos=True)
        assert count == 24  # the model's limit, not the context's end
        for given in ({}, {"temperature": 0.25}):
            body = {"model": NAME, "input": "Hi", "max_output_tokens": 1, **given}
            reported = post(server, "/v1/responses", json=body).json()
            assert reported["temperature"] == given.get("temperature", 0.6)
            assert reported["top_p"] == 1.0


def test_async_outputs_know_the_prompt(folder: Path) -> None:
    engine = AsyncLLM(folder, **SHORT)
    slow(engine.llm, 0.005)  # else a caller that got no turn sees one output, the last
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0, logprobs=0)

    async def all_of(given: SamplingParams | None) -> list[Any]:
        return [output async for output in engine.generate("abcd", given, "one")]

    first, *_, last = asyncio.run(all_of(params))
    assert first.prompt_logprobs == last.prompt_logprobs
    assert [None if each is None else len(each) for each in last.prompt_logprobs] == [None, 1, 1, 1]
    assert last.outputs[0].cumulative_logprob < 0
    assert len(asyncio.run(all_of(None))[-1].outputs[0].token_ids) <= 24
    engine.shutdown()


@pytest.mark.parametrize(
    "rule",
    ["?start:", "!start:", "start[temperature=0.5]:", "start[max_tokens=3]:", "start[capture]:"],
)
def test_lark_without_a_plain_start_is_no_gbnf(plain: LLM, rule: str) -> None:
    pytest.importorskip("llguidance")
    form = StructuredOutputsParams(grammar=f'// a ::= b\n{rule} "ab"')
    params = SamplingParams(temperature=0, structured_outputs=form)
    assert plain.generate("a", params)[0].outputs[0].text == "ab"


def test_a_grammar_that_is_neither_lark_nor_gbnf_is_one_line(plain: LLM) -> None:
    pytest.importorskip("llguidance")
    for grammar in ('root ::= ("a"', "root ::= other", "root ::= " + "(" * 5000):
        form = StructuredOutputsParams(grammar=grammar)
        with pytest.raises(ConfigError, match="the grammar is no GBNF"):
            plain.generate("a", SamplingParams(structured_outputs=form))
