"""The Virtual Token Counter: no credit for absence, and nothing to gain by new names;
test_scheduler.py has its bound."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from smart_decoding.engine.fairness import REMEMBERED, VirtualTokenCounter

L = 8  # tokens of one selection, at most
Sizes = st.lists(st.integers(1, L), min_size=60, max_size=120)


class Serving:
    """A server of one prompt at a time."""

    def __init__(self) -> None:
        self.counter = VirtualTokenCounter()
        self.queue: list[tuple[str, int]] = []  # client, prompt tokens; first come first
        self.served: Counter[str] = Counter()

    def add(self, client: str, size: int) -> None:
        self.counter.arrive([client], {name for name, _ in self.queue})
        self.queue.append((client, size))

    def serve(self) -> str:
        client = self.counter.select([name for name, _ in self.queue])
        place = next(i for i, (name, _) in enumerate(self.queue) if name == client)
        _, size = self.queue.pop(place)
        self.counter.charge(client, size)
        self.served[client] += size
        return client


@given(Sizes, st.integers(1, 4), st.sampled_from([10, 1000]))
def test_ever_new_names_gain_nothing_beyond_the_least_counter(
    sizes: list[int], at_once: int, different: int
) -> None:
    """Names of which a few wait at a time get, together, what as many clients would."""
    serving = Serving()
    serving.add("victim", L)
    serving.serve()
    names = 0
    for size in sizes:
        while sum(name == "victim" for name, _ in serving.queue) < 1:
            serving.add("victim", L)
        while len(serving.queue) <= at_once:
            least = min(serving.counter.served(name) for name, _ in serving.queue)
            names += 1
            name = f"new {names % different}"
            serving.add(name, size)
            assert serving.counter.served(name) >= least
        serving.serve()
    new = sum(tokens for name, tokens in serving.served.items() if name != "victim")
    assert new <= at_once * (serving.served["victim"] + 2 * L)


def test_the_least_served_is_next_and_the_last_one_loses_a_tie() -> None:
    counter = VirtualTokenCounter()
    counter.arrive("ab", "")
    assert counter.select("ab") == "a"
    assert counter.select("ab") == "b"
    counter.charge("b", 5)
    counter.charge("a", 2)
    assert counter.select("ba") == "a"
    counter.charge("a", 4)
    assert counter.select("ab") == "b"


def test_a_returning_client_starts_at_the_greatest_of_three_counters() -> None:
    for own, waits, last in ((9, 5, 7), (5, 9, 7), (5, 7, 9)):
        counter = VirtualTokenCounter()
        counter.charge("waits", waits)
        counter.charge("own", own)
        counter.arrive(["last"], [])
        assert counter.select(["last"]) == "last"
        counter.charge("last", last)
        counter.arrive(["own", "new"], ["waits"])
        assert counter.served("own") == 9
        assert counter.served("new") == max(waits, last)
        assert counter.served("waits") == waits


def test_state_is_bounded_and_who_is_forgotten_gains_nothing() -> None:
    counter = VirtualTokenCounter()
    counter.charge("old", 10**6)
    assert counter.select(["old"]) == "old"
    for i in range(2 * REMEMBERED):
        counter.arrive([f"new {i}"], [])
    assert len(counter._counters) == REMEMBERED
    assert counter.served("old") == counter.served("nobody") == 10**6


def test_a_client_that_waits_is_not_forgotten() -> None:
    counter = VirtualTokenCounter()
    counter.arrive(["waits"], [])
    counter.charge("waits", 10**6)
    waiting = {"waits"}
    for i in range(2 * REMEMBERED):
        counter.arrive([f"new {i}"], waiting)
        counter.charge(f"new {i}", 2 * 10**6)
    assert len(counter._counters) <= REMEMBERED + 1
    assert counter.served("waits") == 10**6
    everybody = [f"waits {i}" for i in range(2 * REMEMBERED)]
    counter.arrive(everybody, waiting)
    assert counter.select(["waits", *everybody]) == "waits"
