"""Bad input, limits, keys, disconnects, failures and the end: one clear answer each, and the others
go on."""

from __future__ import annotations

import asyncio
import hmac
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from serving import NAME, Running, post, serving, slow, wait_for

from smart_decoding.async_llm import AsyncJob, AsyncLLM
from smart_decoding.engine.jobs import Ask
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError, ModelError
from smart_decoding.server import live, worker
from smart_decoding.server.errors import ApiError
from smart_decoding.server.launch import make_server
from smart_decoding.server.schemas import ChatRequest, CompletionRequest
from smart_decoding.server.settings import ServerSettings

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

JSON = {"content-type": "application/json"}
LONG = {"model": NAME, "prompt": "a", "max_tokens": 900, "ignore_eos": True, "temperature": 0}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"].count("\n") == 0
    assert response.headers["x-request-id"]
    assert status not in (429, 503) or int(response.headers["retry-after"]) >= 1
    return error


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model": "tiny", "prompt": "\xff\xfe"}', b"[]", b"null", b'"x"', b"[" * 100_000],
)
def test_malformed_bodies(running: Running, content: bytes) -> None:
    error_of(post(running, "/v1/completions", content=content, headers=JSON), 400)


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": []},
        {"prompt": [999]},
        {"prompt": [-1]},
        {"prompt": ""},
        {"prompt": None},
        {"prompt": "\ud800"},
        {"temperature": 3.0},
        {"temperature": "0"},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"n": 0},
        {"n": 99},
        {"max_tokens": 0},
        {"max_tokens": 10**30},
        {"seed": 2**70},
        {"logit_bias": {"x": 1}},
        {"logprobs": 21},
        {"logit_bias": {"999": 1.0}},
        {"stop": ["a"] * 65},
        {"user": "\ud800"},
        {"stop": [""]},
        {"echo": True},
        {"suffix": "x"},  # the model has no tokens for it
        {"repetition_penalty": 1e-300},
        {"best_of": 2},
        {"stream_options": {"include_usage": True}},
        {"top_k": -2},
        {"n": 2, "temperature": 0},
    ],
)
def test_values_that_cannot_be_honoured(running: Running, change: dict[str, Any]) -> None:
    body = json.dumps({"model": NAME, "prompt": "a", "max_tokens": 1, **change}).encode()
    error_of(post(running, "/v1/completions", content=body, headers=JSON), 400)
    assert running.idle()


def test_errors_name_what_is_wrong(running: Running) -> None:
    long = error_of(
        post(running, "/v1/completions", json={"model": NAME, "prompt": "a" * 2000}), 400
    )
    assert long["code"] == "context_length_exceeded"
    assert long["param"] == "prompt"
    missing = error_of(
        post(running, "/v1/completions", json={"model": "other", "prompt": "a"}), 404
    )
    assert missing["code"] == "model_not_found"
    assert missing["param"] == "model"
    assert missing["type"] == "invalid_request_error"
    unknown = error_of(
        post(running, "/v1/completions", json={"model": NAME, "prompt": "a", "best_of": 2}), 400
    )
    assert unknown["param"] == "best_of"
    assert unknown["code"] == "unsupported_parameter"
    options = {"model": NAME, "prompt": "a", "stream_options": {}}
    reported = error_of(post(running, "/v1/completions", json=options), 400)["message"]
    assert reported == "the body: stream_options is only allowed with stream=true"
    nowhere = error_of(post(running, "/v1/nothing"), 404)
    assert nowhere["type"] == "invalid_request_error"
    assert "/openapi.json lists them" in nowhere["message"]
    wrong_method = httpx.get(f"{running.url}/v1/completions")
    error_of(wrong_method, 405)
    assert wrong_method.headers["allow"] == "POST"
    for headers in ({"content-type": "text/plain"}, {}):
        form = {"content": b'{"model": "tiny", "prompt": "a"}', "headers": headers}
        reported = error_of(post(running, "/v1/completions", **form), 415)["message"]
        assert reported == "the body is not said to be JSON: send Content-Type: application/json"


@pytest.mark.parametrize(
    ("prompt", "limit", "param"),
    [
        ("a", {"max_tokens": 1024}, "max_tokens"),
        ("a", {"max_completion_tokens": 1024}, "max_completion_tokens"),
        ("a", {"max_completion_tokens": 0}, "max_completion_tokens"),
        ("a", {"max_tokens": 0}, "max_tokens"),
        ("a" * 2000, {}, ""),
        ("a" * 2000, {"max_tokens": 1}, ""),
    ],
)
def test_errors_name_a_field_that_was_sent(
    running: Running, prompt: str, limit: dict[str, int], param: str
) -> None:
    bodies = {"/v1/chat/completions": {"messages": [{"role": "user", "content": prompt}]}}
    if "max_completion_tokens" not in limit:
        bodies["/v1/completions"] = {"prompt": prompt}  # type: ignore[dict-item]
    for path, body in bodies.items():
        error = error_of(post(running, path, json={"model": NAME, **body, **limit}), 400)
        assert error["param"] == (param or next(iter(body)))


def test_bodies_too_big(load: Any) -> None:
    with serving(load, max_body=1000, body_timeout=0.3) as running:
        error_of(post(running, "/v1/completions", content=b"x" * 1001, headers=JSON), 413)
        error_of(
            post(running, "/v1/completions", content=iter([b"x" * 600] * 2), headers=JSON), 413
        )

        def drip() -> Any:
            for _ in range(20):
                yield b" "
                time.sleep(0.05)

        error_of(post(running, "/v1/completions", content=drip(), headers=JSON), 408)
        assert (
            post(running, "/v1/completions", json={"model": NAME, "prompt": "a"}).status_code == 200
        )


def test_tokenize_and_back(running: Running, plain: LLM) -> None:
    found = post(running, "/tokenize", json={"prompt": "Grüße"}).json()
    assert found == {"count": 7, "max_model_len": 1024, "tokens": plain.tokenizer.encode("Grüße")}
    assert post(running, "/detokenize", json={"tokens": found["tokens"]}).json() == {
        "prompt": "Grüße"
    }
    chat = [{"role": "user", "content": "hi"}]
    assert post(running, "/tokenize", json={"messages": chat}).json()[
        "tokens"
    ] == plain.tokenizer.encode_chat(chat)
    error_of(post(running, "/detokenize", json={"tokens": [258]}), 400)
    error_of(post(running, "/tokenize", json={}), 400)


def test_health_version_and_document(running: Running) -> None:
    for path in ("/health", "/health/live", "/version"):
        assert httpx.get(running.url + path).status_code == 200
    paths = httpx.get(f"{running.url}/openapi.json").json()["paths"]
    assert {
        "/v1/models",
        "/v1/completions",
        "/v1/chat/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
    } <= set(paths)


def test_keys(load: Any) -> None:
    with serving(load, api_keys=("first", "second")) as running:
        url = f"{running.url}/v1/models"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "first"}):
            error = error_of(httpx.get(url, headers=headers), 401)
            assert error["code"] == "invalid_api_key"
            assert error["type"] == "invalid_request_error"
        for key in ("first", "second"):
            assert httpx.get(url, headers={"authorization": f"Bearer {key}"}).status_code == 200
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert post(running, "/tokenize", json={"prompt": "a"}).status_code == 401
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0).models.list()


def test_keys_are_compared_in_constant_time(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """compare_digest alone decides, and sees every key, whichever fits; of text it would raise
    beyond ASCII."""
    with serving(load, api_keys=("first", "second")) as running:
        url = f"{running.url}/v1/models"
        right = {"authorization": "Bearer first"}
        for strange in (
            "Bearer schlüssel".encode(),
            b"Bearer first\xff",
            b"Bearer \xf0\x9f\x94\x91",
        ):
            error_of(httpx.get(url, headers={b"authorization": strange}), 401)
        for verdict, status in ((False, 401), (True, 200)):
            compared: list[tuple[bytes, bytes]] = []

            def compare(
                given: bytes, key: bytes, verdict: bool = verdict, compared: Any = compared
            ) -> bool:
                compared.append((given, key))
                return verdict

            monkeypatch.setattr(hmac, "compare_digest", compare)
            assert httpx.get(url, headers=right).status_code == status
            assert compared == [(b"first", b"first"), (b"first", b"second")]


def test_who_needs_a_key() -> None:
    with pytest.raises(ConfigError, match="--api-key"):
        ServerSettings(NAME, host="0.0.0.0")
    for host in ("127.0.0.1", "localhost", "::1"):
        ServerSettings(NAME, host=host)
    ServerSettings(NAME, host="0.0.0.0", api_keys=("k",))
    ServerSettings(NAME, host="0.0.0.0", no_api_key=True)


def test_a_web_page_cannot_reach_an_open_server_by_another_name(running: Running) -> None:
    error_of(httpx.get(f"{running.url}/v1/models", headers={"host": "evil.example"}), 403)
    assert httpx.get(f"{running.url}/v1/models", headers={"host": "localhost:1"}).status_code == 200


def test_a_page_from_elsewhere_may_read_nothing(running: Running) -> None:
    """No CORS headers: on a preflight, an answer or an error."""
    url = f"{running.url}/v1/completions"
    origin = {"origin": "https://elsewhere.example"}
    asking = {
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    answers = [
        httpx.options(url, headers={**origin, **asking}),
        httpx.post(url, json={**LONG, "max_tokens": 1}, headers=origin),
        httpx.post(url, content=b"{", headers={**JSON, **origin}),
        httpx.get(f"{running.url}/health", headers=origin),
    ]
    assert [answer.status_code for answer in answers] == [405, 200, 400, 200]
    assert [
        name for answer in answers for name in answer.headers if name.startswith("access-control")
    ] == []


def test_a_client_that_leaves_frees_its_slot(load: Any) -> None:
    with serving(lambda: slow(load(), 0.01)) as running:
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)
        body = {k: v for k, v in LONG.items() if k != "ignore_eos"}
        stream = client.completions.create(**body, stream=True, extra_body={"ignore_eos": True})
        next(iter(stream))
        assert running.worker.active == 1
        stream.close()
        assert running.idle(1.0)  # the answer would take seconds
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{running.url}/v1/completions", json=LONG, timeout=0.3)
        assert running.idle(1.0)


def in_its_first_round(running: Running, act: Any) -> None:
    """Has the engine's thread call `act` with what tells the engine of arrivals."""
    step = running.llm.engine.step
    done = []

    def watched(arrived: Any) -> Any:
        if not done:
            done.append(act(arrived))
        return step()

    running.llm.engine.step = watched  # type: ignore[method-assign]


def job_of(running: Running, name: str) -> AsyncJob:
    return AsyncJob(name, running.llm.engine, [Ask([1], SamplingParams(max_tokens=2))])


def in_its_loop(running: Running, *calls: Any) -> None:
    """Makes the server's event loop call these, and waits for it."""

    async def called() -> None:
        for call, job in calls:
            call(job)

    asyncio.run_coroutine_threadsafe(called(), running.server.servers[0].get_loop()).result(5)


def test_only_who_waits_stops_the_drafting(load: Any) -> None:
    """Neither who leaves, nor who came and has left again."""
    with serving(load) as running:
        gone, stays = (job_of(running, name) for name in ("gone", "stays"))
        heard: list[bool] = []

        def act(arrived: Any) -> None:
            worker = running.worker
            in_its_loop(running, (worker.submit, gone), (worker.cancel, gone))
            heard.append(bool(arrived()))
            in_its_loop(running, (worker.submit, stays))
            heard.extend((bool(arrived()), bool(arrived())))

        in_its_first_round(running, act)
        assert post(running, "/v1/completions", json={**LONG, "max_tokens": 9}).status_code == 200
        assert heard == [False, True, True]
        assert running.idle()
        assert stays.box.get_nowait().content.tokens  # type: ignore[union-attr]
        assert gone.box.get_nowait().content is None


def test_who_arrives_in_the_last_round_is_told(load: Any) -> None:
    with serving(load) as running:
        late = job_of(running, "late")

        def act(arrived: Any) -> None:
            in_its_loop(running, (running.worker.submit, late))
            running.worker.inbox.stopping = bool(arrived())

        in_its_first_round(running, act)
        error_of(post(running, "/v1/completions", json=LONG), 503)
        assert wait_for(lambda: running.worker.active == 0)
        with pytest.raises(ApiError, match="shutting down"):
            asyncio.run(running.worker.chunk(late))


@pytest.mark.parametrize("stream", [True, False])
def test_the_slot_is_free_within_a_round(load: Any, stream: bool) -> None:
    """Its client leaves in the middle of the third round; the fourth is of the request that waited
    for the slot."""
    with serving(lambda: load(max_num_seqs=1)) as running, ThreadPoolExecutor() as pool:
        step = running.llm.engine.step
        rounds = []
        middle = threading.Event()
        go = threading.Event()

        def watched(arrived: Any) -> Any:
            touched = step(arrived)
            rounds.append([request.params.max_tokens for request in touched])
            if len(rounds) == 3:
                middle.set()
                assert go.wait(10)
            return touched

        running.llm.engine.step = watched  # type: ignore[method-assign]
        client = HTTPConnection(running.url.removeprefix("http://"))
        client.request("POST", "/v1/completions", json.dumps({**LONG, "stream": stream}), JSON)
        assert middle.wait(10)
        other = pool.submit(post, running, "/v1/completions", json={**LONG, "max_tokens": 30})
        assert wait_for(lambda: running.worker.active == 2)
        client.close()
        assert wait_for(lambda: len(running.server.server_state.connections) == 1)
        httpx.get(f"{running.url}/health")  # by its answer the event loop has been round
        go.set()
        assert other.result().status_code == 200
        assert running.idle()
        assert rounds[:3] == [[900]] * 3
        assert len(rounds) > 3
        assert [each for each in rounds[3:] if each != [30]] == []


def test_a_full_queue_and_a_long_wait_are_refused(load: Any) -> None:
    with (
        serving(
            lambda: slow(load(max_num_seqs=1, speculative_config=False), 0.005),
            max_queue=1,
            queue_timeout=0.3,
        ) as running,
        ThreadPoolExecutor() as pool,
    ):
        first = pool.submit(post, running, "/v1/completions", json={**LONG, "max_tokens": 300})
        assert wait_for(lambda: running.worker.active == 1)
        second = pool.submit(post, running, "/v1/completions", json=LONG)
        assert wait_for(lambda: running.worker.active == 2)
        third = post(running, "/v1/completions", json=LONG)
        assert error_of(third, 429)["code"] == "queue_full"
        assert error_of(second.result(), 503)["code"] == "queue_timeout"
        assert first.result().status_code == 200
        assert running.idle()
        too_many = post(running, "/v1/completions", json={**LONG, "prompt": ["a"] * 3})
        error_of(too_many, 400)


def poisoned(llm: LLM, error: Exception) -> LLM:
    """Token 7 makes its forward raise, whoever else is in the batch."""
    forward = llm.target.forward

    def raising(rows: Any, aux_layers: Any) -> Any:
        if (rows.token == 7).any():
            raise error
        return forward(rows, aux_layers)

    llm.target.forward = raising  # type: ignore[method-assign]
    return llm


def test_a_request_that_breaks_the_model_does_not_break_the_others(
    load: Any, plain: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    """Its token makes the forward raise, whoever is in the batch; the log says why."""

    params = {"temperature": 0, "max_tokens": 60, "logit_bias": {"7": -100}}
    poison = RuntimeError("poison")
    with (
        serving(
            lambda: poisoned(slow(load(enable_prefix_caching=False), 0.002), poison)
        ) as running,
        ThreadPoolExecutor() as pool,
    ):
        jobs = [
            pool.submit(
                post, running, "/v1/completions", json={"model": NAME, "prompt": p, **params}
            )
            for p in ("ab", "cd")
        ]
        assert wait_for(lambda: running.worker.active == 2)
        bad = post(
            running,
            "/v1/completions",
            json={"model": NAME, "prompt": [1, 7, 2], "max_tokens": 5},
            headers={"x-request-id": "the-bad-one"},
        )
        message = error_of(bad, 500)["message"]
        assert "RuntimeError" in message
        assert "poison" not in message  # it may quote another client's request
        (entry,) = [r for r in caplog.records if r.message == "request failed"]
        assert entry.request_id == "the-bad-one"
        assert "poison" in str(entry.exc_info[1])
        llm_params = SamplingParams(temperature=0, max_tokens=60, logit_bias={7: -100})
        for prompt, job in zip(("ab", "cd"), jobs, strict=True):
            assert (
                job.result().json()["choices"][0]["text"]
                == plain.generate(prompt, llm_params)[0].outputs[0].text
            )
        assert running.idle()
        assert httpx.get(f"{running.url}/health").status_code == 200
        running.llm.engine.check_integrity()


def test_failures_in_a_row_that_are_the_requests_own_do_not_stop_the_engine(load: Any) -> None:
    """Nothing else runs that would show that the model works. What the model does wrong is no bad
    request."""
    wrong = ModelError("logits that are not finite")
    with serving(lambda: poisoned(load(enable_prefix_caching=False), wrong)) as running:
        for _ in range(5):
            bad = post(
                running,
                "/v1/completions",
                json={"model": NAME, "prompt": [1, 7, 2], "max_tokens": 5},
            )
            assert error_of(bad, 500)["code"] == "request_failed"
        good = {"model": NAME, "prompt": "ab", "max_tokens": 2, "logit_bias": {"7": -100}}
        assert post(running, "/v1/completions", json=good).status_code == 200
        assert httpx.get(f"{running.url}/health").status_code == 200


def test_a_long_list_of_nonsense_makes_few_errors() -> None:
    """Each would be told of in a record of its own: gigabytes for a body of a few megabytes."""
    for wrong in (
        {"prompt": [None] * 5000},
        {"prompt": [[-1] * 5000]},
        {"prompt": "a", "stop_token_ids": [-1] * 5000},
    ):
        with pytest.raises(ValidationError) as error:
            CompletionRequest.model_validate({"model": "m", **wrong})
        assert error.value.error_count() < 10


def test_a_broken_engine_is_told(load: Any) -> None:
    with serving(load) as running, ThreadPoolExecutor() as pool:
        running.llm.engine.step = lambda arrived: 1 / 0  # type: ignore[method-assign, assignment, return-value]
        answers = [pool.submit(post, running, "/v1/completions", json=LONG) for _ in range(5)]
        assert {answer.result().status_code for answer in answers} <= {500, 503}
        for _ in range(3):
            post(running, "/v1/completions", json=LONG)
        assert error_of(httpx.get(f"{running.url}/health"), 503)["code"] == "engine_stopped"
        error_of(post(running, "/v1/completions", json=LONG), 503)
        assert running.worker.active == 0


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def load() -> LLM:
        raise ModelError("no such model")

    with serving(load, ready=False) as running:
        running.thread.join(5)
        assert not running.thread.is_alive()
        assert isinstance(running.worker.error, ModelError)


def test_a_context_too_small_to_serve_ends_the_server(load: Any) -> None:
    with serving(lambda: load(max_model_len=2), ready=False) as running:
        running.thread.join(5)
        assert not running.thread.is_alive()
        assert isinstance(running.worker.error, ConfigError)
        assert "max_model_len=2 is not allowed" in str(running.worker.error)
    with serving(lambda: load(max_model_len=3)) as running:
        assert post(running, "/v1/completions", json={**LONG, "max_tokens": 2}).status_code == 200


def test_not_ready_while_loading(load: Any) -> None:
    go = threading.Event()

    def late() -> LLM:
        go.wait(10)
        return load()

    with serving(late, ready=False) as running:
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        assert error_of(post(running, "/v1/completions", json=LONG), 503)["code"] == "not_ready"
        assert httpx.get(f"{running.url}/health").status_code == 503
        go.set()
        assert wait_for(lambda: httpx.get(f"{running.url}/health").status_code == 200)


def test_ready_only_after_the_warm_up(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    reached = threading.Event()
    go = threading.Event()
    warm_up = worker.warm_up

    def held(engine: Any) -> None:
        reached.set()
        assert go.wait(10)
        warm_up(engine)

    monkeypatch.setattr(worker, "warm_up", held)
    with serving(load, ready=False) as running:
        assert reached.wait(10)
        assert httpx.get(f"{running.url}/health/live").status_code == 200
        assert error_of(httpx.get(f"{running.url}/health"), 503)["code"] == "not_ready"
        go.set()
        assert wait_for(lambda: httpx.get(f"{running.url}/health").status_code == 200)


def test_other_refusals_for_now_say_when_to_come_again_too(load: Any) -> None:
    """`error_of` looks at every 429 and 503 of this file."""
    with serving(load) as running:
        running.llm.engine_thread.observers[-1].watchers["x", "y"] = live.MAX_WATCHERS
        assert error_of(httpx.get(f"{running.url}/events"), 503)["code"] == "too_many_watchers"
        running.worker.drain()
        assert error_of(httpx.get(f"{running.url}/health"), 503)["code"] == "shutting_down"
        assert error_of(post(running, "/v1/completions", json=LONG), 503)["code"] == "shutting_down"


def test_a_deadline_below_a_second_is_not_none(load: Any) -> None:
    """uvicorn takes whole seconds, and ends what does not end by itself in time."""
    for requested, seconds in ((0.9, 3), (0, 2), (30.0, 32)):
        server, _ = make_server(load, ServerSettings(NAME, shutdown_timeout=requested))
        assert server.config.timeout_graceful_shutdown == seconds


@pytest.mark.parametrize("deadline", [10, 0])
def test_the_end_drains_up_to_the_deadline(load: Any, deadline: float) -> None:
    body = {**LONG, "max_tokens": 80}
    with ThreadPoolExecutor() as pool:
        with serving(
            lambda: slow(load(speculative_config=False), 0.01), shutdown_timeout=deadline
        ) as running:
            answer = pool.submit(post, running, "/v1/completions", json=body)
            assert wait_for(lambda: bool(running.llm.engine.scheduler.running))
        if deadline > 5:
            assert answer.result().json()["usage"]["completion_tokens"] == 80
        else:
            assert (
                isinstance(answer.exception(), httpx.HTTPError)
                or answer.result().status_code >= 500
            )


def test_two_requests_may_carry_the_same_id(load: Any) -> None:
    with serving(lambda: slow(load(), 0.002)) as running, ThreadPoolExecutor() as pool:
        headers = {"x-request-id": "mine"}
        body = {**LONG, "max_tokens": 40}
        both = [
            pool.submit(post, running, "/v1/completions", json=body, headers=headers)
            for _ in range(2)
        ]
        assert [answer.result().status_code for answer in both] == [200, 200]
        assert all(answer.result().headers["x-request-id"] == "mine" for answer in both)
        assert post(
            running, "/tokenize", json={"prompt": ""}, headers={"x-request-id": "a b"}
        ).headers["x-request-id"] not in ("", "a b")


def test_an_answer_that_cannot_be_written_ends_alone(load: Any, plain: LLM) -> None:
    """Text that raises, and an observer that raises: the other requests do not notice."""
    with serving(lambda: slow(load(), 0.002)) as running, ThreadPoolExecutor() as pool:
        good = pool.submit(post, running, "/v1/completions", json={**LONG, "max_tokens": 80})
        assert wait_for(lambda: running.worker.active == 1)
        decode = running.llm._decoder
        broken = lambda skip: lambda ids: 1 / 0 if not skip else decode(skip)(ids)  # noqa: E731
        running.llm.engine.admission.decode = broken
        running.llm.engine_thread.observers[0].after = lambda engine, touched: 1 / 0  # type: ignore[method-assign]
        bad = post(
            running, "/v1/completions", json={**LONG, "max_tokens": 9, "skip_special_tokens": False}
        )
        error_of(bad, 500)
        (expected,) = plain.generate(
            "a", SamplingParams(temperature=0, max_tokens=80, ignore_eos=True)
        )
        assert good.result().json()["choices"][0]["text"] == expected.outputs[0].text
        assert running.idle()
        assert len(running.llm.engine_thread.observers) == 2
        running.llm.engine.check_integrity()


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted(
    {*ChatRequest.model_fields, *CompletionRequest.model_fields, "tools", "response_format", "echo"}
)


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"]),
    st.dictionaries(st.sampled_from(FIELDS), JSON_VALUES, max_size=3),
    st.booleans(),
)
def test_no_body_makes_the_server_fail(
    running: Running, path: str, change: dict[str, Any], chat: bool
) -> None:
    start = (
        {"messages": [{"role": "user", "content": "a"}]}
        if chat
        else {"prompt": "a", "max_tokens": 2}
    )
    body = json.dumps({"model": NAME, **start, "stop": "e", **change}).encode()
    response = post(running, path, content=body, headers=JSON)
    assert response.status_code in (200, 400, 404), response.text


@pytest.mark.parametrize(
    "name", ["max_model_len", "kv_cache_tokens", "max_num_seqs", "max_num_batched_tokens"]
)
def test_sizes_of_nothing_are_refused(load: Any, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0 is not allowed"):
        load(**{name: 0})


def test_a_negative_seed_is_refused(load: Any) -> None:
    with pytest.raises(ConfigError, match="seed=-1 is not allowed"):
        load(seed=-1)


def test_the_context_is_what_the_memory_holds(load: Any) -> None:
    llm = load(max_model_len=None, kv_cache_tokens=512)
    assert llm.engine.config.max_model_len == llm.target.max_positions == 512
    assert load(max_model_len=None).engine.config.max_model_len == 4096
    assert load(max_model_len=512, kv_cache_tokens=512).engine.config.max_model_len == 512


def test_a_context_beyond_the_memory_is_refused_before_weights_are_loaded(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "smart_decoding.models.checkpoints.weight_files.SafetensorsWeights.__getitem__", None
    )
    with pytest.raises(
        CapacityError, match="max_model_len=1024 exceeds the KV memory of 512 tokens"
    ):
        load(max_model_len=1024, kv_cache_tokens=512)


def test_prompts_may_be_arrays(plain: LLM) -> None:
    ids = [70, 71, 72]
    params = SamplingParams(temperature=0.0, max_tokens=4)
    for prompts in (
        np.array(ids),
        [np.array(ids)],
        np.array([ids]),
        [{"prompt_token_ids": np.array(ids)}],
    ):
        (output,) = plain.generate(prompts, params)  # type: ignore[arg-type]
        assert output.prompt_token_ids == ids
        assert type(output.prompt_token_ids[0]) is int
        assert output.outputs[0].token_ids == plain.generate(ids, params)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    "prompt",
    [
        *(np.array([0.5]), [1, "a"], [[1, 2.5]], [3.5], [None], {"prompt": 7}),
        *(None, 5, iter(["a", "b"])),
    ],
)
def test_what_is_no_prompt_is_refused(plain: LLM, prompt: Any) -> None:
    with pytest.raises(ConfigError, match="a prompt must be a text or token ids"):
        plain.generate(prompt)


@pytest.mark.parametrize("params", [{"max_tokens": 3}, "x", 5, [{"max_tokens": 3}]])
def test_what_are_no_sampling_params_is_refused(plain: LLM, params: Any) -> None:
    async def requested() -> None:
        async for _ in AsyncLLM(plain).generate("hi", params, "r"):
            pass

    for ask in (
        lambda: plain.generate("hi", params),
        lambda: next(plain.stream("hi", params)),
        lambda: asyncio.run(requested()),
    ):
        with pytest.raises(ConfigError, match=r"give SamplingParams, such as"):
            ask()


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        *((wrong, "must be a list of messages") for wrong in ("hello", None, 5, ["hello"], [None])),
        ([{"role": "user"}], "a message of the user needs a content"),
        ([{"role": "system", "content": None}], "a message of the system needs a content"),
    ],
)
def test_what_is_no_conversation_is_refused(plain: LLM, messages: Any, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        plain.chat(messages)


def test_a_conversations_output_holds_its_text(plain: LLM) -> None:
    chat = [{"role": "user", "content": "hi"}]
    (output,) = plain.chat(chat, SamplingParams(temperature=0.0, max_tokens=1))
    assert output.prompt == plain.tokenizer.apply_chat_template(chat)
    assert output.prompt_token_ids == plain.tokenizer.encode_chat(chat)
