"""`smart bench`: policies compared with plain decoding, in one process, in short blocks that take
turns.

All arms share the target's weights and its KV memory, since an engine is empty between its blocks.
The baseline has no drafter and asks for no aux hidden states. In each cycle every arm answers the
same prompts; the order rotates from cycle to cycle, so that no arm always runs first. Tasks take
turns too. Every third cycle the baseline runs once more: the noise.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

from tqdm import tqdm

from smart_decoding.bench.blocks import Block, Prompt, run_block
from smart_decoding.bench.command import command_of
from smart_decoding.bench.data import load_task
from smart_decoding.bench.limits import measure_limits
from smart_decoding.bench.limits import shares as limit_shares
from smart_decoding.bench.options import BASELINE, OURS, Arm, BenchOptions
from smart_decoding.bench.peak import forget_peak, peak_gib
from smart_decoding.bench.provenance import memory, provenance
from smart_decoding.bench.resume import Progress, block_of, key_of, plain_block
from smart_decoding.bench.summary import noise, smart_over, summarise
from smart_decoding.bench.traffic import Sizes, achieved
from smart_decoding.core.cost import CostModel
from smart_decoding.engine.engine import Engine
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine_args import DEFAULT_MODEL_LEN
from smart_decoding.errors import CapacityError
from smart_decoding.llm import LLM

NOISE_EVERY = 3  # cycles
# a contestant whose block takes so many times as long as the baseline's runs in every 2nd cycle, 8:
# 3rd, ...
SLOW = 4
LONG_PROMPT = 4096  # the longest of the task `long`, for which memory is then made
WARM_UP_TOKENS = 8  # few, so that a policy still starts from its prior
LONGEST_PROMPT = (
    1024  # KV memory is made for prompts up to this on average; longer ones may be preempted
)

Clock = Callable[[], float]


@dataclass(slots=True)
class Measurement:
    """What one batch size gave: complete cycles (arm -> block), pairs of baseline blocks, and
    whether time ran out."""

    cycles: list[dict[str, Block]] = field(default_factory=list)
    again: list[tuple[Block, Block]] = field(default_factory=list)
    partial: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run. share: of the time limit, relative to the other parts'; measure: takes the
    time to stop at."""

    share: float
    measure: Callable[[float | None], Any]


def run(options: BenchOptions, kind: type[Bench] | None = None) -> dict[str, Any]:
    """Measures everything asked for; returns what the JSON file has: 'provenance', 'runs' (policies
    in blocks, maybe none), 'sampled_runs' (the same at a second temperature), 'load', 'cost' (the
    measured profile that policies started from, None if none needs one), 'limits' and 'memory'.
    kind: a Bench with further parts.

    Raises CapacityError if the time limit was too short for a single cycle, ConfigError for a file
    of --resume that is of another run, and what LLM raises."""
    progress = Progress(options.resume, key_of(options) if options.resume else {})
    texts = {
        task: load_task(task, options.skip + options.limit)[options.skip :]
        for task in options.all_tasks
    }
    llm = load(options)
    progress.agree("weights", llm.provenance)
    bench = (kind or Bench)(options, llm, encode(llm, texts, options), progress)
    result = bench.measure()
    if not any(result.get(part) for part in bench.MAIN_PARTS):
        raise CapacityError(
            "the time limit was too short for one block of every policy: raise --time-limit"
        )
    sizes = bench.sizes
    return {
        "provenance": provenance(
            bench.command, options.seed, llm.provenance, bench.head, llm.target.plain_torch
        ),
        **result,
        "cost": bench.cost.to_dict() if bench.cost else None,
        "limits": bench.limits,
        "memory": memory(sizes.weights * sizes.item, llm.target.kv_bytes),
    }


class Bench:
    """One run: the model, the prompts, and what its parts share. A subclass may add parts and
    contestants."""

    MAIN_PARTS: ClassVar[Sequence[str]] = ("runs", "load")  # a run needs one of these

    def __init__(
        self,
        options: BenchOptions,
        llm: LLM,
        prompts: Mapping[str, Sequence[Prompt]],
        progress: Progress,
    ) -> None:
        self.options = options
        self.llm = llm
        self.prompts = prompts
        self.progress = progress
        self.head: str | None = None
        self.cost: CostModel | None = None
        self.sizes = Sizes.of(llm.target.decoder.config, llm.target.dtype.itemsize)
        self.limits = measure_limits(llm.target.dtype, llm.target.device)

    @property
    def command(self) -> str:
        """The command line that asks for this run."""
        return command_of(self.options)

    def parts(self) -> dict[str, Part]:
        """The parts that were asked for, in order."""
        found: dict[str, Part] = {}
        if self.options.compares_policies:
            first, *second = self.options.temperatures
            found["runs"] = Part(0.56, partial(self.blocks, *first))
            if second:
                found["sampled_runs"] = Part(0.11, partial(self.blocks, *second[0]))
        if self.options.load:
            found["load"] = Part(0.1, self.load)
        return found

    def contestants(self, batch_size: int) -> list[Arm]:
        """Who is compared in blocks at a batch size."""
        return self.options.arms

    def served(self) -> list[Arm]:
        """Who is compared under load."""
        return self.options.arms

    def measure(self) -> dict[str, Any]:
        """Each part with its share of the time that is left."""
        result: dict[str, Any] = {"runs": []}
        limit = self.options.time_limit
        stop = None if limit is None else time.perf_counter() + limit
        parts = list(self.parts().items())
        for i, (name, part) in enumerate(parts):
            share = part.share / sum(other.share for _, other in parts[i:])
            result[name] = part.measure(_until(stop, share))
        return result

    def made(self, chosen: Sequence[Arm]) -> dict[str, LLM]:
        """The chosen contestants, by label; their drafter and cost model are noted."""
        arms = {
            arm.label: self.llm.sharing_weights(self.options.speculation(arm)) for arm in chosen
        }
        found = [arm.speculation for arm in arms.values() if arm.engine.drafter is not None]
        self.head = (
            self.head or ", ".join(dict.fromkeys(each.description for each in found)) or None
        )
        self.cost = self.cost or next((each.cost for each in found if each.cost), None)
        return arms

    def blocks(
        self,
        temperature: float,
        batch_sizes: Sequence[int],
        stop: float | None,
        arms: Sequence[Arm] = (),
        kind: str = "",
        tasks: Sequence[str] = (),
    ) -> list[dict[str, Any]]:
        """The runs at a temperature, of all contestants or of `arms`, on the tasks asked for or on
        `tasks`; a batch size for which time was too short is left out."""
        runs: list[dict[str, Any]] = []
        chosen = {task: self.prompts[task] for task in tasks or self.options.tasks}
        prompts = at_temperature(chosen, self.options, temperature)
        for i, batch_size in enumerate(batch_sizes):
            forget_peak()
            contestants = arms or self.contestants(batch_size)
            name = f"{kind}T {temperature:g}, batch {batch_size}"
            found = self._batch(
                name, contestants, prompts, batch_size, _until(stop, 1 / (len(batch_sizes) - i))
            )
            if not found.cycles:
                left_out = f"batch {batch_size} is left out: no time was left for one block of every policy"
                print(f"smart: {left_out}", file=sys.stderr)
                continue
            settings = {arm.label: _setting(arm) for arm in contestants if arm.name}
            for run in rows_of(found, batch_size, self.options, temperature):
                run |= achieved(run, self.sizes) | settings.get(run["policy"], {})
                runs.append({**run, **limit_shares(run, self.limits), "peak_gib": peak_gib()})
        return runs

    def _batch(
        self,
        name: str,
        contestants: Sequence[Arm],
        prompts: Mapping[str, Sequence[Prompt]],
        batch_size: int,
        deadline: float | None,
    ) -> Measurement:
        """One batch size measured, from where --resume left it. Engines are gone afterwards."""
        made = self.made(contestants)
        done = _restored(self.progress.units(name))
        cycles = sum(1 for _ in cycles_of(prompts, batch_size, self.options.least_blocks))
        gc.collect()
        gc.freeze()  # else what was loaded is searched for garbage in the midst of a round
        with _bar(cycles, len(made), name, done) as bar:
            measured = measure(
                {label: arm.engine for label, arm in made.items()},
                prompts,
                batch_size,
                deadline,
                lambda label: _advance(bar, label),
                done=done,
                on_cycle=lambda cycle, again: self.progress.add(name, _kept(cycle, again)),
                least_blocks=self.options.least_blocks,
            )
        del made
        gc.unfreeze()
        gc.collect()  # drafters hold memory of their own
        return measured

    def load(self, stop: float | None) -> dict[str, Any]:
        """Requests that arrive at random."""
        from smart_decoding.bench.load import measure_load

        seconds = None if stop is None else max(1.0, stop - time.perf_counter())
        engines = {label: arm.engine for label, arm in self.made(self.served()).items()}
        prompts = {task: self.prompts[task] for task in self.options.tasks}
        return measure_load(
            engines, prompts, self.options.load, self.options.seed, seconds, self.progress
        )


def _setting(arm: Arm) -> dict[str, str]:
    return {"setting": ",".join(f"{name}={value}" for name, value in arm.options.items())}


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
    least_blocks: int = 1,
) -> Measurement:
    """Runs the engines in turn over all prompts (task -> prompts) until done or past the deadline
    (on `clock`).

    A cycle that the deadline cuts is dropped: all arms have answered the same prompts. After the
    first cycle a slow engine runs in few of them: it would use up the time that the others'
    intervals need. `done`: what an earlier run measured of the same, to go on from; `on_cycle` is
    told each new cycle, with the baseline's second block if it had one."""
    result, labels = done or Measurement(), list(engines)
    cycles = list(cycles_of(prompts, batch_size, least_blocks))
    first = len(result.cycles)
    if first == len(cycles):
        return result
    for engine in engines.values():
        _warm_up(engine, prompts, batch_size)
    for number, (chunk, fillers) in enumerate(cycles[first:], first):
        # Turns over all tasks: what happens every third time would else meet one task only.
        turn, task = divmod(number, len(prompts))
        start = (turn + task) % len(labels)
        cycle: dict[str, Block] = {}
        due = [
            label
            for label in labels[start:] + labels[:start]
            if turn % _every(result.cycles, label) == 0
        ]
        for label in due:
            if deadline is not None and clock() > deadline:
                result.partial = True
                return result
            cycle[label] = run_block(engines[label], chunk, fillers, batch_size, clock)
            on_block(label)
        result.cycles.append(cycle)
        again = None
        if (turn + task) % NOISE_EVERY == 0:
            again = run_block(engines[BASELINE], chunk, fillers, batch_size, clock)
            result.again.append((again, cycle[BASELINE]))
        on_cycle(cycle, again)
    return result


def _every(cycles: Sequence[Mapping[str, Block]], label: str) -> int:
    """1 for a contestant that runs in every turn over the tasks, 2 in every second one, and so
    on."""
    if not cycles:
        return 1
    ours, base = (cycles[0][name].total_seconds for name in (label, BASELINE))
    return 1 + int(ours / base / SLOW) if base > 0 else 1


def cycles_of(
    prompts: Mapping[str, Sequence[Prompt]], batch_size: int, least: int = 1
) -> Iterator[tuple[Sequence[Prompt], Sequence[Prompt]]]:
    """Blocks of `batch_size` prompts (the last of a task may have fewer), tasks in turn, each with
    its fillers: the prompts of the task that follow it, in circle. Where that makes fewer than
    `least` blocks of the longest task, its prompts and the others' are used again, in other
    blocks."""
    longest, count, turn = max((len(of_task) for of_task in prompts.values()), default=0), 0, 0
    while longest and (count < least or not turn):
        for start in range(0, longest, batch_size):
            for of_task in prompts.values():
                first = turn * batch_size // 2 % len(of_task)
                turned = [*of_task[first:], *of_task[:first]]
                chunk = turned[start : start + batch_size]
                if chunk:
                    yield chunk, [*turned[start + batch_size :], *turned[:start]]
            count += 1
        turn += 1


def rows_of(
    measured: Measurement, batch_size: int, options: BenchOptions, temperature: float | None = None
) -> list[dict[str, Any]]:
    """The runs of one batch size. Raises CapacityError if no cycle was completed."""
    if not measured.cycles:
        raise CapacityError(
            f"the time limit was too short for one block of every policy at batch size {batch_size}"
        )
    rows, heat = [], options.temperature if temperature is None else temperature
    for label in measured.cycles[0]:
        pairs = [(cycle[label], cycle[BASELINE]) for cycle in measured.cycles if label in cycle]
        extra = noise(measured.again, options.seed) if label == BASELINE else {}
        both = [
            (cycle[OURS], cycle[label])
            for cycle in measured.cycles
            if {OURS, label} <= cycle.keys()
        ]
        ours = smart_over(both, options.seed) if both and label not in (OURS, BASELINE) else {}
        for figures in summarise(pairs, options.seed):
            compared = ours.get(figures["task"], {})
            shared = {
                "policy": label,
                "batch_size": batch_size,
                "task": figures.pop("task"),
                "dtype": options.dtype,
                "temperature": heat,
            }
            rows.append({**shared, **figures, **compared, "partial": measured.partial, **extra})
    return rows


def at_temperature(
    prompts: Mapping[str, Sequence[Prompt]], options: BenchOptions, temperature: float
) -> Mapping[str, Sequence[Prompt]]:
    """The same prompts, to be answered at another temperature."""
    if temperature == options.temperature:
        return prompts
    return {
        task: [
            replace(prompt, params=options.sampling(prompt.index, temperature))
            for prompt in of_task
        ]
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


def load(options: BenchOptions) -> LLM:
    largest = options.most_requests()
    longest = LONG_PROMPT if "long" in options.tasks else LONGEST_PROMPT
    long = "long" in options.all_tasks
    tokens = largest * (options.max_tokens + longest)
    return LLM(
        options.model,
        speculative_config=False,
        dtype=options.dtype,
        device=options.device,
        max_num_seqs=largest,
        kv_cache_tokens=max(
            tokens, LONG_PROMPT + options.max_tokens if long else DEFAULT_MODEL_LEN
        ),
        enable_prefix_caching=False,
        max_model_len=options.max_tokens + LONG_PROMPT if long else None,
        seed=options.seed,
        stop_at_loops=True,
        allow_slow=options.allow_slow,
    )


def encode(
    llm: LLM, texts: Mapping[str, Sequence[Any]], options: BenchOptions
) -> dict[str, list[Prompt]]:
    prompts: dict[str, list[Prompt]] = {}
    count = 0
    for task, of_task in texts.items():
        prompts[task] = []
        for text in of_task:
            ready = llm.chat_prompt([{"role": "user", "content": text}])
            prompts[task].append(
                Prompt(count, task, ready.tokens, options.sampling(count), ready.media)
            )
            count += 1
    return prompts


def _warm_up(engine: Engine, prompts: Mapping[str, Sequence[Prompt]], batch_size: int) -> None:
    """A few rounds at this batch size, so that no block pays for first calls."""
    first = next(iter(prompts.values()))[0]
    short = [
        Prompt(
            i,
            first.task,
            first.tokens,
            SamplingParams(temperature=first.params.temperature, max_tokens=WARM_UP_TOKENS, seed=i),
            first.media,
        )
        for i in range(batch_size)
    ]
    run_block(engine, short, short, batch_size)


def _bar(cycles: int, arms: int, name: str, done: Measurement) -> Any:
    """Blocks done and to come, with the time left."""
    first = len(done.cycles)
    return tqdm(total=cycles * arms, initial=first * arms, desc=name, unit="block", leave=False)


def _advance(bar: Any, label: str) -> None:
    bar.set_postfix_str(label, refresh=False)
    bar.update()
