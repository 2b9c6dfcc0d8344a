"""/v1/responses through the official client: the answers are those of chats."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Literal

import openai
import pytest
from pydantic import BaseModel
from serving import NAME

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.server.responses_request import ResponsesRequest

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Why is the sky blue?"},
]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "name": "weather", "description": "Of a city", "parameters": PARAMETERS}


class Forecast(BaseModel):
    city: Literal["Paris", "Rome"]
    sunny: bool


@pytest.mark.parametrize(
    "options",
    [
        {"instructions": "Be brief.", "input": "Why is the sky blue?"},
        {"input": MESSAGES},
        {
            "input": [
                {**m, "content": [{"type": "input_text", "text": m["content"]}]} for m in MESSAGES
            ]
        },
    ],
)
def test_an_answer_is_that_of_a_chat(client: openai.OpenAI, plain: LLM, options: Any) -> None:
    params = {"temperature": 0.9, "top_p": 0.9}
    answer = client.responses.create(
        model=NAME, max_output_tokens=24, extra_body={"seed": 5}, **params, **options
    )
    (expected,) = plain.chat(MESSAGES, SamplingParams(max_tokens=24, seed=5, **params))
    assert answer.output_text == expected.outputs[0].text
    assert answer.usage.input_tokens == len(expected.prompt_token_ids)
    assert answer.usage.output_tokens == len(expected.outputs[0].token_ids) == 24
    assert answer.status == "incomplete"
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.instructions == options.get("instructions")
    assert answer.temperature == 0.9
    assert answer.id.startswith("resp_")
    assert answer.timings["predicted_n"] == 24


def test_a_stream_tells_of_every_part(client: openai.OpenAI, plain: LLM) -> None:
    params = {"temperature": 0, "logit_bias": {65: 100.0}, "min_tokens": 3, "stop_token_ids": [65]}
    (expected,) = plain.chat(MESSAGES, SamplingParams(max_tokens=9, **params))
    extra = {**params, "logit_bias": {"65": 100.0}}
    with client.responses.stream(
        model=NAME, input=MESSAGES, max_output_tokens=9, extra_body=extra
    ) as stream:
        events = list(stream)
        answer = stream.get_final_response()
    text = expected.outputs[0].text
    assert answer.output_text == text
    assert answer.status == "completed"
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == text != ""
    assert kinds == [
        "created",
        "in_progress",
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * len(deltas),
        "output_text.done",
        "content_part.done",
        "output_item.done",
        "completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert answer.usage.output_tokens == len(expected.outputs[0].token_ids)


def test_a_schema_through_the_clients_own_parser(client: openai.OpenAI, plain: LLM) -> None:
    params = {"temperature": 0}
    answer = client.responses.parse(
        model=NAME, input=MESSAGES, text_format=Forecast, max_output_tokens=300, **params
    )
    assert answer.output_parsed.city in ("Paris", "Rome")
    structure = StructuredOutputsParams(json=answer.text.format.schema_)
    expected = plain.chat(
        MESSAGES, SamplingParams(max_tokens=300, structured_outputs=structure, **params)
    )
    assert answer.output_text == expected[0].outputs[0].text


def test_calls_streamed_and_not_and_the_turn_after(client: openai.OpenAI) -> None:
    options = {
        "model": NAME,
        "input": MESSAGES,
        "tools": [TOOL],
        "tool_choice": {"type": "function", "name": "weather"},
        "temperature": 0,
        "max_output_tokens": 400,
    }
    answer = client.responses.create(**options)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")
    with client.responses.stream(**options) as stream:
        events = list(stream)
        (streamed,) = stream.get_final_response().output
    assert streamed.arguments == call.arguments
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == call.arguments
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"}
    history = [*MESSAGES, call.model_dump(exclude_none=True), output]
    raw = client.responses.with_raw_response.create(
        **{**options, "input": history, "tool_choice": "none", "max_output_tokens": 2}
    )
    assert raw.parse().usage.output_tokens == 2
    assert "warning" not in raw.headers
    cut = client.responses.create(**{**options, "max_output_tokens": 30})
    assert cut.status == "incomplete"
    assert "tool_call" not in cut.output_text


def test_an_answer_with_logprobs_can_be_sent_back(client: openai.OpenAI) -> None:
    first = client.responses.create(
        model=NAME, input="a", max_output_tokens=2, include=["message.output_text.logprobs"]
    )
    again = [*first.output, {"role": "user", "content": "b"}]
    counted = client.responses.create(model=NAME, input=again, max_output_tokens=2)
    assert counted.usage is not None
    assert counted.usage.output_tokens == 2


def test_calls_are_part_of_the_assistants_turn() -> None:
    call = {"type": "function_call", "name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": "a"},
        {
            "type": "message",
            "id": "msg_1",
            "status": "completed",
            "role": "assistant",
            "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
        },
        {**call, "call_id": "1"},
        {**call, "call_id": "2", "id": "fc_2", "status": "completed"},
        {"type": "function_call_output", "call_id": "1", "output": "c"},
        {**call, "call_id": "3"},
    ]
    chat = ResponsesRequest.model_validate({"input": items}).chat
    turns = [message.plain() for message in chat.messages]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "tool", "assistant"]
    assert turns[1]["content"] == "b"
    assert [call["id"] for call in turns[1]["tool_calls"]] == ["1", "2"]
    assert turns[2]["content"] == "c"


def test_logprobs_if_they_are_included(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model=NAME,
        input="a",
        temperature=0,
        max_output_tokens=8,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    found = answer.output[0].content[0].logprobs
    assert len(found) == 8
    assert all(len(each.top_logprobs) == 2 for each in found)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": 1}}, "reasoning"),
        ({"tools": [{"type": "web_search"}]}, "only tools of the type 'function'"),
        ({"tools": [TOOL, TOOL]}, "same name"),
        ({"max_output_tokens": 5000}, "context length"),
        ({"input": []}, "input"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"not": {}}}}}, "text"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(
    client: openai.OpenAI, change: dict[str, Any], named: str
) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.responses.create(**{"model": NAME, "input": "a", **change})
    assert named in error.value.body["message"]
