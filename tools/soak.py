"""Load with faults on servers of its own: many clients, cancellations, slow readers, bodies of four
megabytes, mixed requests, grammars, and grammars that are bombs.

    python tools/soak.py --seconds 600 --clients 64 --json soak.json

Two servers run side by side, `smart` and speculation off; blocks of load go to one, then the other,
with the same requests at the same times, so that a change of the machine's speed hits both. It
looks for requests that fail, are refused or hang, for leaked slots, pages and memory, for answers
that differ from the same request served alone without speculation (5 % of them, in float32), for
anybody at an address of his own who waits longer than --max-gap seconds for the next piece of an
answer, a bystander among them, and for a median that speculation has worsened. Every other client
has its own address; the rest share one, as behind a router. Prints a table (Markdown) and PASS or
FAIL with the reasons, writes everything as JSON, and exits with 1 if something is wrong.

Needed by `make soak` and tests/server/test_soak.py.
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
import ssl
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from soak_bombs import bomb
from soak_result import DIFFERS, SETTLED, Figures, Times, faults, ratio, show, summary

WORDS = [
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
]
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
HUGE = "7" * 4_000_000
# What nobody can answer, and no other client may notice: (path, what is not in every body).
HOSTILE: list[tuple[str, dict[str, Any]]] = [
    ("/v1/completions", {"prompt": HUGE}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": HUGE}]}),
    ("/tokenize", {"prompt": HUGE}),
    ("/v1/completions", {"prompt": [7] * 1_300_000}),
]
IS_JSON = {"content-type": "application/json"}
HANGS = 300.0  # seconds without a byte
SLOW = 0.1  # seconds that a slow reader sleeps after each piece
GROWTH = 1.1  # times the memory after the first fifth of the run
# seconds of load on one server, then on the other: the machine's speed changes within minutes
BLOCK = 30.0
# One client to the server, with one client's share: how long its readers wait is told, not bounded.
SHARED = "a reader at the shared address"
TLS = ssl.create_default_context()  # which is not used, and takes long to make


@dataclass(frozen=True)
class Plan:
    """One request, `at` seconds into its block.

    kind: read to its end, slow, cancel after so many `pieces`, or hostile: to be refused. sent: a
    hostile body, written before anybody waits: that takes a tenth of a second of all clients' loop.
    """

    at: float
    body: dict[str, Any]
    kind: str
    pieces: int
    checked: bool
    path: str = "/v1/completions"
    sent: bytes = b""


def plans(args: argparse.Namespace, client: str) -> list[Plan]:
    """One client's requests in one block: a function of the seed, the same for every server."""
    rng = random.Random(f"{args.seed}-{client}")
    at = rng.expovariate(1 / args.pause)
    found = []
    while at < args.seconds / args.blocks:
        body = _body(rng)
        kind = rng.choices(["read", "hostile", "cancel", "slow"], [0.7, 0.05, 0.15, 0.1])[0]
        pieces = rng.randrange(1, 20)
        checked = kind != "cancel" and rng.random() < args.checked
        if kind == "hostile":
            path, change = HOSTILE[pieces // 2 % len(HOSTILE)]
            if pieces % 2:
                path, change = bomb(random.Random(f"{args.seed}-{client}-{at}"))
            sent = json.dumps({"model": "soak", **change}).encode()
            found.append(Plan(at, {}, kind, 0, False, path, sent))
        else:
            found.append(Plan(at, body, kind, pieces, checked))
        at += rng.expovariate(1 / args.pause)
    return found


def _body(rng: random.Random) -> dict[str, Any]:
    words = rng.choices(WORDS, k=round(3 * 50 ** rng.random()))  # no gap where a median would lie
    body = {
        "model": "soak",
        "prompt": " ".join(words),
        "max_tokens": rng.choice([8, 32, 96, 200]),
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": rng.choice([0.0, 0.7, 1.0]),
        "seed": rng.randrange(2**31),
    }
    if rng.random() < 0.1:
        body["structured_outputs"] = rng.choice(FORMS)
    return body


# --- clients ---


def client_of(url: str, address: str = "127.0.0.1") -> httpx.AsyncClient:
    """One at that address."""
    transport = httpx.AsyncHTTPTransport(verify=TLS, local_address=address)
    return httpx.AsyncClient(base_url=url, timeout=HANGS, transport=transport)


async def stream_of(
    client: httpx.AsyncClient, body: dict[str, Any]
) -> AsyncGenerator[tuple[str, int], None]:
    """(text, tokens so far or 0) of a streamed answer. Raises RuntimeError if it fails."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(str(response.status_code))
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError(f"in the stream: {event['error']['message']}")
                usage = event["usage"]
                text = "".join(choice["text"] for choice in event["choices"])
                yield text, usage["completion_tokens"] if usage else 0


async def refused(client: httpx.AsyncClient, plan: Plan, figures: Figures) -> None:
    """A hostile request, which must be a 400."""
    try:
        answer = await client.post(plan.path, content=plan.sent, headers=IS_JSON)
        status = str(answer.status_code)
    except httpx.HTTPError as error:
        status = type(error).__name__
    figures.ends["refused" if status == "400" else f"hostile: {status}"] += 1
    if status != "400":
        figures.wrong.append(f"{status} instead of 400: {plan.path}")


async def stand_by(url: str, figures: Figures) -> None:
    """A client at another address, whose answers and looks at /health and /metrics go on, one after
    another."""
    body = {"model": "soak", "prompt": "the sea", "max_tokens": 40, "stream": True}
    body["stream_options"] = {"include_usage": True}
    async with client_of(url, "127.0.0.2") as client:
        last = time.monotonic()

        def heard(what: str) -> None:
            nonlocal last
            gap = time.monotonic() - last
            figures.gaps[what] = max(figures.gaps[what], gap)
            last += gap

        while True:
            async for _ in stream_of(client, body):
                heard("a bystander")
            figures.whole += 1
            for path in ("/health", "/metrics"):
                (await client.get(path)).raise_for_status()
                heard(path)
            await asyncio.sleep(0.1)
            last = time.monotonic()


async def ask(
    client: httpx.AsyncClient, reader: str, plan: Plan, name: str, figures: Figures
) -> None:
    """One request, as planned, and what came of it. reader: whose waits these are, if it reads."""
    started = time.monotonic()
    first = 0.0
    texts: list[str] = []
    tokens = 0
    last = started
    try:
        async with contextlib.aclosing(stream_of(client, plan.body)) as stream:
            async for piece, total in stream:
                now = time.monotonic()
                first = first or now
                if plan.kind == "read":
                    figures.gaps[reader] = max(figures.gaps[reader], now - last)
                last = now
                texts.append(piece)
                tokens = total
                if plan.kind == "cancel" and len(texts) >= plan.pieces:
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
        figures.answers.append((plan, "".join(texts)))


async def one_client(
    client: httpx.AsyncClient, reader: str, name: str, mine: Sequence[Plan], figures: Figures
) -> None:
    """Its requests, one after the other, each not before its time."""
    start = time.monotonic()
    for i, plan in enumerate(mine):
        wait = start + plan.at - time.monotonic()
        figures.late += wait < -0.05
        await asyncio.sleep(max(0.0, wait))
        if plan.kind == "hostile":
            await refused(client, plan, figures)
        else:
            await ask(client, reader, plan, f"{name}-{i}", figures)


async def play(url: str, args: argparse.Namespace, block: int, figures: Figures, pid: int) -> None:
    """One block of load on one server, to its last answer."""
    async with contextlib.AsyncExitStack() as stack:
        shared = await stack.enter_async_context(client_of(url))
        own = [
            await stack.enter_async_context(client_of(url, f"127.0.1.{i % 254 + 1}"))
            for i in range(args.clients // 2)
        ]
        loads = []
        for i in range(args.clients):
            client, reader = (own[i // 2], "a reader") if i % 2 else (shared, SHARED)
            name = f"{block}-{i}"
            loads.append(one_client(client, reader, name, plans(args, name), figures))
        started = time.monotonic()
        used = processor_seconds(pid)
        watch = [
            asyncio.create_task(each)
            for each in (watch_memory(pid, figures), stand_by(url, figures))
        ]
        await asyncio.gather(*loads)
        for each in watch:
            each.cancel()
        for end in await asyncio.gather(*watch, return_exceptions=True):
            if not isinstance(end, asyncio.CancelledError):
                figures.wrong.append(f"a bystander's request failed: {end!r}")
        busy, whole = figures.busy
        busy += processor_seconds(pid) - used
        whole += time.monotonic() - started
        figures.busy = (busy, whole)


# --- checks ---


def processor_seconds(pid: int) -> float:
    """What a process, all its threads, has used so far."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


async def watch_memory(pid: int, figures: Figures) -> None:
    """Looks at a process every two seconds."""
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        figures.memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))  # type: ignore[index]
        await asyncio.sleep(2.0)


async def check_answers(plain_url: str, *every: Figures) -> None:
    """Each answer again, alone, without speculation; all servers got the same requests."""
    alone: dict[str, str] = {}
    async with httpx.AsyncClient(base_url=plain_url, timeout=HANGS) as client:
        for figures in every:
            for plan, text in figures.answers:
                asked = json.dumps(plan.body)
                if asked not in alone:
                    alone[asked] = "".join(
                        [piece async for piece, _ in stream_of(client, plan.body)]
                    )
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


# --- servers ---


@contextlib.contextmanager
def server(args: argparse.Namespace, policy: str) -> Iterator[tuple[str, int]]:
    """`smart serve` in a process of its own, once it is ready; (url, pid)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    fixed = f"--served-model-name soak --log-level warning --port {port}".split()
    options = [*fixed, "--dtype", args.dtype, "--policy", policy, *args.option]
    process = subprocess.Popen(
        [sys.executable, "-m", "smart_decoding.cli.main", "serve", args.model, *options]
    )
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health").status_code == 200:
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
    for each in figures.values():
        each.wrong += [
            f"the longest wait was {gap:.2f} s: {what}"
            for what, gap in each.gaps.items()
            if gap > args.max_gap and what != SHARED
        ]
        if not each.whole:
            each.wrong.append("no answer of a bystander ended")
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


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="smollm2-135m")
    add(
        "--dtype",
        default="fp32",
        help="fp32, where answers must be the same everywhere, or bf16 (fp32)",
    )
    add("--policy", default="smart", help="what runs beside speculation off (smart)")
    add("--seconds", type=float, default=600, help="of load on each of the two servers (600)")
    add("--blocks", type=int, default=0, help=f"parts of that, in turn (one every {BLOCK:g} s)")
    add("--clients", type=int, default=64)
    add("--pause", type=float, default=20.0, help="mean seconds between a client's requests (20)")
    add("--seed", type=int, default=0)
    add("--checked", type=float, default=0.05, help="share of the answers to ask for again (0.05)")
    add("--max-gap", type=float, default=1.0, help="seconds anybody may wait for a piece (1)")
    result = Path("build/soak.json")
    add("--json", type=Path, default=result, help=f"the result ({result})")
    add("--option", action="append", default=[], help="passed on to smart serve; may be repeated")
    args = parser.parse_args()
    args.blocks = args.blocks or max(1, round(args.seconds / BLOCK))
    return args


def main() -> int:
    """Runs it all; 1 if something is wrong."""
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the servers end with it
    known = (
        f"from smart_decoding import LLM; LLM({args.model!r}, dtype={args.dtype!r}).take_profile()"
    )
    subprocess.run([sys.executable, "-c", known], check=True)  # else it is taken beside the load
    with server(args, args.policy) as ours, server(args, "off") as off:
        result = soak(args, {args.policy: ours, "off": off})
    sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
    from smart_decoding.files import write_json
    from smart_lab.provenance import provenance

    command = "python tools/soak.py " + " ".join(sys.argv[1:])
    result |= {name: getattr(args, name) for name in ("clients", "seconds", "blocks", "pause")}
    result["provenance"] = provenance(command, args.seed, {"model": args.model}, "the model's own")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    write_json(args.json, result)
    show(result)
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
