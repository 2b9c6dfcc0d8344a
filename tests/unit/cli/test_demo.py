"""`smart demo` on a scripted LLM."""

from __future__ import annotations

import re

import pytest
import torch
from scripted import FakeLLM

from smart_decoding.cli import demo as cli_demo
from smart_decoding.cli import main as cli
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.kernels import library
from smart_decoding.models import target


def test_demo(
    fake: type[FakeLLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.main(["demo"]) == 0
    out = capsys.readouterr().out
    assert out.count("Paris is the capital.") == len(cli_demo.PROMPTS)
    assert "the last 2 verified trees\n" in out
    assert TREE in out
    assert out.count('=> "."') == 2
    line = r"plain [\d.]+ tok/s, smart [\d.]+ tok/s, speedup [\d.]+ \(identical output: yes\)"
    assert re.search(line, out)
    assert "weights: fake weights" in out
    assert "what to try next" in out
    assert [llm.options["speculative_config"] for llm in fake.made] == [{"policy": "smart"}, False]


TREE = """
"??Paris"
├─● " is" 0.90
│ ├─● " the" 0.75
│ │ └─● " capital" 0.40
│ └─○ " a" 0.08
└─○ " a" 0.10
=> "."
"""


def test_demo_takes_turns(fake: type[FakeLLM], monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    monkeypatch.setattr(
        cli_demo, "_timed", lambda llm, params: order.append(llm) or cli_demo.Timing(1.0, [])
    )
    plain, fast = (FakeLLM("m", speculative_config=c) for c in (False, None))
    timings = cli_demo.measure(plain, fast, SamplingParams(temperature=0.0))  # type: ignore[arg-type]
    assert order == [plain, fast, fast, plain, plain, fast]
    assert [len(t) for t in timings] == [3, 3]


def test_demo_summary_takes_medians_and_compares_answers() -> None:
    def passes(*speeds: float, answer: int = 1) -> list[cli_demo.Timing]:
        return [cli_demo.Timing(speed, [[answer]]) for speed in speeds]

    line = cli_demo.summary(passes(50, 60, 40), passes(100, 90, 84))
    assert line == "plain 50.0 tok/s, smart 90.0 tok/s, speedup 2.00 (identical output: yes)"
    assert "identical output: no" in cli_demo.summary(passes(50), passes(100, answer=2))


def test_demo_without_trees_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    cli_demo.show_trees(FakeLLM("m", speculative_config=None), [])  # type: ignore[arg-type]
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
