"""llama.cpp's best flags on this machine, found by the search of `smart tune`: of plain decoding,
then of its draft model and n-gram modes. Prompts are token ids here.

Needed by `gguf-speed`, whose files are the README's first table.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smart_decoding.integrations.tuning.llama_cpp import LlamaCpp, together
from smart_decoding.integrations.tuning.search import Prompts, Search
from smart_decoding.integrations.tuning.settings import PLAIN, Setting
from smart_decoding.measuring.resume import Progress
from smart_lab.gguf.server import Program, Sizes, command_of, environment

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.engines import Tunable
    from smart_decoding.integrations.tuning.found import Found
    from smart_decoding.integrations.tuning.processes import ServerProcess

DRAFT, NGRAM, BOTH = "draft model", "n-gram", "draft model and n-gram"


@dataclass
class Tuned:
    """The result of tuning. flags: mode -> words of the best ones; tried: settings with tokens per
    second or an error; left_out: settings not tried for lack of time."""

    flags: dict[str, list[str]] = field(default_factory=dict)
    tried: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """Return the result for JSON."""
        return asdict(self)


class TokenServers(LlamaCpp):
    """llama.cpp for the search, started as it is measured, with prompts that are lists of token ids
    in JSON."""

    def __init__(
        self,
        program: Program,
        files: tuple[Path, Path | None],
        always: Sequence[str],
        tokens: int,
        sizes: Sizes,
        count: int,
    ) -> None:
        """files: the model and its draft model; always: options that it always gets; count: of the
        prompts."""
        super().__init__(Path(program.command[0]), *files, [""] * count, tokens, always)
        self._program, self._sizes = program, sizes

    def command(self, port: int, slots: int, words: Sequence[str]) -> list[str]:
        """Return the words that start a server."""
        flags = [*self.more, *words]
        return command_of(self._program, self.model, port, flags, slots, self._sizes)

    def environment(self) -> dict[str, str]:
        """Return the variables of rivals."""
        return environment()

    def encoded(self, server: ServerProcess, text: str) -> list[int]:
        """Return the ids in a prompt; some for the text that warms it up."""
        return list(json.loads(text)) if text.startswith("[") else [1, 2, 3]


def searched(
    engine: Tunable, prompts: Sequence[Sequence[int]], slots: int, seconds: float
) -> Found:
    """Return what the search finds for so many slots in so many seconds. Raises ModelError if plain
    decoding fails with the defaults."""

    def tell(line: str, _: float) -> None:
        if line:
            print(f"{engine.name}: {line}", flush=True)

    texts = Prompts([json.dumps(list(map(int, prompt))) for prompt in prompts])
    stop = time.monotonic() + seconds
    return Search(engine, texts, Progress(None, {}), stop, tell).run([slots])


def tuned(found: Found, slots: int, always: Sequence[str]) -> Tuned:
    """Return the best flags of each mode; of plain decoding those with a verdict. always: options
    that all settings had."""
    base = found.base[slots]
    best: dict[str, Setting] = {PLAIN: base}
    known = [*found.settings(slots), *(setting for _, setting in found.left_out)]
    working = [setting for setting in known if (slots, setting) not in found.errors]
    for mode in dict.fromkeys(map(mode_of, working)):
        if mode != PLAIN:  # the last of a race, or the first where nothing was measured
            of_mode = [each for each in working if mode_of(each) == mode]
            best[mode] = max(of_mode, key=_place(found, slots, base))
    if DRAFT in best and NGRAM in best and BOTH not in best:
        best[BOTH] = together(best[NGRAM], best[DRAFT])
    order = [mode for mode in (PLAIN, NGRAM, DRAFT, BOTH) if mode in best]
    return Tuned(
        {mode: [*always, *best[mode].words] for mode in order},
        _tried(found),
        [f"{mode_of(setting)}: {setting}" for _, setting in found.left_out],
    )


def mode_of(setting: Setting) -> str:
    """Return the laboratory's name of a way of drafting."""
    if "," in setting.mode:
        return BOTH
    names = {"ngram": NGRAM, "draft": DRAFT}
    return names.get(setting.mode.partition("-")[0], setting.mode)


def _place(found: Found, slots: int, base: Setting) -> Callable[[Setting], tuple[int, float]]:
    def place(setting: Setting) -> tuple[int, float]:
        blocks = len(found.trials.of(slots, setting))
        return blocks, found.trials.value(slots, setting, base)

    return place


def _tried(found: Found) -> list[dict[str, Any]]:
    worked: list[dict[str, Any]] = [
        {
            "mode": mode_of(setting),
            "flags": str(setting),
            "overall": sum(t.tokens for t in of.values()) / sum(t.seconds for t in of.values()),
        }
        for (_, setting), of in found.trials.items()
    ]
    failed = [
        {"mode": mode_of(setting), "flags": str(setting), "error": error}
        for (_, setting), error in found.errors.items()
    ]
    return [*worked, *failed]
