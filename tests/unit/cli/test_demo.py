"""`smart demo` on a scripted LLM."""

from __future__ import annotations

import io
import itertools
import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from scripted import FakeLLM

from smart_decoding.cli import demo as cli_demo
from smart_decoding.cli import main as cli
from smart_decoding.kernels import library
from smart_decoding.models import target


def test_demo(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pipe: plain lines. Each answer is timed twice with SMART and plainly, in turns."""
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setattr(
        cli_demo, "time", SimpleNamespace(perf_counter=itertools.count(1, 0.1).__next__)
    )
    order: list[FakeLLM] = []
    generate = FakeLLM.generate
    monkeypatch.setattr(
        FakeLLM,
        "generate",
        lambda llm, *args, **more: order.append(llm) or generate(llm, *args, **more),
    )
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert out.count("Paris is the capital.") == len(cli_demo.PROMPTS)
    assert all(f"> {prompt}" in out for prompt in cli_demo.PROMPTS)
    assert len(re.findall(r"^  (?:smart|plain)  .* 2 passes for 5 tokens$", out, re.M)) == 6
    assert out.count(TREE) == 1
    line = r"plain [\d.]+ tok/s, smart [\d.]+ tok/s, speedup [\d.]+ \(identical output: yes\)"
    assert re.search(line, out)
    assert "weights: fake weights" in out
    assert "what to try next" in out
    assert max(map(len, out.partition("what to try next")[0].splitlines())) <= 80
    smart, plain = fake.made
    assert [llm.options["speculative_config"] for llm in fake.made] == [{"policy": "smart"}, False]
    assert order == [smart, plain, plain, smart] * 3
    assert {params.temperature for _, params in smart.calls} == {0.0}


def test_what_comes_next_can_be_typed_as_it_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the clone's folder, without the environment on the path; each command is known."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name in ("python", "smart", "activate"):
        (programs / name).touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(programs / "python"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nonexistent")
    first, *lines = cli_demo.what_next().splitlines()[1:]
    assert first.split("  ")[1] == ". .venv/bin/activate"
    assert max(map(len, lines)) <= 80
    assert lines[0].split("  ")[-1].strip() == "a chat in a browser, with this race"
    monkeypatch.setenv("PATH", str(programs))
    assert cli_demo.what_next().splitlines()[1:] == lines
    for line in lines:
        program, command, *words = shlex.split(re.split(" {2,}", line.strip())[0])
        cli.build_parser(command).parse_args([command, *words])
        assert program == "smart"


TREE = """
"??Paris"
├─● " is" 0.90
│ ├─● " the" 0.75
│ │ └─● " capital" 0.40
│ └─○ " a" 0.08
└─○ " a" 0.10
=> "."
"""


def answer(*pieces: tuple[float, str, int]) -> cli_demo.TimedAnswer:
    return cli_demo.TimedAnswer(list(pieces), list(range(pieces[-1][2])))


FAST = answer((0.0, "1\n", 2), (0.1, "2\t3\x1b" + 70 * "x", 10))
SLOW = answer((0.0, "1\n", 2), (0.1, "2\t3\x1b", 4), (0.2, 70 * "x", 10))


@pytest.mark.parametrize("columns", [60, 80, 300])
def test_a_terminal_shows_both_lanes_and_then_the_answer(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.StringIO()
    monkeypatch.setattr(written, "isatty", lambda: True)
    monkeypatch.setattr("sys.stdout", written)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    cli_demo.show_race({"smart": FAST, "plain": SLOW})
    replay, _, rest = written.getvalue().rpartition("\x1b[J\x1b[?25h")  # erased; the cursor is back
    frames = replay.removeprefix("\x1b[?25l").split("\x1b[10A")
    assert len(frames) >= 3
    for frame in frames[:-1]:
        lines = re.sub(r"\x1b\[[\d;]*[mK]", "", frame).splitlines()
        assert len(lines) == 10
        assert max(map(len, lines)) <= min(columns, 100)
        assert all(line.isprintable() for line in lines)
        assert "smart" in lines[0] and "plain" in lines[0]  # noqa: PT018
    first, last = (re.sub(r"\x1b\[[\d;]*m", "", frame) for frame in (frames[0], frames[-2]))
    assert first.count("2 tokens") == 2
    assert last.count("10 tokens") == 2
    assert "80 tok/s" in last
    assert "40 tok/s" in last
    assert FAST.text in rest


def test_narrow_and_dumb_terminals_get_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("NO_COLOR", "1")
    for columns, term in ((59, "xterm"), (80, "dumb")):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", term)
        cli_demo.show_race({"smart": FAST, "plain": SLOW})
        out = capsys.readouterr().out
        assert out.startswith(FAST.text)
        assert re.search(r"smart  █{30}    80.0 tok/s", out)
        assert re.search(r"plain  █{15} {15}    40.0 tok/s", out)


def test_demo_summary_adds_up_and_compares_answers() -> None:
    races = [{"smart": FAST, "plain": SLOW}, {"smart": FAST, "plain": FAST}]
    line = cli_demo.summary(races, True)
    assert line == "plain 53.3 tok/s, smart 80.0 tok/s, speedup 1.50 (identical output: yes)"
    assert "identical output: no" in cli_demo.summary(races, False)


def test_demo_without_trees_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cli_demo.show_tree(FakeLLM("m", speculative_config=None), [])  # type: ignore[arg-type]
    assert "every round was decoded plainly" in capsys.readouterr().out


def test_it_says_what_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "unavailable", lambda: None)
    monkeypatch.setattr(library, "chosen", lambda: "x86-64-v3")
    monkeypatch.setattr(target, "device_of", lambda name: torch.device("cpu"))
    assert cli_demo.kernels() == "CPU kernels: x86-64-v3"
    monkeypatch.setattr(library, "unavailable", lambda: "none were built")
    assert cli_demo.kernels() == "CPU kernels: none, plain torch (none were built)"
    monkeypatch.setattr(target, "device_of", lambda name: torch.device("cuda"))
    assert cli_demo.kernels() == "device: cuda"
