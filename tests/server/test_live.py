"""The live page: its events always; in a real Chromium where there is one (Debian: chromium; PyPI:
playwright)."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from serving import NAME, Running, post, serving, slow, wait_for

BODY = {
    "model": NAME,
    "prompt": "abcabcabc",
    "max_tokens": 900,
    "ignore_eos": True,
    "temperature": 0,
    "stream": True,
}
CHROMIUM = shutil.which("chromium")
BACKGROUND = "getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g).map(Number)"


@contextmanager
def busy(running: Running) -> Iterator[None]:
    """While one answer streams."""
    with httpx.stream("POST", f"{running.url}/v1/completions", json=BODY, timeout=30) as stream:
        stop = threading.Event()

        def drain() -> None:
            for _ in stream.iter_lines():
                if stop.is_set():
                    return

        reader = threading.Thread(target=drain)
        reader.start()
        yield
        stop.set()
        reader.join()


def events(running: Running, count: int, **options: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{running.url}/events", timeout=10, **options) as stream:
        for line in stream.iter_lines():
            if line:
                found.append(json.loads(line.removeprefix("data: ")))
            if len(found) == count:
                break
    return found


def test_events_show_the_running_trees(load: Any) -> None:
    with serving(lambda: slow(load(), 0.005)) as running:
        quiet = events(running, 1)[0]
        assert quiet["name"] == NAME
        assert quiet["yield"] is None
        assert quiet["ready"]
        assert quiet["running"] == 0
        assert quiet["tps"] == 0
        assert quiet["trees"] == []
        with busy(running):
            _, *later = events(running, 4)
        assert all(
            event["running"] == 1 and event["tps"] > 0 and event["yield"] >= 1 for event in later
        )
        # A token that was not seen before has no successors to draft: then a round's tree is empty.
        tree = next(tree for event in later for tree in event["trees"] if tree["nodes"])
        assert tree["own"]
        assert all(len(event["trees"]) == 1 for event in later)
        for i, (parent, text, prob, accepted) in enumerate(tree["nodes"]):
            assert -1 <= parent < i
            assert isinstance(text, str)
            assert 0 <= prob <= 1
            assert (
                not accepted or parent < 0 or tree["nodes"][parent][3]
            )  # the accepted nodes are a path
        assert later[-1]["trees"][0]["tokens"] > later[0]["trees"][0]["tokens"]
        assert later[-1]["plain_tps"] is None
        assert later[-1]["curve"] is None
        assert running.idle()


def test_a_policy_with_costs_shows_its_curve_and_the_point_moves(
    load: Any, short_profile: None
) -> None:
    with serving(lambda: slow(load(speculative_config={"method": "recycling"}), 0.02)) as running:
        with busy(running):
            _, *alone = events(running, 3)
            with busy(running):
                _, *both = events(running, 3)
        for event in (*alone, *both):
            assert event["policy"] == "smart"
            assert event["plain_tps"] > 0
            assert event["speedup"] > 0
            curve = event["curve"]
            point = event["point"]
            assert curve["batch"] == event["running"]
            assert len(curve["ms"]) == len(curve["rows"]) > 1
            assert curve["rows"] == sorted(curve["rows"])
            assert min(curve["ms"]) > 0
            assert curve["rows"][0] <= point["rows"] <= curve["rows"][-1]
            assert point["ms"] > 0
        assert {event["curve"]["batch"] for event in alone} == {1}
        assert {event["curve"]["batch"] for event in both} == {2}
        assert (
            len({(event["point"]["rows"], event["point"]["ms"]) for event in (*alone, *both)}) > 1
        )
        assert running.idle()


def test_nobody_watching_costs_nothing_and_a_key_guards_the_events(load: Any) -> None:
    with serving(load, api_keys=("k",)) as running:
        headers = {"authorization": "Bearer k"}
        assert httpx.get(f"{running.url}/events").status_code == 401
        page = httpx.get(running.url)
        assert page.status_code == 200
        assert "default-src 'none'" in page.headers["content-security-policy"]
        live = running.worker.observers[1]
        post(
            running,
            "/v1/completions",
            json={**BODY, "max_tokens": 5, "stream": False},
            headers=headers,
        )
        assert running.idle()
        assert live._last is None
        assert events(running, 1, headers=headers)[0]["ready"]
        assert wait_for(lambda: live.watchers == 0)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium")
def test_the_page_in_chromium(load: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """It loads without errors, moves while a request runs, fits a phone, and comes back after the
    server was away."""
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800}, color_scheme="dark")
        faults: list[str] = []
        asked: set[str] = set()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("request", lambda request: asked.add(urlsplit(request.url).hostname))
        with serving(lambda: slow(load(), 0.01)) as running:
            port = int(running.url.rpartition(":")[2])
            page.goto(running.url)
            page.wait_for_selector("#state.live", timeout=5000)
            assert f'"model": "{NAME}"' in page.text_content("#hint")
            assert page.is_visible("#hint")
            with busy(running):
                page.wait_for_selector("#trees rect", timeout=5000)
                page.wait_for_selector("#hint", state="hidden", timeout=5000)
                before = page.text_content("#trees p i")
                page.wait_for_function(
                    "old => document.querySelector('#trees p i').textContent !== old", arg=before
                )
                assert float(page.text_content("#tps")) > 0
                assert page.evaluate("document.querySelector('#bar').clientWidth") > 20
                page.wait_for_selector("#trees rect.accepted, #trees rect.rejected", timeout=5000)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            dark = page.evaluate(BACKGROUND)
            page.emulate_media(color_scheme="light")
            assert sum(page.evaluate(BACKGROUND)) > 600
            assert sum(dark) < 120
        page.wait_for_selector("#state.lost", timeout=5000)
        with serving(load, port=port):
            page.wait_for_selector("#state.live", timeout=8000)
        browser.close()
    assert faults == []
    assert asked == {"127.0.0.1"}
