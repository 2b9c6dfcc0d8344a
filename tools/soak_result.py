"""What a soak (soak.py) came to: its figures, what is wrong, and how that is told.

Needed by soak.py and tests/server/test_soak.py.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

DIFFERS = "differs from alone"
# Looks at the memory after the first fifth of the run; a run with fewer (250 s of load) does not
# judge it.
SETTLED = 100


@dataclass
class Times:
    """Seconds of one answer: to its first text, and per token after it."""

    ttft: float
    tpot: float | None


@dataclass
class Figures:
    """What the load on one server came to.

    times: by request; answers: requests and their texts, to be checked; memory: KiB, over the run;
    gaps: the longest waits between pieces, in seconds, by who waited or what for; busy: processor
    seconds of the server's process, and seconds of the blocks; late: requests that began after
    their time, since their client still had the one before; whole: a bystander's answers that
    ended.
    """

    ends: Counter[str] = field(default_factory=Counter)
    times: dict[str, Times] = field(default_factory=dict)
    answers: list[tuple[Any, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    gaps: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    busy: tuple[float, float] = (0.0, 0.0)
    late: int = 0
    whole: int = 0
    tokens: int = 0


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    if not len(values):
        return {}
    return {f"p{q}": round(1000 * float(np.percentile(values, q)), 2) for q in (50, 95, 99)}


def summary(figures: Figures, counted: dict[str, float]) -> dict[str, Any]:
    """What one server did. counted: its own metrics."""
    times = figures.times.values()
    settled = figures.memory[len(figures.memory) // 5 :]
    return {
        "ends": dict(figures.ends),
        "late": figures.late,
        "checked": len(figures.answers),
        "wrong": figures.wrong,
        "tokens": figures.tokens,
        "ttft_ms": quantiles([t.ttft for t in times]),
        "tpot_ms": quantiles([t.tpot for t in times if t.tpot is not None]),
        "longest_wait_s": {what: round(gap, 3) for what, gap in figures.gaps.items()},
        "memory_judged": len(settled) >= SETTLED,
        "memory_mib": [settled[0] // 1024, settled[-1] // 1024],
        **_rounds(counted),
        "cores_busy": round(figures.busy[0] / figures.busy[1], 3) if figures.busy[1] else None,
    }


def _rounds(counted: dict[str, float]) -> dict[str, float | None]:
    rounds = counted["rounds_total"]
    seconds = counted["round_seconds_total"]
    shares: dict[str, float | None] = dict.fromkeys(("rounds_off", "tokens_per_round", "round_ms"))
    if rounds:
        shares["rounds_off"] = round(1 - counted["drafting_rounds_total"] / rounds, 4)
        shares["tokens_per_round"] = round(counted["generation_tokens_total"] / rounds, 3)
        shares["round_ms"] = round(1000 * seconds / rounds, 2)
    controller = round(counted["controller_seconds_total"] / (seconds or 1), 4)
    return {**shares, "controller_share": controller}


def ratio(ours: dict[str, Times], base: dict[str, Times], name: str) -> dict[str, Any]:
    """Our median over the baseline's, where both answered, with a bootstrap 95 % interval.

    Whole blocks are drawn where there are enough: the machine was the same for a block's requests.
    """
    pairs: dict[str, list[tuple[float, float]]] = {}  # by block, or by request
    for key in sorted(ours.keys() & base.keys()):
        one = getattr(ours[key], name)
        other = getattr(base[key], name)
        if one is not None and other is not None:
            pairs.setdefault(key.partition("-")[0], []).append((one, other))
    groups = [np.array(group) for group in pairs.values()]
    every = np.concatenate(groups) if groups else np.zeros((0, 2))
    if len(every) < 2:
        return {"value": None, "low": None, "high": None, "pairs": len(every)}
    units = groups if len(groups) >= 5 else list(every[:, None])
    rng = np.random.default_rng(0)
    drawn = [
        np.concatenate([units[i] for i in rng.integers(0, len(units), len(units))])
        for _ in range(2000)
    ]
    ratios = [a / b for a, b in (np.median(each, axis=0) for each in (every, *drawn))]
    low, high = np.percentile(ratios[1:], [2.5, 97.5])
    return {
        "value": round(float(ratios[0]), 4),
        "low": round(float(low), 4),
        "high": round(float(high), 4),
        "pairs": len(every),
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What is wrong. A median is worse where its whole interval is; it must not be missing."""
    found = [
        f"{policy}: {wrong}"
        for policy, each in result["policies"].items()
        for wrong in each["wrong"]
    ]
    for policy, ratios in result["over_off"].items():
        for name, r in ratios.items():
            if r["value"] is None:
                found.append(f"{policy}: median {name}: too few answers to compare ({r['pairs']})")
            elif r["low"] > 1:
                interval = f"({r['low']} to {r['high']})"
                found.append(
                    f"{policy}: median {name} {r['value']} x that without speculation {interval}"
                )
    return found


def table(result: dict[str, Any]) -> str:
    """The figures as a Markdown table."""
    heads = (
        "",
        "ended, left early",
        "checked, different",
        "time to first token, ms: p50 / p95 / p99",
        "time per token, ms: p50 / p95 / p99",
        "memory, MiB, after a fifth / at the end",
    )
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for policy, found in result["policies"].items():
        different = sum(wrong.startswith(DIFFERS) for wrong in found["wrong"])
        times = [
            " / ".join(f"{ms:.4g}" for ms in found[name].values())
            for name in ("ttft_ms", "tpot_ms")
        ]
        memory = " / ".join(map(str, found["memory_mib"]))
        lines.append(
            f"| `{policy}` | {found['ends'].get('read', 0)}, {found['ends'].get('cancelled', 0)} | "
            f"{found['checked']}, {different} | {times[0]} | {times[1]} | {memory} |"
        )
    return "\n".join(lines)


def show(result: dict[str, Any]) -> None:
    """Prints it all."""
    print(table(result), end="\n\n")
    for policy, found in result["policies"].items():
        print(
            f"{policy}: ends {found['ends']}, {found['late']} began late; "
            f"{found['tokens_per_round']} tokens and {found['round_ms']} ms a round, "
            f"{found['rounds_off']} of the rounds without drafts, "
            f"controller {found['controller_share']}, {found['cores_busy']} cores busy; "
            f"longest waits, s: {found['longest_wait_s']}"
        )
    for policy, ratios in result["over_off"].items():
        for name, r in ratios.items():
            found = f"{r['value']} ({r['low']} to {r['high']}, {r['pairs']} pairs)"
            print(f"{policy} / off, median {name}: {found}")
    print(verdict(result))


def verdict(result: dict[str, Any]) -> str:
    """FAIL with the reasons, or PASS with what was looked at."""
    if result["faults"]:
        return "\n".join(["FAIL", *result["faults"]])
    every = result["policies"].values()
    judged = all(p["memory_judged"] for p in every)
    memory = "memory did not grow" if judged else "memory not judged (run too short)"
    return (
        f"PASS: no request failed, was refused or hung; no slot or page leaked; {memory}; all "
        f"{sum(p['checked'] for p in every)} answers asked again were the same; no median is "
        "significantly worse with speculation"
    )
