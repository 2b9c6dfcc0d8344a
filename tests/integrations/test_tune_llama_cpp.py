"""`smart tune llama.cpp`, against a fake server with a recorded --help, and a real one as a slow
test."""

from __future__ import annotations

import configparser
import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from gguf import GGUFWriter

from smart_decoding.cli import main as cli
from smart_decoding.cli import tune as cli_tune
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.tuning import huge_pages, llama_cpp, processes, verdicts
from smart_decoding.integrations.tuning.llama_cpp import LlamaCpp, architecture, pairs, server_at
from smart_decoding.integrations.tuning.llama_help import LlamaHelp
from smart_decoding.integrations.tuning.search import Prompts, Search
from smart_decoding.integrations.tuning.settings import Setting
from smart_decoding.measuring import machine
from smart_decoding.measuring.resume import Progress
from smart_decoding.measuring.tasks import load_task

from .told import trial_as_told

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found

HERE = Path(__file__).parent
HELP = (HERE / "llama_server_help.txt").read_text()
OLD = """usage: llama-server [options]
-m,    --model FNAME      model path
-np,   --parallel N       number of slots (default: 1)
-fa,   --flash-attn       enable Flash Attention (default: disabled)
-md,   --model-draft FNAME  draft model for speculative decoding
--draft-max, --draft, --draft-n N   number of tokens to draft (default: 16)
--draft-p-min P           minimum probability (default: 0.8)
"""


@pytest.fixture(autouse=True)
def no_huge_pages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All machines search alike: one whose system does not tell of huge pages."""
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "none")


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """A folder with the fake under the name of the real one."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "llama-server"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HERE}/fake_llama_server.py "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return gguf(tmp_path / "model.gguf", "llama", mtp=1)


def gguf(path: Path, kind: str, mtp: int = 0) -> Path:
    """The header of a file: its architecture and its layers for multi-token prediction."""
    writer = GGUFWriter(path, kind)
    if mtp:
        writer.add_nextn_predict_layers(mtp)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts"
    path.write_text("".join(f"prompt {number}\n" for number in range(40)))
    return path


@pytest.fixture
def tune(
    server: Path, model: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Any:
    """Run the command on the fake, whose own seconds count: a busy machine would blur its rule."""
    monkeypatch.setenv("FAKE_PACE", "0.05")
    monkeypatch.setattr(llama_cpp.busy, "trial", trial_as_told)
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))

    def run(*words: str, model: Path = model) -> int:
        output = str(tmp_path / "out.ini")
        usual = ["tune", "llama.cpp", "-m", str(model), "--server", str(server)]
        usual += ["--prompts", str(prompts), "--max-tokens", "12", "--output", output]
        return cli.main([*usual, *words])

    return run


def started(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]


def left_over(tmp_path: Path) -> list[int]:
    """Fakes that are still there after a while."""
    until = time.monotonic() + 10
    while time.monotonic() < until:
        found = [each["process"] for each in started(tmp_path) if alive(each["process"])]
        if not found:
            return []
        time.sleep(0.05)
    return found


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def test_the_ways_of_drafting_are_those_of_the_servers_help() -> None:
    found = LlamaHelp(HELP)
    assert found.drafting == [
        *("draft-simple", "draft-eagle3", "draft-mtp", "draft-dflash", "draft-dspark"),
        *("ngram-simple", "ngram-map-k", "ngram-map-k4v", "ngram-mod", "ngram-cache"),
    ]
    assert "--draft-max" not in found  # it is listed to say that it was removed
    assert "--no-kv-unified" in found
    assert found.takes("--flash-attn", "on")
    assert not found.takes("--flash-attn", "maybe")
    assert found.first("--draft-max", "--spec-draft-n-max") == "--spec-draft-n-max"


def test_a_new_way_of_drafting_is_tried_without_a_table(model: Path, tmp_path: Path) -> None:
    text = HELP.replace("ngram-simple,", "ngram-simple,ngram-trie,")
    text += "--spec-ngram-trie-size-n N    length of lookup\n--spec-ngram-trie-size-m N    drafts\n"
    words = dict(drafts_of(text, model, None, tmp_path))
    sized = ("--spec-ngram-trie-size-n", "3", "--spec-ngram-trie-size-m", "4")
    assert words["ngram-trie"] == ("--spec-type", "ngram-trie", *sized)


def drafts_of(
    text: str, model: Path, draft: Path | None, tmp_path: Path
) -> list[tuple[str, tuple[str, ...]]]:
    """Ways of drafting of a server with such a help."""
    (tmp_path / "help").write_text(text)
    program = tmp_path / "llama-server-of-a-day"
    program.write_text(f"#!/bin/sh\ncat {tmp_path}/help\n")
    program.chmod(0o755)
    return LlamaCpp(program, model, draft, ["a"], 8).drafts()


def test_an_old_server_drafts_by_its_own_names(model: Path, tmp_path: Path) -> None:
    draft = gguf(tmp_path / "draft.gguf", "llama")
    assert drafts_of(OLD, model, None, tmp_path) == []
    mode, words = drafts_of(OLD, model, draft, tmp_path)[0]
    assert mode == "draft-simple"
    assert words == ("--model-draft", str(draft), "--draft-max", "3", "--draft-p-min", "0.0")


@pytest.mark.parametrize(
    ("kind", "ways"),
    [
        ("llama", {"draft-simple"}),
        ("eagle3", {"draft-eagle3"}),
        ("dflash", {"draft-dflash", "draft-dspark"}),
    ],
)
def test_a_draft_file_says_what_it_is_for(kind: str, ways: set[str], tmp_path: Path) -> None:
    draft = gguf(tmp_path / "draft.gguf", kind)
    assert architecture(draft) == kind
    model = gguf(tmp_path / "model.gguf", "llama")
    found = {mode for mode, _ in drafts_of(HELP, model, draft, tmp_path)}
    assert {mode for mode in found if not mode.startswith("ngram")} == ways
    assert found - ways == {"ngram-simple", "ngram-map-k4v", "ngram-mod"}


def test_layers_for_multi_token_prediction_are_found_in_either_file(tmp_path: Path) -> None:
    plain, own = gguf(tmp_path / "a.gguf", "qwen35"), gguf(tmp_path / "b.gguf", "qwen35", mtp=1)
    for files, found in (((plain, None), False), ((own, None), True), ((plain, own), True)):
        assert ("draft-mtp" in {mode for mode, _ in drafts_of(HELP, *files, tmp_path)}) == found


def test_words_become_a_preset() -> None:
    words = shlex.split("--threads 2 --no-repack --spec-type ngram-mod --temp -1")
    assert pairs(words) == [
        ("threads", "2"),
        ("no-repack", "true"),
        ("spec-type", "ngram-mod"),
        ("temp", "-1"),
    ]


def test_the_command_finds_the_rule_of_the_fake(
    tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--slots", "1,4", "--server-args", "--ctk q8_0") == 0
    told, lines = capsys.readouterr()
    best = "--no-repack --spec-type ngram-simple --spec-ngram-simple-size-n 3"
    program = tmp_path / "bin" / "llama-server"
    assert f"1 at once: {program} -m {tmp_path}/model.gguf --parallel 1 --ctk q8_0" in told
    one, four = (line for line in told.splitlines() if f" at once: {program}" in line)
    assert "--no-repack" in one
    assert "--spec-type ngram-simple --spec-ngram-simple-size-n 3" in one
    assert "--parallel 4 --ctk q8_0" in four
    assert "--no-repack" in four
    assert "--spec-type" not in four
    assert "from four requests on leave speculation off" in told
    assert "With one request at once ngram-simple 3 4 is" in told
    assert re.search(
        r"With one request at once plain decoding is 1\.[3-6].* with --no-repack", told
    )
    assert "Did not work: draft-mtp: llama-server ended with 1: load_model: failed to" in told
    assert best.split()[-1] in lines  # what is measured is told on the way
    preset = (tmp_path / "out.ini").read_text()
    assert f"[model-1-at-once]\nmodel = {tmp_path}/model.gguf\nparallel = 1\nctk = q8_0" in preset
    assert "spec-type = ngram-simple\nspec-ngram-simple-size-n = 3\n" in preset
    assert preset.count("no-repack = true\n") == 2
    sections = configparser.ConfigParser()
    sections.read_string(preset)  # what stands before a section would be a model by itself
    assert sections.sections() == ["model-1-at-once", "model-4-at-once"]
    kept = json.loads((tmp_path / "out.reasons.json").read_text())
    assert kept["version"] == "version: 7 (a fake)"
    assert kept["choices"][0]["pays"] is True
    assert kept["choices"][1]["pays"] is False
    assert {"load", "mode", "options", "blocks"} == set(kept["tried"][0])
    for each in kept["judged"]:  # at least three new processes of each side
        assert len(each["blocks"]) >= verdicts.LEAST
    assert left_over(tmp_path) == []
    for each in started(tmp_path):
        assert each["words"][each["words"].index("--ctk") + 1] == "q8_0"


@pytest.mark.parametrize(
    ("mode", "libc", "found"),
    [
        ("always [madvise] never", ("glibc", "2.35"), True),
        ("[always] madvise never", ("glibc", "2.41"), False),
        ("always madvise [never]", ("glibc", "2.41"), False),
        ("always [madvise] never", ("glibc", "2.31"), False),
        ("always [madvise] never", ("", ""), False),  # musl
        ("nonsense", ("glibc", "2.41"), False),
    ],
)
def test_huge_pages_are_tried_where_they_must_be_requested(
    mode: str, libc: tuple[str, str], found: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "enabled").write_text(mode + "\n")
    monkeypatch.setattr(machine, "_HUGE_PAGES", tmp_path / "enabled")
    monkeypatch.setattr("platform.libc_ver", lambda: libc)
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert huge_pages.variable() == ((huge_pages.VARIABLE,) if found else ())
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.check=1")  # the user's own stay
    assert huge_pages.variable() == ()


def test_huge_pages_stand_before_the_command(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huge_pages, "variable", lambda: (huge_pages.VARIABLE,))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    assert tune("--slots", "1", "--server-args", "-ctk q8_0") == 0
    told = capsys.readouterr().out
    program, variable = tmp_path / "bin" / "llama-server", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1"
    (line,) = (line for line in told.splitlines() if "1 at once: " in line)
    assert line.startswith(f"1 at once: {variable} {program} -m ")
    assert line.count(variable) == 1
    assert "--no-repack" in line
    assert "--spec-ngram-simple-size-n 3" in line
    assert f"a preset: {variable} {program} --models-preset" in told
    assert f"times as fast with {variable} as with defaults" in told
    assert f"times as fast with --no-repack as with {variable}" in told
    assert "GLIBC" not in (tmp_path / "out.ini").read_text()
    assert "ctk = q8_0\n" in (tmp_path / "out.ini").read_text()
    starts = started(tmp_path)
    assert {each["tunables"] for each in starts} == {None, variable.partition("=")[2]}
    assert not any("GLIBC" in word for each in starts for word in each["words"])
    drafting = [each for each in starts if "--spec-type" in each["words"]]
    assert all(each["tunables"] for each in drafting)


def test_servers_see_the_users_environment_alone(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not what this package sets for itself: llama.cpp's threads would sleep sooner, too. A key
    would refuse our requests."""
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("LLAMA_ARG_THREADS", "1")
    for given in ({}, {"GOMP_SPINCOUNT": "77"}):
        (tmp_path / "log").unlink(missing_ok=True)
        code = f"import os; os.environ.pop('GOMP_SPINCOUNT', None); os.environ.update({given}); "
        code += "import sys; from smart_decoding.cli import main; sys.exit(main.main(sys.argv[1:]))"
        words = ["tune", "llama.cpp", "-m", str(tmp_path / "model.gguf"), "--slots", "1"]
        words += ["--server", str(tmp_path / "bin"), "--prompts", str(tmp_path / "prompts")]
        words += ["--max-tokens", "4", "--time-limit", "5", "--output", str(tmp_path / "out.ini")]
        subprocess.run([sys.executable, "-c", code, *words], check=True, timeout=60)
        starts = started(tmp_path)
        assert starts
        assert all(each["seen"] == given for each in starts)


def test_one_server_runs_at_a_time(tune: Any, tmp_path: Path) -> None:
    """A stopped one keeps its memory: on a GPU the next one would run on the CPU."""
    began = processes.ServerProcess.__init__
    running: list[int] = []

    def counted(self: Any, *given: Any, **named: Any) -> None:
        running.append(sum(alive(each["process"]) for each in log_of(tmp_path)))
        began(self, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes.ServerProcess, "__init__", counted)
        assert tune("--slots", "1", "--time-limit", "8") == 0
    assert len(running) > 2
    assert set(running) == {0}


def log_of(tmp_path: Path) -> list[dict[str, Any]]:
    return started(tmp_path) if (tmp_path / "log").exists() else []


@pytest.mark.usefixtures("tune")
def test_what_runs_on_the_cpu_in_part_is_told(server: Path, tmp_path: Path) -> None:
    """`--fit`, the default, moves layers to the CPU where a draft model takes the memory."""
    model, draft = gguf(tmp_path / "gpu.gguf", "llama"), gguf(tmp_path / "draft.gguf", "llama")
    engine = LlamaCpp(server / "llama-server", model, draft, ["a"], 8)
    with engine.launch(Setting(), [1]) as plain:
        assert plain.notes == []
    drafts = Setting("draft-simple", drafts=("--spec-draft-model", str(draft)))
    with engine.launch(drafts, [1]) as drafting:
        assert drafting.notes == [f"Not on the GPU: 13 of 33 layers with {drafts}."]
    assert engine.beside_gpu("offloaded 0/33 layers to GPU", ()) == [
        "Not on the GPU: 33 of 33 layers with the defaults."
    ]
    alone = LlamaCpp(server / "llama-server", model, None, ["a"], 8)
    assert alone.beside_gpu("offloaded 0/33 layers to GPU", ()) == []  # there is none


def test_a_prompt_of_digits_fits(tune: Any, tmp_path: Path, prompts: Path) -> None:
    """Each digit may be a token: the context is counted by the server, not by bytes."""
    prompts.write_text("".join(f"{number:02}" + "1" * 2000 + "\n" for number in range(8)))
    assert tune("--slots", "2", "--time-limit", "6") == 0
    longest = len("<user>") + 2002 + 12 + llama_cpp.SPARE
    first, *others = (each["words"] for each in started(tmp_path))
    assert int(first[first.index("--ctx-size") + 1]) < 2 * longest
    assert others
    assert {words[words.index("--ctx-size") + 1] for words in others} == {str(2 * longest)}


def test_drafts_are_found_wherever_the_preset_is_used(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf(tmp_path / "draft.gguf", "llama")
    monkeypatch.chdir(tmp_path)
    engine = LlamaCpp(
        tmp_path / "bin" / "llama-server", Path("model.gguf"), Path("draft.gguf"), ["a"], 8
    )
    words = [word for _, words in engine.drafts() for word in words if word.endswith(".gguf")]
    assert set(words) == {str(tmp_path / "draft.gguf")}
    assert engine.command(1, 1, ())[2] == str(tmp_path / "model.gguf")


@pytest.mark.parametrize(("tokens", "code"), [("300", 0), ("3000", 2)])
def test_the_time_limit_holds(
    tokens: str, code: int, tune: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Blocks of 3.6 s that are not begun without time, and one of 36 s that is broken off."""
    began = time.monotonic()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_PACE", "1")
        assert tune("--slots", "1", "--max-tokens", tokens, "--time-limit", "8") == code
    assert time.monotonic() - began < 30
    told, errors = capsys.readouterr()
    assert ("Nothing is decided yet." in told) == (code == 0)
    assert ("nothing was measured: the time limit was too short" in errors) == (code == 2)


def test_blocks_of_another_machine_are_refused(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--slots", "1", "--resume", str(tmp_path / "kept"), "--time-limit", "12")
    assert tune(*words) == 0
    monkeypatch.setattr(cli_tune, "machine", lambda: {**machine.machine(), "cpu": "another"})
    assert tune(*words) == 2
    assert "is of another run (machine cpu " in capsys.readouterr().err


def test_a_run_that_is_killed_leaves_no_server(
    server: Path, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """By force: nobody can end them but the system."""
    command = [sys.executable, "-m", "smart_decoding.cli.main", "tune", "llama.cpp"]
    command += ["-m", str(model), "--server", str(server), "--prompts", str(prompts)]
    command += ["--slots", "1", "--max-tokens", "200", "--output", str(tmp_path / "out.ini")]
    environment = {**os.environ, "FAKE_LOG": str(tmp_path / "log"), "FAKE_PACE": "0.1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and not log_of(tmp_path):
            time.sleep(0.05)
        process.kill()
    assert len(started(tmp_path)) == 1
    assert left_over(tmp_path) == []


def test_a_cut_run_goes_on(tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--slots", "1", "--resume", str(tmp_path / "kept"))
    assert tune(*words) == 0
    count = len(started(tmp_path))
    told = capsys.readouterr().out
    assert tune(*words) == 0
    assert len(started(tmp_path)) == count
    assert capsys.readouterr().out == told
    assert tune(*words, "--max-tokens", "9") == 2
    assert "is of another run (max_tokens 12 there, 9 here)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--server", "/nowhere"], "--server /nowhere: there is no llama-server that can be run"),
        (["--server", sys.executable], "is no llama-server: its --help has no --model"),
        (["-m", "/nowhere.gguf"], "/nowhere.gguf is no file"),
        (["-m", __file__], "is no GGUF file"),
        (["--draft", __file__], "is no GGUF file"),
        (["--slots", "1,21"], "40 prompts are too few for 21 requests at once: half of them"),
        (["--server-args", "--port 80"], "--server-args: leave out --port"),
        (["--output", "/nowhere/out.ini"], "cannot be written"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--time-limit", "0"], "--time-limit must be above 0"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_started(
    words: list[str], message: str, tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune(*words) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "log").exists()


def test_without_a_server_it_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match=r"brew install llama\.cpp"):
        server_at(None)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("broken.gguf", "llama-server ended with 1: common_init_: failed to load model"),
        ("dies.gguf", "llama-server did not answer: llama-server ended with 9: error: a bad thing"),
    ],
)
def test_a_server_that_fails_plainly_is_one_line(
    name: str, reason: str, tune: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tune("--slots", "1", model=gguf(tmp_path / name, "llama")) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert errors == [f"smart: error: {errors[0].partition('error: ')[2]}"]
    assert reason in errors[0]
    assert left_over(tmp_path) == []


def test_a_port_that_was_taken_meanwhile_is_told(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        monkeypatch.setattr(llama_cpp, "free_port", lambda: other.getsockname()[1])
        monkeypatch.setattr(processes, "ASKING", 0.2)
        assert tune("--slots", "1") == 2
    assert "couldn't bind HTTP server socket" in capsys.readouterr().err
    assert left_over(tmp_path) == []


def test_a_full_disk_is_told_and_nothing_is_half_written(
    tune: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write = Path.write_text

    def full(path: Path, *given: Any, **named: Any) -> int:
        if ".partial" in path.name:
            write(path, "half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, *given, **named)

    monkeypatch.setattr(Path, "write_text", full)
    assert tune("--slots", "1", "--resume", str(tmp_path / "kept")) == 2
    told = capsys.readouterr().err
    assert "could not be written: No space left on device" in told
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "model.gguf", "prompts", "log"}
    assert left_over(tmp_path) == []


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_a_run_that_is_stopped_ends_its_servers(
    number: signal.Signals, code: int, server: Path, model: Path, prompts: Path, tmp_path: Path
) -> None:
    """Ctrl-C also tells what is known."""
    command = [sys.executable, "-m", "smart_decoding.cli.main", "tune", "llama.cpp"]
    command += ["-m", str(model), "--server", str(server), "--prompts", str(prompts)]
    command += ["--slots", "1", "--max-tokens", "200", "--output", str(tmp_path / "out.ini")]
    environment = {**os.environ, "FAKE_LOG": str(tmp_path / "log"), "FAKE_PACE": "0.1"}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        until = time.monotonic() + 60
        while time.monotonic() < until and not (
            (tmp_path / "log").exists() and len(started(tmp_path)) >= 4
        ):
            time.sleep(0.05)
        process.send_signal(number)
        told, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    assert left_over(tmp_path) == []
    if number == signal.SIGINT:
        assert "Nothing is decided yet." in told
        assert "Leave speculation off" not in told
        assert "interrupted: this is what was known by then" in errors
        assert json.loads((tmp_path / "out.reasons.json").read_text())["choices"]
    assert "Traceback" not in errors


def test_a_signal_while_a_server_starts_leaves_none_behind(
    server: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It comes when the process is there, and nobody knows it yet."""
    real, pids = subprocess.Popen, []

    def popen(*words: Any, **options: Any) -> Any:
        process = real(*words, **options)
        pids.append(process.pid)
        signal.raise_signal(signal.SIGTERM)
        return process

    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setattr(processes.subprocess, "Popen", popen)
    port = processes.free_port()
    with pytest.raises(SystemExit, match="143"), processes.ending_with_us():
        processes.ServerProcess([str(server / "llama-server"), "--port", str(port)], port)
    assert len(pids) == 1
    assert not alive(pids[0])


REAL = os.environ.get("SMART_LLAMA_SERVER") or shutil.which("llama-server")


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="no llama-server: SMART_LLAMA_SERVER or PATH names one")
def test_a_real_server_takes_what_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default model's file, which is fetched; the router lists the presets."""
    from smart_decoding.models.checkpoints.hub import fetch_pinned
    from smart_decoding.models.checkpoints.registry import NAMED_MODELS

    assert REAL is not None
    file = fetch_pinned(NAMED_MODELS["smollm2-135m"].pinned)
    output = tmp_path / "out.ini"
    words = ["tune", "llama.cpp", "-m", str(file), "--server", REAL, "--output", str(output)]
    assert cli.main([*words, "--slots", "1,2", "--max-tokens", "24", "--time-limit", "240"]) == 0
    kept = json.loads(output.with_suffix(".reasons.json").read_text())
    ways = {each["mode"] for each in kept["tried"]}
    assert {"plain", "ngram-simple", "ngram-mod"} <= ways
    port = processes.free_port()
    command = [REAL, "--models-preset", str(output), "--port", str(port), "--host", "127.0.0.1"]
    router = processes.ServerProcess([*command, "--offline"], port)
    try:
        listed = [each["id"] for each in router.ask("/models", None, 30.0)["data"]]
    finally:
        router.close()
    assert [name[-len("-1-at-once") :] for name in listed if "at-once" in name] == [
        "-1-at-once",
        "-2-at-once",
    ]
    best = Setting(base=tuple(kept["choices"][0]["options"]))
    engine = LlamaCpp(Path(REAL), file, None, ["Tides are"], 8)
    with engine.launch(best, [1]) as launched:
        assert launched.answer(["Tides are"], 1).tokens == 8


class Twins(LlamaCpp):
    """llama.cpp, where drafting is nothing but plain decoding once more."""

    def stages(self, loads: Sequence[int], found: Found) -> Iterator[list[Setting]]:
        yield [Setting("twin", drafts=("--twin",))]

    def launch(self, setting: Setting, loads: Sequence[int]) -> llama_cpp.LlamaServer:
        return super().launch(Setting(base=setting.base), loads)


def test_twins_are_two_servers_with_the_same_options(
    server: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    texts = [f"prompt {number}" for number in range(12)]
    engine = Twins(server / "llama-server", model, None, texts, 4)
    found = Search(engine, Prompts(texts), Progress(None, {})).run([1])
    assert found.verdicts[1][0].ratio.pairs >= verdicts.LEAST
    port = started(tmp_path)[0]["words"].index("--port") + 1
    assert (
        len({(*each["words"][:port], *each["words"][port + 1 :]) for each in started(tmp_path)})
        == 1
    )


@pytest.mark.slow
@pytest.mark.skipif(REAL is None, reason="no llama-server: SMART_LLAMA_SERVER or PATH names one")
def test_of_two_equal_servers_none_is_faster() -> None:
    """The null test with real processes: SMART_NULL_RUNS searches of a minute or two each."""
    from smart_decoding.models.checkpoints.hub import fetch_pinned
    from smart_decoding.models.checkpoints.registry import NAMED_MODELS

    assert REAL is not None
    file = fetch_pinned(NAMED_MODELS["smollm2-135m"].pinned)
    texts = load_task("general")
    runs, wrong = int(os.environ.get("SMART_NULL_RUNS", "5")), 0
    for _ in range(runs):
        engine = Twins(Path(REAL), file, None, texts, 24)
        with processes.ending_with_us():
            found = Search(engine, Prompts(texts), Progress(None, {})).run([1])
        choice = found.choice(1)
        assert choice is not None
        assert not choice.open
        wrong += choice.pays
    assert wrong <= max(1, runs // 20)
