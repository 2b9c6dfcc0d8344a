"""response_format, structured_outputs and tools, through the official client: the form holds, the
tokens are plain decoding's under the same grammar, and what cannot be kept to is a 400."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import httpx
import openai
import pytest
from serving import NAME, Running, post, prepared

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.models.text.chat_template import render
from smart_decoding.server.chat import chat_task
from smart_decoding.server.schemas import ChatRequest, Message
from smart_decoding.server.tool_text import ToolText
from smart_decoding.server.tools import Tool, explained, speaks_our_form

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

pytest.importorskip("llguidance")

MESSAGES = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Paris", "Rome"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["sun", "rain"]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["city", "days", "tags"],
    "additionalProperties": False,
}
JSON_SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "forecast", "schema": SCHEMA, "strict": True},
}
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "Tells the weather.", "parameters": SCHEMA},
    },
    {"type": "function", "function": {"name": "now"}},
]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
QWEN = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>"
    " as <tool_call>{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% for c in m.tool_calls %}"
    "<tool_call>{{ c.function.arguments | tojson }}</tool_call>{% endfor %}{% endfor %}"
)


def holds(text: str) -> dict[str, Any]:
    value = json.loads(text)
    assert set(value) == {"city", "days", "tags"}
    assert value["city"] in ("Paris", "Rome")
    assert 1 <= value["days"] <= 99
    assert 1 <= len(value["tags"]) <= 3
    return value


def accepted(running: Running) -> int:
    metrics = httpx.get(f"{running.url}/metrics").text
    line = next(
        line
        for line in metrics.splitlines()
        if line.startswith("smart:spec_decode_num_accepted_tokens_total")
    )
    return int(float(line.rpartition(" ")[2]))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_schema_is_kept_to_and_the_tokens_are_plain_decodings(
    running: Running, client: openai.OpenAI, plain: LLM, temperature: float
) -> None:
    before = accepted(running)
    params = {"temperature": temperature, "seed": 4, "max_tokens": 400}
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, response_format=JSON_SCHEMA, **params
    )
    structure = StructuredOutputsParams(json=SCHEMA)
    (expected,) = plain.chat(MESSAGES, SamplingParams(**params, structured_outputs=structure))
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens == len(expected.outputs[0].token_ids)
    holds(answer.choices[0].message.content)
    stream = client.chat.completions.create(
        model=NAME, messages=MESSAGES, response_format=JSON_SCHEMA, stream=True, **params
    )
    assert (
        "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        == expected.outputs[0].text
    )
    assert accepted(running) > before


def test_any_json_object_and_vllms_other_forms(client: openai.OpenAI, plain: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 40}
    answer = client.chat.completions.create(
        model=NAME, messages=MESSAGES, response_format={"type": "json_object"}, **params
    )
    structure = StructuredOutputsParams(json_object=True)
    (expected,) = plain.chat(MESSAGES, SamplingParams(**params, structured_outputs=structure))
    assert answer.choices[0].message.content == expected.outputs[0].text
    assert answer.choices[0].message.content.lstrip().startswith("{")
    forms = {
        "choice": ['a "b" / \\ \n', "Grüße 😀"],
        "regex": "[0-9]{3}-[a-f]{2}",
        "grammar": 'start: "(" start ")" | "x"',
        "json": {"const": [1, None]},
    }
    for name, what in forms.items():
        answer = client.completions.create(
            model=NAME,
            prompt="q",
            extra_body={"structured_outputs": {name: what}},
            seed=1,
            max_tokens=60,
        )
        structure = StructuredOutputsParams(**{name: what})
        (expected,) = plain.generate(
            "q", SamplingParams(seed=1, max_tokens=60, structured_outputs=structure)
        )
        assert answer.choices[0].text == expected.outputs[0].text
        if name == "choice":
            assert answer.choices[0].text in what
        if name == "json":
            assert json.loads(answer.choices[0].text) == [1, None]


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
def test_tool_calls_streamed_and_not(client: openai.OpenAI, choice: Any) -> None:
    ask = {
        "model": NAME,
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": choice,
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 250,
        "parallel_tool_calls": False,
    }
    answer = client.chat.completions.create(**ask).choices[0]
    assert answer.finish_reason == "tool_calls"
    assert answer.message.content is None
    (call,) = answer.message.tool_calls
    assert call.type == "function"
    assert call.id.startswith("call_")
    if call.function.name == "weather":
        holds(call.function.arguments)
    else:
        assert choice == "required"
        assert call.function.name == "now"
        assert json.loads(call.function.arguments) == {}
    name = ""
    arguments = ""
    reasons = []
    for chunk in client.chat.completions.create(**ask, stream=True):
        (piece,) = chunk.choices
        assert not piece.delta.content
        reasons += [piece.finish_reason] if piece.finish_reason else []
        for part in piece.delta.tool_calls or ():
            assert part.index == 0
            assert part.id or part.function.arguments  # none that says nothing
            assert bool(part.id) == bool(part.function.name) == (not name)
            name += part.function.name or ""
            arguments += part.function.arguments
    assert (name, arguments) == (call.function.name, call.function.arguments)
    assert reasons == ["tool_calls"]


def test_several_calls_and_several_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        tools=TOOLS,
        tool_choice="required",
        temperature=1.0,
        seed=0,
        n=4,
        max_tokens=250,
    )
    counts = [len(choice.message.tool_calls) for choice in answer.choices]
    assert max(counts) > 1
    assert len({call.id for c in answer.choices for call in c.message.tool_calls}) == sum(counts)


def test_auto_and_none_may_answer_with_text(client: openai.OpenAI, plain: LLM) -> None:
    params = {"temperature": 0, "max_tokens": 20}
    none = client.chat.completions.create(
        model=NAME, messages=MESSAGES, tools=TOOLS, tool_choice="none", **params
    )
    (expected,) = plain.chat(MESSAGES, SamplingParams(**params))
    assert none.choices[0].message.content == expected.outputs[0].text
    assert none.choices[0].message.tool_calls is None
    auto = client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS, **params)
    assert auto.choices[0].finish_reason == "length"
    assert auto.choices[0].message.content
    assert auto.usage.prompt_tokens > none.usage.prompt_tokens  # the tools are in it


def takes(running: Running, text: str, **more: Any) -> bool:
    """Whether the grammar of a request with TOOLS lets `text` be a whole answer."""
    body = ChatRequest.model_validate({"model": NAME, "messages": MESSAGES, "tools": TOOLS, **more})
    tokens = running.llm.tokenizer.encode(text, add_special_tokens=False)
    return running.llm.grammars(body.structure()).accepts(
        [*tokens, *running.llm.target.eos_token_ids]
    )


def test_what_the_grammar_lets_pass(running: Running) -> None:
    weather = CALL.replace("now", "weather").replace(
        "{}", json.dumps({"city": "Rome", "days": 2, "tags": ["sun"]})
    )
    for text in (
        "",
        "Hello <tool> {\n",
        CALL,
        f"I look.\n{CALL}",
        f"{CALL}\n{weather}",
        "<tool_cal",
    ):
        assert takes(running, text), text
    for text in (
        "<tool_call>",
        f"{CALL} and",
        f"{CALL}{CALL}",
        CALL.replace("now", "then"),
        CALL.replace("{}", '{"a":1}'),
    ):
        assert not takes(running, text), text
    assert takes(running, CALL, tool_choice="required")
    assert not takes(running, "no", tool_choice="required")
    one = {"parallel_tool_calls": False}
    assert takes(running, CALL, **one)
    assert not takes(running, f"{CALL}\n{CALL}", **one)
    named = {"tool_choice": {"type": "function", "function": {"name": "weather"}}}
    assert takes(running, weather, **named)
    assert not takes(running, CALL, **named)
    assert not takes(running, f"{weather}\n{weather}", **named)
    form = {"response_format": {"type": "json_object"}}
    assert takes(running, '{"a": 1}', **form)
    assert takes(running, CALL, **form)
    assert not takes(running, "a", **form)
    assert not takes(running, "{" + " " * 41 + "}", **form)  # blanks are bounded


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_reading_calls_from_text_in_any_pieces(size: int) -> None:
    arguments = '{"a": "}\\n</tool_call>", "b": [{}\n]}'
    text = f"Well <tool\n{CALL}\n{CALL.replace('{}', arguments)}"
    reader = ToolText()
    content = ""
    calls = []
    for start in range(0, len(text), size):
        piece = text[start : start + size]
        more, found, _ = reader.feed(piece, "stop" if start + size >= len(text) else None)
        content += more
        for part in found:
            if "id" in part:
                calls.append(["", ""])
            calls[part["index"]][0] += part["function"].get("name", "")
            calls[part["index"]][1] += part["function"]["arguments"]
    assert content == "Well <tool\n"
    assert reader.complete
    assert calls == [["now", "{}"], ["now", arguments]]


def test_an_answer_that_ends_may_have_looked_like_a_call() -> None:
    assert ToolText().feed("a <tool_c", "stop").content == "a <tool_c"


@pytest.mark.parametrize("size", [1, 1000])
@pytest.mark.parametrize("end", ["length", "stop"])  # a stop string cuts too
def test_a_call_that_is_cut_shows_nothing_of_its_wrapper(size: int, end: str) -> None:
    """Its arguments are there as far as they came."""
    arguments = '{"a": "}\\n</tool_call>", "b": [{}]}'
    whole = CALL.replace("{}", arguments)
    begins = whole.index(arguments)
    for cut in range(1 if end == "length" else len("<tool_call>"), len(whole)):
        reader = ToolText()
        content = got = ""
        for start in range(0, cut, size):
            last = end if start + size >= cut else None
            more, calls, _ = reader.feed(whole[start : min(start + size, cut)], last)
            content += more
            got += "".join(call["function"]["arguments"] for call in calls)
        assert content == ""
        assert got == arguments[: max(0, cut - begins)]
        assert not reader.complete


def test_calls_and_results_go_back_to_the_model(running: Running, client: openai.OpenAI) -> None:
    answer = (
        client.chat.completions.create(
            model=NAME,
            messages=MESSAGES,
            tools=TOOLS,
            tool_choice="required",
            seed=1,
            max_tokens=250,
            parallel_tool_calls=False,
        )
        .choices[0]
        .message
    )
    (call,) = answer.tool_calls
    history = [*MESSAGES, answer, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
    assert client.chat.completions.create(
        model=NAME, messages=history, tools=TOOLS, max_tokens=2
    ).choices
    messages = [
        Message.model_validate(m if isinstance(m, dict) else m.model_dump(exclude_unset=True))
        for m in history
    ]
    prompt = prompt_of(running.llm, messages)
    assert prompt.startswith("system: You can call functions.")
    assert '"name": "now"' in prompt
    assert "<tool_response>\nsunny\n</tool_response>" in prompt
    assert f'{{"name": "{call.function.name}", ' in prompt


def prompt_of(llm: LLM, messages: list[Message]) -> str:
    """Of a conversation with a tool."""
    task = chat_task(llm, messages, [Tool.model_validate(TOOLS[1])]).task
    (tokens,) = prepared(llm, task)
    return llm.tokenizer.decode(tokens, False)


def test_results_of_tools_and_what_is_said_then_are_one_turn() -> None:
    """Many templates refuse two turns of the user in a row."""
    calls = [{"type": "function", "function": {"name": "now", "arguments": {}}}] * 2
    messages = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": "b"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "5"},
        {"role": "tool", "content": "6"},
        {"role": "user", "content": "And?"},
    ]
    plain = explained(messages, [])
    assert [message["role"] for message in plain] == ["user", "user", "assistant", "user"]
    answers = (
        "<tool_response>\n5\n</tool_response>",
        "<tool_response>\n6\n</tool_response>",
        "And?",
    )
    assert plain[-1]["content"] == "\n".join(answers)


def test_an_answer_that_only_calls_says_nothing() -> None:
    """Qwen3's template adds to its content, which clients send back as null."""
    call = {"type": "function", "function": {"name": "now", "arguments": {}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call]}
    assert render("{{ '<' + messages[0].content + '>' }}", [message], {}) == "<>"


def test_text_parts_are_lines() -> None:
    """As in vLLM, for templates that take a text; they were glued together."""
    parts = [{"type": "text", "text": text} for text in ("Summarise:", "Cats purr.")]
    message = Message.model_validate({"role": "user", "content": parts})
    assert message.plain()["content"] == "Summarise:\nCats purr."


def test_a_template_that_knows_tools_is_given_them(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert speaks_our_form(QWEN)
    assert not speaks_our_form(QWEN + "<function=")
    assert not speaks_our_form("{{ messages }}")
    monkeypatch.setattr(running.llm.tokenizer, "template", QWEN)
    call = {"id": "c", "type": "function", "function": {"name": "now", "arguments": '{"a": 1}'}}
    history = [
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "5"},
    ]
    messages = [Message.model_validate(message) for message in history]
    prompt = prompt_of(running.llm, messages)
    assert prompt == (
        '<tools>{"type": "function", "function": {"name": "now"}}</tools> as <tool_call>'
        '[assistant]<tool_call>{"a": 1}</tool_call>[tool]5'
    )


NESTED: dict[str, Any] = {}
for _ in range(400):
    NESTED = {"type": "array", "items": NESTED}
NESTED_OBJECT = {"type": "object", "properties": {"a": NESTED}}


def schema(value: Any) -> dict[str, Any]:
    """A response_format."""
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": value}}
    }


def offered(**fields: Any) -> dict[str, Any]:
    """One tool."""
    return {"tools": [{"type": "function", "function": {"name": "a", **fields}}]}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        (schema({"type": "no"}), "no"),
        (schema({"not": {}}), "not"),
        (schema(NESTED), "deep"),
        (schema({"const": "\ud800"}), ""),
        (
            {"response_format": JSON_SCHEMA, "structured_outputs": {"regex": "a"}},
            "exclude each other",
        ),
        ({"response_format": JSON_SCHEMA, "min_tokens": 3}, "min_tokens"),
        ({"response_format": JSON_SCHEMA, "ignore_eos": True}, "ignore_eos"),
        ({"structured_outputs": {}}, "exactly one"),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"grammar": "start: ("}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "not supported"),
        (offered(name="a b"), "name"),
        ({"tools": [TOOLS[1], TOOLS[1]]}, "same name"),
        ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, "tools"),
        (offered(parameters={"type": "array"}), "object"),
        (offered(parameters=NESTED_OBJECT), "deep"),
        (offered(parameters={"title": "\ud800"}), "surrogate"),
        (offered(parameters={"x": math.nan}), "float"),
        ({"tools": TOOLS, "structured_outputs": {"regex": "a"}}, "exclude each other"),
        ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "b"}}},
            "no tool",
        ),
        ({"tool_choice": "required"}, "no tools"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "tool_call_id"),
        ({"messages": [{"role": "user", "content": "x", "tool_call_id": "c"}]}, "tool_call_id"),
        ({"messages": [{"role": "assistant"}]}, "content"),
        ({"messages": [{"role": "assistant", "refusal": "no"}]}, "refusal"),
    ],
)
def test_what_cannot_be_kept_to_is_refused(
    running: Running, change: dict[str, Any], words: str
) -> None:
    body = json.dumps({"model": NAME, "messages": MESSAGES, "max_tokens": 2, **change}).encode()
    response = post(
        running, "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
    )
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert words in error["message"]
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    assert running.idle()


CUT = ['{"city": "Par', "[]", "", '{"a":' + 400 * "[" + 400 * "]" + "}", '{"a": "\\ud800"}']


@pytest.mark.parametrize("arguments", CUT)
def test_a_call_that_was_cut_may_be_sent_back(running: Running, arguments: str) -> None:
    """An agent keeps what it got in its conversation."""
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "c", "type": "function", "function": function}]
    call = {"role": "assistant", "tool_calls": calls}
    chat = {"model": NAME, "messages": [*MESSAGES, call, *MESSAGES], "max_tokens": 2}
    assert post(running, "/v1/chat/completions", json=chat).status_code == 200
    item = {"type": "function_call", "call_id": "c", **function}
    response = {"model": NAME, "input": [item, *MESSAGES], "max_output_tokens": 2}
    assert post(running, "/v1/responses", json=response).status_code == 200


@pytest.mark.parametrize("strict", [None, False, True])
def test_tools_of_any_schema_may_be_offered(running: Running, strict: bool | None) -> None:
    """What cannot be kept to is left out, unless it is asked for."""
    parameters = {"properties": {"a": {"type": "integer"}}, "propertyNames": {"pattern": "a"}}
    tool = offered(parameters=parameters, strict=strict)
    body = {"model": NAME, "messages": MESSAGES, "max_tokens": 2, **tool}
    answered = post(running, "/v1/chat/completions", json=body)
    assert answered.status_code == (400 if strict else 200), answered.text
