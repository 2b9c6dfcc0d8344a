"""gpt-oss's answers have channels: reasoning, content and calls of tools."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serving import NAME, Running, save_tiny_model, serving
from tokenizers import AddedToken

from smart_decoding.cli import main as cli
from smart_decoding.engine.jobs import Chunk
from smart_decoding.llm import LLM
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.server.answers import ChatForm
from smart_decoding.server.tool_text import HarmonyReader

TOKENS = ["<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|call|>", "<|constrain|>"]
TEMPLATE = (
    "{% for t in tools or [] %}{{ t.function.name }};{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}{# <|channel|> #}"
)
WHOLE = (
    "<|channel|>analysis<|message|>We think.<|end|><|start|>assistant<|channel|>final<|message|>Hi!"
)
ANSWER = f"start: {json.dumps(WHOLE)}\n"
ASKED: Any = [{"role": "user", "content": "Hello"}]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {"type": "object"}}}
CALLED = (
    "<|channel|>analysis<|message|>Look.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.now <|constrain|>json<|message|>{"a": 1}'
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose tokens and template are those of Harmony, as far as matters."""
    folder = save_tiny_model(tmp_path_factory.mktemp("harmony"), 258 + len(TOKENS))
    backend = Tokenizer.load(folder).backend
    # not special ones: only of these grammars make answers, which here say what is to be said
    backend.add_tokens([AddedToken(token, special=False) for token in TOKENS])
    Tokenizer(backend, {"bos_token": "<bos>", "eos_token": "<eos>"}, TEMPLATE).save(folder)
    return folder


@pytest.fixture(scope="module")
def running(folder: Path) -> Iterator[Running]:
    def load() -> LLM:
        return LLM(
            folder,
            speculative_config={"method": "ngram", "policy": "static"},
            dtype="float32",
            max_model_len=1024,
            max_num_seqs=4,
        )

    with serving(load) as server:
        yield server


def chat(client: openai.OpenAI, **options: Any) -> Any:
    """The answer that the grammar says."""
    extra = {"structured_outputs": {"grammar": ANSWER}, **options.pop("extra_body", {})}
    return client.chat.completions.create(model=NAME, messages=ASKED, extra_body=extra, **options)


def test_reasoning_and_content_are_told_apart(client: openai.OpenAI) -> None:
    choice = chat(client).choices[0]
    assert choice.message.content == "Hi!"
    assert choice.message.reasoning_content == "We think."
    assert choice.finish_reason == "stop"


def test_a_stream_tells_them_apart(client: openai.OpenAI) -> None:
    content = reasoning = ""
    for event in chat(client, stream=True):
        delta = event.choices[0].delta
        content += delta.content or ""
        reasoning += getattr(delta, "reasoning_content", "")
    assert (reasoning, content) == ("We think.", "Hi!")


@pytest.mark.parametrize("skip", [True, False])
def test_a_request_may_want_the_text_as_it_is(client: openai.OpenAI, skip: bool) -> None:
    message = chat(client, extra_body={"skip_special_tokens": skip}).choices[0].message
    assert message.content == WHOLE


@pytest.mark.parametrize("stream", [True, False])
def test_responses_have_an_item_for_reasoning(client: openai.OpenAI, stream: bool) -> None:
    """Which clients may send back."""
    extra = {"structured_outputs": {"grammar": ANSWER}}
    options: dict[str, Any] = {"model": NAME, "extra_body": extra}
    answer: Any = client.responses.create(input="Hello", stream=stream, **options)
    if stream:
        events = list(answer)
        deltas = [e.delta for e in events if e.type == "response.reasoning_text.delta"]
        (done,) = [e for e in events if e.type == "response.reasoning_text.done"]
        assert done.text == "".join(deltas) == "We think."
        answer = events[-1].response
    reasoning, message = answer.output
    assert (reasoning.type, reasoning.status, message.type) == ("reasoning", "completed", "message")
    assert reasoning.content[0].text == "We think."
    assert answer.output_text == "Hi!"
    earlier = [item.model_dump(exclude_none=True) for item in answer.output]
    again = client.responses.create(
        input=[*ASKED, *earlier, {"role": "user", "content": "More"}], **options
    )
    assert again.output_text == "Hi!"


@pytest.mark.parametrize("size", [1, 5, 1000])
def test_calls_are_read_from_commentary(size: int) -> None:
    form = ChatForm(str, None, HarmonyReader)
    deltas = []
    for start in range(0, len(CALLED), size):
        end = "stop" if start + size >= len(CALLED) else None
        delta = form.delta(Chunk(0, CALLED[start : start + size], [1], None, end))
        deltas += [] if delta is None else [delta]
    calls = [call for each in deltas for call in each["delta"].get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "now"
    assert "".join(call["function"]["arguments"] for call in calls) == '{"a": 1}'
    assert "".join(each["delta"].get("reasoning_content", "") for each in deltas) == "Look."
    assert not any("content" in each["delta"] for each in deltas)
    assert deltas[-1]["finish_reason"] == "tool_calls"
    whole = ChatForm(str, None, HarmonyReader).choice(Chunk(0, CALLED, [1], None, "stop"))
    assert whole["message"]["tool_calls"][0]["function"] == {"name": "now", "arguments": '{"a": 1}'}
    assert whole["message"]["content"] is None
    cut = ChatForm(str, None, HarmonyReader).choice(Chunk(0, CALLED, [1], None, "length"))
    assert cut["finish_reason"] == "length"


def test_tools_are_described_by_the_template(running: Running) -> None:
    """And calls have no grammar of ours, but where they must be."""
    body = {"model": NAME, "messages": ASKED, "max_tokens": 4, "tools": [TOOL], "seed": 1}
    url = f"{running.url}/v1/chat/completions"
    free = httpx.post(url, json=body).raise_for_status().json()
    assert (
        free["usage"]["prompt_tokens"] == len("now;") + len("userHello") + 3 + len("assistant") + 1
    )
    assert "<tool_call>" not in json.dumps(free)
    must = {**body, "tool_choice": "required", "max_tokens": 200}
    (call,) = (
        httpx.post(url, json=must)
        .raise_for_status()
        .json()["choices"][0]["message"]["tool_calls"][:1]
    )
    assert call["function"]["name"] == "now"


def test_a_command_prints_reasoning_beside_the_answer(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model says whatever; the text that is parsed is put in its place."""
    whole = "<|channel|>analysis<|message|>We think.<|end|><|start|>assistant<|channel|>final"
    pieces = iter([whole, "<|message|>Hi!"])
    monkeypatch.setattr(
        "smart_decoding.engine.stopping.StopChecker.new_text", lambda self: next(pieces, "")
    )
    run = ["run", "--model", str(folder), "-n", "3", "--temp", "0", "--method", "none", "Hello"]
    assert cli.main(run) == 0
    out, err = capsys.readouterr()
    assert out == "Hi!\n"
    assert "We think." in err
