"""The strongest `likelihood` settings for a batch size: ranked by replay on prompts that the benchmark does not use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tqdm import tqdm

from smart_decoding.bench.options import Arm, BenchOptions
from smart_decoding.bench.sweep import Sweep
from smart_decoding.core.cost import CostModel
from smart_decoding.errors import ConfigError
from smart_decoding.llm import LLM

PER_TASK = 8  # prompts, or more where large batches need them


def prompts_needed(options: BenchOptions) -> int:
    """Tuning prompts per task: enough to keep the largest batch full for a while."""
    return max(PER_TASK, -(-2 * max(options.batch_sizes) // len(options.tasks)))


def best_likelihood(sweep: Sweep, cost: CostModel, batch_size: int, count: int) -> list[Arm]:
    """The `count` settings of `likelihood` that are fastest in the replay at `batch_size`."""
    with tqdm(total=len(sweep.settings), desc="replaying settings", unit="setting", leave=False) as bar:
        ranked = sweep.rank(cost, batch_size, on_setting=bar.update)
    return [Arm("likelihood", setting) for setting, _ in ranked[:count]]


def cost_of(arms: Sequence[LLM]) -> CostModel:
    """The profile that the arms' policies use. Raises ConfigError if none has one."""
    found: Any = next((arm.policy.cost for arm in arms if hasattr(arm.policy, "cost")), None)
    if not isinstance(found, CostModel):
        raise ConfigError("--tune-likelihood needs a policy with a cost model: add smart to the policies")
    return found
