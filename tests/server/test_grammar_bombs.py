"""Schemas and grammars that would stop the server, or kill it: each ends in one clear answer, and
the others go on."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from serving import (
    NAME,
    OUTGROWING,
    Running,
    client,
    longest_gap,
    post,
    serving,
    stretches_of_loops,
    wait_for,
)

from smart_decoding.engine.engine_thread import Isolation
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.models.text import grammars
from smart_decoding.models.text.grammars import GrammarConstraint
from smart_decoding.server import preparation
from smart_decoding.server.preparation import Preparation

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

pytest.importorskip("llguidance")
from llguidance import gbnf_to_lark

BODY = {"model": NAME, "prompt": "abc", "max_tokens": 40, "temperature": 0, "ignore_eos": True}


def structured(structure: dict[str, Any]) -> dict[str, Any]:
    body = {"model": NAME, "prompt": "a", "max_tokens": 60, "temperature": 0}
    return {**body, "structured_outputs": structure}


def post_structure(running: Running, structure: dict[str, Any]) -> Any:
    return post(running, "/v1/completions", json=structured(structure))


def hanging(running: Running, body: dict[str, Any]) -> HTTPConnection:
    """A request that is sent; nobody has read the answer."""
    connection = HTTPConnection(running.url.removeprefix("http://"), timeout=20)
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def trying(running: Running) -> bool:
    """Whether a long task is being done."""
    return running.worker.preparation._long._line.locked()


def for_long_tasks(running: Running) -> set[int]:
    """The children that stand back."""
    child = running.worker.preparation.process.child
    assert child is not None
    found = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    return {int(each) for each in found if os.getpriority(os.PRIO_PROCESS, int(each)) > 5}


def optional(count: int, name: str = "property", **more: Any) -> dict[str, Any]:
    """A schema whose time to compile is quadratic in the count of its properties."""
    properties = {f"{name}_{i:06d}": {"type": "string", **more} for i in range(count)}
    return {"json": {"type": "object", "properties": properties}}


def references(count: int) -> dict[str, Any]:
    """Each is resolved within the one before: llguidance's stack overflows."""
    defs: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}}
        for i in range(count)
    }
    return {"json": {"$defs": {**defs, f"d{count}": {"type": "string"}}, "$ref": "#/$defs/d0"}}


def rules(count: int) -> dict[str, Any]:
    lines = [f'r{i}: r{i + 1} r{i + 1} | "a{i}"' for i in range(count)]
    return {"grammar": "\n".join(["start: r0", *lines, f'r{count}: "x"'])}


def nested(depth: int) -> dict[str, Any]:
    return {"json": '{"type":"array","items":' * depth + "{}" + "}" * depth}


def one(name: str) -> dict[str, Any]:
    return {"properties": {name: {"type": "integer"}}}


BOMBS = {
    "1.3 MB of schema": (optional(9000, description="d" * 100), "at most 262144"),
    "300,000 choices": ({"choice": [f"{i}" for i in range(300_000)]}, "more than|at most"),
    "a million letters": ({"regex": "a" * 1_000_000}, "at most 262144"),
    "quadratic": (optional(6000), "takes more than|items"),
    "references 2000 deep": (references(2000), "takes more than"),
    "rules 5000 deep": (rules(5000), "takes more than"),
    "arrays 900 deep": (nested(900), "recursion"),
    "arrays 100,000 deep": (nested(100_000), "deep|recursion|schema"),
    "groups 10,000 deep": ({"regex": "(" * 10_000 + "a" + ")*" * 10_000}, "regex"),
    "a product of 2 ** 20": (
        {"json": {"allOf": [{"anyOf": [one(f"a{i}"), one(f"b{i}")]} for i in range(20)]}},
        "too large|takes more than",
    ),
    "terminals doubled 400 times": (
        {"grammar": "start: T0\n" + "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(400))},
        "takes more than|too big|T400",
    ),
    "64,000 blank lines": ({"grammar": 'root ::= "a' + "\n" * 64_000}, "GBNF"),
    "a long GBNF": ({"grammar": "root ::= " + '"a" ' * 60_000}, "takes more than"),
    "on the way": ({"grammar": OUTGROWING}, "items"),
}


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SECONDS", 0.3)


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_a_400_and_the_server_goes_on(running: Running, hasty: None, name: str) -> None:
    structure, words = BOMBS[name]
    response = post_structure(running, structure)
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert any(word in error["message"] for word in words.split("|")), error
    assert "\n" not in error["message"]
    assert len(error["message"]) < 500
    assert post(running, "/v1/completions", json=BODY).status_code == 200
    assert running.idle()


@pytest.mark.parametrize(
    "regex", ["(a{1,1000}){1,1000}", "(.*a.{200})", "((.*a.{20})|(.*b.{30})){3,40}", "(x+x+)+y"]
)
def test_bombs_that_llguidance_defuses(running: Running, regex: str) -> None:
    assert post_structure(running, {"regex": regex}).status_code == 200
    assert running.idle()


def test_six_bombs_beside_a_client(
    running: Running, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answers are those alone, and neither they nor its own grammars wait for the bombs."""

    def answered(number: int) -> float:
        started = time.monotonic()
        answer = post(running, "/v1/completions", json=BODY).json()
        assert answer["choices"][0]["text"] == expected
        assert post_structure(running, {"regex": f"own {number}"}).status_code == 200
        return time.monotonic() - started

    monkeypatch.setattr(preparation, "SECONDS", 60.0)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected = plain.generate("abc", params)[0].outputs[0].text
    alone = max(answered(number) for number in range(3))
    bombs = [hanging(running, structured(optional(6000, f"bomb_{i}"))) for i in range(3)]
    assert wait_for(lambda: trying(running))
    with ThreadPoolExecutor(3) as pool, stretches_of_loops() as stretches:
        large = [
            pool.submit(post_structure, running, optional(9000, f"{i}" * 100)) for i in range(3)
        ]
        beside = [answered(number) for number in range(3, 6)]
        assert [bomb.result().status_code for bomb in large] == [400] * 3
    assert max(stretches) < 0.1
    assert max(beside) < 2 + 8 * alone
    assert running.server.server_state.tasks  # the bombs still wait
    for bomb in bombs:
        bomb.close()
    assert running.quiet()
    assert post_structure(running, optional(80, "next")).status_code == 200
    assert running.idle()


def test_a_trial_ends_when_its_client_hangs_up(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It went on for its two seconds, and the next long ones waited."""
    monkeypatch.setattr(preparation, "SECONDS", 60.0)
    bomb = hanging(running, structured(optional(6000, "gone")))
    assert wait_for(lambda: trying(running))
    time.sleep(0.7)  # it is being tried
    child = for_long_tasks(running)
    assert child
    bomb.close()
    assert wait_for(lambda: for_long_tasks(running).isdisjoint(child))
    assert post_structure(running, optional(300, "after")).status_code == 200


def test_equal_grammars_are_tried_once(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []
    process = running.worker.preparation.process
    answer = process.answer

    async def counted(task: bytes, *limits: Any) -> Any:
        if b'"task": "grammar"' in task:
            tried.append(task)
        return await answer(task, *limits)

    monkeypatch.setattr(process, "answer", counted)
    monkeypatch.setattr(preparation, "SHORT_SECONDS", 60.0)
    equal = structured(optional(300, "equal"))
    with ThreadPoolExecutor(20) as pool:
        answers = [pool.submit(post, running, "/v1/completions", json=equal) for _ in range(20)]
        assert [each.result().status_code for each in answers] == [200] * 20
    assert len(tried) == 1


def doubled(name: str) -> dict[str, Any]:
    """459 bytes that take minutes."""
    terminals = "".join(f"T{i}: T{i + 1} T{i + 1}\n" for i in range(26))
    return {"grammar": f"start: T0\n{terminals}T26: {json.dumps(name)}\n"}


def test_forty_small_bombs_beside_a_client(running: Running) -> None:
    """Forty bombs in the line of short tasks: who asked for a schema waited for 7 s."""
    longest = []
    for number in range(3):  # the machine's other work makes one of them longer
        bombs = [hanging(running, structured(doubled(f"{number} {i}"))) for i in range(40)]
        seconds = 0.0
        with client(running) as other:
            for i in range(4):
                schema = structured(optional(100, f"beside_{number}_{i}"))
                schema["max_tokens"] = 1
                started = time.monotonic()
                assert other.post("/v1/completions", json=schema).status_code == 200
                seconds = max(seconds, time.monotonic() - started)
        for bomb in bombs:
            bomb.close()
        assert running.quiet(30)
        longest.append(seconds)
        if seconds < 1.0:
            break
    assert min(longest) < 1.0, longest


def test_all_bombs_beside_a_stream(running: Running) -> None:
    """Whoever asks for no grammar does not wait for those of others: some take a sixth of the time
    of all, on a busy machine, too."""
    done = threading.Event()
    with ThreadPoolExecutor(1) as pool, stretches_of_loops() as stretches:
        gap = pool.submit(longest_gap, running, done)
        started = time.monotonic()
        for structure, _ in BOMBS.values():
            assert post_structure(running, structure).status_code == 400
        seconds = time.monotonic() - started
        done.set()
        assert gap.result() < seconds / 20
    assert max(stretches) < 0.1


def test_a_failing_grammar_ends_its_own_stream(
    load: Any, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a round with others, which is not run again."""
    monkeypatch.setattr(Isolation, "after_failed_round", None)
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    expected = plain.generate("abc", params)[0].outputs[0].text
    with serving(load) as running, ThreadPoolExecutor() as pool:
        body = {**BODY, "max_tokens": 200}
        others = [pool.submit(post, running, "/v1/completions", json=body) for _ in range(2)]
        bad = {"model": NAME, "prompt": "a", "max_tokens": 90, "temperature": 0, "stream": True}
        structure = {"structured_outputs": {"grammar": OUTGROWING}}
        stream = post(running, "/v1/completions", json={**bad, **structure})
        *texts, last = [json.loads(line[6:]) for line in stream.text.splitlines() if line]
        # what came before the error, to the last token
        text = "".join(each["choices"][0]["text"] for each in texts)
        form = StructuredOutputsParams(**structure["structured_outputs"])
        constraint = plain.grammars(form)
        for letter in text:
            assert constraint.error is None
            constraint.append(plain.tokenizer.encode(letter))
        assert constraint.error is not None
        assert "items" in last["error"]["message"]
        assert last["error"]["code"] == "invalid_value"
        for other in others:
            assert other.result().json()["choices"][0]["text"] == expected
        assert running.idle()


def test_nobody_waits_for_a_mask_that_takes_for_ever(
    load: Any, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other clients are answered, who hangs up gives its slot back, and then the answer is the
    same. A client's own further requests may stand behind one that waits for its first mask."""
    free = threading.Event()
    mask = GrammarConstraint._mask

    def held_up(constraint: GrammarConstraint, path: Any) -> Any:
        if threading.current_thread().name.startswith("smart-masks"):
            free.wait(60)
        return mask(constraint, path)

    monkeypatch.setattr(grammars, "EXPENSIVE", -1.0)
    regex = {"regex": "[a-z ]{20}"}
    form = StructuredOutputsParams(**regex)
    params = SamplingParams(temperature=0, max_tokens=60, structured_outputs=form)
    expected = [plain.generate("a", params)[0].outputs[0].text]
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    expected.append(plain.generate("abc", params)[0].outputs[0].text)
    monkeypatch.setattr(GrammarConstraint, "_mask", held_up)
    other = httpx.Client(transport=httpx.HTTPTransport(local_address="127.0.0.2"), timeout=20)
    with serving(load) as running, ThreadPoolExecutor() as pool, other:
        first = pool.submit(post_structure, running, regex)
        gone = hanging(running, structured(regex))
        assert wait_for(lambda: running.worker.active == 2)
        answers = [other.post(f"{running.url}/v1/completions", json=BODY) for _ in range(3)]
        gone.close()
        assert wait_for(lambda: running.worker.active == 1)
        early = first.done()
        free.set()
        assert not early
        answers.insert(0, first.result())
        texts = [answer.json()["choices"][0]["text"] for answer in answers]
        assert texts == [expected[0], *expected[1:] * 3]
        assert running.idle()


def test_the_end_waits_for_no_grammar(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor() as pool, serving(load, shutdown_timeout=30) as running:
        monkeypatch.setattr(preparation, "SECONDS", 60.0)
        bombs = [pool.submit(post_structure, running, optional(6000, f"end_{i}")) for i in range(2)]
        assert wait_for(lambda: trying(running))
        left = for_long_tasks(running)
        time.sleep(0.5)
        started = time.monotonic()
        running.server.should_exit = True
        running.thread.join(20)
        assert time.monotonic() - started < 5
        for bomb in bombs:
            assert bomb.result().status_code == 503
            assert bomb.result().json()["error"]["code"] == "shutting_down"
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in left)


def test_nothing_a_client_sends_is_read_here_before_its_child_has(
    monkeypatch: pytest.MonkeyPatch, plain: LLM
) -> None:
    """The converter of GBNF is a parser in Python, which holds up all threads of its process."""
    monkeypatch.setattr(gbnf_to_lark, "gbnf_to_lark", None)
    form = StructuredOutputsParams(grammar='root ::= "abc"' + "\n" * 64_000)
    prepared = Preparation()
    prepared.know(plain)
    prepared._known.set()
    started = time.monotonic()

    async def compiled() -> None:
        try:
            await prepared.compiled(plain.grammars, form, "client")
        finally:
            prepared.stop()

    asyncio.run(compiled())
    assert time.monotonic() - started < 5
    assert plain.grammars(form).accepts(plain.tokenizer.encode("ab"))


def test_a_choice_may_hold_any_character(running: Running) -> None:
    """U+007F was refused."""
    choices = ['a\x7f"\\', "\x01\x80\u2028\U0001f600"]
    found = post_structure(running, {"choice": choices})
    assert found.status_code == 200, found.text
    assert found.json()["choices"][0]["text"] in choices
