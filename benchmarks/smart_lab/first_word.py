"""From the command to the first word, and the memory that it takes: `smart run` on a GGUF file.

    python -m smart_lab first-word model.gguf --starts 3

The first start has an empty cache: it converts names, packs weights and writes them. Later ones map
them. Each is a process of its own. Memory is what the process holds at its peak: its own, and
mapped files, which make way where others need the room. The file lies in the system's cache of
files, where it fits.

Needed by LOG.md's figures of mixtures and hybrids.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from smart_decoding.errors import ConfigError, ModelError

PROMPT = "Say in one sentence what a tree is."
POLL = 0.02  # seconds between two looks at a process


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds to the first word and to the end, and peaks of memory in bytes: own, mapped, all."""

    first: float
    end: float
    own: int
    mapped: int
    total: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the file and the number of starts."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="a GGUF file")
    add("--starts", type=int, default=3, help="of which the first one has an empty cache (3)")
    add("--max-tokens", type=int, default=16, help="of the answer (16)")


def main(args: argparse.Namespace) -> int:
    """Print a line for each start. Raises ConfigError for a file that is not there, and ModelError
    where `smart run` fails."""
    if not args.file.is_file():
        raise ConfigError(f"{args.file} is not a file")
    if args.starts < 1:
        raise ConfigError(f"--starts {args.starts} is too few")
    size = args.file.stat().st_size
    with tempfile.TemporaryDirectory(dir=args.file.parent) as cache:
        for number in range(args.starts):
            start = started(args.file, args.max_tokens, cache)
            kept = sum(path.stat().st_size for path in Path(cache).rglob("*") if path.is_file())
            shares = {
                "at its peak": start.total,
                "own": start.own,
                "mapped": start.mapped,
                "kept on disk": kept,
            }
            parts = [f"{n / 1e9:.2f} GB {name} ({n / size:.2f})" for name, n in shares.items()]
            times = f"first word {start.first:.1f} s, end {start.end:.1f} s"
            print(f"start {number + 1}: {times}; {', '.join(parts)}", flush=True)
    return 0


def started(file: Path, tokens: int, cache: str) -> Start:
    """Run `smart run` on a file once. Raises ModelError where it fails."""
    smart = Path(sys.executable).with_name("smart")
    command = [str(smart), "run", str(file), PROMPT, "--max-tokens", str(tokens)]
    began = time.perf_counter()
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "SMART_CACHE": cache},
        ) as process,
    ):
        peaks = Peaks(process.pid)
        watcher = threading.Thread(target=peaks.watch)
        watcher.start()
        assert process.stdout is not None
        word = process.stdout.read(1)
        first = time.perf_counter() - began
        process.stdout.read()
        failed = process.wait() or not word
        end = time.perf_counter() - began
        peaks.over.set()
        watcher.join()
        if failed:
            errors.seek(0)
            raise ModelError(f"smart run failed: {errors.read().decode().strip()[-300:]}")
    return Start(first, end, peaks.own, peaks.mapped, peaks.total)


class Peaks:
    """Most bytes of memory that a process held."""

    def __init__(self, process: int) -> None:
        self._status = Path(f"/proc/{process}/status")
        self.own = self.mapped = self.total = 0
        self.over = threading.Event()

    def watch(self) -> None:
        """Look again and again until `over` is set."""
        while not self.over.wait(POLL):
            try:
                fields = dict(line.split(":", 1) for line in self._status.read_text().splitlines())
            except OSError:
                return
            if "RssAnon" not in fields:  # it has just ended
                return
            own, mapped = (1024 * int(fields[k].split()[0]) for k in ("RssAnon", "RssFile"))
            self.own = max(self.own, own)
            self.mapped = max(self.mapped, mapped)
            self.total = max(self.total, own + mapped)
