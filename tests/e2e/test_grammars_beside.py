"""What grammars whose masks take long cost the others: an answer beside six of them takes at most
twice as long as alone."""

from __future__ import annotations

import re
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count

import httpx
import pytest

from smart_lab.busy import COMMAND, is_ready, started

pytestmark = pytest.mark.model
pytest.importorskip("llguidance")

BODY = {"model": "smollm2-135m", "prompt": "The tides", "max_tokens": 60}
PLAIN = {**BODY, "temperature": 0, "ignore_eos": True}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a server in a process of its own, as whose interpreter nobody here is held
    up."""
    line = [*COMMAND, "serve", BODY["model"], "--port", "0", "--policy", "off"]
    with started(line, stderr=subprocess.PIPE) as running:
        found = (re.search(r"http://[\w.:]+\d", line) for line in running.stderr or ())
        where = next(match[0] for match in found if match)
        threading.Thread(target=list, args=(running.stderr,), daemon=True).start()
        while not is_ready(f"{where}/health/ready"):
            assert running.poll() is None
            time.sleep(0.2)
        yield where


@contextmanager
def six(address: str, same: bool) -> Iterator[list[str]]:
    """Clients that ask again as soon as they are refused: masks take 0.1 s, and outgrow the limits
    after some tokens. Yields what they are told."""
    done = threading.Event()
    told: list[str] = []
    numbers = count()
    rules = [f"r{i}: r{(i + 1) % 80} r{(i + 2) % 80} | /[a-z ]/" for i in range(80)]

    def ask() -> None:
        with httpx.Client(base_url=address, timeout=120) as client:
            while not done.is_set():
                start = f'start: "b{0 if same else next(numbers)}"' + " r0" * 30
                body = {**BODY, "structured_outputs": {"grammar": "\n".join([start, *rules])}}
                told.append(client.post("/v1/completions", json=body).text)

    with ThreadPoolExecutor() as pool:
        asking = [pool.submit(ask) for _ in range(6)]
        try:
            yield told
        finally:
            done.set()
    assert [each.result() for each in asking] == [None] * 6


@pytest.mark.parametrize("same", [True, False], ids=["the same", "new ones"])
def test_an_answer_beside_six_dear_grammars_takes_at_most_twice_as_long(
    address: str, same: bool
) -> None:
    other = httpx.HTTPTransport(local_address="127.0.0.2")
    with httpx.Client(base_url=address, timeout=60, transport=other) as client:
        texts = set()

        def seconds() -> float:
            began = time.monotonic()
            texts.add(client.post("/v1/completions", json=PLAIN).json()["choices"][0]["text"])
            return time.monotonic() - began

        alone = [seconds() for _ in range(5)]
        with six(address, same) as told:
            late = time.monotonic() + 60
            while len(told) < 6:
                assert time.monotonic() < late
                time.sleep(0.01)
            beside = [seconds() for _ in range(5)]
            assert all("items" in each for each in told), told  # masks were computed, up to a limit
        alone += [seconds() for _ in range(5)]
        print(sorted(alone), sorted(beside), len(told))
        assert len(texts) == 1
        # the shortest: other work on the machine makes the rest longer
        assert min(beside) < 2 * min(alone)
