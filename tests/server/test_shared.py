"""One client's load is not another's: long texts, bodies of many values, full queues and slots."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import (
    LONG,
    NAME,
    Running,
    client,
    longest_gap,
    post,
    serving,
    slow,
    stretches_of_loops,
    wait_for,
)

from smart_decoding.errors import CapacityError
from smart_decoding.models.text import tokenizer as tokenizing
from smart_decoding.server import middleware
from smart_decoding.server.counting import MAX_NAMED, MAX_NESTED, MAX_VALUES, check_count
from smart_decoding.server.errors import ApiError
from smart_decoding.server.settings import network_of
from smart_decoding.server.turns import Turns

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

# Seconds of a processor in which the event loop looks at nobody else, at most.
STRETCH = 0.015
HUGE = "7" * 4_000_000


def test_who_sends_four_megabytes_holds_up_nobody(running: Running) -> None:
    bodies: dict[str, Any] = {
        "/tokenize": {"prompt": HUGE},
        "/v1/completions": {**LONG, "prompt": HUGE},
        "/v1/chat/completions": {"model": NAME, "messages": [{"role": "user", "content": HUGE}]},
    }
    done = threading.Event()
    with ThreadPoolExecutor() as pool, stretches_of_loops() as stretches:
        gap = pool.submit(longest_gap, running, done)
        sent = [
            pool.submit(post, running, path, json=body)
            for path, body in bodies.items()
            for _ in "ab"
        ]
        wait(sent)
        done.set()
        assert gap.result() < 1.0
    assert max(stretches) < STRETCH
    refused = [each.result() for each in sent]
    for answer in refused:
        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "context_length_exceeded"
        assert answer.json()["error"]["param"] in ("prompt", "messages")
    assert running.idle()


def test_two_addresses_that_tokenise_four_megabytes_hold_up_nobody(running: Running) -> None:
    """A bystander waited 13 s, and who asked about health 22 s."""

    def hostile(address: str) -> list[int]:
        with client(running, address) as attacker:
            body = {"prompt": HUGE}
            return [attacker.post("/tokenize", json=body).status_code for _ in range(4)]

    done = threading.Event()
    with ThreadPoolExecutor() as pool, stretches_of_loops() as stretches:
        gap = pool.submit(longest_gap, running, done, "127.0.0.4")
        sent = [pool.submit(hostile, address) for address in ("127.0.0.2", "127.0.0.3") * 2]
        wait(sent)
        done.set()
        assert gap.result() < 1.0
    assert max(stretches) < STRETCH
    assert [each.result() for each in sent] == [[400] * 4] * 4
    assert running.idle()


def test_a_text_is_refused_by_its_beginning_or_read_whole(load: Any, running: Running) -> None:
    llm = load(max_model_len=100)
    assert len(llm.tokenizer.encode("a" * 800)) == 800  # short enough to be counted
    with pytest.raises(CapacityError, match="first 800 of 801 characters exceed max_model_len=100"):
        llm.tokenizer.encode("a" * 801)
    with pytest.raises(CapacityError, match="too long"):
        llm.generate("a" * 900)
    found = post(running, "/tokenize", json={"prompt": "a" * 8192}).json()
    assert found["count"] == 8192 > found["max_model_len"]


@pytest.mark.parametrize("text", ["sea " * 3000, "ü😀" * 2000, "<bos>a" * 1000])
def test_long_texts_have_the_same_tokens_beside_the_lock(
    plain: LLM, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(plain.tokenizer, "context", None)
    beside = plain.tokenizer.encode(text)
    back = plain.tokenizer.decode(beside, False)
    monkeypatch.setattr(tokenizing, "_LONG", 10**9)
    assert plain.tokenizer.encode(text) == beside
    assert plain.tokenizer.decode(beside, False) == back == text


def test_bodies_of_too_many_values_are_not_read(running: Running) -> None:
    for body in (
        {"model": NAME, "prompt": [1] * (MAX_VALUES + 1)},
        {"model": NAME, "prompt": [[1]] * (MAX_NESTED + 1)},
        {"model": NAME, "prompt": "a", "logit_bias": dict.fromkeys(range(MAX_NAMED), 1)},
    ):
        answer = post(running, "/v1/completions", json=body)
        assert answer.status_code == 400
        assert "the body holds more than" in answer.json()["error"]["message"]


LARGEST: dict[str, dict[str, Any]] = {
    "biases": {"logit_bias": dict.fromkeys(range(MAX_NAMED - 10), 1)},
    "token ids": {"prompt": [1] * (MAX_VALUES - 10)},
    "unknown fields": {f"x{i}": i for i in range(MAX_NAMED - 10)},
    "objects": {"stream_options": [{}] * (MAX_NESTED - 10)},
    "words": {"allowed_token_ids": list(range(MAX_VALUES - 10))},
    "wrong values": {"logit_bias": dict.fromkeys(range(MAX_NAMED - 10), "a")},
    "no JSON": {"prompt": [1] * (MAX_VALUES - 10), "stop": "\0"},
}


QUICK = ["token ids", "wrong values"]
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in LARGEST if name not in QUICK]


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_the_largest_bodies_that_are_read_hold_up_nobody(running: Running, name: str) -> None:
    body = {"model": NAME, "prompt": "a", "max_tokens": 1, **LARGEST[name]}
    raw = json.dumps(body).replace("\\u0000", "\0").encode()  # of which strict JSON has none
    hold_up_nobody(running, "/v1/completions", raw)


def test_a_long_conversation_holds_up_nobody(running: Running) -> None:
    """As items of /v1/responses, which are read twice; and as many at once as come."""
    items = [{"role": "user", "content": "a"}] * (MAX_NESTED - 10)
    hold_up_nobody(running, "/v1/responses", json.dumps({"input": items}).encode())


def hold_up_nobody(running: Running, path: str, raw: bytes) -> None:
    """Four that come at once are read one after the other, beside the event loop."""
    headers = {"content-type": "application/json"}
    longest = []
    for _ in range(3):  # the machine's other work makes one of them longer
        with ThreadPoolExecutor(4) as pool, stretches_of_loops() as stretches:
            sent = [
                pool.submit(post, running, path, content=raw, headers=headers) for _ in range(4)
            ]
            assert {each.result().status_code for each in sent} <= {200, 400}
        longest.append(max(stretches))
    assert min(longest) < STRETCH, longest


@pytest.mark.parametrize("chat", [True, False])
def test_log_probabilities_of_long_answers_hold_up_nobody(load: Any, chat: bool) -> None:
    """Half a second for these ten megabytes."""
    body = {"model": NAME, "n": 8, "max_tokens": 1000, "ignore_eos": True, "seed": 1}
    chat_body = {
        "messages": [{"role": "user", "content": "a"}],
        "logprobs": True,
        "top_logprobs": 20,
    }
    path = "/v1/chat/completions" if chat else "/v1/completions"
    more = chat_body if chat else {"prompt": "a", "logprobs": 20}
    with (
        serving(lambda: load(max_num_seqs=8, speculative_config=False)) as running,
        stretches_of_loops() as stretches,
    ):
        answer = post(running, path, json={**body, **more}).json()
    assert len(answer["choices"]) == 8
    assert answer["usage"]["completion_tokens"] == 8 * 1000
    assert max(stretches) < 4 * STRETCH  # ten megabytes are sent


@pytest.mark.parametrize(
    "text", ["{[" * 300_000, '",[:' * 200_000, "\\" * 300_001, '\\"],' * 99_999]
)
def test_texts_may_hold_what_separates_values(text: str) -> None:
    check_count(json.dumps({"prompt": text, "max_tokens": 1}).encode())
    hidden = json.dumps({"prompt": text, "other": [{}] * (MAX_NESTED + 1)})
    for encoding in ("utf-8", "utf-16"):
        with pytest.raises(ApiError):
            check_count(hidden.encode(encoding))


def test_a_full_queue_has_room_for_who_holds_little(load: Any) -> None:
    def make() -> LLM:
        return slow(load(max_num_seqs=2, speculative_config=False), 0.002)

    with serving(make, max_queue=2) as running, ThreadPoolExecutor() as pool:
        many = [pool.submit(post, running, "/v1/completions", json=LONG) for _ in range(4)]
        assert wait_for(lambda: running.worker.active == 4)
        assert post(running, "/v1/completions", json=LONG).status_code == 429
        with client(running) as other:
            short = {**LONG, "max_tokens": 2}
            assert other.post("/v1/completions", json=short).status_code == 200
            assert not any(each.done() for each in many)  # it got a slot before they ended
            found = httpx.get(f"{running.url}/metrics").text
        for name, value in (
            ("num_clients", 1),
            ("max_num_requests", 4),
            ("max_num_requests_per_client", 4),
        ):
            assert f'smart:{name}{{model_name="{NAME}"}} {value}.0' in found
        assert [each.result().status_code for each in many] == [200] * 4
        texts = {each.result().json()["choices"][0]["text"] for each in many}
        assert len(texts) == 1  # whoever gave up his slot for a while, too
        assert running.idle()


def test_clients_are_told_apart_by_their_keys(load: Any) -> None:
    with serving(lambda: slow(load(), 0.005), api_keys=("one", "two")) as running:
        with ThreadPoolExecutor() as pool:
            sent = [
                pool.submit(
                    post,
                    running,
                    "/v1/completions",
                    json=LONG,
                    headers={"authorization": f"Bearer {key}"},
                )
                for key in ("one", "two", "two")
            ]
            assert wait_for(lambda: running.worker.clients == {"key 0": 1, "key 1": 2})
        assert all(each.result().status_code == 200 for each in sent)
        assert running.worker.clients == {}


def test_clients_take_turns_with_one_piece_at_a_time() -> None:
    """However many pieces each of them has."""
    done: list[str] = []
    at_once: list[int] = [0]

    def work(name: str) -> None:
        at_once[0] += 1
        assert at_once == [1]
        time.sleep(0.005)
        at_once[0] -= 1
        done.append(name)

    async def all_of_them() -> None:
        turns = Turns()

        def piece(name: str) -> asyncio.Task[None]:
            return asyncio.create_task(turns.run(name, lambda: work(name)))

        many = [piece("many") for _ in range(5)]
        await asyncio.sleep(0)
        few = piece("few")
        some = [piece("some") for _ in range(3)]
        await asyncio.sleep(0)
        many[-1].cancel()
        await asyncio.gather(*many[:-1], few, *some)

    asyncio.run(all_of_them())
    assert done == ["many", "few", "some", "many", "some", "many", "some", "many"]


def test_work_that_nobody_waits_for_keeps_its_turn_to_its_end() -> None:
    free = threading.Event()
    done: list[str] = []

    def work(name: str) -> None:
        free.wait(5)
        done.append(name)

    async def both() -> None:
        turns = Turns()
        gone = asyncio.create_task(turns.run("a", lambda: work("gone")))
        await asyncio.sleep(0.01)
        stays = asyncio.create_task(turns.run("b", lambda: done.append("stays")))
        gone.cancel()
        await asyncio.sleep(0.05)
        assert done == []
        free.set()
        await stays

    asyncio.run(both())
    assert done == ["gone", "stays"]


def test_the_texts_of_one_client_that_wait_have_an_end(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(middleware, "LARGEST", 1)  # 4 MiB
    assert post(running, "/tokenize", json={"prompt": "0" * 20_000}).status_code == 400
    child = running.worker.preparation.process.child
    assert child is not None
    os.killpg(child.pid, signal.SIGSTOP)
    with ThreadPoolExecutor() as pool, client(running) as other:
        first = pool.submit(post, running, "/tokenize", json={"prompt": "1" * 3_000_000})
        assert wait_for(lambda: bool(running.server.server_state.tasks))
        time.sleep(0.5)  # it is read, and waits to be tokenised
        refused = post(running, "/tokenize", json={"prompt": "2" * 3_000_000})
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        with pytest.raises(httpx.ReadTimeout):  # it waits, and hangs up
            other.post("/tokenize", json={"prompt": "3" * 3_000_000}, timeout=1)
        os.killpg(child.pid, signal.SIGCONT)
        assert first.result().json()["error"]["code"] == "context_length_exceeded"
    assert running.quiet()


@pytest.mark.parametrize(
    ("address", "network"),
    [
        ("127.0.0.2", "127.0.0.2"),
        ("::ffff:10.0.0.7", "10.0.0.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("unix", "unix"),
    ],
)
def test_an_address_stands_for_its_network(address: str, network: str) -> None:
    assert network_of(address) == network
