"""The Virtual Token Counter: its bound, no credit for absence, and nothing to gain by new names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smart_decoding.engine.fairness import REMEMBERED, ClientQueues, VirtualTokenCounter

L = 8  # tokens of one selection, at most
M = 24  # tokens charged from one selection of a client to its next one, at most
Sizes = st.lists(st.integers(1, L), min_size=60, max_size=120)


class Serving:
    """A server of one prompt at a time. Answers run on beside it, charged in every round."""

    def __init__(self) -> None:
        self.counter = VirtualTokenCounter()
        self.queue: list[tuple[str, int]] = []  # client, prompt tokens; first come first
        self.served: Counter[str] = Counter()
        self.since: Counter[str] = Counter()  # tokens since a client's last selection

    def add(self, client: str, size: int) -> None:
        self.counter.arrive([client], {name for name, _ in self.queue})
        self.queue.append((client, size))

    def serve(self) -> str:
        client = self.counter.select([name for name, _ in self.queue])
        place = next(i for i, (name, _) in enumerate(self.queue) if name == client)
        _, size = self.queue.pop(place)
        self.since[client] = 0
        self.charge(client, size)
        return client

    def charge(self, client: str, tokens: int) -> None:
        self.counter.charge(client, tokens)
        self.served[client] += tokens
        self.since[client] += tokens

    def decode(self, client: str, tokens: int) -> None:
        """A client's running answers gain tokens, as many as M allows."""
        self.charge(client, max(0, min(tokens, M - self.since[client])))


def backlogged(
    serving: Serving, names: str, sizes: list[int], between: Callable[[int], None]
) -> None:
    """Serves clients that always have something waiting, and checks f and g over all intervals."""
    differences = [serving.served["f"] - serving.served["g"]]
    for i, size in enumerate(sizes):
        for name in names:
            while sum(client == name for client, _ in serving.queue) < 2:
                serving.add(name, 1 + (size + ord(name) * i) % L)
        serving.serve()
        between(i)
        differences.append(serving.served["f"] - serving.served["g"])
    assert max(differences) - min(differences) <= 2 * M


@given(Sizes, st.lists(st.tuples(st.sampled_from("fgh"), st.integers(0, M)), min_size=120))
def test_two_backlogged_clients_are_served_within_the_papers_bound(
    sizes: list[int], decoded: list[tuple[str, int]]
) -> None:
    """f decodes much and g little, or the other way round; h comes beside them."""
    serving = Serving()
    for name in "fgh":
        serving.add(name, 1)
    backlogged(serving, "fgh", sizes, lambda i: serving.decode(*decoded[i]))


@given(Sizes, st.integers(1, 100_000))
def test_a_client_that_comes_back_gets_no_credit_for_its_absence(
    sizes: list[int], meanwhile: int
) -> None:
    serving = Serving()
    serving.add("f", 1)
    serving.serve()
    serving.add("g", 1)
    serving.serve()
    serving.counter.charge("g", meanwhile)
    for waiting in (True, False):  # g, when f comes back
        if waiting:
            serving.add("g", 1)
        serving.add("f", 1)
        serving.served.clear()
        backlogged(serving, "fg", sizes, lambda i: None)
        while serving.queue:
            serving.serve()
        serving.counter.charge("g", meanwhile)
        serving.add("g", 1)
        serving.serve()


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


@dataclass(eq=False)
class Item:
    client: str


def test_queues_keep_each_clients_order() -> None:
    a, b, c = Item("x"), Item("x"), Item("y")
    queues: ClientQueues[Item] = ClientQueues()
    for item in (b, c):
        queues.append(item)
    queues.appendleft(a)
    assert list(map(id, queues)) == list(map(id, (a, b, c)))
    assert list(map(id, queues.heads())) == list(map(id, (a, c)))
    assert queues.head("x") is a
    assert queues.head("z") is None
    assert list(queues.clients) == ["x", "y"]
    queues.remove(c)
    assert c not in queues
    assert b in queues
    with pytest.raises(ValueError, match="not in"):
        queues.remove(c)
    assert [queues.popleft("x"), queues.popleft("x")] == [a, b]
    assert not queues.clients
    with pytest.raises(KeyError):
        queues.popleft("x")
    queues.append(a)
    queues.clear()
    assert not queues
    assert queues.heads() == []
