"""`smart bench`: policies compared with plain decoding, in one process, some rounds each in turn.

All arms share the target's weights and the pages of its KV memory. The baseline has no drafter and
needs no aux hidden states.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from smart_decoding.bench.blocks import Prompt
from smart_decoding.bench.cycles import AGAIN, Measurement, Prompts, cycles_of, measure, rows_of
from smart_decoding.bench.data import load_task
from smart_decoding.bench.options import LONGEST_PROMPT, Arm, BenchOptions, command_of
from smart_decoding.bench.provenance import provenance
from smart_decoding.engine_args import DEFAULT_MODEL_LEN
from smart_decoding.errors import CapacityError
from smart_decoding.llm import LLM

if TYPE_CHECKING:
    from smart_decoding.core.costs import CostModel


def run(options: BenchOptions, kind: Callable[..., Bench] | None = None) -> dict[str, Any]:
    """Measure all contestants; return the content of the JSON file: 'provenance', 'runs' and 'cost'
    (the measured profile that policies started from, None if none needs one). kind: makes a Bench
    with further contestants.

    Raises CapacityError if the time limit was too short for a single cycle, and LLM's errors."""
    texts = {task: load_task(task, options.limit) for task in options.tasks}
    llm = load(options)
    bench = (kind or Bench)(options, llm, encode(llm, texts, options))
    limit = options.time_limit
    runs = bench.runs(None if limit is None else bench.started + limit)
    if not runs:
        raise CapacityError(
            "the time limit was too short for one block of every policy: raise --time-limit"
        )
    return {
        "provenance": provenance(
            bench.command, options.seed, llm.provenance, bench.head, llm.target.plain_torch
        ),
        "runs": runs,
        "cost": bench.cost.to_dict() if bench.cost else None,
    }


class Bench:
    """One run: the model, the prompts, and what its batch sizes share. A subclass may add
    contestants."""

    def __init__(self, options: BenchOptions, llm: LLM, prompts: Prompts) -> None:
        self.started = time.perf_counter()  # the time limit counts from here
        self.options = options
        self.llm = llm
        self.prompts = prompts
        self.head: str | None = None
        self.cost: CostModel | None = None

    @property
    def command(self) -> str:
        """The command line of this run."""
        return command_of(self.options)

    def contestants(self, batch_size: int) -> list[Arm]:
        """Return the contestants of a batch size."""
        return self.options.arms

    def begun(self, name: str) -> Measurement:
        """Return the earlier measurement of a batch size to continue: an empty one."""
        return Measurement()

    def made(self, chosen: Sequence[Arm]) -> dict[str, LLM]:
        """Return the chosen contestants, by label; their drafter and cost model are noted."""
        arms = {
            arm.label: self.llm.sharing_weights(self.options.speculation(arm)) for arm in chosen
        }
        found = [arm.speculation for arm in arms.values() if arm.engine.drafts]
        self.head = (
            self.head or ", ".join(dict.fromkeys(each.description for each in found)) or None
        )
        self.cost = self.cost or next((each.cost for each in found if each.cost), None)
        return arms

    def runs(self, stop: float | None) -> list[dict[str, Any]]:
        """Return the runs of all contestants; a batch size for which time was too short is left
        out."""
        options = self.options
        runs: list[dict[str, Any]] = []
        for i, batch_size in enumerate(options.batch_sizes):
            contestants = self.contestants(batch_size)
            share = until(stop, 1 / (len(options.batch_sizes) - i))
            found = self._batch(contestants, batch_size, share, stop)
            if not found.cycles:
                reason = "no time was left for one block of every policy: raise --time-limit"
                print(f"smart: batch {batch_size} is left out: {reason}", file=sys.stderr)
                continue
            settings = {arm.label: _setting(arm) for arm in contestants if arm.name}
            of_size = rows_of(found, batch_size, options.seed)
            runs += [run | settings.get(run["policy"], {}) for run in of_size]
        return runs

    def _batch(
        self,
        contestants: Sequence[Arm],
        batch_size: int,
        deadline: float | None,
        stop: float | None,
    ) -> Measurement:
        """Measure one batch size, as far as memory allows, and free its engines. A slow machine
        may take the whole run's time for the first cycle."""
        name = f"T {self.options.temperature:g}, batch {batch_size}"
        found = self.begun(name)
        found.first_deadline = stop
        made = self.made(contestants)
        made[AGAIN] = self.llm.sharing_weights(False)
        cycles = sum(1 for _ in cycles_of(self.prompts, batch_size))
        try:
            with _bar(cycles, name, found) as bar:
                measure(
                    {label: arm.engine for label, arm in made.items()},
                    self.prompts,
                    batch_size,
                    deadline,
                    bar.update,
                    into=found,
                )
        except CapacityError as error:
            print(f"smart: batch {batch_size}: {error}", file=sys.stderr)
            found.partial = True
        del made
        gc.collect()  # drafters hold memory of their own
        return found


def _setting(arm: Arm) -> dict[str, str]:
    return {"setting": ",".join(f"{name}={value}" for name, value in arm.options.items())}


def until(stop: float | None, share: float) -> float | None:
    """Return the second in which a part ends that may take a share of the time that is left."""
    now = time.perf_counter()
    return None if stop is None else now + max(0.0, stop - now) * share


def load(options: BenchOptions) -> LLM:
    """Return the target, with memory for the largest batch size: contestants hold requests at
    once."""
    largest = max(options.batch_sizes)
    longest = options.max_model_len or options.max_tokens + LONGEST_PROMPT
    tokens = max(largest * (options.max_tokens + options.mean_prompt), longest)
    tokens *= options.most_contestants()
    return LLM(
        options.model,
        generation_config="vllm",
        speculative_config=False,
        dtype=options.dtype,
        quantization=options.quantization,
        activations=options.activations,
        device=options.device,
        max_num_seqs=largest,
        kv_cache_tokens=max(tokens, options.max_model_len or DEFAULT_MODEL_LEN),
        enable_prefix_caching=False,
        max_model_len=options.max_model_len,
        seed=options.seed,
        stop_at_loops=True,
        chat_template=options.chat_template,
        trust_pickle=options.trust_pickle,
        allow_slow=options.allow_slow,
    )


def encode(
    llm: LLM, texts: Mapping[str, Sequence[Any]], options: BenchOptions
) -> dict[str, list[Prompt]]:
    """Return each task's texts as chats of one message, numbered over all tasks."""
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


def _bar(cycles: int, name: str, found: Measurement) -> Any:
    done = len(found.cycles)
    return tqdm(total=cycles, initial=done, desc=name, unit="cycle", leave=False)
