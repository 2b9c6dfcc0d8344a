"""Load with faults on a server of its own, on this machine: many clients, cancellations, slow readers, mixed requests.

    python tools/soak.py --seconds 600 --clients 64                  # smart, then off, at the same arrival times

It looks for leaked slots, pages and memory, for requests that hang or fail, and for answers that differ from the same
request served alone (in float32). Prints a table, then one JSON line; exits with 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

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
HANGS = 300.0  # seconds without a byte


@dataclass(frozen=True)
class Plan:
    """One request. kind: read to its end, cancel after some chunks, or slow (a pause after each chunk)."""

    at: float
    body: dict[str, Any]
    kind: str
    patience: int
    checked: bool


@dataclass
class Figures:
    """What one run came to. Seconds."""

    ends: Counter[str] = field(default_factory=Counter)
    ttft: list[float] = field(default_factory=list)
    tpot: list[float] = field(default_factory=list)
    answers: list[tuple[Plan, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)  # KiB


def plans(args: argparse.Namespace, client: int) -> list[Plan]:
    """The same for every policy: a function of the seed."""
    rng, at, found = random.Random(f"{args.seed}-{client}"), 0.0, []
    while (at := at + rng.expovariate(1 / args.pause)) < args.seconds:
        prompt = " ".join(rng.choices(WORDS, k=rng.choice([3, 12, 60, 150])))
        body = {
            "model": args.model, "prompt": prompt, "max_tokens": rng.choice([8, 32, 96, 200]),
            "stream": True, "stream_options": {"include_usage": True},
            "temperature": rng.choice([0.0, 0.7, 1.0]), "seed": rng.randrange(2**31),
        }  # fmt: skip
        kind = rng.choices(["read", "cancel", "slow"], [0.75, 0.15, 0.1])[0]
        found.append(Plan(at, body, kind, rng.randrange(1, 20), kind != "cancel" and rng.random() < 0.05))
    return found


async def pieces(client: httpx.AsyncClient, body: dict[str, Any]) -> AsyncGenerator[tuple[str, int], None]:
    """(text, tokens so far or 0) of a streamed answer. Raises RuntimeError with the status if it fails."""
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(str(response.status_code))
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                event = json.loads(line[6:])
                if "error" in event:
                    raise RuntimeError("error in the stream")
                usage = event["usage"]
                yield "".join(c["text"] for c in event["choices"]), usage["completion_tokens"] if usage else 0


async def ask(client: httpx.AsyncClient, plan: Plan, figures: Figures) -> None:
    started, first, text, count, tokens = time.monotonic(), 0.0, "", 0, 0
    try:
        async with contextlib.aclosing(pieces(client, plan.body)) as stream:
            async for piece, total in stream:
                first, text, count, tokens = first or time.monotonic(), text + piece, count + 1, total
                if plan.kind == "cancel" and count >= plan.patience:
                    figures.ends["cancelled"] += 1
                    return
                if plan.kind == "slow":
                    await asyncio.sleep(0.05)
    except (RuntimeError, httpx.HTTPError) as error:
        reason = str(error) if isinstance(error, RuntimeError) else type(error).__name__
        figures.ends[reason] += 1
        if reason not in ("429", "503"):
            figures.wrong.append(reason)
        return
    figures.ends["read"] += 1
    if plan.kind == "read" and first:
        figures.ttft.append(first - started)
        if tokens > 1:
            figures.tpot.append((time.monotonic() - first) / (tokens - 1))
    if plan.checked:
        figures.answers.append((plan, text))


async def one_client(client: httpx.AsyncClient, mine: Sequence[Plan], start: float, figures: Figures) -> None:
    for plan in mine:
        await asyncio.sleep(max(0.0, start + plan.at - time.monotonic()))
        await ask(client, plan, figures)


async def watch_memory(pid: int, figures: Figures) -> None:
    while True:
        status = Path(f"/proc/{pid}/status").read_text()
        figures.memory.append(int(re.search(r"VmRSS:\s+(\d+)", status)[1]))  # type: ignore[index]
        await asyncio.sleep(2.0)


async def run(url: str, pid: int, args: argparse.Namespace) -> Figures:
    figures, limits = Figures(), httpx.Limits(max_connections=args.clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=HANGS, limits=limits) as client:
        memory = asyncio.create_task(watch_memory(pid, figures))
        start = time.monotonic()
        work = [one_client(client, plans(args, i), start, figures) for i in range(args.clients)]
        await asyncio.gather(*work)
        memory.cancel()
        for plan, text in figures.answers:
            alone = "".join([piece async for piece, _ in pieces(client, plan.body)])
            if alone != text:
                figures.wrong.append(f"differs from alone: seed {plan.body['seed']}")
        await check_leaks(client, figures)
    return figures


async def check_leaks(client: httpx.AsyncClient, figures: Figures) -> None:
    """No slots and pages may be taken once all is quiet; memory must not have grown after the first fifth."""
    await asyncio.sleep(0.5)
    text = (await client.get("/metrics")).text
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        value = float(re.search(rf"^smart:{name}{{.*}} (\S+)$", text, re.MULTILINE)[1])  # type: ignore[index]
        if value:
            figures.wrong.append(f"leak: {name} is {value:g}")
    settled = figures.memory[len(figures.memory) // 5 :]
    if len(settled) > 10 and settled[-1] > 1.2 * settled[0]:
        figures.wrong.append(f"memory grew from {settled[0]} to {settled[-1]} KiB")


@contextlib.contextmanager
def server(args: argparse.Namespace, policy: str) -> Any:
    """`smart serve` in a process of its own; (url, pid)."""
    url = f"http://127.0.0.1:{args.port}"
    options = ["--served-model-name", args.model, "--dtype", "fp32", "--port", str(args.port), "--policy", policy,
               "--log-level", "warning", *args.option]  # fmt: skip
    process = subprocess.Popen([sys.executable, "-m", "smart_decoding.cli", "serve", args.model, *options])
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{url}/health/ready").status_code == 200:
                    break
            if process.poll() is not None:
                raise SystemExit(f"the server ended with {process.returncode}")
            time.sleep(0.5)
        yield url, process.pid
    finally:
        process.terminate()
        process.wait(60)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {f"p{q}": ordered[min(len(ordered) - 1, q * len(ordered) // 100)] for q in (50, 95, 99)} if ordered else {}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--policies", default="smart,off", help="one run each (smart,off)")
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--pause", type=float, default=20.0, help="mean seconds between a client's requests (20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8077)
    parser.add_argument("--option", action="append", default=[], help="passed on to smart serve; may be repeated")
    args = parser.parse_args()
    wrong: list[str] = []
    for policy in args.policies.split(","):
        with server(args, policy) as (url, pid):
            figures = asyncio.run(run(url, pid, args))
        result = {
            "policy": policy, "ends": dict(figures.ends), "compared": len(figures.answers), "wrong": figures.wrong,
            "ttft": percentiles(figures.ttft), "tpot": percentiles(figures.tpot),
            "memory_kib": [min(figures.memory, default=0), max(figures.memory, default=0)],
        }  # fmt: skip
        for name in ("ttft", "tpot"):
            shown = "  ".join(f"{k} {1000 * v:8.1f} ms" for k, v in result[name].items())
            print(f"{policy:12} {name}  {shown}")
        print(json.dumps(result))
        wrong += figures.wrong
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
