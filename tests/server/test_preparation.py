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
from smart_decoding.server.lane import Lane
from smart_decoding.server.launch import JsonLines
from smart_decoding.server.preparation import ProcessPair, setup_of, task

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


def prepared(template: str, setup: dict[str, Any]) -> Any:
    """What comes of a conversation in a process with this template."""

    async def request() -> Any:
        async def known() -> bytes:
            return preparation_process.framed({**setup, "template": template})

        pair = ProcessPair(known)
        try:
            return await pair.answer("client", HELLO)
        finally:
            pair.stop()

    return asyncio.run(request())


@pytest.fixture(scope="module")
def setup(plain: LLM) -> dict[str, Any]:
    return setup_of(plain)


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "SHORT_SECONDS", 0.1)
    monkeypatch.setattr(preparation, "SECONDS", 0.15)


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


@pytest.mark.usefixtures("hasty")
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
    assert len(preparation_process.unpacked(found)) == 100 * 1009
    own = preparation_process.Tasks(**{**setup, "template": template})
    with pytest.raises(CapacityError):
        own.chat(turns, {}, False)


FRAGMENTS = """
{% for i in x %}|{% endfor %}|{% if x %}|{% endif %}|{{|}}|{%|%}|{#|{% macro f(x) %}|{% endmacro %}
{{ f(x) }}|{{ loop.index }}|{% set x = x %}|{% set x %}|{% endset %}|{% break %}|{{ x.__class__ }}
{% include 'a' %}|{% extends x %}|{{ raise_exception('no') }}| x |messages|[0]|.content| * | ** | ~
999999999|'%s'|namespace(a=1)|range(99999)|(|)|{{ x | list }}|{{ x | tojson }}|\0
""".replace("\n", "|").split("|")


@pytest.mark.usefixtures("hasty")
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
    """It filled 4 to 10 GB. Other chats wait for its death at most, then for the next process."""
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
        if longest[-1] < 1.0:
            break
    assert min(longest) < 1.0, longest


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
        child = running.worker.preparation.texts.short.child
        assert child is not None
        child.kill()
        child.wait()
        assert post(running, "/v1/completions", json=body).status_code == 200
        child = running.worker.preparation.texts.short.child
        assert child is not None
        monkeypatch.setattr(sys, "executable", "/bin/false")
        child.kill()
        child.wait()
        assert post(running, "/v1/completions", json=body).status_code == 500
        assert "ended with status 1" in caplog.text
        monkeypatch.undo()
        assert wait_for(lambda: post(running, "/v1/completions", json=body).status_code == 200)


def endless(setup: dict[str, Any], seconds: float) -> tuple[preparation.Process, dict[str, Any]]:
    """A process that works for ever, and its changeable setup."""
    template = LOOP * 3 + "{% endfor %}" * 3
    changeable = {**setup, "template": template}

    async def known() -> bytes:
        return preparation_process.framed(changeable)

    return preparation.Process(known, 0, seconds), changeable


@pytest.mark.parametrize("killed", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("kills", [1, 2])
def test_an_end_from_outside_is_no_limit(
    setup: dict[str, Any],
    killed: signal.Signals,
    kills: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """As by the kernel where the machine's memory is full: the task is not at fault. It is done
    again once."""

    async def request() -> Any:
        process, changeable = endless(setup, 60.0)
        answer = asyncio.create_task(process.answer(HELLO))
        known: set[int] = set()
        for left in range(kills, 0, -1):
            while (child := process.child) is None or child.pid in known or not ready(process):
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            if left == 1 and kills == 1:
                changeable["template"] = "{{ messages[0].content }}"
            known.add(child.pid)
            child.send_signal(killed)
        try:
            return await answer
        finally:
            process.stop()

    def ready(process: preparation.Process) -> bool:
        return process._ready is not None and process._ready.done()

    if kills == 1:
        assert asyncio.run(request())
        return
    with pytest.raises(ApiError, match="was killed: try again later") as caught:
        asyncio.run(request())
    assert caught.value.status == 503
    assert f"ended with status -{int(killed)}" in caplog.text


def test_a_preparation_process_has_no_secrets(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's template that broke out of its sandbox would find them."""
    for name in ("SMART_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret")

    async def found() -> bytes:
        async def known() -> bytes:
            return preparation_process.framed(setup)

        process = preparation.Process(known, 0, 60.0)
        await process.answer(HELLO)
        try:
            assert process.child is not None
            return Path(f"/proc/{process.child.pid}/environ").read_bytes()
        finally:
            process.stop()

    environment = asyncio.run(found())
    assert b"PATH=" in environment
    assert b"secret" not in environment


def test_faults_of_a_start_are_told(setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a process that a signal ended, too: its status was taken for the next one's."""

    async def request() -> None:
        process, changeable = endless(setup, 0.1)
        try:
            with pytest.raises(preparation.TooSlowError):
                await process.answer(HELLO)
            changeable["backend"] = "{}"
            await ended(process)
            with pytest.raises(RuntimeError, match=r"ended with status 1: (.|\n)*Traceback"):
                await process.answer(HELLO)
            monkeypatch.setattr(subprocess, "Popen", no_process)
            with pytest.raises(RuntimeError, match="Resource temporarily"):
                await process.answer(HELLO)
            monkeypatch.undo()
            changeable["backend"] = setup["backend"]
            with pytest.raises(preparation.TooSlowError):
                await process.answer(HELLO)
        finally:
            process.stop()

    async def ended(process: preparation.Process) -> None:
        """Its present process."""
        assert process._ready is not None
        await asyncio.wait([process._ready])
        if process.child is not None:
            process.child.kill()
            process.child.wait()

    asyncio.run(request())


@pytest.mark.parametrize("memfd", [True, False])
def test_a_process_needs_no_folder(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch, memfd: bool
) -> None:
    """A file system that is full or read-only made every prompt a 500."""
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    if not memfd:
        monkeypatch.delattr(os, "memfd_create", raising=False)
    assert prepared("{{ messages[0].content }}", setup)


def no_process(*_: Any, **__: Any) -> Any:
    raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def test_a_process_that_does_not_answer_is_ended(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the clock on the wall, where a processor's says nothing."""
    monkeypatch.setattr(preparation, "PATIENCE", 1.0)
    with serving(load) as running:
        body = {"model": NAME, "prompt": "a", "max_tokens": 1}
        assert post(running, "/v1/completions", json=body).status_code == 200
        child = running.worker.preparation.texts.short.child
        assert child is not None
        child.send_signal(signal.SIGSTOP)
        # by the other one
        assert post(running, "/v1/completions", json=body).status_code == 200
        assert child.poll() == -signal.SIGKILL


def test_a_task_that_the_machine_has_no_time_for_is_a_503(
    setup: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was called too large. A start has more time than a task: it ended before it was ready."""
    monkeypatch.setattr(preparation, "PATIENCE", 0.05)

    async def request() -> None:
        process, _ = endless(setup, 60.0)
        try:
            await process.answer(HELLO)
        finally:
            process.stop()

    with pytest.raises(ApiError, match="preparing it took") as caught:
        asyncio.run(request())
    assert caught.value.status == 503
    assert "Retry-After" in caught.value.headers


def test_a_process_starts_before_it_stands_back(setup: dict[str, Any]) -> None:
    """Beside a busy machine, starts of long tasks' processes took ten seconds."""

    async def niceness() -> tuple[int, int]:
        known = asyncio.Event()

        async def awaited() -> bytes:
            await known.wait()
            return preparation_process.framed(setup)

        process = preparation.Process(awaited, 3, 1.0)
        process.start()
        try:
            await asyncio.sleep(1.0)
            assert process.child is not None
            before = os.getpriority(os.PRIO_PROCESS, process.child.pid)
            known.set()
            assert process._ready is not None
            await process._ready
            return before, os.getpriority(os.PRIO_PROCESS, process.child.pid)
        finally:
            process.stop()

    before, after = asyncio.run(niceness())
    assert before == os.getpriority(os.PRIO_PROCESS, 0)
    assert after == min(19, before + 3)


def test_processes_of_texts_start_with_the_server(load: Any) -> None:
    with serving(load) as running:
        texts = running.worker.preparation.texts
        assert texts.short.child is not None
        assert texts.long.child is not None


ORPHAN = """
import asyncio, os, signal, sys
from smart_decoding.server.preparation import ProcessPair, _no_tokenizer, task

async def main():
    pair = ProcessPair(_no_tokenizer)
    pair.long._seconds = 60.0
    many = "".join(f'"p{i:06d}":{{"type":"string"}},' for i in range(6000))[:-1]
    schema = '{"type":"object","properties":{' + many + "}}"
    given = dict(json=schema, json_object=None, regex=None, choice=None, grammar=None)
    asked = asyncio.create_task(pair.answer("a", task("grammar", **given)))
    while pair.long.child is None:
        await asyncio.sleep(0.01)
    await asyncio.sleep(float(sys.argv[1]))
    print(pair.long.child.pid, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main())
"""


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("seconds", ["0", "1"])
def test_no_process_outlives_a_server_that_is_killed(seconds: str) -> None:
    """Whether it starts or works."""
    pytest.importorskip("llguidance")
    done = subprocess.run([sys.executable, "-c", ORPHAN, seconds], stdout=subprocess.PIPE)
    assert done.returncode == -signal.SIGKILL
    assert wait_for(lambda: is_gone(int(done.stdout)))


def test_no_process_outlives_the_end(load: Any) -> None:
    with serving(load) as running:
        body = {"model": NAME, "prompt": "a" * 20_000, "max_tokens": 1}
        post(running, "/v1/completions", json=body)
        pair = running.worker.preparation.texts
        children = [pair.short.child, pair.long.child]
    assert all(child is not None and child.poll() is not None for child in children)


def test_a_lane_charges_the_time_that_a_piece_took() -> None:
    """It charged bytes: few of them may take long."""
    order = []

    async def piece(client: str, seconds: float) -> None:
        order.append(client)
        await asyncio.sleep(seconds)

    async def all_pieces() -> None:
        lane = Lane()
        slow = [lane.take("slow", 10, lambda: piece("slow", 0.05)) for _ in range(3)]
        large = [lane.take("large", 5000, lambda: piece("large", 0.0)) for _ in range(3)]
        await asyncio.gather(*slow, *large)

    asyncio.run(all_pieces())
    assert order == ["slow", *["large"] * 3, "slow", "slow"]
