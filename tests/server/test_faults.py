"""What goes wrong on a machine: a full disk, a damaged profile, a killed process. The server goes
on, and says why."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from serving import NAME, post, serving, slow, wait_for

from smart_decoding import files
from smart_decoding.core.costs import CostModel
from smart_decoding.engine import engine_thread
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, EngineStoppedError, ModelError
from smart_decoding.profiling import measure
from smart_decoding.profiling.cache import load_profile, profile_path, save_profile
from smart_decoding.profiling.profile import GUESS

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.profiling.profile import Profile

SMART = {"method": "ngram"}  # under the policy `smart`, which needs a profile
BODY = {"model": NAME, "prompt": "abcabc", "max_tokens": 40, "temperature": 0, "ignore_eos": True}
NATIVE_CODE = (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\xca\xfe\xba\xbe", b"MZ")  # how it begins
COST = CostModel.from_table({1: {1: 0.001, 8: 0.002}}, {1: 0.001})
A_TURN = 60.0  # seconds: other tests' models of this process are measured before, as large ones are


def profile_of(llm: LLM) -> Path:
    return profile_path(
        llm.provenance, llm.target.dtype, llm.target.device, "None", 768, llm.target.steps
    )


def profile(llm: LLM) -> Profile:
    assert llm.speculation.profile is not None
    return llm.speculation.profile


def answer_of(running: Any) -> str:
    response = post(running, "/v1/completions", json=BODY)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def expected_text(plain: LLM) -> str:
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    return plain.generate("abcabc", params)[0].outputs[0].text


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs Linux's /dev/full")
def test_a_full_disk_for_the_profile(
    cache: Path,
    load: Any,
    plain: LLM,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Real ENOSPC: the profile's scratch file is /dev/full."""
    monkeypatch.setattr(files, "uuid4", lambda: SimpleNamespace(hex="own"))
    path = profile_of(plain)
    path.parent.mkdir(parents=True)
    path.with_name(f"{path.name}.own.partial").symlink_to("/dev/full")
    with serving(lambda: load(speculative_config=SMART)) as running:
        assert wait_for(lambda: profile(running.llm).known, A_TURN)
        assert answer_of(running) == expected_text(plain)
    assert "cannot be kept" in caplog.text
    assert "No space left on device" in caplog.text
    assert list(path.parent.iterdir()) == []


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A tmpfs of one page at `folder`, filled up."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        (folder / "filler").write_bytes(b"x" * 4096)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount")
def test_a_file_system_that_is_full(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with small_disk(tmp_path / "disk"):
        save_profile(tmp_path / "disk" / "p.json", COST)
        assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["filler"]
        save_profile(tmp_path / "disk" / "more" / "p.json", COST)
    assert caplog.text.count("No space left on device") == 2


def good() -> str:
    return json.dumps(COST.to_dict())


def summed(state: Mapping[str, Any]) -> bytes:
    """A profile's file with the checksum that is right for it."""
    sha256 = hashlib.sha256(json.dumps(["", state, False]).encode()).hexdigest()
    return json.dumps({"model": "", "sha256": sha256, "cost": state, "busy": False}).encode()


DAMAGE: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "cut": lambda: summed(COST.to_dict())[:-20],
    "zeros": lambda: bytes(4096),
    "not utf-8": lambda: b"\xff\xfe{}",
    "no object": lambda: b"[1, 2]",
    "no curves": lambda: summed({**COST.to_dict(), "verify": {}}),
    "a text for a number": lambda: summed({**COST.to_dict(), "row_token": "much"}),
    "not a number": lambda: summed(json.loads(good().replace("0.002", "NaN"))),
    "below zero": lambda: summed(json.loads(good().replace("0.002", "-0.002"))),
    "infinite": lambda: summed(json.loads(good().replace("0.002", "1e999"))),
    "another number": lambda: summed(COST.to_dict()).replace(b"0.002", b"0.003"),
    "no checksum": lambda: good().encode(),
    "too deep": lambda: b"[" * 100_000,
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_profile_is_not_believed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "p.json"
    save_profile(path, COST)
    assert load_profile(path) is not None
    assert not caplog.text
    path.write_bytes(summed(COST.to_dict()))
    assert load_profile(path) is not None
    path.write_bytes(DAMAGE[name]())
    assert load_profile(path) is None
    assert "cannot be used" in caplog.text
    assert str(path) in caplog.text


def test_costs_of_a_busy_machine_count_for_an_hour(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    busy = tmp_path / "busy.json"
    quiet = tmp_path / "quiet.json"
    save_profile(busy, COST, busy=True)
    save_profile(quiet, COST)
    for age, lasts in ((3000, True), (4000, False)):
        for path in (busy, quiet):
            os.utime(path, (time.time() - age,) * 2)
        assert (load_profile(busy) is not None) == lasts
        assert load_profile(quiet) is not None
    assert not caplog.text


def test_a_folder_in_the_profiles_place(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "p.json").mkdir()
    assert load_profile(tmp_path / "p.json") is None
    save_profile(tmp_path / "p.json", COST)
    assert "cannot be used" in caplog.text
    assert "cannot be kept" in caplog.text


def test_a_server_with_a_damaged_profile_measures_again(
    cache: Path, load: Any, plain: LLM, caplog: pytest.LogCaptureFixture
) -> None:
    path = profile_of(plain)
    path.parent.mkdir(parents=True)
    path.write_bytes(DAMAGE["cut"]())
    with serving(lambda: load(speculative_config=SMART)) as running:
        assert answer_of(running) == expected_text(plain)
        assert wait_for(lambda: profile(running.llm).known, A_TURN)
    assert "measured again" in caplog.text
    assert load_profile(path) is not None


class Steps:
    """Counts the steps of profiles, and holds the first one up until `go`, if that is asked.

    llm: whose profile counts, if set: another test's model may still be at its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, held: bool = False) -> None:
        self.llm: LLM | None = None
        self.counts: Counter[int] = Counter()  # by the model's target
        self.round_counts: list[int] = []  # the count in each round
        self.begun = threading.Event()
        self.go = threading.Event()
        if not held:
            self.go.set()
        step = measure.ForwardTimer.step
        begin = measure.ForwardTimer.__init__

        def noted(measurement: Any, target: Any, *more: Any, **options: Any) -> None:
            measurement.of = target
            begin(measurement, target, *more, **options)

        def counted(measurement: Any) -> bool:
            self.begun.set()
            assert self.go.wait(10)
            self.counts[id(getattr(measurement, "of", None))] += 1  # None: it was begun before
            return step(measurement)

        monkeypatch.setattr(measure.ForwardTimer, "__init__", noted)
        monkeypatch.setattr(measure.ForwardTimer, "step", counted)

    @property
    def count(self) -> int:
        return self.counts.total() if self.llm is None else self.counts[id(self.llm.target)]

    def look(self, _touched: object) -> None:
        self.round_counts.append(self.count)


def test_the_profile_is_taken_after_the_first_answer_and_changes_none(
    cache: Path, load: Any, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It overwrites all pages, in which then nothing is found any more."""
    steps = Steps(monkeypatch)
    probes: list[object] = []
    monkeypatch.setattr(measure, "probe", lambda *args: probes.append(args) or {1: 2e-3, 8: 3e-3})
    llm = load(speculative_config=SMART, kv_cache_tokens=1248)
    assert llm.engine.pool.pages == 2 * -(-(768 + 1) // PAGE)
    steps.llm = llm
    until_then = llm.policy.cost.verify[1]
    assert (until_then.rows, until_then.seconds) == ((1, 8), pytest.approx((2e-3, 3e-3)))
    path = profile_of(llm)
    prompt = list(range(48))
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)

    def answer(chosen: LLM) -> tuple[list[int], int]:
        output = chosen.generate(prompt, params, on_step=steps.look)[0].outputs[0]
        return output.token_ids, output.metrics.cached_tokens

    expected = answer(plain)[0]
    assert answer(llm) == (expected, 0)
    assert set(steps.round_counts) == {0}
    llm.take_profile()
    stored = load_profile(path)
    assert stored is not None
    assert stored.to_dict() == llm.policy.cost.to_dict()
    assert answer(llm) == (expected, 0)
    assert answer(llm)[1] > 0
    llm.engine.check_integrity()
    taken = path.stat().st_mtime_ns
    llm.take_profile()
    assert path.stat().st_mtime_ns == taken
    assert profile(load(speculative_config=SMART)).known
    assert len(probes) == 1


@pytest.mark.parametrize("seconds", [{1: 3e-3, 8: 2e-3}, {}, None])
def test_a_probe_of_costs_makes_no_row_free_and_may_fail(
    cache: Path, load: Any, monkeypatch: pytest.MonkeyPatch, seconds: dict[int, float] | None
) -> None:
    def probe(*args: object) -> dict[int, float]:
        if seconds is None:
            raise ModelError("not finite")
        return seconds

    monkeypatch.setattr(measure, "probe", probe)
    cost = load(speculative_config=SMART).policy.cost
    if seconds:
        assert cost.verify_seconds(1, [1, 8, 64], 0).tolist() == pytest.approx(
            [3e-3, 3e-3 * 1.14, 3e-3 * 2.26]
        )
    else:
        assert cost is GUESS


def test_costs_are_measured_beside_a_batch_which_does_not_wait_for_them(
    cache: Path, load: Any, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing is known of the machine: a part of the time, and in memory that no request
    holds. Its keys and the drafter's stay."""
    monkeypatch.setattr(measure, "probe", lambda *given: {})
    monkeypatch.setattr(engine_thread, "ROUNDS_OVER_WORK", 4.0)  # a round is longer than a step
    steps = Steps(monkeypatch)
    llm = slow(load(speculative_config=SMART), 0.002)
    steps.llm = llm
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    prompts = [[7 * i % 250, *range(60)] for i in range(16)]  # more than there are slots
    known: list[bool] = []

    def look(touched: object) -> None:
        if not steps.round_counts:
            spent["steps"].clear()  # until now nobody asked
        steps.look(touched)
        known.append(profile(llm).known)
        llm.engine.check_integrity()

    llm.generate(prompts[0], replace(params, max_tokens=1))
    steps.round_counts.clear()
    before = steps.count
    spent = timed(monkeypatch, llm)
    outputs = llm.generate(prompts, params, on_step=look)
    assert [each.outputs[0].token_ids for each in outputs] == [
        each.outputs[0].token_ids for each in plain.generate(prompts, params)
    ]
    assert not known[0]  # it did not wait
    assert known[-1]
    beside = [b - a for a, b in itertools.pairwise(steps.round_counts)]
    assert max(beside) == 1  # never two without a round between them
    assert sum(beside) > (steps.count - before) / 2
    # Rounds have paid for every step but the last.
    rounds = sum(spent["rounds"][: 1 + known.index(True)])
    assert rounds >= 4.0 * (sum(spent["steps"]) - max(spent["steps"]))
    assert llm.engine.pool.used == 0
    stored = load_profile(profile_of(llm))
    assert stored is not None


def timed(monkeypatch: pytest.MonkeyPatch, llm: LLM) -> dict[str, list[float]]:
    """Seconds of each round of `llm`, and of each step of its profile."""
    spent: dict[str, list[float]] = {"rounds": [], "steps": []}

    def wrapped(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*given)
            finally:
                spent[name].append(time.perf_counter() - began)

        return run

    monkeypatch.setattr(llm.engine, "step", wrapped("rounds", llm.engine.step))
    monkeypatch.setattr(profile(llm), "step", wrapped("steps", profile(llm).step))
    return spent


def test_nothing_is_measured_while_another_model_of_the_process_answers(
    cache: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else whoever compares two models in one process compares one with half of the cores."""
    monkeypatch.setattr(measure, "SECONDS", 600.0)
    steps = Steps(monkeypatch)
    llm = load(speculative_config=SMART)
    steps.llm = llm
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm.generate("abc", replace(params, max_tokens=1))
    other = slow(load(speculative_config=False), 0.005)
    try:
        assert wait_for(lambda: steps.count > 1)
        other.generate("abc", params, on_step=steps.look)
        assert len(set(steps.round_counts[1:])) == 1  # one may have begun before
        after = steps.round_counts[-1]
        assert wait_for(lambda: steps.count > after)
    finally:
        llm.engine_thread.stop()


def test_two_models_of_a_process_are_measured_one_after_the_other(
    cache: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would measure what the other leaves of the cores."""
    together: list[bool] = []
    inside: set[int] = set()
    step = measure.ForwardTimer.step

    def watched(measurement: Any) -> bool:
        inside.add(id(measurement))
        together.append(len(inside) > 1)
        try:
            return step(measurement)
        finally:
            inside.discard(id(measurement))

    monkeypatch.setattr(measure.ForwardTimer, "step", watched)
    models = [load(speculative_config=SMART, dtype=dtype) for dtype in ("float32", "bfloat16")]
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    for llm in models:
        llm.generate("abc", params)
    assert wait_for(lambda: all(profile(llm).known for llm in models), A_TURN)
    assert sum(together) <= 1  # both may begin at once, and then one stops


def test_who_wants_the_profile_waits_for_no_other_model(
    cache: Path, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even where it is asked for in a round of the other one."""
    steps = Steps(monkeypatch, held=True)
    llm = load(speculative_config=SMART)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    llm.generate("abc", params)
    assert steps.begun.wait(10)
    steps.go.set()
    other = load(speculative_config=False)
    other.generate("abc", params, on_step=lambda touched: llm.take_profile())
    assert profile(llm).known


def test_a_thread_that_has_ended_holds_nobody_up(load: Any) -> None:
    """In the middle of an answer, or whose only answer was given up."""
    params = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    llm = load(speculative_config=False)

    def give_up(touched: object) -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        llm.generate("abc", params, on_step=give_up)
    assert wait_for(lambda: not engine_thread._AT_WORK)
    with pytest.raises(EngineStoppedError):
        llm.generate("abc", params, on_step=lambda touched: llm.engine_thread.inbox.stop())
    assert wait_for(lambda: not engine_thread._AT_WORK)


@pytest.mark.parametrize(("probed", "requests"), [({}, 1), ({1: 2e-3, 8: 3e-3}, 4)])
def test_answers_are_not_held_up_by_what_is_measured(
    cache: Path,
    load: Any,
    monkeypatch: pytest.MonkeyPatch,
    probed: dict[int, float],
    requests: int,
) -> None:
    """A lone one, and several where something is known of the machine, however long rounds are."""
    monkeypatch.setattr(measure, "probe", lambda *given: probed)
    monkeypatch.setattr(measure, "SECONDS", 600.0)
    steps = Steps(monkeypatch)
    llm = slow(load(speculative_config=SMART), 0.002)
    steps.llm = llm
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    llm.generate("abc", replace(params, max_tokens=1))
    assert wait_for(lambda: steps.count > 1)
    llm.generate(["abc"] * requests, params, on_step=steps.look)
    llm.engine_thread.stop()
    assert len(set(steps.round_counts)) == 1


def test_of_several_who_want_the_profile_now_one_tells_of_it(
    cache: Path, load: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "smart.steps")
    steps = Steps(monkeypatch, held=True)
    llm = load(speculative_config=SMART)
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    with pytest.raises(ConfigError, match="on_step cannot ask the model"):
        llm.generate("abc", params, on_step=lambda touched: llm.take_profile())
    assert steps.begun.wait(10)
    with ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(llm.take_profile) for _ in range(4)]
        assert wait_for(lambda: "measuring costs" in caplog.text)
        steps.go.set()
        for each in taken:
            each.result(20)
    assert profile(llm).known
    assert caplog.text.count("measuring costs, once ...") == 1


def test_requests_are_answered_between_steps_of_the_profile_and_a_stop_leaves_nothing(
    cache: Path, load: Any, plain: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The profile would take ten minutes."""
    monkeypatch.setattr(measure, "SECONDS", 600.0)
    steps = Steps(monkeypatch, held=True)
    with serving(lambda: load(speculative_config=SMART)) as running:
        assert steps.begun.wait(10)
        steps.llm = running.llm
        running.llm.engine_thread.observers.append(Looking(steps))
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(answer_of, running)
            assert wait_for(lambda: running.worker.active == 1)
            steps.go.set()
            assert answer.result(20) == expected_text(plain)
        assert set(steps.round_counts) == {1}
        assert wait_for(lambda: steps.count > 3)  # it goes on
    assert not profile_of(plain).parent.exists()


class Looking:
    """An observer that looks at the steps in each round."""

    def __init__(self, steps: Steps) -> None:
        self.before = steps.look

    def after(self, _engine: object, _touched: object) -> None:
        pass

    def ended(self, _request: object, _reason: str) -> None:
        pass


def test_a_profile_that_fails_is_given_up(
    cache: Path,
    load: Any,
    plain: LLM,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def failing(_measurement: object) -> bool:
        raise RuntimeError("no such luck")

    monkeypatch.setattr(measure.ForwardTimer, "step", failing)
    llm = load(speculative_config=SMART)
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    for _ in range(2):
        answers = [each.generate("abc", params)[0].outputs[0].token_ids for each in (llm, plain)]
        assert answers[0] == answers[1]
        llm.take_profile()
    assert "Profile has failed and is given up" in caplog.text
    assert not profile_of(llm).exists()


def test_a_profile_of_an_engine_for_smaller_batches_is_taken_again(
    cache: Path, load: Any, plain: LLM
) -> None:
    """`smart run` serves one request; what it measured says nothing of the batches of a server."""
    path = profile_of(plain)

    def largest(seqs: int) -> int:
        load(speculative_config=SMART, max_num_seqs=seqs).take_profile()
        cost = load_profile(path)
        assert cost is not None
        return max(cost.verify)

    assert [largest(1), largest(4)] == [1, 4]
    measured = path.stat().st_mtime_ns
    assert largest(2) == 4
    assert path.stat().st_mtime_ns == measured


def test_a_pickled_head_is_refused_unless_trusted(load: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps(
            {
                "num_attention_heads": 6,
                "hidden_size": 96,
                "intermediate_size": 200,
                "vocab_size": 258,
            }
        )
    )
    torch.save({}, tmp_path / "pytorch_model.bin")
    head = {"method": "eagle", "model": str(tmp_path), "policy": "static"}
    with pytest.raises(ModelError, match="pickles are refused") as error:
        load(speculative_config=head)
    assert "--trust-pickle" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match="lacks the tensor"):
        load(speculative_config=head, trust_pickle=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(folder: str, port: int, *more: str) -> subprocess.Popen[bytes]:
    """`smart serve` as a user starts it, until it is ready."""
    line = [
        "serve",
        folder,
        "--served-model-name",
        NAME,
        "--port",
        str(port),
        "--dtype",
        "fp32",
        "--method",
        "ngram",
        "--max-model-len",
        "1024",
        "--max-num-seqs",
        "4",
        *more,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "smart_decoding.cli.main", *line], stderr=subprocess.PIPE
    )

    def ready() -> bool:
        try:
            return httpx.get(f"http://127.0.0.1:{port}/health").status_code == 200
        except httpx.HTTPError:
            return False

    assert wait_for(ready, 60), process.kill()
    return process


def test_killed_in_the_middle_and_started_again(cache: Path, load: Any, plain: LLM) -> None:
    """With SIGKILL while an answer streams: the next start takes the same port and the same
    profile. The cache then holds that, and no native code."""
    llm = load(speculative_config=SMART)
    llm.take_profile()
    path = profile_of(plain)
    folder = str(llm.provenance["model"])
    before = path.read_bytes()
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/completions"
    process = start(folder, port)
    body = {**BODY, "max_tokens": 1000, "stream": True}

    def killed_while_it_streams() -> None:
        with httpx.stream("POST", url, json=body, timeout=10) as stream:
            for _ in stream.iter_lines():
                process.send_signal(signal.SIGKILL)

    with pytest.raises(httpx.HTTPError):
        killed_while_it_streams()
    assert process.wait(10) == -signal.SIGKILL
    (path.parent / f"{path.name}.0123abcd.partial").write_bytes(
        before[:30]
    )  # as if killed while it wrote
    process = start(folder, port)
    try:
        answer = httpx.post(url, json=BODY, timeout=10).json()["choices"][0]["text"]
        assert answer == expected_text(plain)
        assert path.read_bytes() == before
    finally:
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert process.wait(20) in (0, -signal.SIGTERM)
        assert time.monotonic() - started < 10
    assert process.stderr is not None
    kept = [file for file in cache.rglob("*") if file.is_file()]
    assert {file.relative_to(cache).parts[0] for file in kept} == {"profiles"}
    assert not [file for file in kept if file.read_bytes().startswith(NATIVE_CODE)]
    lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert {"time", "level", "logger", "message"} <= set.intersection(*map(set, lines))
    assert any(line["message"] == "ready" for line in lines)
