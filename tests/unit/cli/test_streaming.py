"""An answer as it is printed: Harmony's reasoning beside its content, at terminals and in pipes."""

from __future__ import annotations

import io
import sys

import pytest
from scripted import FakeLLM

from smart_decoding.cli.streaming import StreamedAnswer
from smart_decoding.engine.sampling_params import SamplingParams

ANALYSIS = "<|channel|>analysis<|message|>"
FINAL = "<|channel|>final<|message|>"


class Stream(io.StringIO):
    """A standard stream, which may be a terminal. screen: what all terminals show."""

    def __init__(self, terminal: bool, screen: list[str]) -> None:
        super().__init__()
        self.isatty = lambda: terminal
        self.screen = screen

    def write(self, text: str) -> int:
        if self.isatty():
            self.screen.append(text)
        return super().write(text)


def answered(
    monkeypatch: pytest.MonkeyPatch, answer: str, out: bool, err: bool
) -> tuple[str, str, str]:
    """What is on standard output, on standard error and on the screen. out, err: whether each of
    them is a terminal."""
    screen: list[str] = []
    streams = Stream(out, screen), Stream(err, screen)
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    llm = FakeLLM("m", speculative_config=None)
    llm.tokenizer.template = ANALYSIS
    monkeypatch.setattr(llm, "pieces", (answer[:40], answer[40:]), raising=False)
    StreamedAnswer(llm, chat=True).run("q", SamplingParams())  # type: ignore[arg-type]
    return streams[0].getvalue(), streams[1].getvalue(), "".join(screen)


@pytest.mark.parametrize("out", [False, True])
@pytest.mark.parametrize("err", [False, True])
def test_reasoning_and_content_share_no_word(
    monkeypatch: pytest.MonkeyPatch, out: bool, err: bool
) -> None:
    """A terminal's last word is held back until the next one begins, or the text ends."""
    answer = f"{ANALYSIS}I think so.<|end|><|start|>assistant{FINAL}42"
    shown = answered(monkeypatch, answer, out, err)
    assert shown == ("42\n", "I think so.\n", "I think so.\n" * err + "42\n" * out)


CLIPBOARD = "\x1b]52;c;cm0gLXJm\x07"  # writes to the clipboard of many terminals


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("channel", ["", ANALYSIS, FINAL])
def test_a_terminal_gets_no_control_characters(
    monkeypatch: pytest.MonkeyPatch, channel: str, terminal: bool
) -> None:
    """A pipe gets the answer as it is."""
    answer = f"{channel}a{CLIPBOARD} \x9b2Jb\rc\n\td"
    out, err, _ = answered(monkeypatch, answer, terminal, terminal)
    printed = err if channel == ANALYSIS else out
    raw = answer.removeprefix(channel)
    assert printed == ("a]52;c;cm0gLXJm 2Jbc\n\td\n" if terminal else f"{raw}\n")


def test_an_answer_of_reasoning_alone_keeps_its_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    for terminal in (True, False):
        shown = answered(monkeypatch, f"{ANALYSIS}I think so", True, terminal)
        assert shown[:2] == ("", "I think so\n")


def test_content_before_reasoning_is_shown_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    preamble = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
    answer = f"{preamble}{ANALYSIS}Hm.<|end|><|start|>assistant{FINAL}42"
    assert answered(monkeypatch, answer, True, True)[2] == "I look.\nHm.\n42\n"


def test_an_answer_of_nothing_prints_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert answered(monkeypatch, "", True, True) == ("", "", "")
