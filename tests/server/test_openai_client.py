"""The official client, unchanged: sync, async and streaming, with answers that are plain
decoding's."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import openai
import pytest
from serving import NAME, Running

from smart_decoding.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
]


def expected(plain: LLM, prompt: str, **params: object) -> str:
    return plain.generate(prompt, SamplingParams(**params))[0].outputs[0].text


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).id == NAME
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_chat_answers_as_generate_does(
    client: openai.OpenAI, plain: LLM, temperature: float
) -> None:
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, temperature=temperature, seed=5, max_completion_tokens=24
    )
    (reference,) = plain.chat(
        MESSAGES, SamplingParams(temperature=temperature, seed=5, max_tokens=24)
    )
    assert answer.choices[0].message.content == reference.outputs[0].text
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == reference.outputs[0].finish_reason
    assert answer.usage.prompt_tokens == len(reference.prompt_token_ids)
    assert answer.usage.completion_tokens == len(reference.outputs[0].token_ids)
    assert answer.id.startswith("chatcmpl-")


def test_a_chat_stream_is_the_answer_in_pieces(client: openai.OpenAI, plain: LLM) -> None:
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = list(stream)
    (reference,) = plain.chat(MESSAGES, SamplingParams(temperature=0, max_tokens=40))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        == reference.outputs[0].text
    )
    assert [c.choices[0].finish_reason for c in chunks if c.choices[0].finish_reason] == ["length"]
    assert len(chunks) > 5
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage.completion_tokens == len(reference.outputs[0].token_ids)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1


def test_completions_of_several_prompts_and_samples(client: openai.OpenAI, plain: LLM) -> None:
    prompts = ["one two", "three"]
    params = {"temperature": 1.0, "seed": 3, "max_tokens": 9, "n": 2}
    answer = client.completions.create(model=NAME, prompt=prompts, **params)
    reference = [
        o.text for out in plain.generate(prompts, SamplingParams(**params)) for o in out.outputs
    ]
    assert [choice.text for choice in answer.choices] == reference
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    streamed = ["", "", "", ""]
    for chunk in client.completions.create(model=NAME, prompt=prompts, stream=True, **params):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == reference


def test_completions_take_token_ids_and_default_to_16_tokens(
    client: openai.OpenAI, plain: LLM
) -> None:
    tokens = plain.tokenizer.encode("hello")
    answer = client.completions.create(
        model=NAME, prompt=tokens, temperature=0, extra_body={"ignore_eos": True}
    )
    assert answer.usage.completion_tokens == 16
    assert answer.choices[0].text == expected(
        plain, "hello", temperature=0, ignore_eos=True, max_tokens=16
    )


def test_stop_bias_and_penalties_reach_the_engine(client: openai.OpenAI, plain: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 20}
    text = expected(plain, "abc", **params)
    stop = text[4:6]
    answer = client.completions.create(model=NAME, prompt="abc", stop=[stop], **params)
    assert answer.choices[0].text == text[: text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    biased = client.completions.create(model=NAME, prompt="abc", logit_bias={"65": 100}, **params)
    assert biased.choices[0].text == plain.tokenizer.decode([65]) * 20
    more = {"presence_penalty": 1.5, "frequency_penalty": 1.0}
    penalised = client.completions.create(model=NAME, prompt="abc", **params, **more)
    assert penalised.choices[0].text == expected(plain, "abc", **params, **more) != text


def test_logprobs_of_chat_and_completions(client: openai.OpenAI, plain: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 6}
    (reference,) = plain.generate("abc", SamplingParams(**params, logprobs=2))
    answer = client.completions.create(model=NAME, prompt="abc", logprobs=2, **params)
    got = answer.choices[0].logprobs
    best = [max(e.logprob for e in each.values()) for each in reference.outputs[0].logprobs]
    assert got.token_logprobs == pytest.approx(best, abs=1e-4)
    assert len(got.tokens) == len(got.text_offset) == 6
    assert all(1 <= len(top) <= 2 for top in got.top_logprobs)
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, logprobs=True, top_logprobs=3, stream=True, **params
    )
    entries = [
        e
        for chunk in stream
        if chunk.choices[0].logprobs
        for e in chunk.choices[0].logprobs.content
    ]
    assert len(entries) == 6
    assert all(len(e.top_logprobs) == 3 for e in entries)
    for entry in entries:  # greedy: the drawn token is the likeliest
        assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob, abs=1e-5)
        assert entry.logprob <= 0
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


@pytest.mark.parametrize("top", [0, 1])
def test_the_drawn_token_is_always_among_the_top_logprobs(client: openai.OpenAI, top: int) -> None:
    answer = client.completions.create(
        model=NAME, prompt="abc", logprobs=top, temperature=2, seed=1, max_tokens=20
    )
    got = answer.choices[0].logprobs
    for token, value, likely in zip(got.tokens, got.token_logprobs, got.top_logprobs, strict=True):
        assert likely[token] == value
        assert len(likely) <= top + 1
    assert top == 0 or any(len(likely) == 2 for likely in got.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_text_offsets_are_positions_in_the_text(client: openai.OpenAI, stream: bool) -> None:
    """A token is a byte here: those of one character are where it begins. The end token is not
    shown."""

    def offsets(**more: Any) -> tuple[str, list[int]]:
        answer = client.completions.create(
            model=NAME, prompt="abc", logprobs=1, stream=stream, **more
        )
        choices = [each.choices[0] for each in (answer if stream else [answer])]
        return "".join(choice.text for choice in choices), [
            at for choice in choices if choice.logprobs for at in choice.logprobs.text_offset
        ]

    text = "é€ 😀!"
    assert offsets(max_tokens=20, extra_body={"structured_outputs": {"choice": [text]}}) == (
        text,
        [at for at, character in enumerate(text) for _ in character.encode()] + [len(text)],
    )
    only_ends = {"logit_bias": {"257": 100}, "max_tokens": 3}
    assert offsets(**only_ends, extra_body={"ignore_eos": True}) == ("", [0, 0, 0])
    shown = {"ignore_eos": True, "skip_special_tokens": False}
    assert offsets(**only_ends, extra_body=shown) == ("<eos>" * 3, [0, 5, 10])


def test_async_streams_run_side_by_side(running: Running, plain: LLM) -> None:
    async def one(client: openai.AsyncOpenAI, prompt: str) -> str:
        stream = await client.completions.create(
            model=NAME, prompt=prompt, temperature=0, max_tokens=30, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def everyone() -> list[str]:
        async with openai.AsyncOpenAI(
            base_url=f"{running.url}/v1", api_key="none", max_retries=0
        ) as client:
            return await asyncio.gather(*(one(client, prompt) for prompt in prompts))

    prompts = [f"prompt number {i}" for i in range(8)]
    assert asyncio.run(everyone()) == [
        expected(plain, p, temperature=0, max_tokens=30) for p in prompts
    ]
    assert running.idle()


def test_what_is_not_supported_is_refused(client: openai.OpenAI) -> None:
    picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}]
    with pytest.raises(openai.BadRequestError, match="reads text only") as error:
        client.chat.completions.create(model=NAME, messages=picture)
    assert error.value.body["type"] == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match="modalities"):
        client.chat.completions.create(model=NAME, messages=MESSAGES, modalities=["audio"])
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    client.chat.completions.create(
        model=NAME, messages=MESSAGES, max_tokens=1, user="u", store=False, **neutral
    )
