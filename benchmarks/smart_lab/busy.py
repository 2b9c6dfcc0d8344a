"""Tokens per second of every entry point, alone and beside one busy process for every two CPUs.

Each is measured in turn, quiet and beside the busy processes, in reverse order every other time.
Printed are the medians and the ratio, which is to be 0.6 or more. Other work on the machine lowers
all numbers.

Needed by docs/serving.md and tests/e2e/test_beside.py.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from smart_decoding.errors import ConfigError
from smart_decoding.files import write_json
from smart_lab.provenance import check_outputs, provenance

WANTED = 0.6
MODEL = "smollm2-135m"
PROMPT = "Write a Python function that returns the n-th Fibonacci number, and explain it."
LIBRARY = """
import sys, time
from smart_decoding import LLM, SamplingParams
llm = LLM("smollm2-135m", max_num_seqs=1, enable_prefix_caching=False)
llm.take_profile()  # else it would be taken between the answers
params = SamplingParams(temperature=0, max_tokens={tokens}, ignore_eos=True)
def answer():
    return len(llm.generate(llm.chat_prompt([{{"role": "user", "content": {prompt!r}}}]), params)[0]
               .outputs[0].token_ids)
"""
PLUGIN = """
import sys, time
import torch, transformers
from smart_decoding.integrations.transformers import generate
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.text.tokenizer import Tokenizer
folder = load_checkpoint("smollm2-135m").tokenizer_source
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
chat = Tokenizer.load(folder).encode_chat([{{"role": "user", "content": {prompt!r}}}])
def answer():
    found = model.generate(
        torch.tensor([chat]), max_new_tokens={tokens}, min_new_tokens={tokens}, do_sample=False,
        custom_generate=generate, speculative_config={{"method": "eagle", "model": "smollm2-135m"}})
    return found.shape[1] - len(chat)
"""
LOOP = """
answer()
for _ in sys.stdin:
    start = time.perf_counter()
    count = answer()
    print("rate", count / (time.perf_counter() - start), flush=True)
"""
COMMAND = [sys.executable, "-m", "smart_decoding.cli.main"]
Measure = Callable[[], float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the measurement."""
    add = parser.add_argument
    add("--tokens", type=int, default=200, help="of each answer (200)")
    add("--turns", type=int, default=5, help="quiet and busy measurements of each (5)")
    add(
        "--only", nargs="+", choices=list(ENTRIES), default=list(ENTRIES), help="entry points (all)"
    )
    add("--json", type=Path, metavar="FILE", help="write the results there")


def main(args: argparse.Namespace) -> int:
    """Print a line for each entry point; 1 if one is below WANTED."""
    check_outputs((args.json,))
    found = {name: measured(ENTRIES[name], args.tokens, args.turns) for name in args.only}
    for name, figures in found.items():
        quiet, busy, ratio = figures["quiet"], figures["busy"], figures["ratio"]
        print(f"{name:<13}{quiet:7.1f} tok/s alone{busy:7.1f} beside{ratio:6.2f}")
    if args.json is not None:
        given = f"--tokens {args.tokens} --turns {args.turns} --only {' '.join(args.only)}"
        command = f"python -m smart_lab busy {given}"
        origin = provenance(command, 0, {"model": MODEL}, "its own")
        write_json(args.json, {"provenance": origin, "busy": found})
    return int(any(figures["ratio"] < WANTED for figures in found.values()))


def measured(entry: Callable[..., object], tokens: int, turns: int) -> dict[str, float]:
    """Return medians in tokens per second, and of the turns' ratios."""
    rates: dict[bool, list[float]] = {False: [], True: []}
    with entry(tokens) as measure:  # type: ignore[attr-defined]
        for turn in range(turns):
            for beside in (False, True) if turn % 2 == 0 else (True, False):
                with busy() if beside else ExitStack():
                    rates[beside].append(measure())
    ratios = [b / q for q, b in zip(rates[False], rates[True], strict=True)]
    quiet, loaded = (statistics.median(rates[each]) for each in (False, True))
    return {"quiet": quiet, "busy": loaded, "ratio": statistics.median(ratios)}


@contextmanager
def busy() -> Iterator[None]:
    """Return one busy process for every two CPUs, wherever the system puts them."""
    line = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(line) for _ in range(max(1, (os.cpu_count() or 1) // 2))]
    time.sleep(0.5)
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def started(line: list[str], **pipes: Any) -> Iterator[subprocess.Popen[str]]:
    """Return a program that ends with the block, whatever happens."""
    running = subprocess.Popen(line, text=True, **pipes)
    try:
        yield running
    finally:
        running.terminate()
        running.wait()


@contextmanager
def library(tokens: int, program: str = LIBRARY) -> Iterator[Measure]:
    """Return a program that answers whenever it gets a line."""
    line = [sys.executable, "-c", program.format(tokens=tokens, prompt=PROMPT) + LOOP]
    with subprocess.Popen(
        line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        requests, answers = running.stdin, running.stdout

        def measure() -> float:
            print(file=requests, flush=True)
            rate = next(line for line in answers if line.startswith("rate "))
            return float(rate.split()[1])

        yield measure
        requests.close()


def transformers(tokens: int) -> object:
    """Return the plugin, with torch imported first, as its users do."""
    return library(tokens, PLUGIN)


@contextmanager
def run(tokens: int) -> Iterator[Measure]:
    """`smart run`, a new process each time; its own speed, from the first token on."""
    line = [*COMMAND, "run", "--json", PROMPT, "-n", str(tokens)]
    said(line)  # the first one may measure costs afterwards
    yield lambda: float(json.loads(said(line))["tokens_per_s"])


@contextmanager
def demo(tokens: int) -> Iterator[Measure]:
    """`smart demo`, a new process each time; SMART's speed as it prints it."""
    line = [*COMMAND, "demo", "--max-tokens", str(tokens)]
    yield lambda: float(re.findall(r"smart ([\d.]+) tok/s, speedup", said(line))[0])


@contextmanager
def bench(tokens: int) -> Iterator[Measure]:
    """`smart bench` of one prompt, a new process each time; SMART's speed."""
    what = ["--policies", "smart", "--batch-sizes", "1", "--tasks", "code", "--limit", "1"]
    line = [*COMMAND, "bench", *what, "--max-tokens", str(tokens)]
    yield lambda: float(re.findall(r"^smart +1 +([\d.]+)", said(line), re.MULTILINE)[0])


def said(line: list[str]) -> str:
    """Return the standard output of a command that must succeed."""
    return subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True).stdout


@contextmanager
def serve(tokens: int) -> Iterator[Measure]:
    """Yield the rate of `smart serve` with one client."""
    known = f"from smart_decoding import LLM; LLM({MODEL!r}).take_profile()"
    said([sys.executable, "-c", known])  # else it would be taken between the answers
    with started([*COMMAND, "serve", "--port", "0"], stderr=subprocess.PIPE) as running:
        found = (re.search(r"http://[\w.:]+\d", line) for line in running.stderr or ())
        address = next(match[0] for match in found if match)
        threading.Thread(target=list, args=(running.stderr,), daemon=True).start()
        body = {
            "model": MODEL,
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

        def measure() -> float:
            request = Request(
                f"{address}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            start = time.perf_counter()
            with urlopen(request, timeout=600) as answer:
                count = json.load(answer)["usage"]["completion_tokens"]
            return float(count / (time.perf_counter() - start))

        while not is_ready(f"{address}/health"):
            if running.poll() is not None:
                raise ConfigError("smart serve has ended")
            time.sleep(0.2)
        measure()
        yield measure


def is_ready(address: str) -> bool:
    """Return whether the server listens, and has loaded its model."""
    try:
        return bool(urlopen(address, timeout=60).status == 200)
    except OSError:
        return False


ENTRIES = {
    "LLM": library,
    "run": run,
    "demo": demo,
    "bench": bench,
    "serve": serve,
    "transformers": transformers,
}
