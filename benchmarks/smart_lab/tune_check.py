"""Is what `smart tune llama.cpp` chooses as fast as what an exhaustive search chooses, and how much
sooner is it found?

    python -m smart_lab tune-check FILE --llama-cpp build/bin [--draft FILE] [--slots 1,4,8]

For each number of slots the search of `smart tune` runs; then all its settings answer `--blocks`
blocks each, none drops out, and the best of them is taken. At last both choices answer other blocks
in turn: their ratio has a 95 % interval.

Needed by LOG.md ("smart tune against an exhaustive search").
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.bench.data import DEFAULT_TASKS, load_task
from smart_decoding.bench.options import check_outputs
from smart_decoding.bench.provenance import machine, versions, write_json
from smart_decoding.bench.resume import Progress
from smart_decoding.cli.arguments import whole_numbers
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.tuning.found import Found
from smart_decoding.integrations.tuning.llama_cpp import LlamaCpp, server_at
from smart_decoding.integrations.tuning.processes import ending_with_us
from smart_decoding.integrations.tuning.report import interval
from smart_decoding.integrations.tuning.search import Pool, Prompts, Search
from smart_decoding.integrations.tuning.settings import Patience, Setting

if TYPE_CHECKING:
    from smart_decoding.bench.statistics import Ratio

QUICK, EXHAUSTIVE, LAST = "smart tune", "exhaustive", "both choices in turn"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The files, the loads, and how thorough the exhaustive search is."""
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="the model, a GGUF file")
    add("--draft", type=Path, metavar="FILE", help="a draft model or head")
    add("--llama-cpp", type=Path, required=True, metavar="DIR", help="folder of llama-server")
    add("--slots", type=whole_numbers, default=(1, 4, 8), metavar="1,4,8")
    add("--max-tokens", type=int, default=64, help="of an answer (64)")
    add("--blocks", type=int, default=8, help="of each setting in the exhaustive search (8)")
    add("--resume", type=Path, metavar="FILE", help="keep what is measured, and go on from it")
    add("--json", type=Path, metavar="FILE")


def main(args: argparse.Namespace) -> int:
    """Measures, and prints a line for each number of slots."""
    check_outputs((args.json, args.resume))
    if args.blocks < 2:
        raise ConfigError("--blocks must be at least 2")
    texts = list(chain.from_iterable(zip(*map(load_task, DEFAULT_TASKS), strict=False)))
    server = server_at(args.llama_cpp)
    engine = LlamaCpp(server, args.file, args.draft, texts, args.max_tokens)
    free = ("command", "resume", "json", "slots", "debug")
    key = {name: value for name, value in vars(args).items() if name not in free}
    progress = Progress(args.resume, {**key, **engine.about()})
    check = Check(engine, Prompts(texts), progress, args.blocks)
    with ending_with_us():
        found = [check.at(slots) for slots in args.slots]
    if args.json is not None:
        about = {"machine": machine(), "versions": versions(), "llama.cpp": engine.about()}
        write_json(args.json, {**about, "blocks": args.blocks, "slots": found})
    return 0


@dataclass
class Check:
    """One engine, searched twice. blocks: of each setting, and of both choices at last."""

    engine: LlamaCpp
    prompts: Prompts
    progress: Progress
    blocks: int

    def at(self, slots: int) -> dict[str, Any]:
        """Measure, print and return the comparison at so many slots."""
        quick, soon = self._searched(QUICK, slots, Patience())
        best, late = self._searched(EXHAUSTIVE, slots, Patience(self.blocks, self.blocks, 0))
        ratio = self._compared(slots, quick, best)
        print(f"{slots} slots, {QUICK}: {quick}, found in {soon:.0f} s")
        print(f"{slots} slots, {EXHAUSTIVE}: {best}, found in {late:.0f} s")
        print(f"{slots} slots: {interval(ratio)} of it, in {soon / late:.2f} of the time")
        return {
            "slots": slots,
            "ratio": [ratio.value, ratio.low, ratio.high],
            "seconds": {QUICK: soon, EXHAUSTIVE: late},
            "options": {QUICK: quick.words, EXHAUSTIVE: best.words},
        }

    def _searched(self, name: str, slots: int, patience: Patience) -> tuple[Setting, float]:
        """Return the choice of a search, once, and its seconds, over parts that were cut."""
        self.engine.patience = patience
        kept = Part(self.progress, f"{name} at {slots}")
        started = time.monotonic()
        try:
            verdict = Search(self.engine, self.prompts, kept, tell=_tell).run([slots]).choice(slots)
        finally:
            self.progress.add(f"seconds of {name} at {slots}", time.monotonic() - started)
        assert verdict is not None
        return verdict.chosen, sum(self.progress.units(f"seconds of {name} at {slots}"))

    def _compared(self, slots: int, one: Setting, other: Setting) -> Ratio:
        """Return how fast one setting is beside another, in turn, on blocks of the end."""
        found, size = Found(), self.engine.prompts(slots)
        first = len(self.prompts.texts) // size - self.blocks  # the search begins at the other end
        with Pool(self.engine, [slots]) as pool:
            for block in range(max(0, first), max(0, first) + self.blocks):
                order = [one, other] if block % 2 else [other, one]
                for setting in dict.fromkeys(order):
                    _tell(f"{LAST}: {setting}", 0.0)
                    trial = pool.answer(setting, self.prompts.block(block, size), slots)
                    found.trials.setdefault((slots, setting), {})[block] = trial
        return found.ratio(slots, one, other)


class Part(Progress):
    """The trials of one search among others in a file."""

    def __init__(self, whole: Progress, name: str) -> None:
        super().__init__(None, {})
        self._whole, self._name = whole, name

    def units(self, name: str) -> list[Any]:
        """Return this search's part."""
        return self._whole.units(f"{self._name}: {name}")

    def add(self, name: str, unit: Mapping[str, Any]) -> None:
        """Keep one more of this search."""
        self._whole.add(f"{self._name}: {name}", unit)


def _tell(line: str, _: float) -> None:
    if line:
        print(line, flush=True)
