"""Real sockets against a real uvicorn: what is no HTTP, floods, and clients that take their time.
The others go on."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import NAME, Running, post, serving, slow, wait_for

from smart_decoding.errors import ConfigError
from smart_decoding.server import launch, middleware
from smart_decoding.server.connections import allowed_connections

BODY = {"model": NAME, "prompt": "abc", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def impatient(load: Any) -> Iterator[Running]:
    """Waits half a second for heads and bodies."""
    with serving(load, head_timeout=0.5, body_timeout=0.5, max_body=100_000) as running:
        yield running


@contextmanager
def connected(running: Running, source: str = "127.0.0.1") -> Iterator[socket.socket]:
    host, _, port = running.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), 5, (source, 0)) as client:
        yield client


def read_all(client: socket.socket) -> bytes:
    """Until the server closes."""
    data = b""
    try:
        while piece := client.recv(65536):
            data += piece
    except ConnectionError:
        pass
    return data


def first_answer(client: socket.socket) -> tuple[int, bytes]:
    """Status and body of the first response; (0, b"") if the server closes without one."""
    data = b""
    while True:
        head, found, body = data.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if found and length and len(body) >= int(length[1]):
            return int(head.split(b" ")[1]), body[: int(length[1])]
        try:
            piece = client.recv(65536)
        except ConnectionError:
            piece = b""
        if not piece:
            return 0, b""
        data += piece


def said(
    running: Running, *pieces: bytes, pause: float = 0.0
) -> tuple[int, dict[str, Any] | None, float]:
    """Status, error and seconds until the server answered or closed, after it was sent `pieces`."""
    with connected(running) as client:
        started = time.monotonic()
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause)
        except ConnectionError:
            pass
        status, body = first_answer(client)
        return (
            status,
            json.loads(body)["error"] if body.startswith(b'{"error"') else None,
            time.monotonic() - started,
        )


def goes_on(running: Running) -> None:
    assert post(running, "/v1/completions", json=BODY).status_code == 200
    assert running.idle()


@pytest.mark.parametrize("body", [b"{}", b"2\r\n{}\r\n0\r\n\r\n"])
def test_two_lengths_of_a_body_are_refused_at_once(running: Running, body: bytes) -> None:
    """They were waited for, and a proxy may have read the other one. The connection is closed."""
    lengths = b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n"
    with connected(running) as client:
        client.settimeout(60)
        client.sendall(HEAD + lengths + body)
        answer = read_all(client)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b"contradict each other" in answer
    goes_on(running)


def test_answers_on_a_kept_connection_come_at_once(running: Running) -> None:
    """Without TCP_NODELAY the body waits 40 ms for the client to acknowledge the head."""
    connections = running.server.server_state.connections
    with connected(running) as client:
        assert wait_for(lambda: len(connections) == 1)
        server_end = next(iter(connections)).transport.get_extra_info("socket")
        assert server_end.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        client.close()


HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),  # TLS
        b"\x00" * 1000,
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no host
        HEAD + b"content-length: 3\r\ncontent-length: 5\r\n\r\nabc",
        HEAD + b"content-length: -1\r\n\r\n",
        HEAD + b"content-length: 99999999999999999999999\r\n\r\n",
        HEAD + b"transfer-encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"x: a\x00b\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    ],
)
def test_what_is_no_request(impatient: Running, data: bytes) -> None:
    status, error, seconds = said(impatient, data)
    assert status == 0 or 400 <= status < 500
    assert seconds < 3
    assert error is None or set(error) == {"message", "type", "param", "code"}
    goes_on(impatient)


@pytest.mark.parametrize("size", [b"-1", b"ZZ", b"0x5", b"", b"f" * 40])
def test_a_chunk_of_no_size_is_a_400(impatient: Running, size: bytes) -> None:
    chunked = HEAD + b"transfer-encoding: chunked\r\n\r\n"
    status, error, _ = said(impatient, chunked + size + b"\r\nabc\r\n")
    assert status == 400
    assert error is not None
    assert error["code"] == "invalid_http"
    goes_on(impatient)


@pytest.mark.parametrize("path", ["/", "/health", "/health/live", "/version", "/metrics"])
def test_head_is_get_without_a_body(running: Running, path: str) -> None:
    with httpx.Client(base_url=running.url) as client:
        head = client.head(path)
        get = client.get(path)  # on the same connection
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":  # which grows
        assert head.headers["content-length"] == str(len(get.content))


def test_a_flood_of_headers(impatient: Running) -> None:
    flood = b"".join(b"x-%d: %s\r\n" % (i, b"y" * 100) for i in range(2000))
    status, error, _ = said(
        impatient, b"GET /health HTTP/1.1\r\nhost: localhost\r\n" + flood + b"\r\n"
    )
    assert status == 400
    assert error is not None
    assert error["code"] == "invalid_http"
    status, _, _ = said(
        impatient, b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"
    )
    assert status == 400
    goes_on(impatient)


@pytest.mark.parametrize(
    "path",
    [b"/%ff%fe", b"/v1/models/%ff", b"/v1/models/%00", b"/?q=%ff", b"/v1/models/" + b"a" * 9000],
)
def test_paths_that_are_no_utf8(impatient: Running, path: bytes) -> None:
    status, _, _ = said(
        impatient, b"GET " + path + b" HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    )
    assert status in (200, 404)
    goes_on(impatient)


def test_headers_that_are_no_utf8(impatient: Running) -> None:
    head = b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
    for line in (
        b"authorization: Bearer \xff\xfe\r\n",
        b"x-request-id: \xe9\r\n",
        b"upgrade: websocket\r\n",
    ):
        assert said(impatient, head + line + b"\r\n")[0] == 200
    assert (
        said(impatient, b"GET /v1/models HTTP/1.1\r\nhost: \xff\r\nconnection: close\r\n\r\n")[0]
        == 403
    )


def test_bodies_that_are_giant_or_lie_about_their_size(impatient: Running) -> None:
    assert said(impatient, HEAD + b"content-length: 100001\r\n\r\n" + b" " * 1000)[0] == 413
    chunk = b"%x\r\n%s\r\n" % (50_000, b" " * 50_000)
    assert said(impatient, HEAD + b"transfer-encoding: chunked\r\n\r\n", *[chunk] * 4)[0] == 413
    assert said(impatient, HEAD + b"content-length: 50\r\n\r\n{")[0] == 408  # the rest never comes
    goes_on(impatient)


def test_slow_bodies_have_bounds_of_bytes(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """300 of them took 612 MiB. Who holds less than a share is served; room comes back."""
    monkeypatch.setattr(middleware, "LARGEST", 3)
    monkeypatch.setattr(middleware, "OF_ALL", 2)
    slow_body = HEAD + b"content-length: 100000\r\n\r\n" + b" " * 90_000
    with serving(load, max_body=100_000, body_timeout=20) as running, ExitStack() as stack:
        gate = running.server.config.loaded_app
        while not isinstance(gate, middleware.Gate):
            gate = getattr(gate, "middleware_stack", None) or gate.app
        for source in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
            for count in range(1, 4):
                if source == "127.0.0.4" and count == 3:
                    break  # all is full, and this would be more than a share
                client = stack.enter_context(connected(running, source))
                client.sendall(slow_body)
                held = count * 90_000
                assert wait_for(lambda held=held, source=source: gate._held[source] == held)
        one_more = stack.enter_context(connected(running, "127.0.0.2"))
        one_more.sendall(slow_body)
        status, raw_body = first_answer(one_more)
        assert status == 429
        assert json.loads(raw_body)["error"]["code"] == "queue_full"
        goes_on(running)  # at another address, with a small body
        crowd = stack.enter_context(connected(running, "127.0.0.4"))
        crowd.sendall(slow_body)
        assert first_answer(crowd)[0] == 429
        stack.close()
        assert wait_for(lambda: not gate._held)


def test_slow_loris_is_cut_off_and_the_others_do_not_notice(impatient: Running) -> None:
    """Heads that come a line at a time, or never; after an answer, too."""
    lines = [b"x-%d: y\r\n" % i for i in range(15)]
    with ThreadPoolExecutor() as pool:
        slow = [
            pool.submit(said, impatient, b"GET /health HTTP/1.1\r\n", *lines, pause=0.1)
            for _ in range(3)
        ]
        silent = pool.submit(said, impatient)
        for _ in range(5):
            assert post(impatient, "/v1/completions", json=BODY).status_code == 200
        for each in slow:
            status, error, _ = each.result()
            assert status in (0, 408)
            assert error is None or error["code"] == "request_timeout"
        status, _, seconds = silent.result()
        assert status == 408
        assert seconds < 2
    again = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    with connected(impatient) as client:
        client.sendall(again)
        assert b"200 OK" in client.recv(65536)
        client.sendall(again[:30])  # the second head never ends
        started = time.monotonic()
        read_all(client)
        assert time.monotonic() - started < 2
    assert wait_for(lambda: not impatient.server.server_state.connections)


HEALTH = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"


@contextmanager
def streaming(running: Running, source: str) -> Iterator[socket.socket]:
    """A connection on which an answer is on its way."""
    body = json.dumps({**BODY, "max_tokens": 900, "stream": True, "ignore_eos": True}).encode()
    with connected(running, source) as client:
        client.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in client.recv(1000)
        yield client


def test_the_oldest_idle_connection_makes_room(load: Any) -> None:
    with serving(load, max_connections=4) as running, ExitStack() as stack:
        connections = running.server.server_state.connections
        clients = []
        for count in range(1, 5):
            clients.append(stack.enter_context(connected(running, "127.0.0.2")))
            assert wait_for(lambda count=count: len(connections) == count)
        clients[1].sendall(HEALTH)  # it is idle after its answer, and not told when it ends
        assert first_answer(clients[1])[0] == 200
        newcomer = stack.enter_context(connected(running, "127.0.0.5"))
        newcomer.sendall(HEALTH)
        assert first_answer(newcomer)[0] == 200
        evicted = read_all(clients[0])
        assert b"503 Service Unavailable" in evicted
        assert b"retry-after: 5\r\n" in evicted.lower()
        assert wait_for(lambda: len(connections) == 4)
        stack.enter_context(connected(running, "127.0.0.6"))
        assert read_all(clients[1]) == b""
        clients[2].sendall(HEALTH)
        assert first_answer(clients[2])[0] == 200


def test_connections_with_answers_are_not_closed_and_the_newcomer_is_refused(load: Any) -> None:
    with serving(load, max_connections=3) as running, ExitStack() as stack:
        slow(running.llm, 0.01)
        for source in ("127.0.0.2", "127.0.0.2", "127.0.0.3"):
            stack.enter_context(streaming(running, source))
        status, error, _ = said(running, b"")
        assert status == 503
        assert error is not None
        assert error["code"] == "too_many_connections"


SERVER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
from smart_decoding.server.launch import serve
from smart_decoding.server.settings import ServerSettings

def load():  # for ever
    sys.stdin.read()

serve(load, ServerSettings("tiny", port=0, head_timeout=60))
"""


class Limited:
    """A server in a process that may have few files open. log: what it has said, as JSON."""

    def __init__(self, soft: int, hard: int, log: Path) -> None:
        given = [sys.executable, "-c", SERVER, str(soft), str(hard)]
        pipe = subprocess.PIPE
        self._file = log.open("wb")
        self._path = log
        self.port = 0
        self.process = subprocess.Popen(given, stdin=pipe, stdout=pipe, stderr=self._file)
        assert wait_for(self._listens, 60), log.read_text()

    def _listens(self) -> bool:
        found = re.search(r"listening on http://127.0.0.1:(\d+)", self._path.read_text())
        self.port = int(found[1]) if found else 0
        return self.port > 0 and self.answers("127.0.0.1")

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()
        self._file.close()

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self._path.read_text().splitlines()]

    def answers(self, source: str) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), 3, (source, 0)) as client:
                client.sendall(HEALTH.replace(b"/health", b"/version"))
                return b"200 OK" in client.recv(65536)
        except OSError:
            return False

    def idle(self, source: str, count: int, stack: ExitStack) -> None:
        for _ in range(count):
            there = ("127.0.0.1", self.port)
            stack.enter_context(socket.create_connection(there, 5, (source, 0)))

    @property
    def seconds(self) -> float:
        """Of processors, so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_idle_connections_of_one_address_starve_nobody_where_files_are_few(tmp_path: Path) -> None:
    with Limited(256, 256, tmp_path / "log") as server, ExitStack() as stack:
        server.idle("127.0.0.2", 300, stack)
        began = server.seconds
        time.sleep(1)
        assert server.seconds - began < 0.3  # it was all of it
        assert server.answers("127.0.0.3")
        assert server.answers("127.0.0.2")  # in place of one of its idle ones
        (said,) = [line["message"] for line in server.log if "instead of 512" in line["message"]]
        assert "only 256 files may be open; ulimit -n" in said
        assert len(server.log) < 20


def test_a_burst_of_one_address_drops_nobody_else_where_files_are_few(tmp_path: Path) -> None:
    """They all wait when the server looks. One of ten others was dropped."""
    with Limited(256, 256, tmp_path / "log") as server, ExitStack() as stack:
        there = ("127.0.0.1", server.port)
        server.process.send_signal(signal.SIGSTOP)
        others = []
        for _ in range(10):
            server.idle("127.0.0.2", 30, stack)
            other = stack.enter_context(socket.create_connection(there, 5, ("127.0.0.3", 0)))
            other.sendall(HEALTH.replace(b"/health", b"/version"))
            others.append(other)
        server.process.send_signal(signal.SIGCONT)
        for other in others:
            other.settimeout(60)
            assert b"200 OK" in other.recv(65536)
        assert [line for line in server.log if line["level"] == "error"] == []


def test_the_limit_of_files_is_raised_as_far_as_needed(tmp_path: Path) -> None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if hard != resource.RLIM_INFINITY and hard < 2000:
        pytest.skip("no room to raise it")
    with Limited(100, hard, tmp_path / "log") as server, ExitStack() as stack:
        server.idle("127.0.0.2", 250, stack)
        server.idle("127.0.0.3", 200, stack)
        assert server.answers("127.0.0.4")
        assert [line for line in server.log if line["level"] != "info"] == []


def test_no_room_for_a_connection_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (16, 16))
    with pytest.raises(ConfigError, match=r"16 are allowed, .* such as ulimit -n"):
        allowed_connections(512)


def test_a_reader_that_stops_reading_is_cut_off(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STALLED", 0.3)
    body = json.dumps({"tokens": [200] * 199_000}).encode()
    with serving(load) as running, connected(running) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        state = running.server.server_state
        assert wait_for(lambda: len(state.connections) == 1)
        server_end = next(iter(state.connections)).transport.get_extra_info("socket")
        server_end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        head = HEAD.replace(b"/v1/completions", b"/detokenize")
        client.sendall(head + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert wait_for(lambda: not state.connections)
        goes_on(running)


def test_garbage_while_an_answer_streams(running: Running) -> None:
    body = json.dumps({**BODY, "max_tokens": 300, "stream": True, "ignore_eos": True}).encode()
    with connected(running) as client:
        client.sendall(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
        assert b"200 OK" in client.recv(1000)
        client.sendall(b"\x00\x01\x02 garbage\r\n\r\n" * 10)
        read_all(client)
    goes_on(running)
