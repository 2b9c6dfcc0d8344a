"""What clients of vLLM and llama.cpp are used to: fields nobody knows, figures, other origins."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import NAME, Running, post, serving

from smart_decoding.errors import ConfigError
from smart_decoding.server.settings import ServerSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from smart_decoding.llm import LLM

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def test_unknown_fields_are_ignored_and_named_in_a_header(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    assert "warning" not in post(running, "/v1/chat/completions", json=CHAT).headers
    message = {"role": "user", "content": "hi", "mood": 1}
    unknown = {"temprature": 3, "safety_identifier": "me", 'x"\r\né': 0}
    answer = post(running, "/v1/chat/completions", json={**CHAT, **unknown, "messages": [message]})
    assert answer.status_code == 200
    named = answer.headers["warning"]
    assert named.startswith('299 - "')
    assert "mood, safety_identifier, temprature, x????" in named
    caplog.clear()
    for _ in range(2):
        post(running, "/v1/chat/completions", json={**CHAT, "once": 1})
    assert [each.message for each in caplog.records].count("unknown fields were ignored: once") == 1
    many = {f"x{i}": None for i in range(1000)}
    answer = post(running, "/v1/completions", json={"prompt": "a", "max_tokens": 1, **many})
    assert answer.status_code == 200
    assert len(answer.headers["warning"]) < 2000


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_llama_cpps_name_of_a_limit(running: Running, path: str) -> None:
    """llama.vim sends n_predict=0 to have a prompt read: it must not get a whole answer."""
    asked = {**CHAT, "prompt": "abc", "ignore_eos": True, "temperature": 0}
    for limit, expected in ((3, 3), (0, 1), (-1, 100)):
        body = {**asked, "max_tokens": 100, "n_predict": limit}
        if limit < 0:
            del body["max_tokens"]
        answer = post(running, path, json=body).json()
        count = answer["usage"]["completion_tokens"]
        assert count == expected if limit >= 0 else count > expected
    refused = post(running, path, json={**asked, "n_predict": 10**7}).json()["error"]
    assert refused["param"] == "n_predict"


def test_masks_hold_in_the_server(running: Running) -> None:
    request_body = {"prompt": "abc abc", "max_tokens": 20, "temperature": 0}
    free = post(running, "/v1/completions", json=request_body).json()["choices"][0]["text"]
    spelt = {"prompt": "abcdefgh ", "add_special_tokens": False}
    letters = post(running, "/tokenize", json=spelt).json()["tokens"]
    masked = {**request_body, "allowed_token_ids": letters, "bad_words": ["b", "gh"]}
    text = post(running, "/v1/completions", json=masked).json()["choices"][0]["text"]
    assert set(text) <= set("acdefgh ")
    assert "gh" not in text
    assert text != free
    refused = post(running, "/v1/completions", json={**masked, "allowed_token_ids": []})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "allowed_token_ids"


@pytest.mark.parametrize(
    "change",
    [
        {"use_beam_search": True},
        {"prompt_logprobs": 1},
        {"length_penalty": 0.5},
        {"truncate_prompt_tokens": 5},
        {"guided_json": {}},
        {"chat_template_kwargs": {"messages": []}},
        {"chat_template_kwargs": {"self": 1}},
        {"chat_template_kwargs": {"chat_template": "x"}},
        {"continue_final_message": True},
    ],
)
def test_what_would_change_the_answer_elsewhere_is_refused(
    running: Running, change: dict[str, Any]
) -> None:
    answer = post(running, "/v1/chat/completions", json={**CHAT, **change})
    assert answer.status_code == 400
    name = list(change)[-1]
    assert answer.json()["error"]["param"] == name
    assert answer.json()["error"]["message"].startswith(name)


def test_neutral_values_of_vllms_fields_are_taken(running: Running) -> None:
    neutral = {
        "use_beam_search": False,
        "length_penalty": 1.0,
        "priority": 0,
        "add_generation_prompt": True,
        "chat_template_kwargs": {},
        "prompt_logprobs": None,
    }
    answer = post(running, "/v1/chat/completions", json={**CHAT, **neutral})
    assert answer.status_code == 200
    assert "warning" not in answer.headers


THINKING = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools <tool_call>\n{% endif %}"
    "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}"
    "{{ reasoning_effort }}"
)


def test_variables_of_the_chat_template_reach_it(load: Callable[..., LLM]) -> None:
    """As Qwen3's clients say that it is not to think."""
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    request_body = {"input": "hi", "max_output_tokens": 1}
    with serving(lambda: load(chat_template=THINKING)) as server:

        def grown(path: str, body: dict[str, Any], *place: str) -> int:
            counts = []
            for more in ({}, off):
                found = post(server, path, json={**body, **more}).json()
                for name in place:
                    found = found[name]
                counts.append(int(found))
            return counts[1] - counts[0]

        chat = "/v1/chat/completions"
        longer = len("<think></think>")
        assert grown(chat, CHAT, "usage", "prompt_tokens") == longer
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(off, "reasoning_effort", "medium")
            assert grown(chat, CHAT, "usage", "prompt_tokens") == longer + len("medium")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(off, "reasoning", {"effort": "low", "summary": "auto"})
            known = longer + len("low")
            assert grown("/v1/responses", request_body, "usage", "input_tokens") == known
        called = {**CHAT, "tools": [tool]}
        assert grown(chat, called, "usage", "prompt_tokens") == longer
        assert grown("/v1/responses", request_body, "usage", "input_tokens") == longer
        assert grown("/tokenize", {"messages": CHAT["messages"]}, "count") == longer
        refused = post(server, "/tokenize", json={"prompt": "hi", **off})
        assert refused.status_code == 400
        deep: Any = {}
        for _ in range(100):
            deep = {"a": deep}
        refused = post(server, chat, json={**CHAT, "chat_template_kwargs": deep})
        assert refused.status_code == 400
        assert "nested more than 64 deep" in refused.json()["error"]["message"]


@pytest.fixture(scope="module")
def repeating(load: Callable[..., LLM]) -> Iterator[Running]:
    """Drafts what came before."""
    with serving(
        lambda: load(speculative_config={"method": "ngram", "policy": "static"})
    ) as server:
        yield server


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_tells_how_it_went(repeating: Running, stream: bool, usage: bool) -> None:
    """All of its tokens are the same, so that drafts are accepted."""
    body = {
        **CHAT,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {"65": 100},
        "stream": stream,
        "stream_options": {"include_usage": True} if stream and usage else None,
    }
    answer = post(repeating, "/v1/chat/completions", json=body)
    result = _events(answer)[-1] if stream else answer.json()
    timings = result["timings"]
    spec = result["metrics"]["speculative_decoding"]
    assert timings["predicted_n"] == 40
    assert timings["cache_n"] + timings["prompt_n"] > 0
    assert timings["prompt_ms"] > 0
    per_second = 1000 * timings["predicted_n"] / timings["predicted_ms"]
    assert timings["predicted_per_second"] == pytest.approx(per_second, rel=0.01)
    assert 0 < timings["draft_n_accepted"] <= timings["draft_n"]
    assert spec["num_draft_tokens"] == timings["draft_n"]
    assert spec["num_accepted_draft_tokens"] == timings["draft_n_accepted"]
    histogram = spec["acceptance_histogram"]
    assert sum(histogram) == spec["num_spec_steps"]
    assert sum(i * steps for i, steps in enumerate(histogram)) == timings["draft_n_accepted"]
    assert len(histogram) == spec["num_spec_tokens"] + 1
    assert 0 <= result["metrics"]["queue_time_ms"] <= result["metrics"]["time_to_first_token_ms"]
    if usage or not stream:
        details = result["usage"]["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == timings["draft_n_accepted"]
        rejected = timings["draft_n"] - timings["draft_n_accepted"]
        assert details["rejected_prediction_tokens"] == rejected


def test_usage_with_every_chunk(running: Running) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**CHAT, "max_tokens": 9, "ignore_eos": True, "stream": True, "stream_options": options}
    answer = post(running, "/v1/chat/completions", json=body)
    counts = [event["usage"]["completion_tokens"] for event in _events(answer)]
    assert counts == sorted(counts)
    assert len(set(counts)) > 3
    assert counts[-1] == 9


def _events(answer: httpx.Response) -> list[Any]:
    *events, done = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def test_figures_are_of_one_answer_and_drafts_of_all(repeating: Running) -> None:
    body = {"prompt": ["a", "b"], "max_tokens": 20, "temperature": 0, "logit_bias": {"65": 100}}
    answer = post(repeating, "/v1/completions", json=body).json()
    assert "timings" not in answer
    assert "metrics" not in answer
    assert answer["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 0
    body = {**body, "prompt": "a", "speculate": False}
    plain = post(repeating, "/v1/completions", json=body).json()
    assert plain["metrics"]["speculative_decoding"] is None
    assert "draft_n" not in plain["timings"]


def test_pages_of_allowed_origins_may_ask(load: Callable[[], LLM], running: Running) -> None:
    ours = {"origin": "https://a.example", "access-control-request-method": "POST"}
    asks = {**ours, "access-control-request-headers": "authorization,content-type"}
    settings = {"api_keys": ("k",), "allowed_origins": ("https://a.example",)}
    with serving(load, **settings) as server:
        url = f"{server.url}/v1/chat/completions"
        before = httpx.options(url, headers=asks)  # a browser's question, which carries no key
        assert before.status_code == 200
        assert before.headers["access-control-allow-origin"] == "https://a.example"
        assert "authorization" in before.headers["access-control-allow-headers"]
        others = {**asks, "origin": "https://b.example"}
        assert httpx.options(url, headers=others).status_code == 400
        key = {"authorization": "Bearer k"}
        for headers, status in (({**ours, **key}, 200), (ours, 401)):  # errors can be read, too
            answer = httpx.post(url, json=CHAT, headers=headers, timeout=20)
            assert answer.status_code == status
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
    answer = post(running, "/v1/chat/completions", json=CHAT, headers=ours)
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("origin", ["a.example", "https://a.example/", '["*"]', ""])
def test_what_is_no_origin(origin: str) -> None:
    with pytest.raises(ConfigError, match="allowed-origins"):
        ServerSettings(NAME, allowed_origins=(origin,))
