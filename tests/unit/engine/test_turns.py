"""Clients take turns: at slots, at the prompt tokens of a round, and whatever else they share."""

from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from smart_decoding.engine.engine import Engine
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.turns import REMEMBERED, Turns, Waiting

from .fakes import VOCAB, alone, finish, make_engine


def add(
    engine: Engine, client: str, count: int, length: int = 3, tokens: int = 20
) -> list[Request]:
    """`count` requests of one client, each with a prompt of its own."""
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = []
    for i in range(count):
        prompt = [(i * 7 + j + len(client)) % VOCAB for j in range(length)]
        requests += engine.add_request(f"{client}-{length}-{i}", prompt, params, client=client)
    return requests


def step(engine: Engine, rounds: int) -> None:
    for _ in range(rounds):
        engine.step()


@dataclass(eq=False)
class Named:
    client: str


def test_the_next_is_who_holds_least_then_who_waits_longest_then_who_came_first() -> None:
    turns = Turns()
    a, b = Named("a"), Named("b")
    assert turns.choose([a, b]) is a
    assert turns.choose([a, b], {"a": 1}) is b
    turns.taken("a")
    assert turns.choose([a, b]) is b
    turns.taken("b")
    assert turns.choose([b, a]) is a
    for i in range(REMEMBERED):
        turns.taken(str(i))
    assert turns.choose([b, a]) is b  # both are newcomers again
    assert len(turns._last) == REMEMBERED


def test_ever_new_names_are_not_always_the_next() -> None:
    turns = Turns()
    for name in ("a", "b", "c"):
        turns.taken(name)
    waiting = [Named("a"), Named("b"), Named("new")]
    order = []
    for i in range(6):
        one = turns.choose(waiting)
        turns.taken(one.client)
        waiting.remove(one)
        waiting.append(Named(f"new {i}"))
        order.append(one.client)
    assert order == ["a", "b", "new", "new 0", "new 1", "new 2"]
    turns.taken("x")
    assert turns.choose([Named("x"), Named("newest")]).client == "newest"


def test_a_client_does_not_wait_behind_all_requests_of_another() -> None:
    engine = make_engine(max_num_seqs=1)
    many = add(engine, "many", 6)
    step(engine, 3)
    few = add(engine, "few", 2)
    finish(engine)
    order = sorted((*many, *few), key=lambda request: request.metrics.finished or 0.0)
    assert [request.client for request in order] == ["many", "few", "many", "few", *["many"] * 4]
    assert order[0::2][0] is many[0]  # first come, first served within a client


def test_who_holds_all_slots_gives_up_as_many_as_another_wants_up_to_half() -> None:
    engine = make_engine(max_num_seqs=4)
    many = add(engine, "many", 9, tokens=60)
    step(engine, 5)
    assert Counter(request.client for request in engine.scheduler.running) == {"many": 4}
    few = add(engine, "few", 3, tokens=60)
    step(engine, 6)
    assert Counter(request.client for request in engine.scheduler.running) == {"many": 2, "few": 2}
    assert many[0].metrics.preemptions == 0  # the youngest give way
    finish(engine)
    for request in (*many, *few):
        assert request.output == alone(request.prompt, request.params)[0].output


def test_nobody_gives_way_to_himself_or_to_who_holds_as_much() -> None:
    engine = make_engine(max_num_seqs=4)
    engine.scheduler.shares = SimpleNamespace(  # type: ignore[assignment]
        next_round=lambda clients, decoding: None,
        charge=lambda batch, done, seconds: None,
        idle=lambda seconds: None,
        indebted=set(),  # who waits for debts holds less
        resting=set(),
    )
    requests = [*add(engine, "a", 5), *add(engine, "b", 5), *add(engine, "c", 5)]
    finish(engine)
    assert sum(request.metrics.preemptions for request in requests) == 0


def test_a_short_prompt_does_not_wait_for_another_clients_long_one() -> None:
    engine = make_engine(max_num_batched_tokens=8, prefix_caching=False)
    (long,) = add(engine, "long", 1, length=200)
    step(engine, 2)
    (short,) = add(engine, "short", 1, length=6)
    (long_too,) = add(engine, "long too", 1, length=64)
    step(engine, 3)
    assert len(short.output) == 3
    step(engine, 20)  # in turn from here on: after 20 rounds, half of them are the third one's
    assert len(long_too.output) > 1
    assert not long.output
    finish(engine)
    for request in (long, short, long_too):
        assert request.output == alone(request.prompt, request.params)[0].output


@pytest.mark.parametrize("pages", [24, 12])
def test_no_order_and_no_lack_of_memory_changes_an_answer(pages: int) -> None:
    engine = make_engine("chain", pages=pages, max_num_seqs=4, max_model_len=80)
    requests = [*add(engine, "a", 8, 20), *add(engine, "b", 2, 30), *add(engine, "c", 5, 2)]
    finish(engine)
    for request in requests:
        assert request.output == alone(request.prompt, request.params)[0].output


def test_a_round_does_not_look_at_all_that_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(max_num_seqs=1)
    add(engine, "many", 50)
    add(engine, "few", 1)
    seen: list[int] = []
    choose = Turns.choose

    def counting(turns: Turns, waiting: list[Request], *held: dict[str, int]) -> Request:
        seen.append(len(waiting))
        return choose(turns, waiting, *held)

    monkeypatch.setattr(Turns, "choose", counting)
    step(engine, 30)
    assert max(seen) == 2
    assert len(engine.scheduler.waiting) == len(list(engine.scheduler.waiting)) == 49


def test_lines_keep_each_clients_order() -> None:
    a, b, c = Named("x"), Named("x"), Named("y")
    waiting: Waiting[Named] = Waiting()
    for one in (b, c):
        waiting.append(one)
    waiting.appendleft(a)
    assert list(map(id, waiting)) == list(map(id, (a, b, c)))
    assert list(map(id, waiting.heads())) == list(map(id, (a, c)))
    waiting.remove(c)
    assert c not in waiting
    assert b in waiting
    waiting.clear()
    assert not waiting
    assert waiting.heads() == []
