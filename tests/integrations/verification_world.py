"""A device on paper for vLLM's adaptive verification: what steps take, a stand-in for its manager.

Milliseconds are Llama-3.1-8B's in bf16 on an H100, by its data sheet, at 60 % of the arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np

WEIGHTS, TOKEN = 4.8, 0.027  # of one forward: reading weights, arithmetic of a token
CONTEXT = 3.9e-5  # reading the keys and values of one token
SIZES = [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]  # captured, as by vLLM's default
MOST, LONGEST = 256, 4  # sequences, drafts of one


@dataclass(frozen=True)
class Timing:
    """vLLM's StepTimingSample."""

    forward_ms: float
    drafter_ms: float
    num_target_tokens: int
    num_reqs: int
    full_cudagraph: bool


@dataclass
class Device:
    """now: milliseconds since the start. beside: those of each step beside its forwards."""

    now: float = 0.0
    beside: float = 0.6

    def forward(self, tokens: int, sequences: int, context: float) -> float:
        return max(WEIGHTS, TOKEN * tokens) + CONTEXT * sequences * context

    def draft(self, sequences: int, context: float) -> float:
        return 0.5 + 0.01 * sequences + CONTEXT / 32 * sequences * context

    def timed(self, num_tokens: int, context_len: int) -> Timing:
        sequences = min(num_tokens, MOST)
        return Timing(
            forward_ms=self.forward(num_tokens, sequences, context_len),
            drafter_ms=self.draft(sequences, context_len),
            num_target_tokens=num_tokens,
            num_reqs=sequences,
            full_cudagraph=True,
        )

    def event(self) -> Any:
        return Event(self)


class Event:
    """A CUDA event; `record` may be given a stream."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.at = 0.0

    def record(self, *stream: Any) -> None:
        self.at = self.device.now

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def requests() -> Any:
    """vLLM's RequestState, as far as it is read."""
    import torch

    return SimpleNamespace(
        max_num_reqs=MOST,
        max_num_batched_tokens=2048,
        max_model_len=131072,
        num_speculative_steps=LONGEST,
        device=torch.device("cpu"),
        req_id_to_index={str(i): i for i in range(MOST)},
        num_computed_tokens_np=np.zeros(MOST, np.int32),
        prefill_len=SimpleNamespace(np=np.zeros(MOST, np.int32)),
    )


class Manager:
    """Stands for vLLM's AdaptiveVerificationManager: its signatures, tables and scan."""

    def __init__(self, req_states: Any) -> None:
        self.req_states = req_states
        self.cost_tables: Any = None
        self.probs = np.ones((MOST, LONGEST))

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        for size in [*capture_sizes, 1024, 2048]:
            for _ in range(5):
                yield {"num_tokens": size, "context_len": 8192}

    def set_initial_cost_curves(self, samples: list[Any]) -> None:
        tokens = np.arange(self.req_states.max_num_batched_tokens + 1)
        sizes = [s.num_target_tokens for s in samples]
        verify = np.interp(tokens, sizes, [s.forward_ms for s in samples])
        small = [s for s in samples if s.num_target_tokens <= MOST]
        sequences = [s.num_reqs for s in small]
        draft = np.interp(np.arange(MOST + 1), sequences, [s.drafter_ms for s in small])
        self.cost_tables = draft, verify

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        batch = len(num_tokens_per_req)
        drafts = sum(map(len, draft_tokens.values()))
        plain = sum(num_tokens_per_req.values()) - drafts
        gains = -np.sort(-self.probs[:batch].cumprod(1).ravel())[:drafts]
        tokens = batch + np.concatenate(([0.0], gains.cumsum()))
        draft, verify = self.cost_tables
        return plain + int(np.argmax(tokens / (draft[batch] + verify[plain : plain + drafts + 1])))

    def reallocate_drafts(self, req_ids: list[str], idx_mapping: Any) -> Any:
        return req_ids

    def record_confidences(self, confidence_probs: Any, input_batch: Any) -> None:
        self.probs[: len(confidence_probs)] = confidence_probs


def start(manager: Any, device: Device) -> None:
    """Profiles, as vLLM does before it serves."""
    batches = manager.batches_to_profile(SIZES)
    manager.set_initial_cost_curves([device.timed(**batch) for batch in batches])


def run(
    manager: Any, device: Device, batch: int, context: int, chance: float, steps: int
) -> tuple[float, int]:
    """(tokens per second, drafts of the last step): `batch` sequences whose drafts are accepted
    with `chance` at every depth, as their confidences say."""
    import torch

    names = [str(i) for i in range(batch)]
    manager.req_states.num_computed_tokens_np[:batch] = context
    survival = np.sort(np.full((batch, LONGEST), chance).cumprod(1).ravel())[::-1]
    probs = torch.full((batch, LONGEST), chance)
    mapping = torch.arange(batch)
    tokens = 0.0
    begin = device.now
    for _ in range(steps):
        drafts = {name: [-1] * LONGEST for name in names}
        verified = manager.get_num_tokens(dict.fromkeys(names, 1 + LONGEST), drafts)
        manager.reallocate_drafts(names, mapping)
        device.now += device.forward(verified, batch, context) + device.draft(batch, context)
        device.now += device.beside
        manager.record_confidences(probs, SimpleNamespace(num_reqs=batch, idx_mapping=mapping))
        tokens += batch + float(survival[: verified - batch].sum())
    return 1e3 * tokens / (device.now - begin), verified - batch
