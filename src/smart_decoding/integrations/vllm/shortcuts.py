"""Steps without drafts, without what vLLM does for drafts in every step with a drafter.

With a --speculative-config vLLM sends all logits through its rejection sampler, drafts or none: it
copies them and runs some twenty small operations. Without drafts its plain sampler gives the same
tokens; that is what is called then. And a draft model or head runs its first pass at every step,
also where no token is to be drafted; where the scheduler asks for DISABLED tokens, it runs none. If
such a step verifies no drafts either, the model runner takes it without its speculative config,
exactly as plain vLLM does: what it prepares for drafts costs some 0.5 ms. All this holds in the
process that `install` is called in: the scheduler's, which is the worker's, too, where there is one
rank; ranks.py calls it in those of several.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from smart_decoding.integrations.disabling import DISABLED

_seen: list[bool] = []


def drafter_seen() -> bool:
    """Whether a draft model has run in this process through what is installed here.

    Only then is DISABLED understood."""
    return bool(_seen)


@functools.cache
def install() -> None:
    """Once per process."""
    _shorten_sampling()
    _shorten_drafting()
    _shorten_steps()


def replace(owner: Any, name: str, ours: Callable[..., Any]) -> None:
    """Puts `ours` in the place of a method, which it gets first; once per process."""
    original = getattr(owner, name)
    if getattr(original, "_shortcut", False):
        return

    @functools.wraps(original)
    def shortcut(*args: Any, **named: Any) -> Any:
        return ours(original, *args, **named)

    shortcut._shortcut = True  # type: ignore[attr-defined]
    setattr(owner, name, shortcut)


def _shorten_sampling() -> None:
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    def forward(
        original: Any,
        self: Any,
        metadata: Any,
        draft_probs: Any,
        logits: Any,
        sampling_metadata: Any,
    ) -> Any:
        if any(metadata.num_draft_tokens) or len(logits) != len(metadata.num_draft_tokens):
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        # As the rejection sampler calls it: a thinking budget finds its row by that.
        return self.sampler(
            logits=logits, sampling_metadata=sampling_metadata, predict_bonus_token=True
        )

    replace(RejectionSampler, "forward", forward)


def _shorten_drafting() -> None:
    import torch
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    def propose(
        original: Any, self: Any, num_speculative_tokens: int, *args: Any, **named: Any
    ) -> Any:
        if num_speculative_tokens != DISABLED:
            _seen[:] = [True]
            return original(self, num_speculative_tokens, *args, **named)
        self._last_draft_probs = None
        sequences = named["next_token_ids"]
        return sequences.new_empty((len(sequences), 0), dtype=torch.int64)

    replace(SpecDecodeBaseProposer, "propose", propose)


def _shorten_steps() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    def execute_model(
        original: Any, self: Any, scheduler_output: Any, *args: Any, **named: Any
    ) -> Any:
        with _plain(self, scheduler_output):
            return original(self, scheduler_output, *args, **named)

    def sample_tokens(original: Any, self: Any, *args: Any, **named: Any) -> Any:
        state = self.execute_model_state
        with _plain(self, state and state.scheduler_output):
            return original(self, *args, **named)

    replace(GPUModelRunner, "execute_model", execute_model)
    replace(GPUModelRunner, "sample_tokens", sample_tokens)


@contextmanager
def _plain(runner: Any, step: Any) -> Iterator[None]:
    """The model runner without its speculative config, if `step` neither verifies nor drafts.

    All stays as it is in asynchronous scheduling, where the next step's inputs are made from what
    is prepared for drafts; with recurrent layers, which find their state by how many drafts were
    accepted before; and with a thinking budget, which counts rows as the rejection sampler does."""
    skipped = step is not None and step.num_spec_tokens_to_schedule == DISABLED
    budgets = runner.input_batch.thinking_budget_state_holder is not None
    special = runner.use_async_scheduling or runner.model_config.is_hybrid or budgets
    if not skipped or step.scheduled_spec_decode_tokens or special:
        yield
        return
    config = runner.speculative_config
    runner.speculative_config = None
    try:
        yield
    finally:
        runner.speculative_config = config
