"""`smart bench`: policies compared with plain decoding, in one process, in short blocks that take turns.

All arms share the target's weights and its KV memory, since an engine is empty between its blocks. The baseline has no
drafter and keeps no taps. In each cycle every arm answers the same prompts; the order rotates from cycle to cycle, so
that no arm always runs first. Tasks take turns too. Every third cycle the baseline runs once more: the noise.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from smart_decoding.bench.blocks import Block, Prompt, run_block
from smart_decoding.bench.command import command_of
from smart_decoding.bench.data import load_task
from smart_decoding.bench.limits import measure_limits
from smart_decoding.bench.limits import shares as limit_shares
from smart_decoding.bench.options import BASELINE, Arm, BenchOptions
from smart_decoding.bench.peak import forget_peak, peak_gib
from smart_decoding.bench.provenance import memory, provenance
from smart_decoding.bench.resume import Progress, block_of, key_of, plain_block
from smart_decoding.bench.summary import noise, summarise
from smart_decoding.bench.sweep import Sweep
from smart_decoding.bench.traffic import Sizes, achieved
from smart_decoding.bench.tuning import best_likelihood, cost_of, prompts_needed
from smart_decoding.core.cost import CostModel
from smart_decoding.engine.engine import Engine
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.llm import LLM

NOISE_EVERY = 3  # cycles
SLOTS = 16  # requests at once under load
LONG_PROMPT = 4096  # the longest of the task `long`, for which memory is then made
_PART_SHARES = {"runs": 0.65, "sampled_runs": 0.15, "load": 0.2}  # of the time limit
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
    """Measures everything asked for; returns what the JSON file has: 'provenance', 'runs' (policies in blocks, maybe
    none), 'sampled_runs' (the same at a second temperature), 'load', 'peers', 'cost' (the measured profile that
    policies started from, None if none needs one), 'limits' and 'memory'.

    Raises CapacityError if the time limit was too short for a single cycle, ConfigError for a file of --resume that is
    of another run, and what LLM raises."""
    progress = Progress(options.resume, key_of(options) if options.resume else {})
    texts = {task: load_task(task, options.skip + options.limit)[options.skip :] for task in options.tasks}
    llm = load(options)
    progress.agree("weights", llm.provenance)
    bench = _Bench(options, llm, encode(llm, texts, options), progress)
    result = bench.parts()
    if not any(result.get(part) for part in ("runs", "load", "peers")):
        raise CapacityError("the time limit was too short for one block of every policy: raise --time-limit")
    sizes = bench.sizes
    return {
        "provenance": provenance(command_of(options), options.seed, llm.provenance, bench.head),
        **result,
        "cost": bench.cost.to_dict() if bench.cost else None,
        "limits": bench.limits,
        "memory": memory(sizes.weights * sizes.item, llm.target.kv_bytes),
    }


class _Bench:
    """One run: the model, the prompts, and what its parts share."""

    def __init__(
        self, options: BenchOptions, llm: LLM, prompts: Mapping[str, Sequence[Prompt]], progress: Progress
    ) -> None:
        self.options, self.llm, self.prompts, self.progress = options, llm, prompts, progress
        self.head: str | None = None
        self.cost: CostModel | None = None
        self.tuner = _Tuner(llm, options)
        self.sizes = Sizes.of(llm.target.decoder.config, llm.target.dtype.itemsize)
        self.limits = measure_limits(llm.target.dtype, llm.target.device)

    def parts(self) -> dict[str, Any]:
        """The parts that were asked for, each with its share of the time that is left."""
        options, result = self.options, dict[str, Any]({"runs": []})
        stop = None if options.time_limit is None else time.perf_counter() + options.time_limit
        heats = dict(
            zip(("runs", "sampled_runs"), options.temperatures if options.compares_policies else (), strict=False)
        )
        asked = [*heats, *(["load"] if options.load else [])]
        for i, part in enumerate(asked):
            until = _until(stop, _PART_SHARES[part] / sum(_PART_SHARES[each] for each in asked[i:]))
            result[part] = self._load(until) if part == "load" else self._blocks(*heats[part], until)
        if options.peers:
            result["peers"] = self._peers()
        return result

    def engines(self, batch_size: int) -> dict[str, LLM]:
        """Every contestant of a batch size, by label."""
        chosen = {arm.label: arm for arm in [*self.options.arms, *self.tuner.arms(batch_size, self.progress)]}
        arms = {label: self.llm.sharing_weights(self.options.speculation(arm)) for label, arm in chosen.items()}
        found = [arm.speculation for arm in arms.values() if arm.engine.drafter is not None]
        self.head = self.head or ", ".join(dict.fromkeys(each.description for each in found)) or None
        self.cost = self.cost or next((each.cost for each in found if each.cost), None)
        return arms

    def _blocks(self, temperature: float, batch_sizes: Sequence[int], stop: float | None) -> list[dict[str, Any]]:
        """The runs at a temperature; a batch size for which time was too short is left out."""
        runs: list[dict[str, Any]] = []
        prompts = at_temperature(self.prompts, self.options, temperature)
        for i, batch_size in enumerate(batch_sizes):
            forget_peak()
            engines = {label: arm.engine for label, arm in self.engines(batch_size).items()}
            name = f"T {temperature:g}, batch {batch_size}"
            done = _restored(self.progress.units(name))
            deadline = _until(stop, 1 / (len(batch_sizes) - i))
            with _bar(prompts, batch_size, len(engines), name, done) as bar:
                measured = measure(
                    engines, prompts, batch_size, deadline, lambda label, bar=bar: _advance(bar, label), done=done,
                    on_cycle=lambda cycle, again, name=name: self.progress.add(name, _kept(cycle, again)),
                )  # fmt: skip
            if not measured.cycles:
                print(f"smart: batch {batch_size} is left out: no time was left for one block of every policy",
                      file=sys.stderr)  # fmt: skip
                continue
            for run in rows_of(measured, batch_size, self.options, temperature):
                run |= achieved(run, self.sizes)
                runs.append({**run, **limit_shares(run, self.limits), "peak_gib": peak_gib()})
            del engines
            gc.collect()  # drafters hold memory of their own
        return runs

    def _load(self, stop: float | None) -> dict[str, Any]:
        from smart_decoding.bench.load import measure_load

        seconds = None if stop is None else max(1.0, stop - time.perf_counter())
        engines = {label: arm.engine for label, arm in self.engines(SLOTS).items()}
        return measure_load(engines, self.prompts, self.options.load, self.options.seed, seconds, self.progress)

    def _peers(self) -> list[dict[str, Any]]:
        from smart_decoding.bench.peers.session import measure_peers

        smart = self.llm.sharing_weights(self.options.speculation(self.options.peer_arm))
        self.head, self.cost = self.head or smart.speculation.description, self.cost or smart.speculation.cost
        engines = {"plain": self.llm.engine, "smart": smart.engine}
        return measure_peers(self.options, engines, self.prompts, self.progress)


def _until(stop: float | None, share: float) -> float | None:
    """When a part must end that may take a share of the time that is left."""
    now = time.perf_counter()
    return None if stop is None else now + max(0.0, stop - now) * share


def measure(
    engines: Mapping[str, Engine],
    prompts: Mapping[str, Sequence[Prompt]],
    batch_size: int,
    deadline: float | None = None,
    on_block: Callable[[str], None] = lambda label: None,
    clock: Clock = time.perf_counter,
    done: Measurement | None = None,
    on_cycle: Callable[[dict[str, Block], Block | None], None] = lambda cycle, again: None,
) -> Measurement:
    """Runs the engines in turn over all prompts (task -> prompts) until done or past the deadline (on `clock`).

    A cycle that the deadline cuts is dropped: all arms have answered the same prompts. `done`: what an earlier run
    measured of the same, to go on from; `on_cycle` is told each new cycle, with the baseline's second block if it had
    one."""
    result, labels = done or Measurement(), list(engines)
    cycles = list(cycles_of(prompts, batch_size))
    first = len(result.cycles)
    if first == len(cycles):
        return result
    for engine in engines.values():
        _warm_up(engine, prompts, batch_size)
    for number, (chunk, fillers) in enumerate(cycles[first:], first):
        turn = number % len(labels)
        cycle: dict[str, Block] = {}
        for label in labels[turn:] + labels[:turn]:
            if deadline is not None and clock() > deadline:
                result.partial = True
                return result
            cycle[label] = run_block(engines[label], chunk, fillers, batch_size, clock)
            on_block(label)
        result.cycles.append(cycle)
        again = None
        if number % NOISE_EVERY == 0:
            again = run_block(engines[BASELINE], chunk, fillers, batch_size, clock)
            result.again.append((again, cycle[BASELINE]))
        on_cycle(cycle, again)
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


def rows_of(
    measured: Measurement, batch_size: int, options: BenchOptions, temperature: float | None = None
) -> list[dict[str, Any]]:
    """The runs of one batch size. Raises CapacityError if no cycle was completed."""
    if not measured.cycles:
        raise CapacityError(f"the time limit was too short for one block of every policy at batch size {batch_size}")
    rows, heat = [], options.temperature if temperature is None else temperature
    for label in measured.cycles[0]:
        pairs = [(cycle[label], cycle[BASELINE]) for cycle in measured.cycles]
        extra = noise(measured.again, options.seed) if label == BASELINE else {}
        for figures in summarise(pairs, options.seed):
            shared = {"policy": label, "batch_size": batch_size, "task": figures.pop("task"),
                      "dtype": options.dtype, "temperature": heat}  # fmt: skip
            rows.append({**shared, **figures, "partial": measured.partial, **extra})
    return rows


def at_temperature(
    prompts: Mapping[str, Sequence[Prompt]], options: BenchOptions, temperature: float
) -> Mapping[str, Sequence[Prompt]]:
    """The same prompts, to be answered at another temperature."""
    if temperature == options.temperature:
        return prompts
    return {
        task: [replace(prompt, params=options.sampling(prompt.index, temperature)) for prompt in of_task]
        for task, of_task in prompts.items()
    }


def _kept(cycle: Mapping[str, Block], again: Block | None) -> dict[str, Any]:
    """A cycle as --resume keeps it."""
    return {
        "cycle": {label: plain_block(block) for label, block in cycle.items()},
        "again": None if again is None else plain_block(again),
    }


def _restored(units: Sequence[Any]) -> Measurement:
    measured = Measurement()
    for unit in units:
        cycle = {label: block_of(block) for label, block in unit["cycle"].items()}
        measured.cycles.append(cycle)
        if unit["again"] is not None:
            measured.again.append((block_of(unit["again"]), cycle[BASELINE]))
    return measured


class _Tuner:
    """Finds the best `likelihood` settings of a batch size, if asked to; records once."""

    def __init__(self, llm: LLM, options: BenchOptions) -> None:
        self.llm, self.options = llm, options
        self.sweep: Sweep | None = None

    def arms(self, batch_size: int, progress: Progress) -> list[Arm]:
        """The best settings; the same again when a run goes on."""
        if not self.options.tune_likelihood:
            return []
        name = f"tuned for batch {batch_size}"
        if not progress.units(name):
            progress.add(name, [[arm.policy, dict(arm.options)] for arm in self._found(batch_size)])
        return [Arm(policy, options) for policy, options in progress.units(name)[0]]

    def _found(self, batch_size: int) -> list[Arm]:
        options = self.options
        candidates = [self.llm.sharing_weights(options.speculation(arm)) for arm in options.arms]
        cost = cost_of(candidates)
        if self.sweep is None:
            from smart_decoding.bench.recorder import record_wide  # which needs this module

            drafting = next(arm for arm in candidates if arm.engine.drafter is not None)
            recording = record_wide(drafting, encode(self.llm, self._other_texts(), options))
            self.sweep = Sweep(recording, eos=self.llm.target.eos_token_ids)
        return best_likelihood(self.sweep, cost, batch_size, options.tune_likelihood)

    def _other_texts(self) -> dict[str, list[Any]]:
        """Prompts after those that are measured. Raises ConfigError if a task has no others."""
        options = self.options
        count, used = prompts_needed(options), options.skip + options.limit
        texts = {task: load_task(task, used + count)[used:] for task in options.tasks}
        for task, others in texts.items():
            if not others:
                raise ConfigError(f"--tune-likelihood finds no {task} prompts beyond the first {used}: lower --limit")
        return texts


def load(options: BenchOptions) -> LLM:
    largest = max([*options.batch_sizes, *(options.sampled_batch_sizes if options.sampled else ()),
                   *([SLOTS] if options.load else ())])  # fmt: skip
    longest = LONG_PROMPT if "long" in options.tasks else LONGEST_PROMPT
    return LLM(
        options.model, speculative_config=False, dtype=options.dtype, device=options.device, max_num_seqs=largest,
        kv_cache_tokens=largest * (options.max_tokens + longest), enable_prefix_caching=False,
        max_model_len=options.max_tokens + LONG_PROMPT if "long" in options.tasks else None,
        seed=options.seed, stop_at_loops=True,
    )  # fmt: skip


def encode(llm: LLM, texts: Mapping[str, Sequence[Any]], options: BenchOptions) -> dict[str, list[Prompt]]:
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


def _bar(prompts: Mapping[str, Sequence[Prompt]], batch_size: int, arms: int, name: str, done: Measurement) -> Any:
    """Blocks done and to come, with the time left."""
    cycles, first = sum(1 for _ in cycles_of(prompts, batch_size)), len(done.cycles)
    return tqdm(total=cycles * arms, initial=first * arms, desc=name, unit="block", leave=False)


def _advance(bar: Any, label: str) -> None:
    bar.set_postfix_str(label, refresh=False)
    bar.update()
