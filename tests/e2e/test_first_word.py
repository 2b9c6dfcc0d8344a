"""How soon `smart run` says its first word, in a new process, with the model's file at hand."""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from smart_decoding.models.checkpoints.hub import cache_dir
from smart_decoding.models.checkpoints.loading import load_checkpoint

pytestmark = pytest.mark.model

FIRST = 10.0  # seconds, on a quiet machine
LATER = 2.0
BUSY = 3.0  # times as long on one that others share


def first_word() -> tuple[float, float]:
    """Seconds from the command to the first byte of the answer, and seconds of processors that the
    whole of it took."""
    line = [sys.executable, "-m", "smart_decoding.cli.main", "run", "Hello!", "-n", "4"]
    before = processor_seconds()
    started = time.monotonic()
    with subprocess.Popen(line, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        seconds = time.monotonic() - started
        process.stdout.read()
    assert process.returncode == 0
    return seconds, processor_seconds() - before


def processor_seconds() -> float:
    """Of all processes that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_the_first_word_comes_soon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At first with nothing that was made of the model's file: no converted weights, no profile."""
    load_checkpoint("smollm2-135m")  # fetches it if need be
    for entry in cache_dir().iterdir():
        if entry.name not in ("converted", "profiles"):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.setenv("SMART_CACHE", str(tmp_path))
    first, _ = first_word()
    later, processor = first_word()
    print(f"{first:.1f} s at first, later {later:.1f} s, {processor:.1f} s of processors")
    assert first < BUSY * FIRST
    assert later < BUSY * FIRST
    assert min(later, processor) < BUSY * LATER  # who waits for a processor is not slow
