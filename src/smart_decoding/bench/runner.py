"""`smart bench`: policies compared with plain decoding, in one process, some rounds each in turn.

All arms share the target's weights and the pages of its KV memory. The baseline has no drafter and
needs no aux hidden states.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from smart_decoding.bench.blocks import Prompt
from smart_decoding.bench.cycles import Cycle, Prompts, cycles_of, measure
from smart_decoding.bench.options import LONGEST_PROMPT, MEAN_PROMPT, BenchOptions
from smart_decoding.bench.results import Results, Row, rows_of
from smart_decoding.engine_args import DEFAULT_MODEL_LEN
from smart_decoding.errors import CapacityError
from smart_decoding.llm import LLM
from smart_decoding.measuring.tasks import load_task


def run(options: BenchOptions) -> Results:
    """Measure all contestants at all batch sizes; one for which time was too short is left out.

    Raises CapacityError if it was too short for a single cycle, and LLM's errors."""
    texts = {task: load_task(task, options.limit) for task in options.tasks}
    llm = load(options, len(options.arms))
    prompts = encode(llm, texts, options)
    limit = options.time_limit  # from here on
    stop = None if limit is None else time.perf_counter() + limit
    rows: list[Row] = []
    for i, batch_size in enumerate(options.batch_sizes):
        share = until(stop, 1 / (len(options.batch_sizes) - i))
        rows += _batch(options, llm, prompts, batch_size, share, stop)
        gc.collect()  # drafters hold memory of their own
    if not rows:
        raise CapacityError(
            "the time limit was too short for one block of every policy: raise --time-limit"
        )
    return Results(rows, llm.target.plain_torch)


def _batch(
    options: BenchOptions,
    llm: LLM,
    prompts: Prompts,
    batch_size: int,
    deadline: float | None,
    stop: float | None,
) -> list[Row]:
    """Measure one batch size, as far as memory allows. A slow machine may take the whole run's time
    for the first cycle, which there are no figures without."""
    arms = {arm.label: llm.sharing_weights(options.speculation(arm)) for arm in options.arms}
    engines = {label: arm.engine for label, arm in arms.items()}
    total = sum(1 for _ in cycles_of(prompts, batch_size))
    found: list[Cycle] = []

    def late() -> bool:
        end = deadline if found else stop
        return end is not None and time.perf_counter() > end

    try:
        with tqdm(total=total, desc=f"batch {batch_size}", unit="cycle", leave=False) as bar:
            for cycle in measure(engines, prompts, batch_size, late):
                found.append(cycle)
                bar.update()
    except CapacityError as error:
        print(f"smart: batch {batch_size}: {error}", file=sys.stderr)
    if not found:
        reason = "no time was left for one block of every policy: raise --time-limit"
        print(f"smart: batch {batch_size} is left out: {reason}", file=sys.stderr)
        return []
    return rows_of(found, batch_size, partial=len(found) < total)


def until(stop: float | None, share: float) -> float | None:
    """Return the second in which a part ends that may take a share of the time that is left."""
    now = time.perf_counter()
    return None if stop is None else now + max(0.0, stop - now) * share


def load(
    options: BenchOptions,
    contestants: int,
    mean_prompt: int = MEAN_PROMPT,
    max_model_len: int | None = None,
) -> LLM:
    """Return the target, with memory for the largest batch size of all contestants, who hold
    requests at once. max_model_len: the longest prompt plus answer; None for the usual."""
    largest = max(options.batch_sizes)
    longest = max_model_len or options.max_tokens + LONGEST_PROMPT
    tokens = max(largest * (options.max_tokens + mean_prompt), longest) * contestants
    return LLM(
        options.model,
        generation_config="vllm",
        speculative_config=False,
        dtype=options.dtype,
        quantization=options.quantization,
        activations=options.activations,
        device=options.device,
        max_num_seqs=largest,
        kv_cache_tokens=max(tokens, max_model_len or DEFAULT_MODEL_LEN),
        enable_prefix_caching=False,
        max_model_len=max_model_len,
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
