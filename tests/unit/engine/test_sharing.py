"""Clients share the time of rounds: each of k keeps a k-th of the speed that it has alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from smart_decoding.core.cost import CostModel
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams

from . import fakes
from .fakes import EOS, VOCAB, alone, finish, make_engine

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.request import Request

# as of SmolLM2 on two cores: 67 rows take 4.2 times as long as 3
STEEP = CostModel.from_table({1: {1: 1.0, 101: 7.0}}, {1: 0.1, 101: 0.7})


@pytest.fixture(autouse=True)
def steep(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "CHEAP_ROWS", STEEP)


def new_engine(policy: str, **config: Any) -> Engine:
    return make_engine(policy, pages=1024, max_num_seqs=72, max_model_len=256, **config)


def add(engine: Engine, client: str, count: int, tokens: int, length: int = 3) -> list[Request]:
    params = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
    requests = []
    for i in range(count):
        prompt = [(i * 7 + j + len(client)) % VOCAB for j in range(length)]
        requests += engine.add_request(f"{client}-{i}", prompt, params, client=client)
    return requests


def tokens_of(requests: Sequence[Request]) -> int:
    return sum(len(request.output) for request in requests)


def until_done(engine: Engine, requests: Sequence[Request]) -> float:
    """Seconds until all have ended."""
    began = engine.target.clock.now
    while not all(request.finished for request in requests):
        engine.step()
    return engine.target.clock.now - began


def test_who_would_wait_interrupts_no_drafting() -> None:
    """As `next_round` decides it: whether it has a request here or not, and only among others."""
    engine = new_engine("off")
    add(engine, "a", 1, 20)
    engine.step()
    scheduler = engine.scheduler
    assert not scheduler.can_begin([])
    scheduler.shares._owed = {"a": 5.0, "b": 5.0}
    scheduler.shares._allowed = 1.0
    assert scheduler.can_begin(["a"])  # it is alone
    assert not scheduler.can_begin(["b"])
    assert not scheduler.can_begin(["a", "b"])
    assert scheduler.can_begin(["b", "c"])
    scheduler.max_num_seqs = 1
    assert not scheduler.can_begin(["c"])


def begin(engine: Engine, requests: Sequence[Request]) -> None:
    while not all(request.output for request in requests):
        engine.step()


def speed_alone(policy: str, count: int, tokens: int) -> float:
    engine = new_engine(policy)
    requests = add(engine, "alone", count, tokens)
    begin(engine, requests)
    before = tokens_of(requests)
    seconds = until_done(engine, requests)
    return (tokens_of(requests) - before) / seconds


def rests(engine: Engine, requests: Sequence[Request]) -> int:
    """Rounds to the end of the requests in which a client sat out."""
    count = 0
    while not all(request.finished for request in requests):
        engine.step()
        count += bool(engine.scheduler.shares.resting)
    return count


@pytest.mark.parametrize("policy", ["off", "smart"])
def test_three_answers_beside_64_keep_half_their_speed_and_so_do_the_64(policy: str) -> None:
    engine = new_engine(policy)
    heavy = add(engine, "heavy", 64, 80)
    begin(engine, heavy)
    light = add(engine, "light", 3, 60)
    begin(engine, light)
    before = [tokens_of(requests) for requests in (light, heavy)]
    seconds = until_done(engine, light)
    for requests, began, count in zip((light, heavy), before, (3, 64), strict=True):
        gained = tokens_of(requests) - began
        assert gained / seconds > 0.45 * speed_alone(policy, count, 60)  # without: 0.23
    assert min(len(request.output) for request in heavy) > 10  # all of them went on
    finish(engine)
    for request in (*light, *heavy[::9]):
        assert request.output == alone(request.prompt, request.params)[0].output


def test_a_stream_of_prompts_leaves_another_client_half_its_speed() -> None:
    engine = new_engine("static", prefix_caching=False)
    light = add(engine, "light", 2, 100)
    begin(engine, light)
    before = tokens_of(light)
    add(engine, "heavy", 40, 2, length=200)
    seconds = until_done(engine, light)
    assert engine.scheduler.has_work  # the prompts went on beside it all the time
    assert (tokens_of(light) - before) / seconds > 0.45 * speed_alone("static", 2, 100)
    finish(engine)
    for request in light:
        assert request.output == alone(request.prompt, request.params)[0].output


@pytest.mark.parametrize("gap", [1, 2])
def test_prompts_with_gaps_between_them_leave_another_client_half_its_speed(gap: int) -> None:
    engine = new_engine("off", prefix_caching=False)
    light = add(engine, "light", 1, 150)
    begin(engine, light)
    before = tokens_of(light)
    began = engine.target.clock.now
    count = waited = 0
    heavy: list[Request] = []
    while not light[0].finished:
        waited = waited + 1 if all(request.finished for request in heavy) else 0
        if waited > gap:
            count += 1
            params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
            prompt = [(count * 11 + j) % VOCAB for j in range(200)]
            heavy = engine.add_request(f"heavy-{count}", prompt, params, client="heavy")
        engine.step()
    assert count > 5
    speed = (tokens_of(light) - before) / (engine.target.clock.now - began)
    assert speed > 0.4 * speed_alone("off", 1, 100)  # debts that gaps wipe out: 0.15


def test_a_stall_keeps_nobody_out_for_long() -> None:
    engine = new_engine("off")
    heavy = add(engine, "heavy", 64, 200)
    begin(engine, heavy)
    begin(engine, add(engine, "light", 3, 200))
    for _ in range(10):
        engine.step()
    before = tokens_of(heavy)
    stalled = engine.target.verify

    def verify(*args: Any) -> Any:
        engine.target.clock.now += 10_000.0
        engine.target.verify = stalled
        return stalled(*args)

    while tokens_of(heavy) == before:  # until it is in a round
        engine.target.verify = verify
        engine.step()
    before = tokens_of(heavy)
    for _ in range(80):
        engine.step()
    assert tokens_of(heavy) > before


def test_nobody_rests_where_rounds_cost_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes, "CHEAP_ROWS", CostModel.from_table({1: {1: 1.0, 101: 1.1}}))
    engine = new_engine("off")
    add(engine, "heavy", 64, 80)
    assert rests(engine, add(engine, "light", 3, 60)) <= 4  # to learn what rounds cost


def test_nobody_rests_where_all_ask_for_as_much_or_are_alone() -> None:
    engine = new_engine("off")
    requests = [request for name in "abcd" for request in add(engine, name, 4, 30)]
    assert rests(engine, requests) == 0
    assert rests(engine, add(engine, "alone", 64, 10)) == 0


class Slow:
    """A grammar that forbids the end. Masks take `each` seconds, in turn."""

    error = None
    dear = False
    beside = False

    def __init__(self, engine: Engine, each: Sequence[float]) -> None:
        self.clock = engine.target.clock
        self.left = list(each)
        self.spent = 0.0

    def allowed(self, path: Sequence[int]) -> np.ndarray:
        seconds = self.left.pop(0)
        self.clock.now += seconds
        self.spent += seconds
        return np.arange(VOCAB) != EOS

    def compute_beside(self) -> None:
        self.beside = True

    def ready(self, seconds: float = 0.0) -> bool:
        return True

    def before_error(self, tokens: Sequence[int]) -> Sequence[int]:
        return tokens

    def append(self, tokens: Sequence[int]) -> None:
        pass

    def take_seconds(self) -> float:
        spent = self.spent
        self.spent = 0.0
        return spent


def add_bombs(engine: Engine, count: int, tokens: int) -> list[Request]:
    params = SamplingParams(
        temperature=0.0,
        max_tokens=tokens,
        structured_outputs=StructuredOutputsParams(regex="a"),
    )
    return [
        request
        for i in range(count)
        for request in engine.add_request(f"bomb-{i}", [1, i], params, client="bombs")
    ]


@pytest.mark.parametrize(("each", "tokens"), [(1.0, 60), (20.0, 240)])
def test_a_grammar_is_charged_to_its_client(each: float, tokens: int) -> None:
    """Rounds of a second take six times `each` longer in six grammars."""

    engine = new_engine("off", constrain=lambda params: Slow(engine, [each] * 100))
    bombs = add_bombs(engine, 6, 60)
    begin(engine, bombs)
    light = add(engine, "light", 1, tokens)
    begin(engine, light)
    before = max(len(bomb.output) for bomb in bombs)
    seconds = until_done(engine, light)
    assert (tokens - 1) / seconds > 0.45 * speed_alone("off", 1, 60)
    assert not any(bomb.finished for bomb in bombs)
    gained = min(len(bomb.output) for bomb in bombs) - before
    assert gained >= tokens / (6 * each) - 2  # half the time is theirs
    finish(engine)


class Beside(Slow):
    """Its masks are computed in another thread, one after the other."""

    dear = True
    free = 0.0  # when that thread has done all that it was given

    def __init__(self, engine: Engine, each: Sequence[float]) -> None:
        super().__init__(engine, each)
        self.append([])

    def append(self, tokens: Sequence[int]) -> None:
        Beside.free = self.known = max(Beside.free, self.clock.now) + self.left.pop(0)

    def ready(self, seconds: float = 0.0) -> bool:
        if seconds:  # of less than a step each there would be many
            self.clock.now = max(self.known, self.clock.now)
        return self.clock.now >= self.known

    def allowed(self, path: Sequence[int]) -> np.ndarray:
        assert not path  # nothing is drafted
        assert self.ready()
        return np.arange(VOCAB) != EOS


@pytest.mark.parametrize("policy", ["off", "static"])
@pytest.mark.parametrize("each", [0.3, 20.0])
def test_rounds_wait_for_no_dear_grammar(each: float, policy: str) -> None:
    """Beside six of them an answer keeps more than half of its speed, and each goes on as soon as
    it can. Tight memory and few slots change no token."""
    Beside.free = 0.0
    engine = new_engine(policy, constrain=lambda params: Beside(engine, [each] * 61))
    bombs = add_bombs(engine, 6, 60)
    begin(engine, bombs)
    light = add(engine, "light", 1, 240)
    begin(engine, light)
    before = len(light[0].output)
    gained = tokens_of(bombs)
    seconds = until_done(engine, light)
    assert (240 - before) / seconds > 0.5 * speed_alone(policy, 1, 240)
    assert tokens_of(bombs) - gained > 0.8 * min(seconds / each, 6 * 60 - gained) - 1
    finish(engine)
    assert light[0].output == alone(light[0].prompt, light[0].params)[0].output
    for bomb in bombs:
        wanted = alone(bomb.prompt, bomb.params, lambda params: Slow(engine, [0.0] * 61))[0]
        assert bomb.output == wanted.output
        assert len(bomb.output) == 60


def test_a_clients_grammars_are_computed_beside_until_one_is_not_dear() -> None:
    engine = new_engine("off", constrain=lambda params: Slow(engine, [0.0] * 9))
    for dear, known in ((True, False), (True, True), (False, True), (False, False)):
        (request,) = add_bombs(engine, 1, 3)
        engine.step()
        assert request.constraint.beside == known
        request.constraint.dear = dear
        finish(engine)


@pytest.mark.parametrize("each", [[20.0, 0.0], [0.0, 20.0]])
def test_a_grammars_seconds_are_charged_once(
    each: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the round that they are a part of, which may be the answer's last one."""
    engine = new_engine("off", constrain=lambda params: Slow(engine, each))
    shares = engine.scheduler.shares
    charged: list[float] = []
    owe = shares.owe

    def noted(client: str, seconds: float) -> None:
        charged.extend([seconds] if client == "bombs" else [])
        owe(client, seconds)

    monkeypatch.setattr(shares, "owe", noted)
    add(engine, "light", 1, 60)
    (bomb,) = add_bombs(engine, 1, 2)
    while not bomb.finished:
        engine.step()
    assert len(charged) == 2
    assert sum(charged) == pytest.approx(20.0, rel=0.2)
    assert shares._times.least > 0.5  # no round's forward has taken nothing


def test_a_grammars_seconds_alone_are_not_charged_later() -> None:
    engine = new_engine("off", constrain=lambda params: Slow(engine, [20.0] * 3 + [0.0] * 100))
    bombs = add_bombs(engine, 1, 60)
    while len(bombs[0].output) < 3:
        engine.step()
    begin(engine, add(engine, "light", 1, 60))
    assert engine.scheduler.shares._owed.get("bombs", 0.0) < 5.0


def test_a_shared_round_in_which_the_clock_stands_still_is_charged_to_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = new_engine("off")
    add(engine, "heavy", 16, 3)
    add(engine, "light", 1, 3)
    monkeypatch.setattr(engine, "_clock", lambda: 0.0)
    engine.step()
    assert not engine.scheduler.shares._owed
    finish(engine)


def test_time_in_which_nobody_asks_pays_debts() -> None:
    engine = new_engine("off")
    both = [*add(engine, "heavy", 16, 3), *add(engine, "light", 1, 3)]
    begin(engine, both)
    engine.scheduler.shares.owe("heavy", 1000.0)
    finish(engine)
    for idle, heavy_waits in ((300.0, True), (2000.0, False)):
        engine.target.clock.now += idle
        both = [*add(engine, "heavy", 16, 3), *add(engine, "light", 1, 3)]
        engine.step()
        assert any(request.output for request in both)
        assert ("heavy" in engine.scheduler.shares.indebted) == heavy_waits
        finish(engine)


def test_who_rests_gives_way_where_the_others_wait_for_its_memory() -> None:
    engine = make_engine("off", pages=8, max_num_seqs=4, max_model_len=128)
    heavy = add(engine, "heavy", 1, 100)
    begin(engine, heavy)
    light = add(engine, "light", 1, 5, length=100)
    engine.scheduler.shares.next_round(["heavy", "light"], heavy)
    engine.scheduler.shares.owe("heavy", 1e6)
    finish(engine)
    for request in (*light, *heavy):
        assert request.output == alone(request.prompt, request.params)[0].output


def longest_wait(own_addresses: bool) -> float:
    """Seconds between two tokens of one answer, among 24 users who send prompts all the time."""
    engine = new_engine("off", prefix_caching=False)
    running: list[tuple[Request, int, float]] = []
    longest = 0.0
    for turn in range(600):
        if turn % 8 == 0:
            user = turn // 8 % 24
            params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
            prompt = [(turn + 3 * j) % VOCAB for j in range(100)]
            client = f"user {user}" if own_addresses else "all"
            found = engine.add_request(f"{turn}", prompt, params, client=client)
            running += [(request, 0, engine.target.clock.now) for request in found]
        engine.step()
        now = engine.target.clock.now
        for place, (request, tokens, since) in enumerate(running):
            if len(request.output) > tokens:
                longest = max(longest, now - since if tokens else 0.0)
                running[place] = (request, len(request.output), now)
        running = [entry for entry in running if not entry[0].finished]
    assert longest > 0
    return longest


def test_a_prompt_in_debt_does_not_stop_the_answer_to_it() -> None:
    """Among many clients no round has few rows, so that what one costs alone is a guess."""
    assert longest_wait(own_addresses=True) < 2 * longest_wait(own_addresses=False)


def test_a_client_in_debt_rests_where_rounds_carry_drafts() -> None:
    """Sixteen answers with trees beside one: their rows in a round are not one each."""
    engine = new_engine("static", prefix_caching=False)
    heavy = add(engine, "heavy", 16, 200)
    begin(engine, heavy)
    light = add(engine, "light", 1, 100)
    begin(engine, light)
    before = tokens_of(light)
    seconds = until_done(engine, light)
    assert (tokens_of(light) - before) / seconds > 0.4 * speed_alone("static", 1, 100)
