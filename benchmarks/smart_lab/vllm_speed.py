"""vLLM with SMART's scheduler against stock vLLM, plain and with speculation: run it with the
Python of an environment that has vLLM, with src and benchmarks of this clone on PYTHONPATH.

    python -m smart_lab vllm MODEL_FOLDER [--batches 1,2,4,8,16] [--ranks 2] [--json FILE]
    python -m smart_lab vllm MODEL_FOLDER --method draft_model --draft FOLDER --tokens 3

The engines live in processes of their own and answer the same prompts, taking turns every half
second, so that all see the machine at the same speed. At batch size n, 3 n requests of various
lengths are answered, n at a time: each that ends makes way for the next, as in a server, and time
counts while n are running, so that no engine is judged by its slowest answer. Before that each
batch size is run once, uncounted, by all engines. Prints tokens per second (prefill included),
ratios with 95 % intervals, and what SMART did. With --ranks 2 an engine's ranks have a core each,
and are stopped while it is not their turn, as they would wait by spinning.
tests/integrations/smollm_variants.py makes draft models, and a SmolLM2 whose heads two ranks can
share.

Needed by docs/vllm.md, "The scheduler".
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import statistics
import time
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from smart_decoding.cli.arguments import whole_numbers
from smart_decoding.files import plain
from smart_decoding.kernels import children
from smart_decoding.measuring.statistics import Pair, paired_ratio
from smart_decoding.measuring.tasks import load_task

children.become_another_program()  # vLLM runs here, in these processes
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
ARMS = ("plain", "spec", "smart")
WAVES = 3  # requests of a block, in batches
TURN = 0.5  # seconds that an engine runs before the next one does


def main(args: argparse.Namespace) -> int:
    """Loads the engines, then measures and prints a line for each batch size, cycle by cycle."""
    start = time.perf_counter()
    if args.ranks > 1:
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, range(args.ranks))),
            "OMP_NUM_THREADS": "1",
        }
    context = multiprocessing.get_context("spawn")
    engines = {arm: Arm(context, args, arm) for arm in ARMS}
    chooser = random.Random(0)
    for engine in engines.values():
        engine.ready()
    if args.wait:
        input(f"loaded after {time.perf_counter() - start:.0f} s; a line on stdin begins: ")
    prompts = load_task("general")
    for batch in args.batches:
        block(engines, list(ARMS), chooser.sample(prompts, batch), batch)
    print("warm", flush=True)
    tallies = {batch: Tally() for batch in args.batches}
    stop = time.perf_counter() + args.seconds
    while time.perf_counter() < stop:
        for batch, tally in tallies.items():
            chosen = chooser.sample(prompts, WAVES * batch)
            order = list(ARMS)
            chooser.shuffle(order)
            tally.add(block(engines, order, chosen, batch))
        report(tallies, args)
    for engine in engines.values():
        engine.close()
    return 0


@dataclass
class Answers:
    """rate: tokens per second while the batch was full; tokens: of each request; counters: what
    SMART did."""

    rate: float
    tokens: list[list[int]]
    counters: dict[str, Any]


def block(
    engines: dict[str, Arm], order: list[str], prompts: list[str], batch: int
) -> dict[str, Answers]:
    """Let all engines answer these prompts, a turn of each after the other."""
    found: dict[str, Answers] = {}
    for arm in order:
        engines[arm].begin(prompts, batch)
    while len(found) < len(order):
        for arm in order:
            if arm not in found and (answers := engines[arm].turn()) is not None:
                found[arm] = answers
    return found


class Tally:
    """The rates of a batch size, block by block."""

    def __init__(self) -> None:
        self.rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
        self._same = 0
        self._answers = 0
        self._done: Counter[str] = Counter()

    def add(self, found: dict[str, Answers]) -> None:
        for arm in ARMS:
            self.rates[arm].append(found[arm].rate)
        self._done.update(found["smart"].counters)
        pairs = zip(found["plain"].tokens, found["smart"].tokens, strict=True)
        self._same += sum(plain == smart for plain, smart in pairs)
        self._answers += len(found["plain"].tokens)

    def figures(self) -> dict[str, Any]:
        """Return a row of the report."""
        row: dict[str, Any] = {arm: round(statistics.median(self.rates[arm]), 1) for arm in ARMS}
        for arm in ("spec", "smart"):
            row[f"{arm}_speedup"] = interval(self.rates[arm], self.rates["plain"])
        better = "spec" if row["spec_speedup"][0] > 1 else "plain"
        row["smart_over_better"] = interval(self.rates["smart"], self.rates[better])
        same = f"{self._same}/{self._answers}"
        return row | {"blocks": len(self.rates["plain"]), "same": same, **self._done}


def report(tallies: dict[int, Tally], args: argparse.Namespace) -> None:
    """Print and write what there is so far: a run that is cut leaves what it has."""
    results = {batch: tally.figures() for batch, tally in tallies.items()}
    for batch, row in results.items():
        print(batch, json.dumps(row), flush=True)
    if args.json:
        rates = {batch: tally.rates for batch, tally in tallies.items()}
        given = {name: value for name, value in vars(args).items() if name != "command"}
        found = {"arguments": given, "results": results, "tokens_per_second": rates}
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what drafts, and how much is measured."""
    add = parser.add_argument
    add("model")
    add("--method", default="ngram")
    add("--draft", help="folder of the draft model")
    tokens = "num_speculative_tokens of both speculating engines"
    add("--tokens", type=int, default=4, help=tokens)
    add("--ranks", type=int, default=1, help="tensor-parallel ranks of every engine")
    add("--batches", type=whole_numbers, default=(1, 2, 4, 8, 16), metavar="1,4")
    add("--max-tokens", type=int, default=128)
    add("--dtype", default="bfloat16")
    add("--eager", action="store_true", help="without torch.compile: starts sooner, runs slower")
    add("--seconds", type=float, default=200.0, help="time for the measured blocks")
    add("--wait", action="store_true", help="wait for a line on stdin when all are loaded")
    add("--json")


class Arm:
    """One engine in a process of its own; it sleeps while it is not its turn."""

    def __init__(self, context: Any, args: argparse.Namespace, arm: str) -> None:
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=serve, args=(theirs, args, arm), daemon=args.ranks == 1
        )
        self._process.start()
        theirs.close()  # so that it sees our end

    def ready(self) -> None:
        """Wait until the engine is loaded."""
        self._pipe.recv()

    def begin(self, prompts: list[str], batch: int) -> None:
        """Give the engine a block to answer."""
        self._pipe.send((prompts, batch))

    def turn(self) -> Answers | None:
        """Run for a turn; return the answers if they are complete then."""
        self._pipe.send("go on")
        answers: Answers | None = self._pipe.recv()
        return answers

    def close(self) -> None:
        """End the engine's process."""
        self._pipe.send(None)
        self._process.join(20)


def serve(pipe: Any, args: argparse.Namespace, arm: str) -> None:
    """Run an engine's process: answer blocks in turns until it receives None."""
    llm, params = loaded(args, arm)
    controller = getattr(llm.llm_engine.engine_core.engine_core.scheduler, "controller", None)
    signal_ranks(signal.SIGSTOP)
    pipe.send("ready")
    while (job := pipe.recv()) is not None:
        prompts, batch = job
        before = counted(controller)
        work = stream(llm, prompts, batch, params)
        answers = None
        while answers is None:
            pipe.recv()
            signal_ranks(signal.SIGCONT)
            try:
                next(work)
            except StopIteration as end:
                rate, tokens = end.value
                after = counted(controller)
                answers = Answers(
                    rate, tokens, {name: after[name] - before[name] for name in after}
                )
            signal_ranks(signal.SIGSTOP)
            pipe.send(answers)
    signal_ranks(signal.SIGCONT)
    llm.llm_engine.engine_core.shutdown()


def loaded(args: argparse.Namespace, arm: str) -> tuple[Any, Any]:
    """vLLM's engine of one contestant, and its sampling parameters."""
    from vllm import LLM, SamplingParams

    speculative: dict[str, Any] | None = None
    if arm != "plain":
        speculative = {"method": args.method, "num_speculative_tokens": args.tokens}
        ngram = {"prompt_lookup_max": 3, "prompt_lookup_min": 2}
        speculative |= ngram if args.method == "ngram" else {"model": args.draft}
    ours = {"scheduler_cls": "smart_decoding.integrations.vllm.SmartScheduler"}
    llm = LLM(
        args.model,
        dtype=args.dtype,
        max_model_len=1024,
        enable_prefix_caching=False,
        max_num_seqs=32,
        speculative_config=speculative,
        enforce_eager=args.eager,
        tensor_parallel_size=args.ranks,
        **(ours if arm == "smart" else {}),
    )
    return llm, SamplingParams(temperature=0.0, max_tokens=args.max_tokens, ignore_eos=True)


def signal_ranks(number: int) -> None:
    """Send a signal to the processes of this engine's ranks, if it has several."""
    for process in multiprocessing.active_children():
        if process.pid is not None:
            os.kill(process.pid, number)


def stream(
    llm: Any, prompts: list[str], batch: int, params: Any
) -> Generator[None, None, tuple[float, Any]]:
    """Yield after each turn; returns (tokens per second while `batch` requests are running, the
    tokens of all)."""
    engine, tokenizer = llm.llm_engine, llm.get_tokenizer()
    waiting = list(enumerate(prompts))[::-1]
    lengths = random.Random(len(prompts))
    tokens: dict[str, list[int]] = {}

    def add() -> None:
        id_, prompt = waiting.pop()
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        mine = params.clone()
        mine.max_tokens = round(params.max_tokens * lengths.uniform(0.5, 1.5))
        engine.add_request(str(id_), {"prompt_token_ids": list(ids)}, mine)

    rate, before, start = 0.0, 0.0, time.perf_counter()  # before: seconds of earlier turns
    for _ in range(batch):
        add()
    while engine.has_unfinished_requests():
        outputs = engine.step()
        tokens |= {output.request_id: list(output.outputs[0].token_ids) for output in outputs}
        seconds = time.perf_counter() - start
        for output in outputs:
            if output.finished and waiting:
                add()
            elif output.finished and not rate:
                rate = sum(map(len, tokens.values())) / (before + seconds)
        if seconds > TURN:
            yield
            before, start = before + seconds, time.perf_counter()
    return rate, [tokens[str(i)] for i in range(len(prompts))]


def counted(controller: Any) -> dict[str, Any]:
    """Return what SMART did so far; nothing of the other engines."""
    if controller is None:
        return {}
    counters = dict(vars(controller.counters))
    lengths = counters.pop("lengths")
    return counters | {f"length_{k}": lengths.get(k, 0) for k in controller.captured.lengths}


def interval(ours: list[float], base: list[float]) -> Any:
    """Ratio of total times for equal tokens, with its bootstrap 95 % interval over blocks."""
    found = paired_ratio([Pair(a, b) for a, b in zip(ours, base, strict=True)])
    return plain(
        [round(x, 3) for x in (found.value, found.low, found.high)]
    )  # no bounds of a single block: None
