"""`python -m smart_lab bench --record FILE`: the prompts' wide drafts, and what a replay needs of
the machine.

Needed by `bench --record` and the tuning of `bench`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from smart_decoding.bench.options import Arm
from smart_decoding.bench.runner import encode
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.smart import Smart
from smart_decoding.drafters.union import UnionDrafter
from smart_decoding.measuring.tasks import load_task
from smart_lab.options import LabOptions, command_of, loaded
from smart_lab.provenance import provenance
from smart_lab.recording import Recording, Wide, record
from smart_lab.replay import HostCosts
from smart_lab.trace import Trace

if TYPE_CHECKING:
    from smart_decoding.bench.blocks import Prompt
    from smart_decoding.engine.engine import Engine
    from smart_decoding.llm import LLM

AT_ONCE = 4  # prompts
HOST_TOKENS, HOST_TURNS = 32, 5


def record_trace(options: LabOptions) -> Trace:
    """Records all prompts that `options` names, and what rounds cost here beyond their forwards.

    Raises what LLM raises."""
    texts = {
        task: load_task(task, options.skip + options.limit)[options.skip :]
        for task in options.tasks
    }
    llm = loaded(options)
    arm = llm.sharing_weights(options.speculation(Arm("smart")))
    policy = arm.policy
    prior, prompts = prior_of(policy), encode(llm, texts, options)
    recording = record_wide(arm, prompts)
    plain = llm.sharing_weights(False)
    host = measure_host(
        plain.engine, arm.engine, [p for of_task in prompts.values() for p in of_task][:8]
    )
    origin = (llm.provenance, arm.speculation.description, llm.target.plain_torch)
    about = {
        "provenance": provenance(command_of(options), options.seed, *origin),
        "dtype": options.dtype,
        "temperature": options.temperature,
    }
    return Trace(
        recording, about, tuple(llm.target.eos_token_ids), arm.speculation.cost, host, prior
    )


def prior_of(policy: Any) -> dict[str, Any] | None:
    """Return what `smart` starts from, as a recording keeps it; None for another policy."""
    if not isinstance(policy, Smart):
        return None
    return {
        "calibration": policy.state.calibration.state_dict(),
        "forecast": policy.state.forecast.state_dict(),
    }


def record_wide(
    arm: LLM,
    prompts: Mapping[str, Sequence[Prompt]],
    late: Callable[[], bool] = lambda: False,
) -> Recording:
    """Records the prompts' trees with `arm`'s drafter, of a union its model's, tasks mixed; the
    arm's policy and drafter are as before afterwards. late: whether to begin no more prompts."""
    engine = arm.engine
    policy, engine.policy = engine.policy, Wide()
    drafter = engine.drafter
    if isinstance(drafter, UnionDrafter) and drafter.model is not None:
        engine.listen(drafter.model)
    try:
        longest = max((len(of_task) for of_task in prompts.values()), default=0)
        mixed = [
            of_task[i] for i in range(longest) for of_task in prompts.values() if i < len(of_task)
        ]
        with tqdm(total=len(mixed), desc="recording for replay", unit="prompt", leave=False) as bar:
            return record(engine, mixed, AT_ONCE, bar.update, late)
    finally:
        engine.policy = policy
        if drafter is not None:
            engine.listen(drafter)


def measure_host(
    plain: Engine,
    drafting: Engine,
    prompts: Sequence[Prompt],
    late: Callable[[], bool] = lambda: False,
) -> HostCosts:
    """Time rounds of plain decoding and of a small tree, alone and together, in turn; policies
    stay as they were. late: whether to begin no more turns."""
    policies = plain.policy, drafting.policy
    counts = sorted({1, min(len(prompts), plain.config.max_num_seqs)})
    found: dict[tuple[bool, int], list[float]] = {
        (drafts, count): [] for count in counts for drafts in (False, True)
    }
    try:
        for turn in range(HOST_TURNS):
            if turn and late():
                break
            for count in counts:
                found[False, count] += _beyond(plain, prompts[:count], make_policy("off"))
                found[True, count] += _beyond(
                    drafting, prompts[:count], make_policy("eagle2", depth=1, top_k=2)
                )
    finally:
        plain.policy, drafting.policy = policies
    seconds = {key: float(np.median(rounds)) if rounds else 0.0 for key, rounds in found.items()}
    return fit_host({count: (seconds[False, count], seconds[True, count]) for count in counts})


def fit_host(seconds: Mapping[int, tuple[float, float]]) -> HostCosts:
    """Fit {batch size: (seconds of a plain round, of a drafting one)} at the least and the greatest
    batch size."""
    low, high = min(seconds), max(seconds)

    def line(values: Mapping[int, float]) -> tuple[float, float]:
        slope = max(0.0, (values[high] - values[low]) / (high - low)) if high > low else 0.0
        return max(0.0, values[low] - slope * low), slope

    plain = line({size: both[0] for size, both in seconds.items()})
    return HostCosts(*plain, *line({size: both[1] - both[0] for size, both in seconds.items()}))


class _Timed:
    """A policy whose own seconds are added up."""

    def __init__(self, policy: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._policy, self._clock, self.name, self.seconds = policy, clock, policy.name, 0.0

    def __getattr__(self, call: str) -> Any:
        def timed(*arguments: Any) -> Any:
            start = self._clock()
            result = getattr(self._policy, call)(*arguments)
            self.seconds += self._clock() - start
            return result

        return timed


def _beyond(engine: Engine, prompts: Sequence[Prompt], policy: Any) -> list[float]:
    """Return seconds that each decoding round of all `prompts` takes beyond its forwards and the
    policy."""
    found: list[float] = []
    engine.policy = timed = _Timed(policy)
    for prompt in prompts:
        engine.add_request(
            f"host-{prompt.index}", prompt.tokens, replace(prompt.params, max_tokens=HOST_TOKENS)
        )
    while engine.has_unfinished_requests:
        own = timed.seconds
        engine.step()
        done = engine.last_round
        if (
            done is not None
            and done.round.batch.size == len(prompts)
            and not done.round.batch.prefill_rows
        ):
            found.append(
                done.seconds - done.draft_seconds - done.verify_seconds - (timed.seconds - own)
            )
    return found
