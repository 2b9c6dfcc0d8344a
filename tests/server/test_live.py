"""The live events: what they tell, whom, and what they cost."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
from serving import NAME, STREAMED, Running, busy, post, reading, serving, slow, wait_for


def events(running: Running, count: int, **options: Any) -> list[dict[str, Any]]:
    """The first `count` events."""
    return events_until(running, lambda found: len(found) == count, **options)


def events_until(
    running: Running, done: Callable[[list[dict[str, Any]]], bool], **options: Any
) -> list[dict[str, Any]]:
    """The events until those so far are enough."""
    found: list[dict[str, Any]] = []
    with httpx.stream("GET", f"{running.url}/events", timeout=10, **options) as stream:
        for line in stream.iter_lines():
            if line:
                found.append(json.loads(line.removeprefix("data: ")))
            if found and done(found):
                break
    return found


def drawn(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trees of these events that have nodes."""
    return [tree for event in found for tree in event["trees"] if tree["nodes"]]


def test_events_show_the_running_trees(load: Any) -> None:
    with serving(lambda: slow(load(), 0.005)) as running:
        quiet = events(running, 1)[0]
        assert quiet["name"] == NAME
        assert quiet["yield"] is quiet["expected"] is quiet["drafting"] is None
        assert quiet["ready"]
        assert quiet["running"] == 0
        assert quiet["tps"] == 0
        assert quiet["trees"] == []
        assert quiet["idle"] is None
        with busy(running):
            # A new token is followed by nothing: then a round's tree is empty, and on a busy
            # machine several events in a row may show such rounds.
            def enough(found: list[dict[str, Any]]) -> bool:
                return len(found) >= 4 and (bool(drawn(found[1:])) or len(found) > 40)

            _, *later = events_until(running, enough)
        assert all(
            event["running"] == 1
            and event["tps"] > 0
            and event["yield"] >= 1
            and event["expected"] >= 1
            and 0 <= event["drafting"] <= 1
            for event in later
        )
        assert later[-1]["expected"] > 1  # there were guesses
        assert later[-1]["drafting"] > 0
        tree = drawn(later)[0]
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
        past = events(running, 1)[0]  # the last result stays
        assert past["idle"] > 0
        assert past["tps"] > 0
        assert past["trees"]
        with busy(running, speculate=False):  # nothing of drafting: it does not count
            undrafted = events(running, 4)[-1]
        assert undrafted["running"] == 1
        assert undrafted["idle"] > past["idle"]


def test_a_policy_with_costs_shows_its_curve_and_the_point_moves(
    load: Any, short_profile: None
) -> None:
    with serving(lambda: slow(load(speculative_config={"method": "ngram"}), 0.02)) as running:
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
        live = running.llm.engine_thread.observers[-1]
        post(
            running,
            "/v1/completions",
            json={**STREAMED, "max_tokens": 5, "stream": False},
            headers=headers,
        )
        assert running.idle()
        assert live._last is None
        assert events(running, 1, headers=headers)[0]["ready"]
        assert wait_for(lambda: not live.watchers)


@contextmanager
def watching(running: Running, found: list[dict[str, Any]], **options: Any) -> Iterator[None]:
    """While a stream of events is open, all of which are found."""

    def keep(line: str) -> None:
        if line:
            found.append(json.loads(line.removeprefix("data: ")))

    with (
        httpx.stream("GET", f"{running.url}/events", timeout=10, **options) as stream,
        reading(stream, keep),
    ):
        yield


def test_nobody_sees_the_text_of_others(load: Any) -> None:
    """Numbers are for all, trees for whom they belong to: the last ones of their own."""
    alice, bob = ({"authorization": f"Bearer {key}"} for key in ("a", "b"))
    with serving(lambda: slow(load(), 0.005), api_keys=("a", "b")) as running:
        hers: list[dict[str, Any]] = []
        his: list[dict[str, Any]] = []
        with watching(running, hers, headers=alice), watching(running, his, headers=bob):
            with busy(running, headers=alice):
                assert wait_for(lambda: len(hers) > 4 and len(his) > 4)
            running.idle()
            busy_events = [event for event in his if event["running"]]
            assert busy_events
            assert all(event["tps"] > 0 and event["point"] for event in busy_events[1:])
            assert all(event["trees"] == [] and event["trees_idle"] is None for event in his)
            assert any(event["trees"] for event in hers)
            observed = len(hers)
            with busy(running, headers=bob, prompt="xyzxyzxyz"):
                assert wait_for(lambda: len(hers) > observed + 3 and his[-1]["trees"])
            last = hers[-1]  # her own last ones stay, and are known to be old
            assert last["running"] == 1
            assert [tree["id"] for tree in last["trees"]] == [
                t["id"] for t in hers[observed]["trees"]
            ]
            assert last["trees_idle"] > last["idle"]
            assert {tree["id"] for tree in his[-1]["trees"]}.isdisjoint(
                tree["id"] for tree in last["trees"]
            )


def test_addresses_are_clients_where_there_are_no_keys(load: Any) -> None:
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with serving(lambda: slow(load(), 0.005)) as running, httpx.Client(transport=elsewhere) as two:
        with busy(running):
            mine = events(running, 4)
            with two.stream("GET", f"{running.url}/events", timeout=10) as stream:
                other = json.loads(next(stream.iter_lines()).removeprefix("data: "))
        assert mine[-1]["trees"]
        assert other["running"] == 1
        assert other["trees"] == []


def test_an_address_of_many_shows_only_who_knows_the_token(load: Any) -> None:
    """As behind one NAT or reverse proxy."""
    hers, his, short = ({"x-viewer": token} for token in ("a" * 32, "b" * 32, "c"))
    with serving(lambda: slow(load(), 0.005), no_api_key=True) as running:
        with busy(running, hers), busy(running), busy(running, short):
            observed = [events(running, 4, headers=each)[-1] for each in (hers, his, {}, short)]
        assert all(event["running"] == 3 for event in observed)
        assert [len(event["trees"]) for event in observed] == [1, 0, 0, 0]


def test_on_loopback_a_page_shows_what_a_terminal_asks(load: Any) -> None:
    with serving(lambda: slow(load(), 0.005)) as running, busy(running):
        assert events(running, 4, headers={"x-viewer": "a" * 32})[-1]["trees"]


def test_a_client_may_watch_four_times(load: Any) -> None:
    elsewhere = httpx.HTTPTransport(local_address="127.0.0.2")
    with serving(load) as running, ExitStack() as stack:
        url = f"{running.url}/events"
        streams = [stack.enter_context(httpx.stream("GET", url, timeout=10)) for _ in range(4)]
        lines = [stream.iter_lines() for stream in streams]  # which would close them if dropped
        assert all(map(next, lines))
        refused = stack.enter_context(httpx.stream("GET", url, timeout=10))
        assert refused.status_code == 503
        assert "too_many_watchers" in refused.read().decode()
        two = stack.enter_context(httpx.Client(transport=elsewhere))
        assert stack.enter_context(two.stream("GET", url)).status_code == 200
