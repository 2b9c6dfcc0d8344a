"""Long steps say that they run: lines in a pipe, a bar on a terminal."""

from __future__ import annotations

import logging
import sys

import pytest

from smart_decoding.cli import run as cli_run
from smart_decoding.progress import long_step


def test_in_a_pipe_a_step_has_a_line_at_its_beginning_and_at_its_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("smart.steps", "smart.memory"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
    cli_run.show_steps()
    with long_step("measuring", 2.0) as progress:
        assert capsys.readouterr().err == "smart: measuring ...\n"
        progress(1.0)
    assert capsys.readouterr().err == "smart: measuring: done in 0.0 s\n"


def test_on_a_terminal_a_step_has_a_bar(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with long_step("measuring", 2.0) as progress:
        progress(2.0)
    shown = capsys.readouterr().err
    assert "measuring:   0%" in shown
    assert "..." not in shown
