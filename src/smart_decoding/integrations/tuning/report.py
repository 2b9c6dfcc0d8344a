"""What was found, for people: a table by load, one sentence to act on, and why nothing pays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smart_decoding.integrations.tuning.settings import PLAIN

if TYPE_CHECKING:
    from smart_decoding.bench.statistics import Ratio
    from smart_decoding.integrations.tuning.found import Found, Verdict

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def text(found: Found, choices: Sequence[Verdict]) -> str:
    """Return the table, the sentence, and the reasons."""
    lines = [*table(choices), "", sentence(choices), *faster_plain(choices), *reasons(choices)]
    failed: dict[str, str] = {}
    for (_, setting), error in found.errors.items():
        failed.setdefault(setting.mode if setting.mode != PLAIN else str(setting), error)
    lines += [f"Did not work: {name}: {error}" for name, error in failed.items()]
    missing = len({setting for _, setting in found.left_out})
    if missing:
        lines.append(f"Not tried for lack of time: {missing} settings; --time-limit gives more.")
    return "\n".join(lines)


def table(choices: Sequence[Verdict]) -> list[str]:
    """Return a row for each load."""
    head = (
        "requests",
        "plain tok/s",
        "best drafts",
        "tok/s",
        "ratio",
        "accepted",
        "a round",
    )
    rows = [head]
    for choice in choices:
        plain, best = choice.rates
        row = (str(choice.load), f"{plain:.1f}")
        if choice.best is None:
            rows.append((*row, "none worked", "", "", "", ""))
            continue
        drafted = (f"{100 * choice.accepted:.0f} %", f"{choice.tokens:.2f} tokens")
        rows.append((*row, _named(choice), f"{best:.1f}", interval(choice.ratio), *drafted))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def sentence(choices: Sequence[Verdict]) -> str:
    """Return what to do, in one sentence."""
    if not any(choice.pays for choice in choices):
        loads = _listed([_count(choice.load) for choice in choices])
        return f"Leave speculation off: nothing was clearly faster than plain with {loads}."
    parts = []
    for pays, run in _runs(choices):
        if pays:
            ratios = " and ".join(f"{choice.ratio.value:.2f}" for choice in run)
            names = " and ".join(dict.fromkeys(_named(choice) for choice in run))
            parts.append(f"{_loads(run, choices)} {names} is {ratios} times as fast as plain")
        else:
            parts.append(f"{_loads(run, choices)} leave speculation off")
    joined = "; ".join(parts)
    return f"{joined[0].upper()}{joined[1:]}."


def faster_plain(choices: Sequence[Verdict]) -> Iterator[str]:
    """Yield how much faster plain decoding is with other options than the defaults."""
    for choice in choices:
        if choice.plain.base and choice.gain.low > 1.0:
            yield (
                f"With {_requests(choice.load)} plain decoding itself is {interval(choice.gain)} "
                f"times as fast with {choice.plain} as with the defaults."
            )


def reasons(choices: Sequence[Verdict]) -> Iterator[str]:
    """Yield, for each load at which drafts do not pay, what they bring and what they cost."""
    for choice in choices:
        if choice.pays or choice.best is None:
            continue
        unsure = choice.ratio.low <= 1.0 < choice.ratio.value and choice.ratio.pairs > 0
        more = " More blocks (--time-limit) may tell." if unsure else ""
        row = (choice.cost - 1.0) / choice.drafted if choice.drafted else math.nan
        yield (
            f"With {_requests(choice.load)}, {_named(choice)} drafts {choice.drafted:.1f} tokens a "
            f"round, of which {100 * choice.accepted:.0f} % are accepted: {choice.tokens:.2f} "
            f"tokens for the time of {choice.cost:.2f} plain ones. To draft and verify a token "
            f"costs {row:.2f} of a plain round.{more}"
        )


def interval(ratio: Ratio) -> str:
    """Return a ratio with its interval; without one of a single block."""
    if ratio.pairs < 2:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def plain(found: Found, choices: Sequence[Verdict]) -> dict[str, Any]:
    """Return all measurements, for JSON."""
    return {
        "choices": [
            {**asdict(choice), "pays": choice.pays, "options": list(choice.chosen.words)}
            for choice in choices
        ],
        "tried": [
            {
                "load": load,
                "mode": setting.mode,
                "options": list(setting.words),
                "blocks": {str(block): asdict(trial) for block, trial in trials.items()},
            }
            for (load, setting), trials in found.trials.items()
        ],
        "failed": [
            {"load": load, "mode": setting.mode, "options": list(setting.words), "error": error}
            for (load, setting), error in found.errors.items()
        ],
        "left_out": [
            {"load": load, "mode": setting.mode, "options": list(setting.words)}
            for load, setting in found.left_out
        ],
    }


def _named(choice: Verdict) -> str:
    """Return the drafts with their lengths: those that the mode does not name are the numbers among
    the options."""
    best = choice.best
    if best is None:
        return "none"
    if " " in best.mode:
        return best.mode
    numbers = [word for word in best.drafts if word.replace(".", "", 1).isdigit()]
    return f"{best.mode} {' '.join(numbers)}".rstrip()


def _runs(choices: Sequence[Verdict]) -> list[tuple[bool, list[Verdict]]]:
    found: list[tuple[bool, list[Verdict]]] = []
    for choice in choices:
        if not found or found[-1][0] != choice.pays:
            found.append((choice.pays, []))
        found[-1][1].append(choice)
    return found


def _loads(run: Sequence[Verdict], choices: Sequence[Verdict]) -> str:
    last = run[-1] is choices[-1]
    if last and run[0] is not choices[0]:
        return f"from {_count(run[0].load)} requests on"
    return f"with {_listed([_count(choice.load) for choice in run])} at once"


def _listed(words: Sequence[str]) -> str:
    joined = " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
    return f"{joined} request{'' if list(words) == ['one'] else 's'}"


def _count(load: int) -> str:
    return NUMBERS[load] if load < len(NUMBERS) else str(load)


def _requests(load: int) -> str:
    return f"{_count(load)} request{'' if load == 1 else 's'} at once"
