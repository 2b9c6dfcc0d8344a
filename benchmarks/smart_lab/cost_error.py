"""How well the cost model predicts real rounds of another process than the one that took the
profile.

Batch sizes, contexts and tree shapes are those that real answers bring, most of them absent from
the profile. Prints, for the model as the policy uses it (with its online correction) and for the
bare profile, the median and the 90th percentile of |predicted / measured - 1| of verifications and
of drafted levels; and the machine's own noise beside them: the same forward again and again against
its median.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smart_decoding import LLM, SamplingParams
from smart_decoding.bench.data import DEFAULT_TASKS, load_task
from smart_decoding.profiling.measure import fake_rows

if TYPE_CHECKING:
    from smart_decoding.core.cost import CostModel
    from smart_decoding.core.policies.base import Round

BATCH_SIZES = (1, 3, 6, 12)
Errors = Mapping[str, Sequence[float]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How much is answered."""
    parser.add_argument("prompts", type=int, nargs="?", default=6, help="prompts per task")


def main(args: argparse.Namespace) -> int:
    """Measures and prints a line for each kind of prediction."""
    pooled: dict[str, list[float]] = defaultdict(list)
    for batch in BATCH_SIZES:
        for name, values in errors(batch, args.prompts).items():
            pooled[name].extend(values)
    pooled["the machine against itself"] = noise()
    for name, values in pooled.items():
        size = np.abs(values)
        middle = np.median(size)
        print(f"{name:28} median {middle:6.1%}  p90 {np.percentile(size, 90):6.1%}  n {len(size)}")
    return 0


def errors(batch: int, prompts: int) -> Errors:
    """predicted / measured - 1 of all rounds at one batch size."""
    speculation = {"method": "eagle", "policy": "smart"}
    llm = LLM("smollm2-135m", speculative_config=speculation, max_num_seqs=batch)
    llm.take_profile()
    policy: Any = llm.policy
    watching = _Watching(policy)
    policy.observe = watching.observe
    texts = [text for task in DEFAULT_TASKS for text in load_task(task, prompts)]
    chats = [llm.tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    llm.generate(chats, SamplingParams(temperature=0, max_tokens=96))
    return watching.found


class _Watching:
    """A policy's `observe` that first compares each round with what was predicted."""

    def __init__(self, policy: Any) -> None:
        self.found: dict[str, list[float]] = defaultdict(list)
        self._policy = policy
        self._profile: CostModel = policy.cost
        self._observe = policy.observe

    def observe(self, done: Round) -> None:
        if not done.batch.prefill_rows:
            self._compare("", self._policy.cost, done)
            self._compare(", bare profile", self._profile, done)
        self._observe(done)

    def _compare(self, suffix: str, cost: CostModel, done: Round) -> None:
        size = done.batch.size
        context = done.batch.mean_context
        expected = float(cost.verify_seconds(size, np.asarray(done.verify_rows), context))
        self.found[f"verify{suffix}"].append(expected / done.verify_seconds - 1)
        levels = cost.levels_seconds(size, done.level_widths, context)
        ratios = (p / s - 1 for p, s in zip(levels, done.level_seconds, strict=True))
        self.found[f"draft{suffix}"].extend(map(float, ratios))


def noise() -> list[float]:
    """The same forward 400 times, over its median."""
    llm = LLM("smollm2-135m", speculative_config=False, max_num_seqs=4)
    rows = fake_rows(1, 6, 200, llm.engine.config.pages)
    assert rows is not None
    seconds = []
    for _ in range(400):
        start = time.perf_counter()
        llm.target.verify(rows, ())
        seconds.append(time.perf_counter() - start)
    return list(np.array(seconds) / np.median(seconds) - 1)
