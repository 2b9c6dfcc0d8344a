"""What was found, for people: a table by load, one sentence to act on, and why nothing pays."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from smart_decoding.integrations.tuning.settings import PLAIN

if TYPE_CHECKING:
    from smart_decoding.integrations.tuning.found import Found, LoadResult, Trials
    from smart_decoding.integrations.tuning.verdicts import Verdict
    from smart_decoding.measuring.statistics import Ratio

NOT_TRIED = "no drafts were tried (--time-limit; --resume FILE keeps what is measured)"
NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def text(found: Found, choices: Sequence[LoadResult], loads: Sequence[int] = ()) -> str:
    """Return the table, the sentence, and the reasons. loads: all that were to be measured."""
    lines = [*table(choices), "", sentence(choices), *no_verdict(choices)]
    for choice in choices:
        lines += plain_options(found.verdicts.get(choice.load, []))
    lines += [*reasons(choices), *found.notes]
    failed: dict[str, str] = {}
    for (_, setting), error in found.errors.items():
        failed.setdefault(setting.mode if setting.mode != PLAIN else str(setting), error)
    lines += [f"Did not work: {name}: {error}" for name, error in failed.items()]
    missing = len({setting for _, setting in found.left_out})
    if missing:
        lines.append(f"Not tried for lack of time: {missing} settings; --time-limit gives more.")
    unknown = set(loads) - {choice.load for choice in choices}
    for which, what in (
        (unknown & found.ended, "Nothing to try, as all drafts failed or lost before, for"),
        (unknown - found.ended, "No time for"),
    ):
        if which:
            lines.append(f"{what} {_listed([_count(load) for load in sorted(which)])} at once.")
    return "\n".join(lines)


def table(choices: Sequence[LoadResult]) -> list[str]:
    """Return a row for each load."""
    head = (
        "requests",
        "plain tok/s",
        "best drafts",
        "tok/s",
        "ratio",
        "verdict",
        "accepted",
        "a round",
    )
    rows = [head]
    for choice in choices:
        plain, best = choice.rates
        row = (str(choice.load), f"{plain:.1f}")
        if choice.best is None:
            rows.append((*row, "not tried" if choice.open else "none worked", "", "", "", "", ""))
            continue
        verdict = "none yet" if choice.open else "faster" if choice.pays else "not faster"
        if not choice.ratio.pairs:
            rows.append((*row, _named(choice), "", "", verdict, "", ""))
            continue
        drafted = (f"{100 * choice.accepted:.0f} %", f"{choice.tokens:.2f} tokens")
        ratio = interval(choice.ratio)
        rows.append((*row, _named(choice), f"{best:.1f}", ratio, verdict, *drafted))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def sentence(choices: Sequence[LoadResult]) -> str:
    """Return what to do, in one sentence."""
    known = [choice for choice in choices if not choice.open]
    if not known:
        return "Nothing is decided yet."
    if not any(choice.pays for choice in known):
        loads = _listed([_count(choice.load) for choice in known])
        return f"Leave speculation off: nothing was clearly faster than plain with {loads}."
    parts = []
    for pays, run in _runs(known):
        if pays:
            ratios = " and ".join(f"{choice.ratio.value:.2f}" for choice in run)
            names = " and ".join(dict.fromkeys(_named(choice) for choice in run))
            parts.append(f"{_loads(run, choices)} {names} is {ratios} times as fast as plain")
        else:
            parts.append(f"{_loads(run, choices)} leave speculation off")
    joined = "; ".join(parts)
    return f"{joined[0].upper()}{joined[1:]}."


def no_verdict(choices: Sequence[LoadResult]) -> Iterator[str]:
    """Yield, for each load without a verdict, the time that it takes at most."""
    for choice in choices:
        if choice.open:
            tried = f"{_named(choice)} {lacking(choice.lacking)}" if choice.best else NOT_TRIED
            yield f"No verdict with {_requests(choice.load)}: {tried}."


def lacking(seconds: float) -> str:
    """Return how much time a verdict lacks."""
    minutes = math.ceil(seconds / 60)
    if not minutes:
        return "was not measured to the end"
    count = f"{minutes} more minute{'' if minutes == 1 else 's'}"
    return f"needs up to {count} (--time-limit; --resume FILE keeps what is measured)"


def plain_options(verdicts: Sequence[Verdict]) -> Iterator[str]:
    """Yield how much faster other options of plain decoding are, or that it is not known."""
    for verdict in verdicts:
        if verdict.setting.drafts or verdict.faster is False:
            continue
        new = " ".join(verdict.setting.base[len(verdict.base.base) :])
        load, before = _requests(verdict.load), verdict.base
        if verdict.faster:
            ratio = interval(verdict.ratio)
            yield (
                f"With {load} plain decoding is {ratio} times as fast with {new} as with {before}."
            )
        else:
            more = lacking(verdict.lacking)
            yield f"No verdict with {load}: plain decoding with {new} {more}."


def reasons(choices: Sequence[LoadResult]) -> Iterator[str]:
    """Yield, for each load at which drafts do not pay, what they bring and what they cost."""
    for choice in choices:
        if choice.pays or choice.best is None or not choice.ratio.pairs:
            continue
        row = (choice.cost - 1.0) / choice.drafted if choice.drafted else math.nan
        yield (
            f"With {_requests(choice.load)}, {_named(choice)} drafts {choice.drafted:.1f} tokens a "
            f"round, of which {100 * choice.accepted:.0f} % are accepted: {choice.tokens:.2f} "
            f"tokens for the time of {choice.cost:.2f} plain ones. To draft and verify a token "
            f"costs {row:.2f} of a plain round."
        )


def interval(ratio: Ratio) -> str:
    """Return a ratio with its interval; without one of a single pair."""
    if ratio.pairs < 2:
        return f"{ratio.value:.2f}"
    return f"{ratio.value:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def plain(found: Found, choices: Sequence[LoadResult]) -> dict[str, Any]:
    """Return all measurements, for JSON."""
    return {
        "choices": [
            {
                **asdict(choice),
                "pays": choice.pays,
                "open": choice.open,
                "options": list(choice.chosen.words),
            }
            for choice in choices
        ],
        "verdicts": [asdict(each) for of in found.verdicts.values() for each in of],
        "tried": _tried(found.trials),
        "judged": _tried(found.judged),
        "failed": [
            {"load": load, "mode": setting.mode, "options": list(setting.words), "error": error}
            for (load, setting), error in found.errors.items()
        ],
        "left_out": [
            {"load": load, "mode": setting.mode, "options": list(setting.words)}
            for load, setting in found.left_out
        ],
        "notes": list(found.notes),
    }


def _tried(trials: Trials) -> list[dict[str, Any]]:
    return [
        {
            "load": load,
            "mode": setting.mode,
            "options": list(setting.words),
            "blocks": {str(block): asdict(trial) for block, trial in of.items()},
        }
        for (load, setting), of in trials.items()
    ]


def _named(choice: LoadResult) -> str:
    """Return the drafts with their lengths: those that the mode does not name are the numbers among
    the options."""
    best = choice.best
    if best is None:
        return "none"
    if " " in best.mode:
        return best.mode
    numbers = [word for word in best.drafts if word.replace(".", "", 1).isdigit()]
    return f"{best.mode} {' '.join(numbers)}".rstrip()


def _runs(choices: Sequence[LoadResult]) -> list[tuple[bool, list[LoadResult]]]:
    found: list[tuple[bool, list[LoadResult]]] = []
    for choice in choices:
        if not found or found[-1][0] != choice.pays:
            found.append((choice.pays, []))
        found[-1][1].append(choice)
    return found


def _loads(run: Sequence[LoadResult], choices: Sequence[LoadResult]) -> str:
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
