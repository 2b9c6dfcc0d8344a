"""Long steps say that they run: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator

import pytest

from smart_decoding.cli import run as cli_run
from smart_decoding.errors import ModelError
from smart_decoding.progress import long_step


@pytest.fixture
def as_nobody_set_it_up() -> Iterator[None]:
    logger = logging.getLogger("smart.steps")
    before = logger.level
    logger.setLevel(logging.NOTSET)
    yield
    logger.setLevel(before)


def said_of_a_step(capsys: pytest.CaptureFixture[str]) -> str:
    with long_step("measuring", 2.0) as progress:
        progress(1.0)
    return capsys.readouterr().err


def test_in_a_pipe_a_step_has_a_line_at_its_beginning_and_at_its_end(
    as_nobody_set_it_up: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, and in any program that makes an `LLM`."""
    cli_run.show_steps()
    with long_step("measuring", 2.0) as progress:
        assert capsys.readouterr().err == "smart: measuring ...\n"
        progress(1.0)
    assert capsys.readouterr().err == "smart: measuring: done in 0.0 s\n"


def test_a_program_that_logs_gets_each_line_once_and_one_that_wants_silence_has_it(
    as_nobody_set_it_up: None,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)  # of the root
    assert said_of_a_step(capsys) == ""
    assert caplog.messages == ["measuring ...", "measuring: done in 0.0 s"]
    caplog.set_level(logging.WARNING, "smart")
    assert said_of_a_step(capsys) == ""
    assert len(caplog.messages) == 2


def test_a_step_that_fails_has_an_end_too(
    as_nobody_set_it_up: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ModelError), long_step("converting", 1.0):
        raise ModelError("damaged")
    assert capsys.readouterr().err.endswith("smart: converting: broken off after 0.0 s\n")


def test_on_a_terminal_a_step_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with long_step("measuring", 2.0) as progress:
        progress(2.0)
    shown = capsys.readouterr().err
    assert "measuring:   0%" in shown
    assert "..." not in shown
