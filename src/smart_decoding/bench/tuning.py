"""The strongest `likelihood` settings for a batch size: ranked by replay on prompts that the benchmark does not use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from smart_decoding.bench.blocks import Prompt
from smart_decoding.bench.options import Arm, BenchOptions
from smart_decoding.bench.replay import Recorded, Wide, likelihood_settings, rank, record
from smart_decoding.core.cost import CostModel
from smart_decoding.errors import ConfigError
from smart_decoding.llm import LLM

PER_TASK = 8  # prompts, or more where large batches need them


def prompts_needed(options: BenchOptions) -> int:
    """Tuning prompts per task: enough to keep the largest batch full for a while."""
    return max(PER_TASK, -(-2 * max(options.batch_sizes) // len(options.tasks)))


def record_wide(arm: LLM, prompts: Mapping[str, Sequence[Prompt]]) -> list[Recorded]:
    """Records the prompts' trees with `arm`'s drafter, tasks mixed; the arm's policy is as before afterwards."""
    engine = arm.engine
    policy, engine.policy = engine.policy, Wide()
    try:
        longest = max(len(of_task) for of_task in prompts.values())
        mixed = [of_task[i] for i in range(longest) for of_task in prompts.values() if i < len(of_task)]
        with tqdm(total=len(mixed), desc="recording for replay", unit="prompt", leave=False) as bar:
            return record(engine, mixed, on_answers=bar.update)
    finally:
        engine.policy = policy


def best_likelihood(
    recording: Sequence[Recorded], cost: CostModel, batch_size: int, count: int, eos_token_ids: Sequence[int]
) -> list[Arm]:
    """The `count` settings of `likelihood` that are fastest in the replay at `batch_size`."""
    with tqdm(total=len(likelihood_settings()), desc="replaying settings", unit="setting", leave=False) as bar:
        ranked = rank(recording, cost, batch_size, eos_token_ids=eos_token_ids, on_setting=bar.update)
    return [Arm("likelihood", setting) for setting, _ in ranked[:count]]


def cost_of(arms: Sequence[LLM]) -> CostModel:
    """The profile that the arms' policies use. Raises ConfigError if none has one."""
    found: Any = next((arm.policy.cost for arm in arms if hasattr(arm.policy, "cost")), None)
    if not isinstance(found, CostModel):
        raise ConfigError("--tune-likelihood needs a policy with a cost model: add smart to the policies")
    return found
