"""Streams before their first token: headers at once, then comments, which clients ignore."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from serving import NAME, Running, serving

from smart_decoding.server import answering

MESSAGES = [{"role": "user", "content": "hi"}]
REQUESTS = {
    "/v1/completions": {"prompt": "ab", "max_tokens": 4},
    "/v1/chat/completions": {"messages": MESSAGES, "max_tokens": 4},
    "/v1/responses": {"input": "hi", "max_output_tokens": 16},
}


class Held(threading.Event):
    """Rounds wait until it is set."""

    running: Running


@pytest.fixture(scope="module")
def server(load: Any) -> Iterator[Held]:
    held = Held()

    def loaded() -> Any:
        llm = load()
        step = llm.engine.step

        def waiting(*given: Any) -> Any:
            assert held.wait(60)
            return step(*given)

        llm.engine.step = waiting
        return llm

    held.set()
    with serving(loaded) as held.running:
        yield held


@pytest.fixture(autouse=True)
def short(server: Held, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(answering, "SILENCE", 0.01)
    server.clear()
    yield
    server.set()


@pytest.mark.parametrize("path", REQUESTS)
def test_a_stream_begins_before_its_first_token(path: str, server: Held) -> None:
    body = {"model": NAME, "stream": True, "temperature": 0, **REQUESTS[path]}
    with httpx.stream("POST", server.running.url + path, json=body, timeout=60) as stream:
        assert stream.status_code == 200
        lines = stream.iter_lines()
        assert [next(lines) for _ in range(4)] == [": keep-alive", ""] * 2
        server.set()
        events = [line for line in lines if line and not line.startswith(":")]
    assert events[0].startswith(("data: {", "event: response.created"))
    assert events[-1].startswith("data: ")


def test_openais_client_ignores_comments(server: Held) -> None:
    with openai.OpenAI(base_url=f"{server.running.url}/v1", api_key="none") as client:
        given: dict[str, Any] = {"model": NAME, "messages": MESSAGES, "temperature": 0}
        stream = client.chat.completions.create(**given, max_tokens=8, stream=True)
        server.set()
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
        whole = client.chat.completions.create(**given, max_tokens=8)
        assert text == whole.choices[0].message.content


def test_a_client_that_leaves_before_the_first_token_frees_its_place(server: Held) -> None:
    body = {"model": NAME, "stream": True, **REQUESTS["/v1/completions"]}
    url = f"{server.running.url}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as stream:
        assert next(stream.iter_lines()) == ": keep-alive"
    server.set()
    assert server.running.idle()
