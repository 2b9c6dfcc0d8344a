"""A GGUF file in two engines, without either: programs that answer by a rule stand for llama.cpp's
binaries, a rule and a clock for our model."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import worlds

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.integrations.tuning.found import Found, Trials
from smart_decoding.integrations.tuning.settings import PLAIN, Setting, Trial
from smart_decoding.kernels import children
from smart_decoding.measuring import machine
from smart_lab import gguf_speed, tables
from smart_lab.gguf import engines, ik, ours, rates, report, server, worker
from smart_lab.gguf.engines import Worker, job_of
from smart_lab.gguf.openvino_worker import OpenvinoSteps
from smart_lab.gguf.rates import Reply, Span, agreement, best, decode_rate, figures, ratio
from smart_lab.gguf.server import (
    BATCHED,
    BENCH,
    SERVER,
    LlamaCpp,
    Server,
    Sizes,
    batched_seconds,
    bench_seconds,
    reply_of,
)
from smart_lab.gguf.tuning import BOTH, DRAFT, NGRAM, mode_of, tuned

SIZES = Sizes(64, 9)
SERVES = f"""#!{sys.executable}
import json, os, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer

words = sys.argv[1:]
if words == ["--version"]:
    print("version: 7 (abc)", file=sys.stderr)
    print("built with a rule", file=sys.stderr)
    sys.exit()
if words == ["--help"]:
    print('''-t,    --threads N     threads
-ub,   --ubatch-size N         rows of a forward
-fa,   --flash-attn [on|off|auto]    attention
--repack, -nr, --no-repack              weights
-m,    --model FNAME  the model
-np,   --parallel N   slots
--spec-draft-n-max N                    number of tokens to draft
--spec-draft-p-min, --draft-p-min P     minimum probability
--spec-draft-model, -md, --model-draft FNAME
                                        draft model
--spec-type none,draft-simple,ngram-simple,ngram-map-k4v
                                        types (default:
                                        none)
--spec-ngram-simple-size-n N            to look up
--spec-ngram-map-k4v-size-n N           to look up''')
    sys.exit()
if "no-such-model.gguf" in words:
    print("0.1 I common_param: system_info: n_threads = 2 / 2 | CPU : AVX2 = 1 | ", file=sys.stderr)
    sys.exit(1)
if "--no-repack" in words:
    print("error: no such thing")
    sys.exit(3)
drafts = 1
if "draft-simple" in " ".join(words):
    drafts = 2 + 2 * ("--spec-draft-n-max 5" in " ".join(words))

class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def say(self, value):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(value).encode())

    def do_GET(self):
        self.say({{"status": "ok"}})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert asked["temperature"] == 0 and not asked["cache_prompt"], asked
        tokens, answers = asked["n_predict"], []
        if "ASKED" in os.environ:
            with open(os.environ["ASKED"], "a") as log:
                told = {{"words": words, "environment": list(os.environ), "process": os.getpid()}}
                told |= {{"tokens": tokens, "prompts": asked["prompt"]}}
                print(json.dumps(told), file=log)
        time.sleep(0.06 / drafts)
        for index, prompt in enumerate(asked["prompt"]):
            times = {{"prompt_n": len(prompt), "prompt_ms": 100.0, "predicted_n": tokens,
                     "predicted_ms": 1000.0 * (tokens - 1) / drafts,
                     "draft_n": tokens if "--spec-type" in words else 0,
                     "draft_n_accepted": (tokens - 1) // 2 if drafts > 1 else 0}}
            told = [(prompt[-1] + 1 + i) % {worlds.EOS} for i in range(tokens)]
            answers.append({{"index": index, "tokens": told, "timings": times}})
        self.say(answers[0] if len(answers) == 1 else answers[::-1])

HTTPServer(("127.0.0.1", int(words[words.index("--port") + 1])), Handler).serve_forever()
"""
# Its cousin knows other words, and tells texts, in order.
IK_SERVES = (
    SERVES.replace('if "--no-repack" in words', 'if "--no-cache-prompt" in words')
    .replace('if "draft-simple" in " ".join(words)', 'if "--spec-autotune" in words')
    .replace('"index": index, "tokens": told', '"content": text, "stopped_eos": False')
    .replace(
        "            answers.append",
        '            text = " ".join(map(str, told))\n            answers.append',
    )
    .replace("answers[::-1]", "answers")
)
BENCHES = f"""#!{sys.executable}
import json, sys
words = sys.argv[1:]
rows = [int(n) for n in words[words.index("-p") + 1].split(",")]
slow = 2 if words[words.index("--repack") + 1] == "1" else 1
print("a warning", file=sys.stderr)
print(json.dumps([{{"n_prompt": n, "samples_ns": [slow * n * 10**6, 9 * 10**9, 0]}} for n in rows]))
"""
BATCHES = f"""#!{sys.executable}
import sys
words = sys.argv[1:]
for n in words[words.index("-npl") + 1].split(","):
    print('{{"n_kv_max": 9, "pl": %s, "tg": 4, "t_tg": %f}}' % (n, 0.02 * int(n)))
"""


# A rival's process: its tokens come by a rule, in seconds by its own clock.
WORKS = f"""#!{sys.executable}
import sys
from smart_lab.gguf.worker import serve

def load(settings):
    print("a library chatters on standard output")
    assert sys.argv[1] == "-m" and settings["stops"] == [{worlds.EOS}], settings
    assert settings["weights"].endswith("expanded" if "vllm" in sys.argv[2] else "m.gguf"), settings

    def answer(prompts, tokens, places, ahead=1):
        fast = 1 + max(1, ahead - 2) if settings["ahead"] else 1
        told = [[(p[-1] + 1 + i) % {worlds.EOS} for i in range(tokens)] for p in prompts]
        seconds, count = 0.5 + (tokens - 1) / fast, len(prompts)
        found = {{"placed": [0.0] * count, "firsts": [0.5] * count, "ends": [seconds] * count}}
        found |= {{"before": [1] * count, "steps": [1 + (tokens - 1) // fast] * count}}
        return {{**found, "answers": told, "seconds": seconds}}

    return {{"version": "9"}}, answer

serve(load)
"""


@pytest.fixture(autouse=True)
def no_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All machines try the same settings."""
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "none")


@pytest.fixture
def binaries(tmp_path: Path) -> Path:
    folder = tmp_path / "build" / "bin"
    folder.mkdir(parents=True)
    for name, text in ((SERVER, SERVES), (BENCH, BENCHES), (BATCHED, BATCHES)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    (folder.parent / "CMakeCache.txt").write_text(
        "CMAKE_BUILD_TYPE:STRING=Release\nGGML_NATIVE:BOOL=ON\nGGML_CUDA:BOOL=OFF\nOTHER:BOOL=ON\n"
    )
    return folder


def stopped(server: Server) -> bool:
    """Whether the kernel says so soon: a signal takes a moment."""
    until = time.monotonic() + 5
    path = Path(f"/proc/{server._server.pid}/stat")
    while (state := path.read_text().rpartition(")")[2].split()[0]) != "T":
        if time.monotonic() > until:
            return False
        time.sleep(0.01)
    return state == "T"


def test_tokens_of_all_count_over_the_seconds_of_all() -> None:
    """A mean of their own rates would have the quick one count as much as the slow one."""
    spans = [Span(1.0, 2.0, 20), Span(2.0, 6.0, 20)]
    assert decode_rate(spans) == pytest.approx(5.0)
    assert math.isnan(decode_rate([Span(1.0, 1e-6, 0)]))  # as llama-server tells it


def test_an_answer_without_a_token_is_an_error() -> None:
    with pytest.raises(ModelError, match="an answer has no token"):
        rates.reply([Span(1.0, 1.0, 4), Span(1.0, 0.0, 0)], 2.0, 4, [[1] * 5, []])


def test_agreement_ends_at_the_first_other_token() -> None:
    assert agreement([[1, 2, 3, 4], [5]], [[1, 2, 9, 4], [5, 6]]) == pytest.approx(0.75)


def told(index: int, tokens: int, accepted: int, **others: Any) -> dict[str, Any]:
    """What llama-server says of an answer: a prompt of three tokens, and ten tokens a second."""
    times = {"prompt_n": 3, "prompt_ms": 500.0, "predicted_n": tokens}
    times |= {"predicted_ms": 100.0 * (tokens - 1), "draft_n_accepted": accepted}
    return {"index": index, "tokens": [index] * tokens, "timings": times, **others}


def test_a_servers_answers_become_rates() -> None:
    """Accepted drafts behind the second one's end are no gift."""
    reply = reply_of([told(1, 3, 5), told(0, 21, 10)], [[1, 2, 3]] * 2, 21, 4.0)
    assert reply.answers == [[0] * 21, [1] * 3]
    assert reply.decode == pytest.approx(10.0)
    assert reply.overall == pytest.approx(24 / 4)
    assert reply.prefill_seconds == 0.5
    assert reply.per_round == pytest.approx(22 / 10)


@pytest.mark.parametrize(
    ("predicted", "others", "tokens"),
    [(7, {}, 4), (9, {"stopped_limit": True}, 8)],
    ids=["drafts behind an end", "tokens of the last round, which are not told"],
)
def test_what_the_cousin_counts_is_what_it_made(
    predicted: int, others: dict[str, Any], tokens: int
) -> None:
    """It tells four tokens as a text."""
    reported = told(0, predicted, 4, **others)
    found = reply_of(reported, [[1, 2, 3]], 8, 4.0, lambda answer: [1, 2, 3, 4])
    assert found.counts == [tokens]
    assert found.overall == pytest.approx(tokens / 4)
    assert found.decode == pytest.approx((tokens - 1) / (0.1 * (predicted - 1)))


def test_a_prompt_that_came_from_a_cache_is_refused() -> None:
    with pytest.raises(ModelError, match="computed 3 tokens of a prompt of 4"):
        reply_of(told(0, 2, 0), [[1, 2, 3, 4]], 2, 1.0)


def test_another_output_of_a_benchmark_is_refused() -> None:
    with pytest.raises(ModelError, match="no JSON of its runs: nonsense"):
        bench_seconds("nonsense")
    with pytest.raises(ModelError, match="no JSON lines of its runs: it said nothing"):
        batched_seconds("")


def test_a_folder_without_binaries_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="has no llama-server"):
        LlamaCpp(tmp_path)


def test_llama_cpp_says_what_it_is(binaries: Path) -> None:
    assert LlamaCpp(binaries).about() == {
        "version": "version: 7 (abc); built with a rule",
        "system": "CPU : AVX2 = 1",
        "build": {"CMAKE_BUILD_TYPE": "Release", "GGML_NATIVE": "ON"},
    }


def test_the_best_layout_counts_for_a_forward(binaries: Path) -> None:
    cpp, file = LlamaCpp(binaries), Path("m.gguf")
    assert cpp.one_sequence(file, 2, (1, 4), 150, 3) == pytest.approx({1: 0.001, 4: 0.004})
    assert cpp.many_sequences(file, 2, (1, 4), 150, 4) == pytest.approx({1: 0.005, 4: 0.02})


def test_a_server_answers_and_is_stopped_in_between(
    binaries: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # which must not be asked
    with Server(LlamaCpp(binaries).program, Path("m.gguf"), [], 2, SIZES) as server:
        assert stopped(server)
        reply = server.answer([[4, 5], [7]], 3)
        assert reply.answers == [[6, 7, 8], [8, 9, 10]]
        assert reply.decode == pytest.approx(1.0)  # a second a token
        assert stopped(server)
    assert server._server.ended


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program in place of a rival's, and a checkpoint that is not read."""
    found = argparse.Namespace(tokenizer_source=tmp_path / "expanded")
    monkeypatch.setattr(engines, "load_checkpoint", lambda path: found)
    path = tmp_path / "python"
    path.write_text(WORKS)
    path.chmod(0o755)
    return path


class Rule:
    """An engine that gives each request a token a step, and as many as its prompt says."""

    def __init__(self, clock: worlds.Clock) -> None:
        self._clock = clock
        self.most = 0
        self.running: dict[int, list[int]] = {}
        self._required: dict[int, int] = {}

    def add(self, number: int, prompt: list[int]) -> None:
        self._required[number], self.running[number] = prompt[0], []

    def step(self) -> list[tuple[int, list[int], bool]]:
        self.most = max(self.most, len(self.running))
        self._clock.now += 1.0
        found = []
        for number, tokens in list(self.running.items()):
            tokens.append(len(tokens))
            ended = len(tokens) == self._required[number]
            found.append((number, list(tokens), ended))
            if ended:
                del self.running[number]
        return found


def test_a_worker_keeps_its_places_full(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = worlds.Clock()
    monkeypatch.setattr(worker.time, "perf_counter", clock)
    engine = Rule(clock)
    found = engines.reply_of(worker.answered(engine, [[3], [5], [4], [2]], 2))
    assert engine.most == 2
    assert found.answers == [[0, 1, 2], [0, 1, 2, 3, 4], [0, 1, 2, 3], [0, 1]]
    assert (found.prefill_seconds, found.per_round) == (1.0, 1.0)
    assert found.decode == pytest.approx(1.0)
    assert found.overall == pytest.approx(14 / 7)


class RuleHandle:
    """A request in OpenVINO: what was not read yet, and a status."""

    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.status = "RUNNING"

    def can_read(self) -> bool:
        return bool(self.parts)

    def read(self) -> dict[int, Any]:
        return {0: argparse.Namespace(generated_ids=self.parts.pop(0))}

    def get_status(self) -> Any:
        return argparse.Namespace(name=self.status)


def test_openvino_is_asked_step_by_step() -> None:
    """A step may give several tokens, none, or an end alone."""
    handles: dict[int, RuleHandle] = {}
    reported = iter(
        [([[4], [5, 6]], "RUNNING"), ([], "RUNNING"), ([], "FINISHED"), ([], "IGNORED")]
    )

    def add_request(number: int, prompt: Any, config: object) -> RuleHandle:
        assert prompt == ("tensor", [7, 8])
        handles[number] = RuleHandle()
        return handles[number]

    def step() -> None:
        for handle in handles.values():
            handle.parts, handle.status = next(reported)

    pipeline = argparse.Namespace(add_request=add_request, step=step)
    steps = OpenvinoSteps(pipeline, None, lambda prompt: ("tensor", prompt))
    steps.add(3, [7, 8])
    assert steps.step() == [(3, [4, 5, 6], False)]
    assert steps.step() == [(3, [4, 5, 6], False)]
    assert steps.step() == [(3, [4, 5, 6], True)]
    handles.clear()
    steps.add(4, [7, 8])
    with pytest.raises(MemoryError, match="given up: IGNORED"):
        steps.step()


RULE = """
import os, sys
from smart_lab.gguf.worker import serve

def load(settings):
    print("a library chatters on standard output")
    if settings.get("fails") == "loading":
        raise ValueError("no such weights\\nand more")
    if settings.get("fails") == "dying":
        print("Illegal instruction", file=sys.stderr, flush=True)
        os._exit(3)
    def answer(prompts, tokens):
        if settings.get("fails") == "answering":
            raise MemoryError("too much")
        return {"answers": [[tokens, *p] for p in prompts]}
    return {"version": "1.2"}, answer

serve(load)
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "rule.py"
    path.write_text(RULE)
    return path


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("loading", "ValueError: no such weights"),
        ("dying", "ended with 3: Illegal"),
        ("answering", "MemoryError"),
    ],
)
def test_what_a_worker_dies_of_is_told_in_one_line(fails: str, message: str, script: Path) -> None:
    settings = {"threads": 1, "fails": fails}
    with pytest.raises(ModelError, match=message) as caught:
        Worker(Path(sys.executable), [str(script)], settings).ask(job_of([[1]], 2), 60.0)
    assert "\n" not in str(caught.value)


def test_a_silent_worker_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "LOADING", 0.2)
    file = tmp_path / "silent.py"
    file.write_text("import time; time.sleep(60)")
    with pytest.raises(ModelError, match="no answer within"):
        Worker(Path(sys.executable), [str(file)], {"threads": 1})


def test_the_workers_import_the_standard_library_and_each_other_alone() -> None:
    folder = Path(worker.__file__).parent
    for path in (folder / "worker.py", *folder.glob("*_worker.py")):
        ours = [
            line for line in path.read_text().splitlines() if "import" in line and "smart_" in line
        ]
        assert all(line.startswith("from smart_lab.gguf.worker import") for line in ours)


@pytest.fixture
def cousin(binaries: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "ik"
    folder.mkdir()
    (folder / SERVER).write_text(IK_SERVES)
    (folder / SERVER).chmod(0o755)
    return folder


def found_of(**seconds: float) -> Found:
    """Four blocks of 100 tokens; seconds by mode and options, as in draft_simple or ngram_mod."""
    found = Found()
    for name, of in seconds.items():
        mode = PLAIN if name.startswith("plain") else name.replace("_", "-").replace("-and-", ",")
        base = ("--x",) if name == "plain_changed" else ()
        drafts = () if mode == PLAIN else ("--spec-type", mode, f"--{mode}")
        trial = Trial(100, of, drafted=0 if mode == PLAIN else 50)
        found.trials[4, Setting(mode, base, drafts)] = dict.fromkeys(range(4), trial)
    found.base[4] = Setting()
    return found


def test_each_mode_has_its_best_flags() -> None:
    found = found_of(plain=1.0, ngram_simple=0.9, ngram_mod=0.8, draft_simple=1.2)
    found.errors[4, Setting("draft-mtp", (), ("--spec-type", "draft-mtp"))] = "no such layer"
    result = tuned(found, 4, ["--threads", "2"])
    assert result.flags == {
        PLAIN: ["--threads", "2"],
        NGRAM: ["--threads", "2", "--spec-type", "ngram-mod", "--ngram-mod"],
        DRAFT: ["--threads", "2", "--spec-type", "draft-simple", "--draft-simple"],
        BOTH: [
            "--threads",
            "2",
            "--spec-type",
            "ngram-mod,draft-simple",
            "--ngram-mod",
            "--draft-simple",
        ],
    }
    overall = [each["overall"] for each in result.tried[:-1]]
    assert overall == pytest.approx([100 / seconds for seconds in (1.0, 0.9, 0.8, 1.2)])
    assert result.tried[-1]["error"] == "no such layer"
    assert {each["mode"] for each in result.tried} == {PLAIN, NGRAM, DRAFT}


def test_what_was_tried_together_is_taken_as_it_was_tried() -> None:
    found = found_of(plain=1.0, ngram_mod=0.8, draft_simple=1.2, ngram_mod_and_draft_simple=0.7)
    result = tuned(found, 4, [])
    assert result.flags[BOTH] == [
        "--spec-type",
        "ngram-mod,draft-simple",
        "--ngram-mod,draft-simple",
    ]
    assert mode_of(Setting("ngram-mod,draft-simple")) == BOTH


def test_a_text_of_the_cousin_becomes_tokens(cousin: Path) -> None:
    program = ik.IkLlamaCpp(cousin).program(lambda text: [int(n) for n in text.split()], worlds.EOS)
    assert program.tokens_of({"content": "6 7", "stopped_eos": True}) == [6, 7, worlds.EOS]


def test_few_flags_of_the_cousin_serve_all_its_modes() -> None:
    found = found_of(plain=1.0, plain_changed=0.8)
    found.base[4] = Setting(base=("--x",))
    result = ik.tuned(found, 4, ["--threads", "2"])
    assert result.flags == {PLAIN: ["--threads", "2", "--x"]}  # it speculates for one slot only
    found.trials = Trials({(1, setting): of for (_, setting), of in found.trials.items()})
    found.base[1] = found.base[4]
    modes = ik.tuned(found, 1, []).flags
    assert list(modes) == [PLAIN, NGRAM, ik.SUFFIX]
    assert modes[ik.SUFFIX] == ["--x", "--spec-type", "suffix", "--spec-autotune"]


def test_rivals_get_what_the_user_set_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not this package's own: OpenMP's threads in vLLM would sleep sooner, too."""
    monkeypatch.setitem(children._OURS, "GOMP_SPINCOUNT", "150")
    monkeypatch.setenv("GOMP_SPINCOUNT", "150")
    assert "GOMP_SPINCOUNT" not in engines._environment(2)
    assert "GOMP_SPINCOUNT" not in server.environment()
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert engines._environment(2)["GOMP_SPINCOUNT"] == "77"


def test_the_next_prompt_has_the_place_of_the_one_that_ended() -> None:
    """Never more at once than places; a wait for a place is not a request's time."""
    clock = worlds.Clock()
    engine = worlds.engine(clock)
    most, step = 0, engine.step

    def counted() -> Any:
        nonlocal most
        most = max(most, len(engine._requests))
        return step()

    engine.step = counted  # type: ignore[method-assign]
    found = ours.answer(engine, 2, [[n, n + 1] for n in (1, 50, 100, 200, 300)], 6, clock)
    assert found.answers == [[n + 2 + i for i in range(6)] for n in (1, 50, 100, 200, 300)]
    assert most == 2
    assert found.prefill_seconds == pytest.approx(1.0)
    assert found.decode == pytest.approx(1.0)
    assert found.overall == pytest.approx(30 / 18)  # two, two and one, six rounds each
    assert found.per_round == pytest.approx(1.0)


def test_drafters_are_names_or_configs() -> None:
    union = '{"method": "union", "model": "/a/b.gguf"}'
    found = ours.speculative_configs(["ngram", "draft_model", union], Path("d.gguf"))
    assert found == {
        "ngram": {"method": "ngram"},
        "draft_model": {"method": "draft_model", "model": "d.gguf"},
        "union, model=b.gguf": {"method": "union", "model": "/a/b.gguf"},
    }
    assert ours.without_folders(union) == '{"method": "union", "model": "b.gguf"}'
    assert ours.without_folders("ngram") == "ngram"
    with pytest.raises(ConfigError, match="give --draft FILE"):
        ours.speculative_configs(["draft_model"], None)
    for wrong in ("medusa", '{"policy": "smart"}', "[1]"):
        with pytest.raises(ConfigError, match="neither one of"):
            ours.speculative_configs([wrong], None)


def blocks_of(**rates: list[float]) -> list[dict[str, Any]]:
    names = {
        name.replace("_", " ").replace("llama ", "llama.cpp "): of for name, of in rates.items()
    }
    return [
        {
            name: Reply(of[i], of[i] / 2, 0.5, 2.0, [[1, 2]], [2.0 / of[i]], [2]).plain()
            for name, of in names.items()
        }
        for i in range(3)
    ]


def test_ratios_are_of_the_best_over_the_same_blocks() -> None:
    blocks = blocks_of(
        llama_plain=[10.0, 10.0, 10.0],
        llama_drafts=[12.0, 8.0, 12.0],
        ours_plain=[20.0, 20.0, 20.0],
        ours_smart_ngram=[30.0, 36.0, 45.0],
        ours_smart_union=[31.0, 31.0, 31.0],
    )
    found = figures(blocks, "ours plain")
    assert found[1].decode == (pytest.approx(3 / (1 / 12 + 1 / 8 + 1 / 12)), 8.0, 12.0)
    assert best(found, ["ours smart ngram", "ours smart union"], "decode") == "ours smart ngram"
    run = report.run_of(4, blocks, [["code"], ["maths"], ["code"]], ["ours"])
    assert run["tasks"] == ["1 code", "1 maths", "1 code"]
    slow, fast = 2.0 / 30.0, 2.0 / 45.0
    assert run["by_task"]["ours smart ngram"] == pytest.approx(
        {"code": 4 / (slow + fast), "maths": 36.0}
    )
    reported = {(r["of"], r["over"]): r["value"] for r in run["ratios"] if r["key"] == "decode"}
    slower = (1 / 12 + 1 / 8 + 1 / 12) / (1 / 30 + 1 / 36 + 1 / 45)
    assert reported["ours smart ngram", "llama.cpp drafts"] == pytest.approx(slower)
    assert reported["ours plain", "llama.cpp plain"] == pytest.approx(2.0)
    assert set(reported) == {
        ("ours smart ngram", "llama.cpp drafts"),
        ("ours smart ngram", "ours plain"),
        ("ours plain", "llama.cpp plain"),
    }


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("auto", "SMART"),
        ("as-stored smart ngram", "SMART (n-grams, exact products)"),
        ("int8 smart draft_model", "SMART (draft model, activations in 8 bits)"),
        ("auto smart union", "SMART (head and n-grams)"),
        ("auto smart union, model=a.gguf", "SMART (draft model and n-grams, model=a.gguf)"),
        ("llama.cpp plain", "llama.cpp plain"),
    ],
)
def test_contestants_are_told_in_words(name: str, told: str) -> None:
    run = {"ratios": [{"of": name}], "by_task": {name: {"code": 1.0}}}
    found = report.in_words({"runs": [run], "decode": name})
    assert found["runs"] == [{"ratios": [{"of": told}], "by_task": {told: {"code": 1.0}}}]
    assert found["decode"] == name


def test_a_draft_model_of_the_whole_run_is_told() -> None:
    origin = {"command": "python -m smart_lab gguf-speed a.gguf --draft b.gguf --slots 1"}
    found = report.in_words({"provenance": origin, "runs": ["auto smart union"]})
    assert found["runs"] == ["SMART (draft model and n-grams)"]


def test_tasks_of_different_speed_do_not_widen_an_interval() -> None:
    """Where a block is all code or all maths, each is resampled by itself."""
    ours, base = [80.0, 20.0] * 3, [40.0, 16.0] * 3
    found = ratio(ours, base, ["code", "maths"] * 3)
    assert (found.value, found.low, found.high) == pytest.approx((1.4, 1.4, 1.4))
    assert ratio(ours, base, [""] * 6).low < 0.95 * found.value


class RuleOurs:
    """Our engines without a model; it counts how often it answers."""

    answered = 0

    def __init__(self, model: Path, held: str, configs: Any, slots: int, context: int) -> None:
        self.held, self._names = held, ["plain", *(f"smart {name}" for name in configs)]
        self.llm = argparse.Namespace(
            provenance={"model": str(model)},
            chat_prompt=self._chat,
            target=argparse.Namespace(eos_token_ids=(worlds.EOS,)),
            tokenizer=argparse.Namespace(encode=self._encode),
        )

    @staticmethod
    def _encode(text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [int(word) for word in text.split()]

    @staticmethod
    def _chat(messages: Any) -> Any:
        return argparse.Namespace(tokens=[int(messages[0]["content"]), 5])

    def contestants(self, places: int) -> dict[str, Callable[..., Reply]]:
        def answer(prompts: Any, tokens: int) -> Reply:
            RuleOurs.answered += 1
            reported = [[(p[-1] + 1 + i) % worlds.EOS for i in range(tokens)] for p in prompts]
            return Reply(
                9.0,
                8.0 * places,
                0.1,
                3.0,
                reported,
                [1.0] * len(reported),
                [tokens] * len(reported),
            )

        return {f"{self.held} {name}": answer for name in self._names}

    bytes_read = 40_000_000

    def first_token(self, prompt: Any) -> float:
        return 0.002 * len(prompt)

    def read_rate(self, calls: int) -> float:
        return 50e9

    def forwards(self, rows: Any, context: int, turns: int) -> dict[int, float]:
        return dict.fromkeys(rows, 0.001)


@pytest.fixture
def command(
    binaries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., argparse.Namespace]:
    monkeypatch.setattr(gguf_speed, "Ours", RuleOurs)
    monkeypatch.setattr(gguf_speed, "PAUSE", 0.0)
    monkeypatch.setattr(gguf_speed, "load_task", lambda task: [str(n) for n in range(30)])
    monkeypatch.setattr(RuleOurs, "answered", 0)
    for name in ("m.gguf", "d.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")

    def parsed(*words: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        gguf_speed.add_arguments(parser)
        usual = [str(tmp_path / "m.gguf"), "--draft", str(tmp_path / "d.gguf")]
        usual += ["--llama-cpp", str(binaries), "--max-tokens", "8", "--tune-tokens", "4"]
        return parser.parse_args([*usual, *words])

    return parsed


def test_a_run_is_whole_whatever_the_time_and_goes_on(
    command: Callable[..., argparse.Namespace],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, file = str(tmp_path / "run.part"), tmp_path / "run.json"
    words = ("--slots", "2", "--resume", kept, "--json", str(file))
    assert gguf_speed.main(command(*words, "--time-limit", "0")) == 0
    text = capsys.readouterr().out
    assert "2 requests at a time, 1 blocks of 6 prompts" in text
    assert re.search(r"llama.cpp, not tried for lack of time: (\d+) of \1 settings", text)
    assert "SMART, one row: 0.04 GB of weights, 40.0 GB/s, 0.80 of the 50.0 at which" in text
    assert "llama.cpp 1000 (1000 - 1000), 1.00 of llama.cpp's; SMART 500 (500 - 500), 0.50" in text
    result = json.loads(file.read_text())
    assert str(tmp_path) not in file.read_text()
    weights = result["provenance"]["weights"]
    assert weights["sha256 of d.gguf"] == hashlib.sha256(b"GGUF").hexdigest()
    (run,) = result["runs"]
    rates = {one["name"]: one["decode"][0] for one in run["contestants"]}
    assert rates == pytest.approx(
        {
            "llama.cpp plain": 1.0,
            "llama.cpp draft model": 2.0,
            "llama.cpp n-gram": 1.0,
            "llama.cpp draft model and n-gram": 2.0,
            **{f"auto {name}": 9.0 for name in ("plain", "smart draft_model")},
            **{f"auto smart {name}": 9.0 for name in ("ngram", "union")},
        }
    )
    assert {one["same"] for one in run["contestants"]} == {1.0}
    assert result["forwards"]["auto"]["16"] == pytest.approx([1.0, 1.0, 1.0])
    assert result["forwards"]["llama.cpp"]["16"] == pytest.approx([16.0, 16.0, 16.0])

    before = RuleOurs.answered
    assert gguf_speed.main(command(*words, "--time-limit", "60", "--blocks", "3")) == 0
    text = capsys.readouterr().out
    assert "2 requests at a time, 3 blocks of 6 prompts" in text
    assert "llama.cpp with" not in text  # tuned once
    assert gguf_speed.main(command(*words, "--time-limit", "60", "--blocks", "3")) == 0
    reported = json.loads(file.read_text())["provenance"]["command"]
    assert reported.endswith("--time-limit 120  # in 3 parts, by --resume")
    assert RuleOurs.answered - before == 4 * 3  # a warm-up and two blocks


@pytest.mark.slow
def test_llama_cpp_is_asked_as_fairly_as_we_are(
    command: Callable[..., argparse.Namespace],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Tuned and warmed up on other prompts than it is measured on, each slot once; nothing is kept
    between answers, and no variable changes its flags."""
    log = tmp_path / "asked"
    monkeypatch.setenv("ASKED", str(log))
    monkeypatch.setenv("LLAMA_ARG_THREADS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert gguf_speed.main(command("--slots", "3", "--blocks", "2", "--time-limit", "600")) == 0
    requests = [json.loads(line) for line in log.read_text().splitlines()]
    measured: dict[int, list[list[int]]] = {}
    for each in requests:
        assert not {"LLAMA_ARG_THREADS", "OMP_NUM_THREADS"} & set(each["environment"])
        assert {"--no-cache-prompt", "--offline"} <= set(each["words"])
        assert each["words"][each["words"].index("--parallel") + 1] == "3"
        numbers = [prompt[0] for prompt in each["prompts"]]
        if each["prompts"] == [[1, 2, 3]]:  # warms up
            continue
        if each["tokens"] == 4:  # while flags are tried
            assert max(numbers) < gguf_speed.KEPT_BACK / len(gguf_speed.TASKS)
        else:
            measured.setdefault(each["process"], []).append(numbers)
    assert len(measured) == 5  # plain, n-grams, draft model as tuned and by default, both
    for warm_up, first, second in measured.values():
        assert max(warm_up) < gguf_speed.KEPT_BACK / len(gguf_speed.TASKS) <= min(*first, *second)
        assert len(warm_up) == 3
        assert len(first) == len(second) == 3 * gguf_speed.WAVES
    text = capsys.readouterr().out
    reported = text.rpartition("3 requests at a time")[2]
    rates = {line[:38].strip(): line[38:].split() for line in reported.splitlines()[2:11]}
    assert rates["llama.cpp draft model, its defaults"][4] == "2.0"
    assert rates["llama.cpp draft model"][4] == "4.0"
    assert "failed: llama.cpp plain with" in reported
    assert "not tried" not in reported


def test_who_begins_changes_from_block_to_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_speed, "PAUSE", 0.0)
    order: list[str] = []

    def contestant(name: str) -> Callable[[Any, int], Reply]:
        def answer(prompts: Any, tokens: int) -> Reply:
            order.append(name)
            return Reply(float(ord(name)), 1.0, 0.5, 1.0, [[1, 2]])

        return answer

    contestants = {name: contestant(name) for name in "abc"}
    for number in range(4):
        found = gguf_speed.block(contestants, [[1]], 8, number)
        assert {name: of["decode"] for name, of in found.items()} == {"a": 97, "b": 98, "c": 99}
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"


def test_rivals_take_part(
    command: Callable[..., argparse.Namespace],
    python: Path,
    cousin: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """They are loaded once for all numbers of slots, and their versions last."""
    words = ["--vllm", str(python), "--openvino", str(python), "--ik-llama-cpp", str(cousin)]
    words += ["--slots", "1,2", "--blocks", "1", "--time-limit", "0"]
    words += ["--resume", str(tmp_path / "run.part"), "--json", str(tmp_path / "run.json")]
    for _ in range(2):
        assert gguf_speed.main(command(*words)) == 0
        reported = capsys.readouterr().out
        assert "vLLM: 9, in bf16" in reported
        assert "OpenVINO: 9, from the file" in reported
        assert "ik_llama.cpp: version: 7 (abc)" in reported
        assert "SMART (draft model) over vLLM n-gram, decode: 4.50 (one block)" in reported
        assert re.search(r"ik_llama.cpp, not tried for lack of time: (\d+) of \1 ", reported)
        text = (tmp_path / "run.json").read_text()
        assert str(tmp_path) not in text
        for run in json.loads(text)["runs"]:
            rates = {one["name"]: one["decode"][0] for one in run["contestants"]}
            assert (rates["vLLM plain"], rates["vLLM n-gram"]) == (1.0, 2.0)
            assert rates["OpenVINO prompt lookup of 5"] == 4.0  # that of 3 was slower in a trial
            assert "OpenVINO prompt lookup of 3" not in rates
            assert rates["ik_llama.cpp plain"] == 1.0
            assert rates.get("ik_llama.cpp suffix") == (2.0 if run["slots"] == 1 else None)
            assert {one["same"] for one in run["contestants"]} == {1.0}
            over = [one["over"] for one in run["ratios"] if one["key"] == "decode"]
            assert over[0] == "OpenVINO prompt lookup of 5"  # the best of all
        (page, *_) = tables.gguf(json.loads(text))[1:]
        assert any(line.startswith("ik_llama.cpp suffix: `--threads") for line in page.captions)
        assert "OpenVINO: 9, from the file, in its own quants" in page.captions
    assert "is loaded" not in reported  # all was measured


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--vllm", "nowhere/python"), "--vllm nowhere/python is no Python"),
        (("--openvino", "nowhere/python"), "--openvino nowhere/python is no Python"),
        (("--ik-llama-cpp", "nowhere"), "nowhere has no llama-server"),
        (("--ours", "packed"), "--ours takes auto, exact, expanded, not packed"),
        (("--max-tokens", "1"), "--max-tokens 1 is too small"),
        (("--blocks", "4,2"), "one number, or one for each of --slots"),
        (("--draft", "x.safetensors"), "x.safetensors is not a GGUF file"),
        (("--smart", "medusa"), "neither one of"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_loaded(
    words: tuple[str, ...], message: str, command: Callable[..., argparse.Namespace]
) -> None:
    with pytest.raises(ConfigError, match=message):
        gguf_speed.main(command(*words))


def test_prompts_that_do_not_fit_are_an_error(command: Callable[..., argparse.Namespace]) -> None:
    with pytest.raises(ConfigError, match="too few prompts fit"):
        gguf_speed.main(command("--max-model-len", "9"))
