"""Load with faults on servers of its own: many clients, cancellations, slow readers, mixed requests
and grammars.

    python tools/soak.py --seconds 600 --clients 64 --json soak.json

Two servers run side by side, `smart` and speculation off; blocks of load go to one, then the other,
with the same requests at the same times, so that a change of the machine's speed hits both. It
looks for requests that fail, are refused or hang, for leaked slots, pages and memory, for answers
that differ from the same request served alone without speculation (5 % of them, in float32), and
for a median that speculation has worsened. Prints a table (Markdown) and PASS or FAIL with the
reasons, writes everything as JSON, and exits with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

WORDS = (
    "the",
    "sea",
    "carries",
    "ships",
    "and",
    "wind",
    "stories",
    "of",
    "cities",
    "rivers",
    "numbers",
    "people",
    "count",
)
FORMS: list[dict[str, Any]] = [
    {"regex": r"[a-z]{3,9}( [a-z]{3,9}){5,20}\."},
    {
        "json": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 30}, "age": {"type": "integer"}},
            "required": ["name", "age"],
            "additionalProperties": False,
        }
    },
]
HANGS = 300.0  # seconds without a byte
SLOW = 0.1  # seconds that a slow reader sleeps after each piece
DIFFERS = "differs from alone"
GROWTH = 1.1  # times the memory after the first fifth of the run
SETTLED = (
    100  # looks at the memory after that fifth; a run with fewer (250 s of load) does not judge it
)
# seconds of load on one server, then on the other: the machine's speed changes within minutes
BLOCK = 30.0


@dataclass(frozen=True)
class Plan:
    """One request, `at` seconds into its block. kind: read to its end, cancel after some pieces, or
    slow."""

    at: float
    body: dict[str, Any]
    kind: str
    patience: int
    checked: bool


@dataclass
class Times:
    """Seconds of one answer: to its first text; per token after it; from its first text to its
    end."""

    ttft: float
    tpot: float | None


@dataclass
class Figures:
    """What the load on one server came to. times: by request; answers: texts to be checked; memory:
    KiB."""

    ends: Counter[str] = field(default_factory=Counter)
    times: dict[str, Times] = field(default_factory=dict)
    answers: list[tuple[Plan, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    busy: tuple[float, float] = (
        0.0,
        0.0,
    )  # processor seconds of the server's process, and seconds of the blocks
    late: int = 0  # requests that began after their time: their client still had the one before
    tokens: int = 0


def plans(args: argparse.Namespace, client: str) -> list[Plan]:
    """One client's requests in one block: a function of the seed, the same for every server."""
    rng, at, found = random.Random(f"{args.seed}-{client}"), 0.0, []
    while (at := at + rng.expovariate(1 / args.pause)) < args.seconds / args.blocks:
        prompt = " ".join(
            rng.choices(WORDS, k=round(3 * 50 ** rng.random()))
        )  # no gap where a median would lie
        body = {
            "model": "soak",
            "prompt": prompt,
            "max_tokens": rng.choice([8, 32, 96, 200]),
            "stream": True,
            "stream_options": {"include_usage": True},
            "temperature": rng.choice([0.0, 0.7, 1.0]),
            "seed": rng.randrange(2**31),
        }
        if rng.random() < 0.1:
            body["structured_outputs"] = rng.choice(FORMS)
        kind = rng.choices(["read", "cancel", "slow"], [0.75, 0.15, 0.1])[0]
        found.append(
            Plan(
                at,
                body,
                kind,
                rng.randrange(1, 20),
                kind != "cancel" and rng.random() < args.checked,
            )
        )
    return found


# ------------------------------------------------------------------------------------------------------------- clients


async def pieces(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> AsyncGenerator[tuple[str, int], None]:
    """(text, tokens so far or 0) of a streamed answer. Raises RuntimeError with the status if it
    fails."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(str(response.status_code))
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"in the stream: {event['error']['message']}")
                usage = event["usage"]
                yield (
                    "".join(c["text"] for c in event["choices"]),
                    usage["completion_tokens"] if usage else 0,
                )


async def ask(client: httpx.AsyncClient, plan: Plan, name: str, figures: Figures) -> None:
    started, first, text, count, tokens = time.monotonic(), 0.0, "", 0, 0
    try:
        async with contextlib.aclosing(pieces(client, plan.body)) as stream:
            async for piece, total in stream:
                first, text, count, tokens = (
                    first or time.monotonic(),
                    text + piece,
                    count + 1,
                    total,
                )
                if plan.kind == "cancel" and count >= plan.patience:
                    figures.ends["cancelled"] += 1
                    return
                if plan.kind == "slow":
                    await asyncio.sleep(SLOW)
    except (RuntimeError, httpx.HTTPError) as error:
        reason = str(error) if isinstance(error, RuntimeError) else type(error).__name__
        figures.ends[reason] += 1
        figures.wrong.append(f"{reason}: seed {plan.body['seed']}")
        return
    figures.ends["read"] += 1
    figures.tokens += tokens
    if plan.kind == "read" and first:
        each = (time.monotonic() - first) / (tokens - 1) if tokens > 1 else None
        figures.times[name] = Times(first - started, each)
    if plan.checked:
        figures.answers.append((plan, text))


async def one_client(
    client: httpx.AsyncClient, name: str, mine: Sequence[Plan], figures: Figures
) -> None:
    start = time.monotonic()
    for i, plan in enumerate(mine):
        wait = start + plan.at - time.monotonic()
        figures.late += wait < -0.05
        await asyncio.sleep(max(0.0, wait))
        await ask(client, plan, f"{name}-{i}", figures)


async def play(url: str, args: argparse.Namespace, block: int, figures: Figures, pid: int) -> None:
    """One block of load on one server, to its last answer."""
    limits = httpx.Limits(max_connections=args.clients)
    async with httpx.AsyncClient(base_url=url, timeout=HANGS, limits=limits) as client:
        started, used = time.monotonic(), processor_seconds(pid)
        watch = asyncio.create_task(watch_memory(pid, figures))
        names = [f"{block}-{i}" for i in range(args.clients)]
        await asyncio.gather(
            *(one_client(client, name, plans(args, name), figures) for name in names)
        )
        watch.cancel()
        busy, whole = figures.busy
        figures.busy = busy + processor_seconds(pid) - used, whole + time.monotonic() - started


# -------------------------------------------------------------------------------------------------------------- checks


def processor_seconds(pid: int) -> float:
    """What a process, all its threads, has used so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def watch_memory(pid: int, figures: Figures) -> None:
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        figures.memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))  # type: ignore[index]
        await asyncio.sleep(2.0)


async def check_answers(plain_url: str, *every: Figures) -> None:
    """Each answer again, alone, on the server without speculation: once, for all servers got the
    same requests."""
    alone: dict[str, str] = {}
    async with httpx.AsyncClient(base_url=plain_url, timeout=HANGS) as client:
        for figures in every:
            for plan, text in figures.answers:
                asked = json.dumps(plan.body)
                if asked not in alone:
                    alone[asked] = "".join([piece async for piece, _ in pieces(client, plan.body)])
                if alone[asked] != text:
                    figures.wrong.append(f"{DIFFERS}: {asked}")


def check_leaks(url: str, figures: Figures) -> dict[str, float]:
    """No slots and pages may be taken once all is quiet. Returns what the server counted.

    Nor may memory have grown; before some minutes are over it does, since KV pages are touched for
    the first time."""
    time.sleep(0.5)
    text = httpx.get(f"{url}/metrics").text
    values = {
        name: float(value)
        for name, value in re.findall(r"^smart:(\w+){[^}]*} (\S+)$", text, re.MULTILINE)
    }
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        if values[name]:
            figures.wrong.append(f"leak: {name} is {values[name]:g}")
    settled = figures.memory[len(figures.memory) // 5 :]
    if len(settled) >= SETTLED and settled[-1] > GROWTH * settled[0]:
        figures.wrong.append(f"memory grew from {settled[0]} to {settled[-1]} KiB")
    return values


# -------------------------------------------------------------------------------------------------------------- result


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Milliseconds."""
    return (
        {f"p{q}": round(1000 * float(np.percentile(values, q)), 2) for q in (50, 95, 99)}
        if len(values)
        else {}
    )


def summary(figures: Figures, counted: dict[str, float]) -> dict[str, Any]:
    times, rounds = figures.times.values(), counted["rounds_total"]
    return {
        "ends": dict(figures.ends),
        "late": figures.late,
        "checked": len(figures.answers),
        "wrong": figures.wrong,
        "tokens": figures.tokens,
        "ttft_ms": quantiles([t.ttft for t in times]),
        "tpot_ms": quantiles([t.tpot for t in times if t.tpot is not None]),
        "memory_judged": len(figures.memory) - len(figures.memory) // 5 >= SETTLED,
        "memory_mib": [
            m // 1024 for m in (figures.memory[len(figures.memory) // 5], figures.memory[-1])
        ],
        "rounds_off": round(1 - counted["drafting_rounds_total"] / rounds, 4) if rounds else None,
        "tokens_per_round": round(counted["generation_tokens_total"] / rounds, 3)
        if rounds
        else None,
        "round_ms": round(1000 * counted["round_seconds_total"] / rounds, 2) if rounds else None,
        "controller_share": round(
            counted["controller_seconds_total"] / (counted["round_seconds_total"] or 1), 4
        ),
        "cores_busy": round(figures.busy[0] / figures.busy[1], 3) if figures.busy[1] else None,
    }


def ratio(ours: dict[str, Times], base: dict[str, Times], name: str) -> dict[str, Any]:
    """Our median over the baseline's, on the requests that both answered, with a bootstrap 95 %
    interval.

    Whole blocks are drawn where there are enough: requests of one block saw the same state of the
    machine."""
    pairs: dict[str, list[tuple[float, float]]] = {}  # by block, or by request
    for key in sorted(ours.keys() & base.keys()):
        one, other = getattr(ours[key], name), getattr(base[key], name)
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
    """What is wrong. A median is worse where its whole interval is; one that cannot be had is wrong
    as well."""
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
                found.append(
                    f"{policy}: median {name} {r['value']} x that without speculation ({r['low']} to {r['high']})"
                )
    return found


def table(result: dict[str, Any]) -> str:
    """As it stands in docs/reliability.md."""
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
    print(table(result), end="\n\n")
    for policy, found in result["policies"].items():
        print(
            f"{policy}: ends {found['ends']}, {found['late']} began late; {found['tokens_per_round']} tokens and "
            f"{found['round_ms']} ms a round, {found['rounds_off']} of the rounds without drafts, controller "
            f"{found['controller_share']}, {found['cores_busy']} cores busy"
        )
    for policy, ratios in result["over_off"].items():
        for name, r in ratios.items():
            print(
                f"{policy} / off, median {name}: {r['value']} ({r['low']} to {r['high']}, {r['pairs']} pairs)"
            )
    print(verdict(result))


def verdict(result: dict[str, Any]) -> str:
    """FAIL with the reasons, or PASS with what was looked at."""
    if result["faults"]:
        return "\n".join(["FAIL", *result["faults"]])
    every = result["policies"].values()
    memory = (
        "memory did not grow"
        if all(p["memory_judged"] for p in every)
        else "memory not judged (run too short)"
    )
    return (
        f"PASS: no request failed, was refused or hung; no slot or page leaked; {memory}; all "
        f"{sum(p['checked'] for p in every)} answers asked again were the same; no median is significantly worse "
        "with speculation"
    )


# ------------------------------------------------------------------------------------------------------------- servers


@contextlib.contextmanager
def server(args: argparse.Namespace, policy: str) -> Iterator[tuple[str, int]]:
    """`smart serve` in a process of its own, once it is ready; (url, pid)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    options = [
        "--served-model-name",
        "soak",
        "--dtype",
        args.dtype,
        "--port",
        str(port),
        "--policy",
        policy,
        "--log-level",
        "warning",
        *args.option,
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "smart_decoding.cli.main", "serve", args.model, *options]
    )
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            time.sleep(0.5)
        else:
            raise SystemExit("the server was not ready within five minutes")
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def soak(args: argparse.Namespace, servers: dict[str, tuple[str, int]]) -> dict[str, Any]:
    """Blocks of load on each server in turn, the checks, and what came out. `off` must be among the
    servers."""
    figures = {policy: Figures() for policy in servers}
    for block in range(args.blocks):
        for policy in list(servers)[:: 1 if block % 2 == 0 else -1]:
            url, pid = servers[policy]
            asyncio.run(play(url, args, block, figures[policy], pid))
    asyncio.run(check_answers(servers["off"][0], *figures.values()))
    counted = {policy: check_leaks(url, figures[policy]) for policy, (url, _) in servers.items()}
    over_off = {
        policy: {
            name: ratio(figures[policy].times, figures["off"].times, name)
            for name in ("ttft", "tpot")
        }
        for policy in servers
        if policy != "off"
    }
    policies = {policy: summary(figures[policy], counted[policy]) for policy in servers}
    result = {"policies": policies, "over_off": over_off}
    return result | {"faults": faults(result)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument(
        "--dtype",
        default="fp32",
        help="fp32, where answers must be the same everywhere, or bf16 (fp32)",
    )
    parser.add_argument(
        "--policy", default="smart", help="what runs beside speculation off (smart)"
    )
    parser.add_argument(
        "--seconds", type=float, default=600, help="of load on each of the two servers (600)"
    )
    parser.add_argument(
        "--blocks", type=int, default=0, help=f"parts of that, in turn (one every {BLOCK:g} s)"
    )
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument(
        "--pause", type=float, default=20.0, help="mean seconds between a client's requests (20)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--checked", type=float, default=0.05, help="share of the answers to ask for again (0.05)"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("build/soak.json"), help="the result (build/soak.json)"
    )
    parser.add_argument(
        "--option", action="append", default=[], help="passed on to smart serve; may be repeated"
    )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with it
    args.blocks = args.blocks or max(1, round(args.seconds / BLOCK))
    with server(args, args.policy) as ours, server(args, "off") as off:
        result = soak(args, {args.policy: ours, "off": off})
    from smart_decoding.bench.provenance import provenance, write_json

    command = "python tools/soak.py " + " ".join(sys.argv[1:])
    result |= {
        "clients": args.clients,
        "seconds": args.seconds,
        "blocks": args.blocks,
        "pause": args.pause,
    }
    result |= {
        "provenance": provenance(command, args.seed, {"model": args.model}, "the model's own")
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    show(result)
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
