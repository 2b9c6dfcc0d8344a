"""What one client may learn of another: numbers, and no text by any route."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from serving import NAME, Running, client, post, serving, slow, wait_for

from smart_decoding.server.launch import JsonLines, Lines

PROMPT = "The vault code is 7291, and nobody else may know it. " * 4
ALICE = "alice-key"
BOB = "bob-key"


def cached(running: Running, key: str | None = None, prompt: str = PROMPT, **fields: Any) -> int:
    """Ask a completion; return how many tokens of its prompt were cached."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": 2, **fields}
    headers = {"authorization": f"Bearer {key}"} if key else {}
    reply = post(running, "/v1/completions", json=body, headers=headers)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    cached_count = found["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached_count == found["timings"]["cache_n"]
    assert isinstance(cached_count, int)
    return cached_count


def test_a_key_finds_its_own_cached_prompts_only(load: Any) -> None:
    with serving(load, api_keys=(ALICE, BOB)) as running:
        assert cached(running, ALICE) == 0
        assert cached(running, BOB) == 0
        assert cached(running, ALICE) > 100
        assert cached(running, BOB, PROMPT + "!") > 100  # what it sent itself
        running.llm.engine.check_integrity()


@pytest.mark.parametrize("keys", [(), (ALICE,)])
def test_all_share_cached_prompts_where_there_is_one_key_or_loopback(
    load: Callable[..., Any], keys: tuple[str, ...]
) -> None:
    with serving(load, api_keys=keys) as running:
        assert [cached(running, *keys) > 100 for _ in range(2)] == [False, True]


def test_an_address_finds_its_own_cached_prompts_only(load: Any) -> None:
    """Where anyone is served."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 1}
    with serving(load, no_api_key=True) as running, client(running) as stranger:
        assert cached(running) == 0
        for few in (True, False):
            usage = stranger.post("/v1/completions", json=body).json()["usage"]
            assert (usage["prompt_tokens_details"]["cached_tokens"] == 0) is few


def test_requests_of_a_salt_share_with_each_other(running: Running) -> None:
    first = {"prompt": PROMPT + "salted"}
    assert cached(running, **first, cache_salt="a") == 0
    assert cached(running, **first, cache_salt="b") == 0
    assert cached(running, **first) == 0
    assert cached(running, **first, cache_salt="a") > 100
    assert cached(running, **first) > 100
    for wrong in ("", 5):
        body = {"model": NAME, "prompt": "a", "cache_salt": wrong}
        reply = post(running, "/v1/completions", json=body)
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "cache_salt"


def test_conversations_and_responses_take_a_salt(running: Running) -> None:
    for path, given in (("chat/completions", "messages"), ("responses", "input")):
        found = []
        for salt in ("x", "y", "y"):
            content = [{"role": "user", "content": PROMPT + path}]
            body = {"model": NAME, given: content, "cache_salt": path + salt}
            usage = post(running, f"/v1/{path}", json=body).json()["usage"]
            details = usage.get("prompt_tokens_details") or usage["input_tokens_details"]
            found.append(details["cached_tokens"] > 100)
        assert found == [False, False, True]


def test_nobody_is_told_what_a_failed_round_says(
    load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever raises may quote any request of the round. The log has the place and the types."""
    body = {"model": NAME, "prompt": PROMPT, "max_tokens": 200, "ignore_eos": True}
    with (
        serving(lambda: slow(load(), 0.01), api_keys=(ALICE, BOB)) as running,
        ThreadPoolExecutor() as pool,
    ):

        def ask(key: str) -> Any:
            headers = {"authorization": f"Bearer {key}"}
            return post(running, "/v1/completions", json=body, headers=headers)

        both = [pool.submit(ask, key) for key in (ALICE, BOB)]
        assert wait_for(lambda: len(running.llm.engine.scheduler.running) == 2)

        def broken(*_: Any) -> Any:
            code = "7291"
            try:
                json.loads(code + "}")
            except ValueError as error:
                raise KeyError(code) from error

        running.llm.engine.step = broken  # type: ignore[method-assign]
        replies = [each.result() for each in both]
        replies.append(ask(BOB))
        health = httpx.get(f"{running.url}/health")
    assert all(reply.status_code in (500, 503) for reply in replies)
    assert all("7291" not in reply.text for reply in (*replies, health))
    for record in caplog.records:
        record.exc_text = None  # pytest's own, which later formatters would take
    for form in (Lines(), JsonLines()):
        log = "\n".join(map(form.format, caplog.records))
        assert "7291" not in log
        assert re.search("JSONDecodeError.*then:.*raise KeyError.*KeyError", log, re.DOTALL)
