"""One `LLM` that many threads call: answers as if each were alone, and nobody's failure is
another's."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest
from serving import OUTGROWING, save_tiny_model, slow, wait_for

from smart_decoding.engine.engine_thread import GIVE_UP, EngineThread, Isolation
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.structured import StructuredOutputsParams
from smart_decoding.errors import CapacityError, ConfigError, EngineStoppedError
from smart_decoding.models.text import grammars
from smart_decoding.models.text.grammars import GrammarConstraint

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

THREADS = 8
REQUESTS = 200
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def request_of(i: int) -> tuple[list[int], SamplingParams]:
    """Short prompts, some with a long beginning in common; greedy and drawn, one answer or two."""
    prompt = [*range(40), i % 7] if i % 3 == 0 else [i % 11, i % 5, i % 3]
    if i % 2:
        drawn = {"temperature": 0.8, "seed": i % 13, "n": 2 if i % 5 == 0 else 1}
    else:
        drawn = {"temperature": 0}
    return prompt, SamplingParams(max_tokens=1 + i % 6, logprobs=0, **drawn)


def said(outputs: list[Any]) -> list[Any]:
    """All that a caller can compare, the logprobs to the last bit."""
    return [
        (answer.token_ids, answer.text, answer.finish_reason, answer.logprobs)
        for output in outputs
        for answer in output.outputs
    ]


def said_once(llm: LLM) -> list[int]:
    return llm.generate("abc", GREEDY)[0].outputs[0].token_ids


def in_threads(work: Any, count: int = THREADS) -> list[Any]:
    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(work, range(count)))


def check_free(llm: LLM) -> None:
    assert not llm.engine.has_unfinished_requests
    llm.engine.check_integrity()
    assert llm.engine.pool.used == 0


@pytest.mark.parametrize("prefix_caching", [True, False])
def test_many_threads_get_what_one_gets(load: Any, prefix_caching: bool) -> None:
    """Few pages: requests are preempted, too."""
    llm = load(enable_prefix_caching=prefix_caching, kv_cache_tokens=256, max_model_len=128)
    expected = [said(llm.generate(*request_of(i))) for i in range(REQUESTS)]
    most = 0

    def mine(thread: int) -> bool:
        nonlocal most
        order = [(i + 25 * thread) % REQUESTS for i in range(REQUESTS)]
        for i in order:
            assert said(llm.generate(*request_of(i))) == expected[i]
            most = max(most, len(llm.engine.scheduler.running))
        return True

    assert all(in_threads(mine))
    assert most > 1  # rounds were shared
    check_free(llm)


def test_rounds_are_shared_and_nobody_waits_for_a_whole_answer(load: Any) -> None:
    llm = slow(load(speculative_config=False), 0.002)
    ended = []

    def call(tokens: int) -> None:
        llm.generate([1, 2, 3], SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True))
        ended.append(tokens)

    long = threading.Thread(target=call, args=(400,))
    long.start()
    assert wait_for(lambda: bool(llm.engine.scheduler.running))
    call(5)
    assert ended == [5]
    long.join()
    check_free(llm)


def test_streams_and_chats_of_several_threads(load: Any) -> None:
    llm = load()
    (expected,) = llm.generate("abc", GREEDY)
    conversation = [{"role": "user", "content": "hello"}]
    (chat,) = llm.chat(conversation, GREEDY)

    def mine(thread: int) -> str:
        if thread % 2:
            return str(llm.chat(conversation, GREEDY)[0].outputs[0].text)
        return "".join(llm.stream("abc", GREEDY))

    texts = in_threads(mine)
    assert texts == [expected.outputs[0].text, chat.outputs[0].text] * (THREADS // 2)
    check_free(llm)


def test_engines_that_share_weights_take_turns(load: Any) -> None:
    first = load(enable_prefix_caching=False)
    static = {"method": "ngram", "policy": "static"}
    engines = [first, first.sharing_weights(False), first.sharing_weights(static)]
    expected = [said(first.generate(*request_of(i))) for i in range(40)]
    overlaps = []
    for llm in engines:
        step = llm.engine.step

        def watched(*given: Any, step: Any = step) -> Any:
            overlaps.append(sum(each.engine.has_unfinished_requests for each in engines) > 1)
            return step(*given)

        llm.engine.step = watched

    def mine(thread: int) -> bool:
        llm = engines[thread % 3]
        return all(said(llm.generate(*request_of(i))) == expected[i] for i in range(40))

    assert all(in_threads(mine, 6))
    assert not any(overlaps)
    for llm in engines:
        check_free(llm)


def test_engines_that_share_weights_may_be_stepped_in_turn(load: Any) -> None:
    """As benchmarks do: each holds requests meanwhile, in pages of its own."""
    first = load(enable_prefix_caching=False)
    static = {"method": "ngram", "policy": "static"}
    engines = [first.engine, first.sharing_weights(static).engine]
    params = SamplingParams(temperature=0.0, max_tokens=20)
    prompts = [list(range(3 + i, 30 + 3 * i)) for i in range(3)]
    (expected, drafted) = (
        [e.add_request(str(i), p, params)[0] for i, p in enumerate(prompts)] for e in engines
    )
    while any(engine.has_unfinished_requests for engine in engines):
        for engine in engines:
            engine.step()
    alone = [first.generate([prompt], params)[0].outputs[0].token_ids for prompt in prompts]
    assert [r.output for r in expected] == [r.output for r in drafted] == [list(a) for a in alone]
    check_free(first)


def failing(touched: Any) -> NoReturn:
    raise RuntimeError("mine")


def test_what_one_caller_does_wrong_does_not_reach_the_others(load: Any) -> None:
    llm = slow(load(enable_prefix_caching=False), 0.001)
    expected = said_once(llm)
    over = threading.Event()

    def good(_: int) -> int:
        count = 0
        while not over.is_set() or not count:
            assert said_once(llm) == expected
            count += 1
        return count

    def interrupt(touched: Any) -> None:
        raise KeyboardInterrupt

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(good, i) for i in range(3)]
        try:
            for _ in range(5):
                with pytest.raises(CapacityError):
                    llm.generate(["abc", [1] * 2000])
                with pytest.raises(ConfigError):
                    llm.generate([[10_000]])
                with pytest.raises(RuntimeError, match="mine"):
                    llm.generate("abc", GREEDY, on_step=failing)
                with pytest.raises(KeyboardInterrupt):
                    llm.generate("abc", GREEDY, on_step=interrupt)
                with pytest.raises(ConfigError, match="on_step cannot ask the model"):
                    llm.generate("abc", GREEDY, on_step=lambda touched: llm.generate("a"))
                pieces = llm.stream("abc", GREEDY)
                next(pieces)
                pieces.close()
        finally:
            over.set()
        assert all(other.result() for other in others)
    check_free(llm)


def check_poison_ends_alone(llm: Any, params: SamplingParams, expected: str) -> None:
    """Token 7 raises: to who asks for it, while others get what they want."""

    def mine(thread: int) -> bool:
        if thread % 4:
            return bool(llm.generate("abc", params)[0].outputs[0].text == expected)
        with pytest.raises(RuntimeError, match="poison"):
            llm.generate([[1, 7, 2]], params)
        return True

    assert all(in_threads(mine))


def test_a_request_that_breaks_a_round_ends_alone(
    load: Any, caplog: pytest.LogCaptureFixture
) -> None:
    # Plainly: nobody drafts the token for another.
    llm = slow(load(enable_prefix_caching=False, speculative_config=False), 0.001)
    free = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias={7: -100})
    (expected,) = llm.generate("abc", free)
    forward = llm.target.forward

    def raising(rows: Any, aux_layers: Any) -> Any:
        if (rows.token == 7).any():
            raise RuntimeError("poison")
        return forward(rows, aux_layers)

    llm.target.forward = raising  # type: ignore[method-assign]

    caplog.set_level("WARNING", "smart")
    check_poison_ends_alone(llm, free, expected.outputs[0].text)
    assert not caplog.records  # the caller is told by the exception
    check_free(llm)


def test_a_request_that_breaks_a_round_before_it_begins_ends_alone(load: Any) -> None:
    """Nothing runs then that could be suspected, and the engine itself is sound."""
    llm = slow(load(enable_prefix_caching=False, speculative_config=False), 0.001)
    (expected,) = llm.generate("abc", GREEDY)
    scheduler = llm.engine.scheduler
    next_batch = scheduler.next_batch

    def raising() -> Any:
        if any(7 in request.prompt for request in scheduler.waiting):
            raise RuntimeError("poison")
        return next_batch()

    scheduler.next_batch = raising  # type: ignore[method-assign]

    check_poison_ends_alone(llm, GREEDY, expected.outputs[0].text)
    check_free(llm)


def test_who_waits_for_a_mask_has_not_survived(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its decoding round breaks, which comes after steps that wait for its mask."""
    pytest.importorskip("llguidance")
    llm = slow(load(enable_prefix_caching=False, speculative_config=False), 0.001)
    (poison,) = llm.tokenizer.encode("h", add_special_tokens=False)
    free = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True, logit_bias={poison: -100})
    form = StructuredOutputsParams(regex="h{30}")
    bound = SamplingParams(temperature=0, max_tokens=20, structured_outputs=form)
    (expected,) = llm.generate("abc", free)
    forward = llm.target.forward
    mask = GrammarConstraint._mask
    after = Isolation.after_failed_round
    failed = []

    def raising(rows: Any, aux_layers: Any) -> Any:
        if (rows.token == poison).any():
            raise RuntimeError("poison")
        return forward(rows, aux_layers)

    def late(constraint: GrammarConstraint, path: Any) -> Any:
        time.sleep(0.05)
        return mask(constraint, path)

    def counting(isolation: Isolation, error: Exception) -> None:
        failed.append(error)
        after(isolation, error)

    monkeypatch.setattr(grammars, "EXPENSIVE", -1.0)
    monkeypatch.setattr(GrammarConstraint, "_mask", late)
    monkeypatch.setattr(Isolation, "after_failed_round", counting)
    llm.target.forward = raising  # type: ignore[method-assign]
    with ThreadPoolExecutor() as pool:
        other = pool.submit(llm.generate, "abc", free)
        with pytest.raises(RuntimeError, match="poison"):
            llm.generate("abc", bound)
        assert other.result()[0].outputs[0].text == expected.outputs[0].text
    assert len(failed) == 1
    check_free(llm)


def test_a_grammar_that_fails_in_a_round_ends_alone(
    load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The round does not: no request is run again."""
    pytest.importorskip("llguidance")
    llm = slow(load(), 0.001)
    (expected,) = llm.generate("abc", GREEDY)
    monkeypatch.setattr(Isolation, "after_failed_round", None)
    bound = SamplingParams(
        temperature=0,
        max_tokens=90,
        structured_outputs=StructuredOutputsParams(grammar=OUTGROWING),
    )

    def mine(thread: int) -> bool:
        if thread % 4:
            return bool(llm.generate("abc", GREEDY)[0].outputs[0].text == expected.outputs[0].text)
        with pytest.raises(ConfigError, match="structured_outputs: Parser Error"):
            llm.generate("abc", bound)
        return True

    assert all(in_threads(mine))
    check_free(llm)


INTERRUPTED = """
import contextlib, signal, sys, threading, time
sys.path.append({tests!r})
from serving import slow
from smart_decoding import LLM, SamplingParams
from smart_decoding.errors import EngineStoppedError

signal.signal(signal.SIGALRM, signal.default_int_handler)
llm = slow(LLM({model!r}, dtype="float32", max_model_len=1024, speculative_config=False), 0.002)
params = SamplingParams(temperature=0, max_tokens=150, ignore_eos=True)
wanted = llm.generate("abc", params)[0].outputs[0].token_ids
found = []
other = threading.Thread(
    target=lambda: found.append(llm.generate("abc", params)[0].outputs[0].token_ids)
)
other.start()
interrupts = 0
while other.is_alive():
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        llm.generate("xyz", params)
    except KeyboardInterrupt:
        interrupts += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
assert found == [wanted]
assert not llm.engine.has_unfinished_requests
llm.engine.check_integrity()
print(interrupts)

def left_behind():
    with contextlib.suppress(EngineStoppedError):
        llm.generate("abc", params)

threading.Thread(target=left_behind, daemon=True).start()
time.sleep(0.05)  # and the process ends in the midst of rounds
"""


def test_interrupts_of_the_main_thread_do_not_reach_the_others(tmp_path: Path) -> None:
    program = INTERRUPTED.format(
        tests=str(Path(__file__).parent), model=str(save_tiny_model(tmp_path))
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 3
    assert not done.stderr


ONE_TEAM = """
import os, threading
from smart_decoding import LLM, SamplingParams
import torch
before = len(os.listdir("/proc/self/task")) - threading.active_count()
llm = LLM({model!r}, dtype="float32", max_model_len=1024, speculative_config=False)
llm.generate("abc", SamplingParams(temperature=0, max_tokens=4))
print(len(os.listdir("/proc/self/task")) - threading.active_count() - before)
"""


@pytest.mark.skipif(
    not Path("/proc/self/task").exists() or len(os.sched_getaffinity(0)) < 2,
    reason="threads are counted by Linux, and one CPU has no team",
)
def test_loading_and_answering_leave_one_team_of_threads(tmp_path: Path) -> None:
    """Two were more threads than CPUs, which OpenMP lets sleep whenever they wait."""
    program = ONE_TEAM.format(model=str(save_tiny_model(tmp_path)))
    environment = {**os.environ, "OMP_NUM_THREADS": "2"}
    environment.pop("SMART_NUM_THREADS", None)
    line = [sys.executable, "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1


def test_on_step_sees_each_round_of_its_own_requests_and_may_abort_them(load: Any) -> None:
    llm = slow(load(), 0.001)
    (expected,) = llm.generate("abc", GREEDY)

    def mine(thread: int) -> bool:
        shown: list[int] = []
        owned = set()

        def on_step(touched: Any) -> None:
            for request in touched:
                owned.add(request)
                shown[:] = request.output
                if thread % 2 and len(shown) > 20:
                    llm.engine.abort(request.id)

        (answer,) = llm.generate("abc", GREEDY, on_step=on_step)[0].outputs
        assert len(owned) == 1
        assert answer.token_ids == shown == expected.outputs[0].token_ids[: len(shown)]
        assert answer.finish_reason == ("abort" if thread % 2 else "length")
        return True

    assert all(in_threads(mine))
    check_free(llm)


def test_no_prompts_are_no_answers(load: Any) -> None:
    llm = load()
    assert llm.generate([]) == []
    assert llm.generate("abc", GREEDY)[0].finished


def test_the_thread_ends_with_its_model(load: Any) -> None:
    llm = load()
    llm.generate("abc", GREEDY, on_step=lambda touched, engine=llm.engine: engine)
    thread = llm.engine_thread._thread
    gone = weakref.ref(llm.engine)
    assert thread.is_alive()
    del llm
    gc.collect()
    assert gone() is None
    thread.join(5)
    assert not thread.is_alive()


def test_a_generator_that_nobody_closes_gives_its_slot_back(load: Any) -> None:
    llm = slow(load(), 0.002)
    pieces = llm.stream("abc", SamplingParams(temperature=0, max_tokens=900, ignore_eos=True))
    next(pieces)
    del pieces
    gc.collect()
    assert wait_for(lambda: not llm.engine.has_unfinished_requests, 1.0)
    check_free(llm)


def test_an_engine_that_is_stopped_says_so(load: Any) -> None:
    llm = slow(load(), 0.005)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(llm.generate, "abc", SamplingParams(max_tokens=900, ignore_eos=True))
        assert wait_for(lambda: bool(llm.engine.scheduler.running))
        began = time.monotonic()
        llm.engine_thread.stop()
        assert time.monotonic() - began < 2
        with pytest.raises(EngineStoppedError, match="shut down"):
            running.result()
        with pytest.raises(EngineStoppedError, match="shut down"):
            llm.generate("abc")


def test_a_broken_engine_is_told_to_all_callers(load: Any) -> None:
    llm = load()
    llm.engine.step = lambda *given: 1 / 0

    def mine(_: int) -> bool:
        with pytest.raises((ZeroDivisionError, EngineStoppedError)):
            llm.generate("abc", GREEDY)
        return True

    assert all(in_threads(mine))
    assert all(map(mine, range(GIVE_UP)))  # the eight may have shared one failed round
    with pytest.raises(EngineStoppedError, match="the engine has died: ZeroDivisionError"):
        llm.generate("abc", GREEDY)


def test_no_round_runs_while_a_caller_measures_in_its_place() -> None:
    """Both had the kernels and the pages at once."""
    thread = EngineThread()
    began = threading.Event()
    goes_on = threading.Event()
    order: list[str] = []

    def measure() -> None:
        began.set()
        goes_on.wait(10)
        order.append("measured")

    def start() -> None:
        thread.start()
        order.append("started")

    with ThreadPoolExecutor() as pool:
        measured = pool.submit(thread.work_before, measure)
        began.wait(10)
        started = pool.submit(start)
        time.sleep(0.05)
        goes_on.set()
        started.result(10)
        assert measured.result(10)
    assert order == ["measured", "started"]
    assert not thread.work_before(order.clear)
    assert order
    thread.stop()


def test_a_thread_that_cannot_start_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was believed to run, and its callers waited for ever."""

    def refuse(thread: threading.Thread) -> NoReturn:
        raise RuntimeError("can't start new thread")

    thread = EngineThread()
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError):
            thread.start()
    assert thread.work_before(bool)
    thread.start()
    assert not thread.work_before(bool)
    thread.stop()


FORKED = """
import os, sys
from smart_decoding import LLM, SamplingParams
from smart_decoding.errors import EngineStoppedError

llm = LLM({model!r}, dtype="float32", max_model_len=1024, speculative_config=False)
params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
if {runs}:
    stream = llm.stream("abc", params)
    print(len(next(stream)) > 0, flush=True)
child = os.fork()
if child == 0:
    try:
        print(len(llm.generate("abc", params)[0].outputs[0].token_ids), flush=True)
    except EngineStoppedError as error:
        print(error, flush=True)
    sys.exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(len(llm.generate("abc", params)[0].outputs[0].token_ids))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.parametrize("runs", [False, True])
def test_a_forked_child_answers_or_is_told_to_load_the_model_itself(
    tmp_path: Path, runs: bool
) -> None:
    """It waited for a thread that only its parent has; also at its end, for a stream."""
    program = FORKED.format(model=str(save_tiny_model(tmp_path)), runs=runs)
    line = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(line, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    message = "this process was forked from the one that loaded the model: load it in the child"
    lines = ["True", message] if runs else ["400"]
    assert done.stdout.split("\n") == [*lines, "7", "400", ""]
    assert "Traceback" not in done.stderr
