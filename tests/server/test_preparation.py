"""What strangers' input makes slow or large happens in processes that may die: each request that
breaks a limit is told so, and the others go on."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import NAME, Running, client, longest_gap, post, serving, wait_for

from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.server import preparation, preparation_process
from smart_decoding.server.errors import ApiError
from smart_decoding.server.launch import JsonLines
from smart_decoding.server.preparation import setup_of, task

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

MEGABYTE = 2**20
HI = [{"role": "user", "content": "hi"}]
HELLO = task("chat", messages=HI, variables={}, pictures=False)
# With variables: Jinja computes what is constant when it compiles a template.
ATTACKS = {
    "replace": "{{ messages[0].content.replace('', messages[0].content * 99) }}",
    "translate": "{{ messages[0].content.translate({97: 'a' * n * 9}) }}",
    "join": "{{ range(n) | join(messages[0].content * 99) }}",
    "tojson": "{{ ([[]] * n) | tojson(indent=n) }}",
    "format": "{{ ('%0' ~ wide ~ 'd') | format(1) }}",
    "width": "{{ ('{:>' ~ wide ~ '}').format(1) }}",
    "list": "{{ dict(a=1, b=2).values() | list * wide }}",
    "loop": "{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}",
}
LIMITS = {"replace": "too long", "loop": "s of a processor"}  # of others it is memory
CHOOSING = (
    "".join(f"{{% if attack == '{name}' %}}{text}{{% endif %}}" for name, text in ATTACKS.items())
    + "{{ messages[0].content[:9] }}"
)


def process_of(setup: dict[str, Any]) -> preparation.Process:
    """A preparation process. setup: may change until it starts."""

    async def known() -> bytes:
        return preparation_process.framed(setup)

    return preparation.Process(known)


def prepared(template: str, setup: dict[str, Any]) -> Any:
    """What comes of a conversation in a process with this template."""

    async def request() -> Any:
        process = process_of({**setup, "template": template})
        try:
            return await process.answer(HELLO, 0.15)
        finally:
            process.stop()

    return asyncio.run(request())


@pytest.fixture(scope="module")
def setup(plain: LLM) -> dict[str, Any]:
    return setup_of(plain)


LOOP = "{% for i in range(99999) %}"
ENDLESS = [
    LOOP * 3 + "{% endfor %}" * 3,
    LOOP.replace(" %}", " if range(99999)|list|sum < 0 %}") + "{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% for i in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "{{ 'a' * 10 ** 10 }}",
    "{{ 'a'.center(10 ** 10) }}",
    "{{ [1] | tojson(indent=10 ** 10) }}",
    "{% set n = namespace(s='a') %}" + LOOP + "{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{% set n = namespace(s=3) %}" + LOOP + "{% set n.s = n.s * n.s %}{% endfor %}",
    "{{ 1 / 0 }}",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "{% for i in [1] %}" * 60 + "{% endfor %}" * 60,
]


@pytest.mark.parametrize("template", ENDLESS)
def test_a_template_ends(template: str, setup: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"refuses these messages|preparing it takes") as caught:
        prepared(template, setup)
    assert "\n" not in str(caught.value)


def test_long_conversations_are_within_the_bounds(plain: LLM, setup: dict[str, Any]) -> None:
    """Four megabytes in four thousand turns, of which the context holds none."""
    template = "{% for m in messages %}<|{{ m.role ~ '|>' + m.content }}\n{% endfor %}"
    turns = [{"role": "user", "content": "x" * 1000}] * 4000
    own = preparation_process.Tasks(**{**setup, "template": template, "context": 2**20})
    (found,) = own.chat(turns[:100], {}, False)
    assert len(found) == 100 * 1009
    own = preparation_process.Tasks(**{**setup, "template": template})
    with pytest.raises(CapacityError):
        own.chat(turns, {}, False)


FRAGMENTS = """
{% for i in x %}|{% endfor %}|{% if x %}|{% endif %}|{{|}}|{%|%}|{#|{% macro f(x) %}|{% endmacro %}
{{ f(x) }}|{{ loop.index }}|{% set x = x %}|{% set x %}|{% endset %}|{% break %}|{{ x.__class__ }}
{% include 'a' %}|{% extends x %}|{{ raise_exception('no') }}| x |messages|[0]|.content| * | ** | ~
999999999|'%s'|namespace(a=1)|range(99999)|(|)|{{ x | list }}|{{ x | tojson }}|\0
""".replace("\n", "|").split("|")


@settings(
    max_examples=10,
    derandomize=True,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(template=st.lists(st.sampled_from(FRAGMENTS), max_size=14).map("".join))
def test_strange_templates(template: str, setup: dict[str, Any]) -> None:
    with suppress(CapacityError, ConfigError):
        prepared(template, setup)


# One server whose template is hostile
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hostile(load: Any) -> Iterator[Running]:
    with serving(lambda: load(chat_template=CHOOSING)) as running:
        yield running


def chat(attack: str = "") -> dict[str, Any]:
    message = {"role": "user", "content": "a" * 1000}
    variables = {"attack": attack, "n": 99_999, "wide": 999_999_999}
    return {
        "model": NAME,
        "messages": [message],
        "max_tokens": 1,
        "chat_template_kwargs": variables,
    }


@contextmanager
def largest_growth() -> Iterator[list[int]]:
    """Bytes by which this process, the server's, is larger meanwhile than before, at most."""
    done = threading.Event()
    grown = [0]
    page = os.sysconf("SC_PAGESIZE")

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * page

    before = resident()

    def watch() -> None:
        while not done.wait(0.002):
            grown[0] = max(grown[0], resident() - before)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield grown
    finally:
        done.set()
        thread.join()


def longest_chat(running: Running, done: threading.Event) -> float:
    """Seconds that a short chat of another client takes, at most."""
    longest = 0.0
    with client(running, "127.0.0.3") as bystander:
        while not done.is_set():
            began = time.monotonic()
            assert bystander.post("/v1/chat/completions", json=chat()).status_code == 200
            longest = max(longest, time.monotonic() - began)
    return longest


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_hostile_template_holds_up_nobody(hostile: Running, attack: str) -> None:
    """It filled 4 to 10 GB. Other chats wait for its tenth of a second at most."""
    longest = []
    for _ in range(5):  # the machine's other work makes one of them longer
        done = threading.Event()
        with ThreadPoolExecutor() as pool, largest_growth() as grown:
            other = pool.submit(longest_chat, hostile, done)
            answer = post(hostile, "/v1/chat/completions", json=chat(attack))
            done.set()
            longest.append(other.result())
        assert answer.status_code == 400
        assert LIMITS.get(attack, "256 MiB of memory") in answer.json()["error"]["message"]
        assert grown[0] < 256 * MEGABYTE
        assert post(hostile, "/v1/chat/completions", json=chat()).status_code == 200
        if longest[-1] < 0.3:
            break
    assert min(longest) < 0.3, longest


# A megabyte
# ------------------------------------------------------------------------------------------


def tools(count: int, text: str) -> list[dict[str, Any]]:
    functions = ({"name": f"f{i}", "description": text} for i in range(count))
    return [{"type": "function", "function": each} for each in functions]


def schema(properties: int) -> dict[str, Any]:
    names = {f"property_{i:06d}": {"type": "string"} for i in range(properties)}
    return {"type": "object", "properties": names}


DENSE = "".join(chr(33 + i * 7919 % 94) for i in range(MEGABYTE))
USER = {"role": "user", "content": "hi"}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "a prompt": ("completions", {"prompt": "The tides " * 100_000}),
    "a dense prompt": ("completions", {"prompt": DENSE}),
    "a chat": ("chat/completions", {"messages": [{**USER, "content": "The tides " * 100_000}]}),
    "a dense chat": ("chat/completions", {"messages": [{**USER, "content": DENSE}]}),
    "messages": ("chat/completions", {"messages": [USER] * 9_990}),
    "tools": ("chat/completions", {"messages": [USER], "tools": tools(128, "d" * 8_000)}),
    "variables": (
        "chat/completions",
        {"messages": [USER], "chat_template_kwargs": {f"v{i}": "v" * 20 for i in range(25_000)}},
    ),
    "a schema": (
        "chat/completions",
        {"messages": [USER], "structured_outputs": {"json": schema(25_000)}},
    ),
    "a large schema": (
        "chat/completions",
        {"messages": [USER], "structured_outputs": {"json": schema(2_000)}},
    ),
}


ALLOWED = ("variables", "a large schema")


@pytest.mark.parametrize("name", LARGE)
def test_a_megabyte_costs_little(running: Running, name: str) -> None:
    """At most 256 MiB here, and a second of anybody else's time."""
    path, body = LARGE[name]
    raw = json.dumps({"model": NAME, "max_tokens": 1, **body}).encode()
    headers = {"content-type": "application/json"}
    longest = []
    for _ in range(3):  # the machine's other work makes one of them longer
        done = threading.Event()
        with ThreadPoolExecutor() as pool, largest_growth() as grown:
            gap = pool.submit(longest_gap, running, done)
            answer = post(running, f"/v1/{path}", content=raw, headers=headers)
            done.set()
            longest.append(gap.result())
        assert answer.status_code == (200 if name in ALLOWED else 400), answer.text
        assert grown[0] < 256 * MEGABYTE
        if longest[-1] < 1.0:
            break
    assert min(longest) < 1.0, longest
    assert running.idle()


# Life and death of a process
# ------------------------------------------------------------------------------------------


def test_only_a_limit_means_too_large(
    load: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever else goes wrong is logged, and a 500."""
    with serving(load) as running:
        body = {"model": NAME, "prompt": "a", "max_tokens": 1}
        made = preparation.task
        monkeypatch.setattr(
            "smart_decoding.server.openai_api.task", lambda name, **given: made("nothing", **given)
        )
        answer = post(running, "/v1/completions", json=body)
        assert answer.status_code == 500
        assert "AttributeError" in JsonLines().format(caplog.records[-1])
        monkeypatch.undo()
        assert post(running, "/v1/completions", json=body).status_code == 200
        killed(running.worker.preparation.process)
        assert post(running, "/v1/completions", json=body).status_code == 200
        monkeypatch.setattr(sys, "executable", "/bin/false")
        killed(running.worker.preparation.process)
        assert post(running, "/v1/completions", json=body).status_code == 500
        assert "ended with status 1" in JsonLines().format(caplog.records[-1])
        monkeypatch.undo()
        assert wait_for(lambda: post(running, "/v1/completions", json=body).status_code == 200)


def killed(process: preparation.Process) -> None:
    """With its children."""
    assert process.child is not None
    os.killpg(process.child.pid, signal.SIGKILL)
    process.child.wait()


def children(process: preparation.Process) -> list[int]:
    """The children of a preparation process."""
    assert process.child is not None
    pid = process.child.pid
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


ENDLESSLY = {"template": "{% if n %}" + LOOP * 3 + "{% endfor %}" * 3 + "{% endif %}{{ 1 }}"}
WORK = task("chat", messages=HI, variables={"n": 1}, pictures=False)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kills", [1, 2])
def test_an_end_from_outside_is_no_limit(
    setup: dict[str, Any],
    number: signal.Signals,
    kills: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As by the kernel where the machine's memory is full: the task is not at fault. It is done
    again once."""

    async def request() -> Any:
        process = process_of({**setup, **ENDLESSLY})
        try:
            assert await process.answer(HELLO, 0.1)
            answer = asyncio.create_task(process.answer(WORK, 1.0))
            known: set[int] = set()
            for _ in range(kills):
                while not (new := set(children(process)) - known):
                    await asyncio.sleep(0.01)
                known |= new
                os.kill(new.pop(), number)
            return await answer
        finally:
            process.stop()

    if kills == 1:
        with pytest.raises(preparation.TooSlowError):  # the second time by itself
            asyncio.run(request())
        return
    with pytest.raises(ApiError, match="was killed: try again later") as caught:
        asyncio.run(request())
    assert caught.value.status == 503
    assert f"ended with status -{int(number)}" in caplog.text


def test_a_task_that_breaks_a_limit_dies_alone(setup: dict[str, Any]) -> None:
    """Another task beside it gets its answer, and the process stays."""

    async def request() -> None:
        process = process_of({**setup, **ENDLESSLY})
        try:
            assert await process.answer(HELLO, 0.1)
            child = process.child
            slow = asyncio.create_task(process.answer(WORK, 0.3, 1))
            for _ in range(5):
                assert await process.answer(HELLO, 0.1)
            assert not slow.done()
            with pytest.raises(preparation.TooSlowError):
                await slow
            assert await process.answer(HELLO, 0.1)
            assert process.child is child
            while len(children(process)) > 1:
                await asyncio.sleep(0.01)
        finally:
            process.stop()

    asyncio.run(request())


def test_a_preparation_process_has_no_secrets(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's template that broke out of its sandbox would find them."""
    for name in ("SMART_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")

    async def found() -> bytes:
        process = process_of(setup)
        await process.answer(HELLO, 1.0)
        try:
            assert process.child is not None
            return Path(f"/proc/{process.child.pid}/environ").read_bytes()
        finally:
            process.stop()

    environment = asyncio.run(found())
    assert b"PATH=" in environment
    assert b"secret" not in environment


def test_faults_of_a_start_are_told(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next start may go well."""

    async def request() -> None:
        changeable = {**setup, "backend": "{}"}
        process = process_of(changeable)
        try:
            with pytest.raises(preparation.FailedError) as caught:
                await process.answer(HELLO, 1.0)
            assert "ended with status 1" in caught.value.said
            assert "Traceback" in caught.value.said
            monkeypatch.setattr(subprocess, "Popen", no_process)
            with pytest.raises(preparation.FailedError) as caught:
                await process.answer(HELLO, 1.0)
            assert "Resource temporarily" in caught.value.said
            monkeypatch.undo()
            changeable["backend"] = setup["backend"]
            assert await process.answer(HELLO, 1.0)
        finally:
            process.stop()

    asyncio.run(request())


def test_a_process_needs_no_folder(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that is full or read-only made every prompt a 500."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    assert prepared("{{ messages[0].content }}", setup)


def no_process(*_: Any, **__: Any) -> Any:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_a_task_that_the_machine_has_no_time_for_is_a_503(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called too large. A start has more time than a task: it ended before it was ready."""
    monkeypatch.setattr(preparation, "PATIENCE", 0.05)

    async def request() -> None:
        process = process_of({**setup, **ENDLESSLY})
        try:
            await process.answer(WORK, 60.0)
        finally:
            process.stop()

    with pytest.raises(ApiError, match="preparing it took") as caught:
        asyncio.run(request())
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.headers


def test_the_process_starts_with_the_server(load: Any) -> None:
    with serving(load) as running:
        assert running.worker.preparation.process.child is not None


ORPHAN = """
import asyncio, json, os, signal, sys
from smart_decoding.server.preparation import Process, task
from smart_decoding.server.preparation_process import framed

async def main():
    setup = json.loads(sys.argv[2])

    async def known():
        return framed(setup)

    process = Process(known)
    message = {"role": "user", "content": "hi"}
    work = task("chat", messages=[message], variables={"n": 1}, pictures=False)
    asked = asyncio.create_task(process.answer(work, 60.0))
    while process.child is None:
        await asyncio.sleep(0.01)
    pid = process.child.pid
    found = [pid]
    if sys.argv[1] == "works":
        while len(found) < 2:
            await asyncio.sleep(0.1)
            if process._ready.done():
                with open(f"/proc/{pid}/task/{pid}/children") as file:
                    found += map(int, file.read().split())
    print(*found, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("moment", ["starts", "works"])
def test_no_process_outlives_a_server_that_is_killed(setup: dict[str, Any], moment: str) -> None:
    given = json.dumps({**setup, **ENDLESSLY})
    done = subprocess.run([sys.executable, "-c", ORPHAN, moment, given], stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL
    for pid in map(int, done.stdout.split()):
        assert wait_for(lambda pid=pid: is_gone(pid))


def test_no_process_outlives_the_end(setup: dict[str, Any]) -> None:
    async def request() -> list[int]:
        process = process_of({**setup, **ENDLESSLY})
        assert await process.answer(HELLO, 0.1)
        work = asyncio.create_task(process.answer(WORK, 60.0))
        await asyncio.sleep(0.1)
        found = children(process)
        assert found
        process.stop()
        with pytest.raises(ApiError, match="shutting down"):
            await work
        assert process.child is not None
        assert process.child.poll() is not None
        return found

    for pid in asyncio.run(request()):
        assert wait_for(lambda pid=pid: is_gone(pid))
