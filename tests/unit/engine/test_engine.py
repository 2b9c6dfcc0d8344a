"""Scheduling, memory and the life of a request."""

from collections.abc import Sequence

import pytest

from smart_decoding.core.policies import POLICIES
from smart_decoding.engine import engine as engine_module
from smart_decoding.engine.engine import Engine
from smart_decoding.engine.engine_thread import EngineLoop
from smart_decoding.engine.inbox import Inbox
from smart_decoding.engine.jobs import Ask, Job
from smart_decoding.engine.observers import Observers
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.scheduler import Batch
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.training.generate import Recorder

from .fakes import VOCAB, FakeDrafter, alone, finish, make_engine


def greedy(max_tokens: int | None = 10, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, **more)


def add(engine: Engine, name: str, prompt: list[int], params: SamplingParams) -> Request:
    (request,) = engine.add_request(name, prompt, params)
    return request


# --- scheduling


def test_first_come_first_served() -> None:
    engine = make_engine(max_num_seqs=2)
    requests = [add(engine, str(i), [i + 1] * 3, greedy(5)) for i in range(5)]
    first_step: dict[str, int] = {}
    for step in range(100):
        for request in engine.step():
            first_step.setdefault(request.id, step)
        assert len(engine.scheduler.running) <= 2
    assert [r.id for r in sorted(requests, key=lambda r: first_step[r.id])] == [
        "0",
        "1",
        "2",
        "3",
        "4",
    ]
    assert first_step["0"] == first_step["1"] < first_step["2"] == first_step["3"] < first_step["4"]


def test_a_long_prompt_goes_in_chunks_while_others_decode() -> None:
    engine = make_engine(max_num_batched_tokens=8, prefix_caching=False)
    short = add(engine, "short", [1, 2], greedy(20))
    engine.step()
    long = add(engine, "long", [i % VOCAB for i in range(30)], greedy(3))
    rows = []
    while not long.output:
        before = len(short.output)
        engine.step()
        assert len(short.output) == before + 1  # the prompt never stops the other's decoding
        rows.append(engine.last_round.round.verify_rows)
    assert rows == [9, 9, 9, 7]
    finish(engine)
    assert long.output == alone(long.prompt, greedy(3))[0].output


KEPT: dict[tuple[int, ...], list[int]] = {}  # plain decoding knows no policy


def outputs_alone(requests: Sequence[Request]) -> list[list[int]]:
    """What each greedy request gets with nothing else around."""
    found = []
    for request in requests:
        key = (*request.prompt, -request.params.max_tokens)
        if key not in KEPT:
            KEPT[key] = alone(request.prompt, greedy(request.params.max_tokens))[0].output
        found.append(KEPT[key])
    return found


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"off"}))
def test_rounds_that_carry_prompts_do_not_draft(policy: str) -> None:
    """Others wait for their first token. Rounds without prompts do draft, and nobody's tokens
    change."""
    engine = make_engine(policy, max_num_batched_tokens=4, prefix_caching=False)
    requests = [add(engine, "0", [1, 2], greedy(40))]
    drafted = {True: 0, False: 0}
    for i in range(1, 60):
        if i % 12 == 0 and i < 40:
            requests.append(add(engine, str(i), [i % VOCAB] * 6, greedy(20)))
        engine.step()
        batch = engine.last_round.round.batch
        drafted[batch.prefill_rows > 0] += len(engine.last_round.round.trees)
    finish(engine)
    assert drafted[True] == 0 < drafted[False]
    assert [r.output for r in requests] == outputs_alone(requests)


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"off"}))
@pytest.mark.parametrize("stays", [False, True])
def test_who_arrives_while_a_round_drafts_need_not_wait_for_its_forward(
    policy: str, stays: bool
) -> None:
    """Its prompt is in the next forward, if it has not left again; drafting goes on, and nobody's
    tokens change."""
    engine = make_engine(policy, max_num_seqs=3)
    requests = [add(engine, str(i), [i + 1, 2], greedy(200)) for i in range(2)]
    cuts = 0
    for _ in range(30):
        before = engine.last_round
        if not engine.step(lambda: [""]):
            cuts += 1
            if stays:
                requests.append(add(engine, f"new {cuts}", [cuts % VOCAB] * 6, greedy(2)))
            assert engine.last_round is before
            assert engine.step(lambda: [""])  # never twice in a row: the others go on
            assert not len(engine.last_round.round.trees)
            assert requests[-1].output
        engine.step()
    finish(engine)
    assert cuts > 5
    assert sum(r.metrics.accepted for r in requests) > 10
    assert [r.output for r in requests] == outputs_alone(requests)


def test_who_sits_out_after_its_drafts_were_dropped_has_a_plain_round_first() -> None:
    """Its drafter has read its last tokens already, and would find nothing new to read."""
    engine = make_engine("eagle2", max_num_seqs=3)
    first, second = (add(engine, str(i), [i + 1, 2], greedy(40)) for i in range(2))
    engine.step()
    assert not engine.step(lambda: [""])
    before = len(second.output)
    batch = Batch([first], [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.scheduler, "next_batch", lambda: batch)
        for _ in range(3):
            assert engine.step() == [first]
    assert len(second.output) == before
    engine.step()
    assert not len(engine.last_round.round.trees)
    assert len(second.output) == before + 1
    engine.step()
    assert len(engine.last_round.round.trees)
    finish(engine)
    assert [r.output for r in (first, second)] == outputs_alone([first, second])


def test_all_answers_of_a_request_are_aborted_and_no_others() -> None:
    engine = make_engine()
    several = engine.add_request("a", [1, 2], SamplingParams(max_tokens=9, n=2, temperature=1.0))
    others = [add(engine, name, [1, 2], greedy(9)) for name in ("ab", "b")]
    engine.abort("a")
    assert [r.aborted for r in (*several, *others)] == [True, True, False, False]
    engine.abort("b")
    assert others[1].aborted
    finish(engine)
    assert len(others[0].output) == 9


def test_drafting_goes_on_where_nobody_could_begin() -> None:
    engine = make_engine("static", max_num_seqs=1)
    add(engine, "0", [1, 2], greedy(40))
    engine.step()
    assert engine.step(lambda: [""])
    assert len(engine.last_round.round.trees)


@pytest.mark.parametrize("length", range(14, 20))
@pytest.mark.parametrize("chunk", [1, 2, 16])
def test_prompts_around_a_chunks_length(length: int, chunk: int) -> None:
    prompt = [i % VOCAB for i in range(length)]
    engine = make_engine("static", max_num_batched_tokens=chunk)
    request = add(engine, "x", prompt, greedy())
    while not request.output:
        engine.step()
    assert (
        request.metrics.rounds == 0
    )  # a prompt's rounds are not its answer's, however few rows were left
    finish(engine)
    assert request.output == alone(prompt, greedy())[0].output


def test_prompts_spare_the_last_layer_while_the_model_rarely_drafts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FakeDrafter, "aux_layers", (1, 3))
    monkeypatch.setattr(FakeDrafter, "resting_layers", (1, 2))
    monkeypatch.setattr(engine_module, "RECENT", 32)
    engine = make_engine("smart", drafter={})
    plan, read = engine.policy.plan, []
    forward = engine.target.forward
    engine.target.forward = lambda rows, layers: read.append(layers) or forward(rows, layers)
    engine.policy.plan = lambda batch: None
    add(engine, "first", [1, 2, 3], greedy(64))
    finish(engine)
    assert set(read) == {(1, 3)}  # rounds of answers always have all
    read.clear()
    add(engine, "second", [4, 5, 6], greedy(1))
    finish(engine)
    assert read == [(1, 2)]
    engine.policy.plan = plan
    add(engine, "third", [7, 8, 9], greedy(6))
    finish(engine)
    read.clear()
    add(engine, "fourth", [8, 8, 9], greedy(60))
    engine.step()
    assert read == [(1, 2)]  # few drafts are no reason to read all again
    finish(engine)
    read.clear()
    add(engine, "fifth", [1, 5, 9], greedy(1))
    finish(engine)
    assert read == [(1, 3)]


@pytest.mark.parametrize("stop", [None, 3])
def test_a_recorder_is_told_of_the_round_that_ends_an_answer(stop: int | None) -> None:
    """Of all tokens but the last, which no round reads: so that a draft head learns what an answer
    ends with."""
    engine = make_engine("off")
    recorder = Recorder((1,))
    engine.listen(recorder)
    params = SamplingParams(temperature=0.0, max_tokens=60 if stop else 10, ignore_eos=not stop)
    recorder.request_ids = {"0", "1"}
    requests = [add(engine, str(i), [i + 1, 5, 7], params) for i in range(2)]
    while engine.has_unfinished_requests:
        engine.step()
    for request, features, _ in recorder.done:
        assert len(features) == len(request.tokens) - 1
        assert features[:, 0].tolist() == request.tokens[:-1]
    assert len(recorder.done) == 2
    assert all(request.finished for request in requests)


def test_tree_nodes_yield_before_any_request_does() -> None:
    """Two requests fill the memory to the last slots: trees shrink, nobody is preempted."""
    engine = make_engine("static", pages=4, max_model_len=32, prefix_caching=False)
    requests = [add(engine, str(i), [i + 1] * 16, greedy(16)) for i in range(2)]
    finish(engine)
    for request in requests:
        assert request.output == alone(request.prompt, greedy(16))[0].output
        assert request.metrics.preemptions == 0
        assert request.metrics.verified < request.metrics.drafted


@pytest.mark.parametrize("caching", [True, False])
def test_the_youngest_is_preempted_and_finishes_with_the_same_tokens(caching: bool) -> None:
    engine = make_engine("chain", pages=6, max_model_len=80, prefix_caching=caching)
    old, young = (add(engine, str(i), [i + 1] * 8, greedy(64)) for i in range(2))
    finish(engine)
    assert (old.metrics.preemptions, young.metrics.preemptions > 0) == (0, True)
    assert old.metrics.finished < young.metrics.finished
    for request in (old, young):
        assert request.output == alone(request.prompt, greedy(64))[0].output
        assert (
            request.metrics.cached_tokens == 0
        )  # what it finds again of its own answer is not the prompt's


@pytest.mark.parametrize("steps", [1, 20])
def test_only_a_lack_of_memory_is_counted_as_a_preemption(steps: int) -> None:
    """Who is put back since a step raised is not; what it finds again of its own answer is not the
    prompt's either."""
    engine = make_engine("chain", max_num_batched_tokens=16)
    requests = [add(engine, str(i), [i + 1] * 20, greedy(64)) for i in range(2)]
    for _ in range(steps):
        engine.step()
    assert engine.suspend()
    engine.check_integrity()
    finish(engine)
    for request in requests:
        assert (request.metrics.preemptions, request.metrics.cached_tokens) == (0, 0)
        assert request.output == alone(request.prompt, greedy(64))[0].output


def test_cached_prefixes_are_not_computed_again() -> None:
    engine = make_engine()
    prompt = [i % VOCAB for i in range(40)]
    first = add(engine, "a", prompt, greedy(1))
    finish(engine)
    rows = engine.target.rows
    second = add(engine, "b", prompt, greedy(1))
    finish(engine)
    assert (first.metrics.cached_tokens, second.metrics.cached_tokens) == (0, 32)
    assert engine.target.rows - rows == 8
    assert first.output == second.output


def test_a_conversation_goes_on_from_any_answer_of_a_prompt() -> None:
    """Also from one whose prompt is in the cache by another answer's pages."""
    engine = make_engine("eagle2")
    prompt = [i % VOCAB for i in range(40)]
    answers = engine.add_request(
        "a", prompt, SamplingParams(n=3, temperature=1.0, max_tokens=30, ignore_eos=True)
    )
    finish(engine)
    assert len({tuple(answer.output) for answer in answers}) == 3
    for i, answer in enumerate(answers):
        following = add(engine, f"b{i}", [*answer.tokens, 7], greedy(3))
        finish(engine)
        assert following.metrics.cached_tokens == 64
        assert following.output == alone([*answer.tokens, 7], greedy(3))[0].output


def test_a_conversation_goes_on_from_its_cached_answer() -> None:
    engine = make_engine("eagle2")
    first = add(engine, "a", [1, 2, 3], greedy(40))
    finish(engine)
    second = add(engine, "b", [*first.tokens, 7, 8], greedy(30))
    finish(engine)
    assert second.metrics.cached_tokens == 32
    assert second.output == alone([*first.tokens, 7, 8], greedy(30))[0].output


# --- lifetime


@pytest.mark.parametrize("max_tokens", [1, 2, 7])
def test_never_more_than_max_tokens(max_tokens: int) -> None:
    engine = make_engine("static")
    request = add(engine, "x", [1], greedy(max_tokens))
    finish(engine)
    assert request.output == alone([1], greedy(7))[0].output[:max_tokens]
    assert request.stop.finish_reason == "length"
    assert request.tokens == [1, *request.output]


@pytest.mark.parametrize("max_tokens", [None, 1000])
def test_the_context_ends_an_answer(max_tokens: int | None) -> None:
    engine = make_engine("static", pages=3, max_model_len=48)
    request = add(engine, "x", [1] * 5, greedy(max_tokens))
    finish(engine)
    assert len(request.tokens) == 48
    assert request.output == alone([1] * 5, greedy(43))[0].output


def test_prompts_that_cannot_run_are_refused() -> None:
    engine = make_engine(pages=4, max_model_len=64)
    with pytest.raises(CapacityError, match="max_model_len=64"):
        engine.add_request("x", [1] * 64, greedy())
    for prompt in ([], [-1], [VOCAB]):
        with pytest.raises(ConfigError):
            engine.add_request("x", prompt, greedy())
    with pytest.raises(CapacityError, match="KV memory of 64 tokens"):
        make_engine(pages=4, max_model_len=65)
    assert not engine.has_unfinished_requests
    assert len(add(engine, "x", [1] * 63, greedy()).prompt) == 63
    finish(engine)


def test_an_id_cannot_run_twice_but_can_be_used_again() -> None:
    engine = make_engine()
    add(engine, "x", [1], greedy())
    with pytest.raises(ConfigError, match="already running"):
        engine.add_request("x", [1], greedy())
    finish(engine)
    add(engine, "x", [1], greedy())
    finish(engine)


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_abort_frees_everything_and_leaves_others_alone(steps: int) -> None:
    engine = make_engine("eagle2", max_num_batched_tokens=16, max_num_seqs=2)
    gone, stays, waits = (
        add(engine, name, [i + 1] * 20, greedy(12))
        for i, name in enumerate(("gone", "stays", "waits"))
    )
    for _ in range(steps):
        engine.step()
    engine.abort("gone")
    engine.abort("gone")
    engine.abort("never heard of")
    engine.check_integrity()
    assert gone.finished
    assert gone.aborted
    assert not gone.table.pages
    written = list(gone.output)
    finish(engine)
    assert gone.output == written
    for request in (stays, waits):
        assert request.output == alone(request.prompt, greedy(12))[0].output


def test_n_answers_differ_and_each_is_a_function_of_seed_and_index() -> None:
    params = SamplingParams(n=4, temperature=1.0, seed=11, max_tokens=12, ignore_eos=True)
    plain = [request.output for request in alone([1, 2], params)]
    assert len({tuple(output) for output in plain}) == 4
    engine = make_engine("static", max_num_seqs=3)
    answers = engine.add_request("x", [1, 2], params)
    assert [r.id for r in answers] == ["x#0", "x#1", "x#2", "x#3"]
    finish(engine)
    assert [r.output for r in answers] == plain
    engine.add_request("y", [1, 2], params)
    engine.step()
    engine.abort("y")
    finish(engine)


def test_seeds() -> None:
    def outputs(engine: Engine, seed: int | None) -> list[list[int]]:
        params = SamplingParams(temperature=1.0, seed=seed, max_tokens=12, ignore_eos=True)
        requests = [add(engine, str(i), [1, 2], params) for i in range(2)]
        finish(engine)
        return [request.output for request in requests]

    fixed = outputs(make_engine(), 5)
    assert fixed[0] == fixed[1] == outputs(make_engine(seed=9), 5)[0]
    drawn = outputs(make_engine(seed=1), None)
    assert drawn[0] != drawn[1]
    assert drawn == outputs(make_engine(seed=1), None)
    assert drawn[0] != outputs(make_engine(seed=2), None)[0]


def test_metrics_count_nodes_and_times() -> None:
    engine = make_engine("static")
    request = add(engine, "x", [1, 2], greedy(30))
    drafted = verified = emitted = 0
    while engine.has_unfinished_requests:
        engine.step()
        record = engine.last_round
        drafted = drafted + len(record.round.trees)
        verified = verified + len(record.round.kept)
        emitted += record.emitted
        assert record.round.verify_rows == (2 if emitted == 1 else 1 + len(record.round.kept))
        assert abs(record.controller_seconds) < 1e-9  # the clock moves only in forwards
    metrics = request.metrics
    assert (metrics.drafted, metrics.verified, emitted) == (drafted, verified, 30)
    assert 0 < metrics.accepted < metrics.verified
    assert metrics.wasted_rows == metrics.verified - metrics.accepted
    assert metrics.accepted + metrics.rounds + 1 >= 30 > metrics.rounds + 1
    assert 0 < metrics.ttft < metrics.finished


def test_nodes_beyond_the_end_of_an_answer_are_not_accepted() -> None:
    accepted = walked = 0
    for stop in range(VOCAB):
        engine = make_engine("static", drafter={"skill": 1.0})
        params = SamplingParams(
            temperature=0.0, max_tokens=40, ignore_eos=True, stop_token_ids=[stop]
        )
        requests = [add(engine, str(i), [i + 1, 2], params) for i in range(2)]
        before = accepted
        while engine.has_unfinished_requests:
            engine.step()
            accepted += sum(engine.last_round.accepted)
            walked += sum(map(len, engine.last_round.acceptance.path))
        assert accepted - before == sum(r.metrics.accepted for r in requests)
    assert 0 < accepted < walked


def test_a_drafter_cannot_be_changed_under_a_running_request() -> None:
    engine = make_engine("static")
    add(engine, "x", [1, 2], greedy(4))
    with pytest.raises(ConfigError, match="no request is running"):
        engine.listen(engine.drafter)
    finish(engine)
    engine.listen(engine.drafter)


def test_who_ended_before_it_began_waits_no_more() -> None:
    rounds = EngineLoop(Inbox(), Observers(), [])
    engine = make_engine(max_num_seqs=1)
    jobs = [Job(name, engine, [Ask([1, 2], greedy())]) for name in ("a", "b", "c")]
    for job in jobs:
        rounds._add(job)
    engine.step()
    engine.abort("c-0")
    rounds._drop_overdue()
    assert rounds._waiting == [jobs[1]]
