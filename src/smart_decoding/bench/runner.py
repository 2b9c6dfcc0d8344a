"""`smart bench`: policies compared with plain decoding, in one process, in short blocks that take turns.

All arms share the target's weights and its KV memory, since an engine is empty between its blocks. The baseline has no
drafter and keeps no taps. In each cycle every arm answers the same prompts; the order rotates from cycle to cycle, so
that no arm always runs first. Tasks take turns too. Every third cycle the baseline runs once more: the noise.
"""

from __future__ import annotations

import gc
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm import tqdm

from smart_decoding.bench.blocks import Block, Prompt, run_block
from smart_decoding.bench.data import load_task
from smart_decoding.bench.options import BASELINE, Arm, BenchOptions
from smart_decoding.bench.provenance import memory, provenance
from smart_decoding.bench.replay import Recorded
from smart_decoding.bench.summary import noise, summarise
from smart_decoding.bench.traffic import Sizes, achieved
from smart_decoding.bench.tuning import best_likelihood, cost_of, prompts_needed, record_wide
from smart_decoding.engine.engine import Engine
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.llm import LLM

NOISE_EVERY = 3  # cycles
WARM_UP_TOKENS = 8  # few, so that a policy still starts from its prior
LONGEST_PROMPT = 1024  # KV memory is made for prompts up to this on average; longer ones may be preempted

Clock = Callable[[], float]


@dataclass(slots=True)
class Measurement:
    """What one batch size gave: complete cycles (arm -> block), pairs of baseline blocks, and whether time ran out."""

    cycles: list[dict[str, Block]] = field(default_factory=list)
    again: list[tuple[Block, Block]] = field(default_factory=list)
    partial: bool = False


def run(options: BenchOptions) -> dict[str, Any]:
    """Measures everything asked for; returns what the JSON file has: 'provenance', 'runs', 'cost' (the measured profile
    that policies started from, None if none needs one) and 'memory'.

    Raises CapacityError if the time limit was too short for a single cycle, and what LLM raises."""
    texts = {task: load_task(task, options.limit) for task in options.tasks}
    llm = _load(options)
    prompts = _encode(llm, texts, options)
    tuner = _Tuner(llm, options)
    stop = None if options.time_limit is None else time.perf_counter() + options.time_limit
    runs, head, cost = [], None, None
    sizes = Sizes.of(llm.target.decoder.config, llm.target.dtype.itemsize)
    for i, batch_size in enumerate(options.batch_sizes):
        chosen = {arm.label: arm for arm in [*options.arms, *tuner.arms(batch_size)]}
        arms = {label: llm.sharing_weights(_speculation(arm, options)) for label, arm in chosen.items()}
        head = head or next((_head(arm) for arm in arms.values() if arm.engine.drafter is not None), None)
        cost = cost or next((arm.speculation.cost for arm in arms.values() if arm.speculation.cost), None)
        left = len(options.batch_sizes) - i
        now = time.perf_counter()
        deadline = None if stop is None else now + max(0.0, stop - now) / left
        engines = {label: arm.engine for label, arm in arms.items()}
        with _progress(prompts, batch_size, len(engines)) as bar:
            measured = measure(engines, prompts, batch_size, deadline, on_block=lambda label: _advance(bar, label))
        runs += [{**run, **achieved(run, sizes)} for run in rows_of(measured, batch_size, options)]
        del arms, engines
        gc.collect()  # drafters hold memory of their own
    return {
        "provenance": provenance(command_of(options), options.seed, llm.provenance, head),
        "runs": runs,
        "cost": cost.to_dict() if cost else None,
        "memory": memory(sizes.weights * sizes.item, llm.target.kv_bytes),
    }


def measure(
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Sequence[Prompt]],
    batch_size: int,
    deadline: float | None = None,
    on_block: Callable[[str], None] = lambda label: None,
    clock: Clock = time.perf_counter,
) -> Measurement:
    """Runs the engines in turn over all prompts (task -> prompts) until done or past the deadline (on `clock`).

    A cycle that the deadline cuts is dropped: all arms have answered the same prompts."""
    result, labels = Measurement(), list(engines)
    for engine in engines.values():
        _warm_up(engine, prompts, batch_size)
    for number, (chunk, fillers) in enumerate(cycles_of(prompts, batch_size)):
        turn = number % len(labels)
        cycle: dict[str, Block] = {}
        for label in labels[turn:] + labels[:turn]:
            if deadline is not None and clock() > deadline:
                result.partial = True
                return result
            cycle[label] = run_block(engines[label], chunk, fillers, batch_size, clock)
            on_block(label)
        result.cycles.append(cycle)
        if number % NOISE_EVERY == 0:
            result.again.append((run_block(engines[BASELINE], chunk, fillers, batch_size, clock), cycle[BASELINE]))
    return result


def cycles_of(
    prompts: Mapping[str, Sequence[Prompt]], batch_size: int
) -> Iterator[tuple[Sequence[Prompt], Sequence[Prompt]]]:
    """Blocks of `batch_size` prompts (the last of a task may have fewer), tasks in turn, each with its fillers: the
    prompts of the task that follow it, in circle."""
    longest = max((len(of_task) for of_task in prompts.values()), default=0)
    for start in range(0, longest, batch_size):
        for of_task in prompts.values():
            chunk = of_task[start : start + batch_size]
            if chunk:
                yield chunk, [*of_task[start + batch_size :], *of_task[:start]]


def rows_of(measured: Measurement, batch_size: int, options: BenchOptions) -> list[dict[str, Any]]:
    """The runs of one batch size. Raises CapacityError if no cycle was completed."""
    if not measured.cycles:
        raise CapacityError(f"the time limit was too short for one block of every policy at batch size {batch_size}")
    rows = []
    for label in measured.cycles[0]:
        pairs = [(cycle[label], cycle[BASELINE]) for cycle in measured.cycles]
        extra = noise(measured.again, options.seed) if label == BASELINE else {}
        for figures in summarise(pairs, options.seed):
            shared = {"policy": label, "batch_size": batch_size, "task": figures.pop("task"),
                      "dtype": options.dtype, "temperature": options.temperature}  # fmt: skip
            rows.append({**shared, **figures, "partial": measured.partial, **extra})
    return rows


def command_of(options: BenchOptions) -> str:
    """The command line that asks for this run."""
    words = ["smart", "bench", "--model", options.model, "--policies", ",".join(options.policies)]
    words += [word for setting in options.policy_options for word in ("--policy-options", setting)]
    words += ["--tune-likelihood", str(options.tune_likelihood)] if options.tune_likelihood else []
    words += ["--method", options.method] if options.method else []
    words += ["--batch-sizes", ",".join(map(str, options.batch_sizes)), "--tasks", ",".join(options.tasks)]
    words += ["--dtype", options.dtype, "--temperature", f"{options.temperature:g}", "--limit", str(options.limit)]
    words += ["--max-tokens", str(options.max_tokens), "--seed", str(options.seed), "--device", options.device]
    words += ["--time-limit", f"{options.time_limit:g}"] if options.time_limit is not None else []
    for name in ("json", "html", "plots"):
        path = getattr(options, name)
        words += [f"--{name}", path.name] if path is not None else []
    return shlex.join(words)


class _Tuner:
    """Finds the best `likelihood` settings of a batch size, if asked to; records once."""

    def __init__(self, llm: LLM, options: BenchOptions) -> None:
        self.llm, self.options = llm, options
        self.recording: list[Recorded] | None = None

    def arms(self, batch_size: int) -> list[Arm]:
        options = self.options
        if not options.tune_likelihood:
            return []
        candidates = [self.llm.sharing_weights(_speculation(arm, options)) for arm in options.arms]
        cost = cost_of(candidates)
        if self.recording is None:
            drafting = next(arm for arm in candidates if arm.engine.drafter is not None)
            self.recording = record_wide(drafting, _encode(self.llm, self._other_texts(), options))
        eos = self.llm.target.eos_token_ids
        return best_likelihood(self.recording, cost, batch_size, options.tune_likelihood, eos)

    def _other_texts(self) -> dict[str, list[Any]]:
        """Prompts after those that are measured. Raises ConfigError if a task has no others."""
        options = self.options
        count = prompts_needed(options)
        texts = {task: load_task(task, options.limit + count)[options.limit :] for task in options.tasks}
        for task, others in texts.items():
            if not others:
                raise ConfigError(f"--tune-likelihood finds no {task} prompts beyond --limit {options.limit}: lower it")
        return texts


def _load(options: BenchOptions) -> LLM:
    largest = max(options.batch_sizes)
    return LLM(
        options.model, speculative_config=False, dtype=options.dtype, device=options.device, max_num_seqs=largest,
        kv_cache_tokens=largest * (options.max_tokens + LONGEST_PROMPT), enable_prefix_caching=False,
        seed=options.seed, stop_at_loops=True,
    )  # fmt: skip


def _speculation(arm: Arm, options: BenchOptions) -> dict[str, Any] | bool:
    if arm.policy == BASELINE:
        return False
    method = {"method": options.method} if options.method else {}
    return {**method, "policy": arm.policy, **arm.options}


def _encode(llm: LLM, texts: Mapping[str, Sequence[Any]], options: BenchOptions) -> dict[str, list[Prompt]]:
    prompts: dict[str, list[Prompt]] = {}
    count = 0
    for task, of_task in texts.items():
        prompts[task] = []
        for text in of_task:
            ready = llm.chat_prompt([{"role": "user", "content": text}])
            prompts[task].append(Prompt(count, task, ready.tokens, options.sampling(count), ready.media))
            count += 1
    return prompts


def _warm_up(engine: Engine, prompts: Mapping[str, Sequence[Prompt]], batch_size: int) -> None:
    """A few rounds at this batch size, so that no block pays for first calls."""
    first = next(iter(prompts.values()))[0]
    short = [Prompt(i, first.task, first.tokens, SamplingParams(temperature=first.params.temperature,
             max_tokens=WARM_UP_TOKENS, seed=i), first.media) for i in range(batch_size)]  # fmt: skip
    run_block(engine, short, short, batch_size)


def _head(llm: LLM) -> str:
    return llm.speculation.description


def _progress(prompts: Mapping[str, Sequence[Prompt]], batch_size: int, arms: int) -> Any:
    cycles = sum(1 for _ in cycles_of(prompts, batch_size))
    return tqdm(total=cycles * arms, desc=f"batch {batch_size}", unit="block", leave=False)


def _advance(bar: Any, label: str) -> None:
    bar.set_postfix_str(label, refresh=False)
    bar.update()
