"""The end of a server in a process of its own: nobody waits for it longer than was said, and every
client is told."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import httpx
import pytest
from serving import NAME
from test_faults import free_port, start

from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL

LOADING = """
import sys, time
from smart_decoding.server.launch import serve
from smart_decoding.server.settings import ServerSettings

def load():
    print("loading", flush=True)
    time.sleep(60)

serve(load, ServerSettings("tiny", port=0))
"""


# While this goes on, by what the server has said just before.
MOMENTS = {
    "torch is imported": "torch.",
    "it is packed": "needs about",
}


def allowed() -> float:
    """Seconds: two, or what 25 starts of an interpreter take on a machine that is busier."""
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", ""], check=True)
    return max(2.0, 25 * (time.monotonic() - started))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads(number: signal.Signals) -> None:
    """It took ten seconds, which is what the end of the loading was waited for."""
    with subprocess.Popen(
        [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"loading\n"
        started = time.monotonic()
        process.send_signal(number)
        try:
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert time.monotonic() - started < allowed()
    assert b"stopping: 0 answers have 30 s to end" in said
    if number == signal.SIGTERM:
        assert process.returncode == -signal.SIGTERM
        assert b"Traceback" not in said


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_signal_while_a_real_model_loads(moment: str) -> None:
    """One that takes a second to pack: a tiny one would be ready before the signal."""
    said = []
    with subprocess.Popen(
        [
            *(sys.executable, "-X", "importtime", "-m", "smart_decoding.cli.main"),
            *("serve", DEFAULT_MODEL, "--port", "0", "--method", "ngram"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line)
            if MOMENTS[moment] in line:
                break
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        try:
            said.append(process.communicate(timeout=20)[1])
        finally:
            process.kill()
    assert time.monotonic() - started < allowed()
    assert process.returncode == -signal.SIGTERM
    assert "Traceback" not in "".join(said)
    assert "ready" not in said[-1]


def test_streams_beyond_the_time_limit_are_told(load: Any, plain: Any) -> None:
    """The one who reads gets an error event, the one who does not is cut off; the log holds no
    traceback."""
    port = free_port()
    folder = str(plain.provenance["model"])
    process = start(folder, port, "--shutdown-timeout", "0", "--max-model-len", "4096")
    url = f"http://127.0.0.1:{port}/v1/completions"
    body = {"model": NAME, "prompt": "abc", "max_tokens": 4000, "ignore_eos": True, "stream": True}
    lines: list[str] = []
    with (
        httpx.stream("POST", url, json={**body, "n": 3}, timeout=20) as silent,
        httpx.stream("POST", url, json=body, timeout=20) as stream,
    ):
        events = stream.iter_lines()
        lines.append(next(events))
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        lines += [line for line in events if line]
        assert silent.status_code == 200
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(20) == -signal.SIGTERM
        assert time.monotonic() - started < 10
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "shutting_down"
    records = [json.loads(line) for line in said.splitlines()]
    assert [record for record in records if "exception" in record] == []
    assert [record for record in records if record["level"] == "error"] == []


@pytest.mark.parametrize("after", [0.02, 0.3])
def test_a_second_ctrl_c_ends_the_server_at_once(plain: Any, after: float) -> None:
    """Each answer was a 500 with a traceback."""
    port = free_port()
    process = start(str(plain.provenance["model"]), port, "--max-model-len", "4096")
    url = f"http://127.0.0.1:{port}/v1/completions"
    body = {"model": NAME, "prompt": "abc", "max_tokens": 4000, "ignore_eos": True}
    codes: list[int] = []

    def ask() -> None:
        with contextlib.suppress(httpx.HTTPError):
            codes.append(httpx.post(url, json=body, timeout=20).status_code)

    with ThreadPoolExecutor(8) as pool:
        requests = [pool.submit(ask) for _ in range(8)]
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        time.sleep(after)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        lines = process.stderr.read().splitlines()
        assert process.wait(20) == 130
        assert time.monotonic() - started < allowed()
        wait(requests)
    assert codes == []
    records = [json.loads(line) for line in lines]
    said = [record["message"].partition(":")[0] for record in records]
    assert said[-1] in ("ready", "stopping")
    assert not [record for record in records if record["level"] == "error"]


@pytest.mark.parametrize("loading", [True, False])
@pytest.mark.parametrize("after", [0.0, 0.01, 0.2])
def test_ctrl_c_twice_ends_a_run_with_one_line(loading: bool, after: float) -> None:
    """Once more while Python ends was a traceback, and so it was while the model loads."""
    command = ["-X", "importtime"] if loading else []
    command += ["-m", "smart_decoding.cli.main", "run", "-n", "3000", "Count."]
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, *command], stdout=pipe, stderr=pipe) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        if loading:
            assert any(b"torch." in line for line in process.stderr)
        else:
            assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        time.sleep(after)
        process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=20)
        finally:
            process.kill()
    assert process.returncode == 130
    assert said.split(b"\n")[-2:] == [b"smart: interrupted", b""]
    assert b"Traceback" not in said


def test_a_server_with_too_few_files_says_so_in_one_line() -> None:
    """It was a traceback of forty lines."""
    program = "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12));"
    program += "from smart_decoding.cli.main import main; raise SystemExit(main())"
    for command in (["serve", DEFAULT_MODEL, "--port", "0"], ["run", "-n", "3", "Count."]):
        line = [sys.executable, "-c", program, *command]
        done = subprocess.run(line, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        pattern = r"smart: error: too many open files: .*allow more, such as ulimit -n \d+"
        assert re.fullmatch(pattern, done.stderr.splitlines()[-1])
        assert "Traceback" not in done.stderr
