"""Clients share slots and the prompt tokens of a round by the Virtual Token Counter; nobody waits
for another one's grammar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from smart_decoding.engine.fairness import VirtualTokenCounter
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams

from .fakes import EOS, VOCAB, alone, finish, make_engine

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.scheduler import Batch


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


def test_nobody_gives_way_to_himself_or_to_who_holds_one_slot_less() -> None:
    engine = make_engine(max_num_seqs=4)
    (one,) = add(engine, "a", 1, tokens=60)
    many = add(engine, "b", 9, tokens=60)
    step(engine, 5)
    assert Counter(request.client for request in engine.scheduler.running) == {"a": 1, "b": 3}
    more = add(engine, "a", 1, length=4, tokens=60)
    step(engine, 5)
    assert Counter(request.client for request in engine.scheduler.running) == {"a": 2, "b": 2}
    more += add(engine, "a", 2, length=5, tokens=60)
    step(engine, 5)
    assert sum(request.metrics.preemptions for request in (one, *many, *more)) == 1
    finish(engine)


class Ledger:
    """Counts the rows that each client is really served, by the batches of an engine.

    most: rows that one client is served from one of its selections to its next one, at most."""

    def __init__(self, engine: Engine) -> None:
        self.rows: Counter[str] = Counter()
        self.most = 0
        self._at_selection: Counter[str] = Counter()
        self._charge = engine.scheduler.charge
        self._select = engine.scheduler._counter.select
        engine.scheduler.charge = self._charging  # type: ignore[method-assign]
        engine.scheduler._counter.select = self._selecting  # type: ignore[method-assign]

    def _charging(self, batch: Batch, rows: Sequence[int]) -> None:
        self._charge(batch, rows)
        for request, count in (*zip(batch.decode, rows, strict=True), *batch.prefill):
            self.rows[request.client] += count
        for client, count in self.rows.items():
            self.most = max(self.most, count - self._at_selection[client])

    def _selecting(self, waiting: Collection[str]) -> str:
        client = self._select(waiting)
        self._at_selection[client] = self.rows[client]
        return client


def backlogged(slots: int, f: tuple[int, int], g: tuple[int, int]) -> tuple[Ledger, int, int]:
    """Two clients with 20 requests waiting before each of 1,000 rounds, of chunks of 16.

    f, g: tokens of a prompt and of an answer. Returns the largest difference of the rows served
    over any interval, and the most requests that ran at a time."""
    engine = make_engine(max_num_seqs=slots, max_num_batched_tokens=16, prefix_caching=False)
    ledger = Ledger(engine)
    differences = [0]
    running = 0
    for turn in range(1000):
        waiting = Counter(request.client for request in engine.scheduler.waiting)
        for name, (length, tokens) in (("f", f), ("g", g)):
            params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
            prompt = [(turn + j) % VOCAB for j in range(length)]
            for i in range(waiting[name], 20):
                engine.add_request(f"{name}-{turn}-{i}", prompt, params, client=name)
        engine.step()
        running = max(running, len(engine.scheduler.running))
        differences.append(ledger.rows["f"] - ledger.rows["g"])
    return ledger, max(differences) - min(differences), running


LongPrompts = st.tuples(st.integers(30, 80), st.integers(1, 3))
ShortPrompts = st.tuples(st.integers(3, 12), st.integers(1, 3))


@settings(max_examples=6, deadline=None)
@given(LongPrompts, ShortPrompts)
@example((60, 2), (3, 2))
def test_two_backlogged_clients_are_served_within_2_m_rows(
    f: tuple[int, int], g: tuple[int, int]
) -> None:
    ledger, difference, running = backlogged(12, f, g)
    assert running < 12  # slots are free
    assert ledger.most <= 16 + 12 * max(f[1], g[1])  # a chunk, and answers in all slots
    assert difference <= 2 * ledger.most


@settings(max_examples=6, deadline=None)
@given(*[st.tuples(st.integers(1, 12), st.integers(6, 12))] * 2)
@example((2, 9), (5, 10))
def test_without_a_free_slot_the_difference_is_what_slots_hold(
    f: tuple[int, int], g: tuple[int, int]
) -> None:
    """Requests that give way are charged only for rows that were served."""
    _, difference, running = backlogged(4, f, g)
    assert running == 4
    assert difference <= 2 * 4 * max(sum(f), sum(g))


def test_a_short_prompt_does_not_wait_for_another_clients_long_one() -> None:
    engine = make_engine(max_num_batched_tokens=8, prefix_caching=False)
    (long,) = add(engine, "long", 1, length=200)
    step(engine, 2)
    (short,) = add(engine, "short", 1, length=6)
    (long_too,) = add(engine, "long too", 1, length=64)
    step(engine, 3)
    assert len(short.output) == 3
    step(engine, 35)  # from here on half of the prompt tokens are the third one's
    assert len(long_too.output) > 1
    assert not long.output
    finish(engine)
    for request in (long, short, long_too):
        assert request.output == alone(request.prompt, request.params)[0].output


def test_a_long_prompt_has_a_quarter_of_a_round_beside_another_clients_answer() -> None:
    """Each token of the answer waits for all rows of its round."""
    engine = make_engine(max_num_batched_tokens=64, prefix_caching=False)
    add(engine, "long", 1, tokens=200)
    step(engine, 2)
    add(engine, "long", 1, length=300)
    engine.step()
    assert engine.last_round.round.batch.prefill_rows == 64  # it holds up itself
    (short,) = add(engine, "short", 1)
    while not short.finished:
        engine.step()
        assert engine.last_round.round.batch.prefill_rows <= 16


@pytest.mark.parametrize("answering", ["long", "short"])
def test_a_head_that_has_no_slot_does_not_shorten_a_round(answering: str) -> None:
    """Prompts are cut where an answer of another client waits for them."""
    engine = make_engine(max_num_batched_tokens=64, max_num_seqs=2, prefix_caching=False)
    add(engine, answering, 1, tokens=200)
    step(engine, 2)
    add(engine, "long", 1, length=300)
    add(engine, "third", 1)
    engine.scheduler._counter.charge("third", 1000)
    step(engine, 2)
    rows = engine.last_round.round.batch.prefill_rows
    assert rows == (64 if answering == "long" else 16)


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
    counts: list[int] = []
    select = VirtualTokenCounter.select

    def counting(counter: VirtualTokenCounter, waiting: Any) -> str:
        clients = list(waiting)
        counts.append(len(clients))
        return select(counter, clients)

    monkeypatch.setattr(VirtualTokenCounter, "select", counting)
    step(engine, 30)
    assert max(counts) == 2
    assert len(engine.scheduler.waiting) == len(list(engine.scheduler.waiting)) == 49


class Grammar:
    """One that forbids the end."""

    error = None
    expensive = False
    in_background = False
    client = ""

    def allowed(self, path: Sequence[int]) -> np.ndarray:
        return np.arange(VOCAB) != EOS

    def accepts(self, path: Sequence[int]) -> bool:
        return EOS not in path

    def compute_in_background(self) -> None:
        self.in_background = True

    def ready(self, seconds: float = 0.0) -> bool:
        return True

    def before_error(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens

    def append(self, tokens: Sequence[int]) -> None:
        pass


class SlowGrammar(Grammar):
    """Its masks are computed in another thread, one after the other, `each` seconds long."""

    expensive = True
    free = 0.0  # when that thread has computed all masks

    def __init__(self, engine: Engine, each: float) -> None:
        self.clock = engine.target.clock
        self.each = each
        self.append([])

    def append(self, tokens: Sequence[int]) -> None:
        SlowGrammar.free = self.known = max(SlowGrammar.free, self.clock.now) + self.each

    def ready(self, seconds: float = 0.0) -> bool:
        if seconds:  # of less than a step each there would be many
            self.clock.now = max(self.known, self.clock.now)
        return self.clock.now >= self.known

    def allowed(self, path: Sequence[int]) -> np.ndarray:
        assert not path  # nothing is drafted
        assert self.ready()
        return super().allowed(path)


def add_slow(engine: Engine, count: int, tokens: int) -> list[Request]:
    form = StructuredOutputsParams(regex="a")
    params = SamplingParams(temperature=0.0, max_tokens=tokens, structured_outputs=form)
    return [
        request
        for i in range(count)
        for request in engine.add_request(f"slow-{i}", [1, i], params, client="slow")
    ]


@pytest.mark.parametrize("policy", ["off", "static"])
@pytest.mark.parametrize("each", [0.3, 20.0])
def test_rounds_wait_for_no_expensive_grammar(each: float, policy: str) -> None:
    """Beside six of them an answer keeps more than half of its speed, and each goes on as soon as
    it can. No token changes."""
    SlowGrammar.free = 0.0
    engine = make_engine(policy, constrain=lambda params: SlowGrammar(engine, each))
    slow = add_slow(engine, 6, 60)
    while not all(request.output for request in slow):
        engine.step()
    (light,) = add(engine, "light", 1, tokens=240)
    while not light.output:
        engine.step()
    before = len(light.output)
    gained = sum(len(request.output) for request in slow)
    began = engine.target.clock.now
    while not light.finished:
        engine.step()
    seconds = engine.target.clock.now - began
    alone_engine = make_engine(policy)
    (other,) = add(alone_engine, "light", 1, tokens=240)
    finish(alone_engine)
    assert (240 - before) / seconds > 0.5 * 240 / (other.metrics.finished or 0.0)
    gained = sum(len(request.output) for request in slow) - gained
    assert gained > 0.8 * min(seconds / each, 6 * 60) - 7
    finish(engine)
    assert light.output == alone(light.prompt, light.params)[0].output
    for request in slow:
        assert (
            request.output
            == alone(request.prompt, request.params, lambda params: Grammar())[0].output
        )
        assert len(request.output) == 60


def test_expensive_grammars_do_not_keep_all_slots() -> None:
    """They decode few rows, so that by these alone their client would be next for ever."""
    SlowGrammar.free = 0.0
    engine = make_engine(max_num_seqs=4, constrain=lambda params: SlowGrammar(engine, 100.0))
    add_slow(engine, 12, 60)
    step(engine, 20)
    assert len(engine.scheduler.running) == 4
    for i in range(6):
        (light,) = add(engine, "light", 1, length=20 + i, tokens=20)
        rounds = 0
        while not light.finished:
            engine.step()
            rounds += 1
        assert rounds < 60


def test_a_clients_grammars_are_computed_in_background_until_one_is_cheap() -> None:
    engine = make_engine(constrain=lambda params: Grammar())
    for expensive, known in ((True, False), (True, True), (False, True), (False, False)):
        (request,) = add_slow(engine, 1, 3)
        engine.step()
        assert request.constraint.in_background == known
        request.constraint.expensive = expensive
        finish(engine)


def test_a_client_gets_no_credit_for_the_time_that_its_mask_takes() -> None:
    """Its prompts wait behind a request whose mask is not there."""
    SlowGrammar.free = 0.0
    engine = make_engine(
        max_num_batched_tokens=16,
        prefix_caching=False,
        constrain=lambda params: SlowGrammar(engine, 100.0),
    )
    add_slow(engine, 1, 3)
    add(engine, "slow", 20, length=200, tokens=1)
    f = add(engine, "f", 1, length=900, tokens=1)
    while not f[0].finished:
        engine.step()
    assert engine.target.clock.now < 100.0
    engine.target.clock.now = 101.0
    engine.step()
    ledger = Ledger(engine)
    f += add(engine, "f", 1, length=8, tokens=1)
    rounds = 0
    while not f[1].finished:
        engine.step()
        rounds += 1
    assert rounds <= 3
    assert ledger.rows["slow"] <= 48
    finish(engine)


@pytest.mark.parametrize("late", [False, True])
def test_a_running_request_without_its_mask_is_charged_a_row_a_round(late: bool) -> None:
    """And no other one, such as a prompt whose turn has not come."""
    SlowGrammar.free = 0.0
    engine = make_engine(
        max_num_batched_tokens=16,
        prefix_caching=False,
        constrain=lambda params: SlowGrammar(engine, 1.0 if late else 1000.0),
    )
    (slow,) = add_slow(engine, 1, 60)
    engine.target.clock.now = SlowGrammar.free
    while not slow.output:
        engine.step()
    add(engine, "f", 1, length=300)
    add(engine, "g", 1, length=300)
    served = engine.scheduler._counter.served
    step(engine, 2)
    ledger = Ledger(engine)
    before = {client: served(client) for client in ("slow", "f", "g")}
    for _ in range(10):
        engine.step()
    charged = {client: served(client) - before[client] for client in before}
    assert charged == {**ledger.rows, "slow": 10}
