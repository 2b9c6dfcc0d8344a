"""The costs by which vLLM's `enable_adaptive_verification` sizes its draft budget, as ours.

vLLM times steps of one token for each sequence at start-up, every sequence with a context of 8,192
tokens, and prices a draft like such a sequence for good. A draft shares its sequence's context.
Here attention is told apart by a second context at start-up, charged for the contexts that the
batch really has, and all of it is corrected by the times of real steps. vLLM's own scan over the
costs then finds the budget.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from smart_decoding.core.cost import DEFAULT_DRAFT, CostModel
from smart_decoding.core.cost_fit import LEAST, VerifySample
from smart_decoding.core.curve import Curve
from smart_decoding.errors import ConfigError
from smart_decoding.integrations.vllm.options import refuse_missing
from smart_decoding.integrations.vllm.seams import VERIFICATION, missing

if TYPE_CHECKING:
    from smart_decoding.core.tree import FloatArray

SIZES = 4  # step sizes that are timed with a short context too
REPLAYS = 5  # of each, as vLLM does
SHORTER = 8  # times shorter
PUBLISH_EVERY = 16  # steps after which all ranks take what the first one has learned
WITHOUT = "unset SMART_VLLM_VERIFICATION to start without it"
PENDING = 8  # steps that may wait for their times


class Sample(Protocol):
    """vLLM's StepTimingSample."""

    forward_ms: float
    drafter_ms: float
    num_target_tokens: int
    num_reqs: int


class Slopes(NamedTuple):
    """Milliseconds per token of context and sequence, of one forward of each model."""

    draft: float
    verify: float


NO_SLOPES = Slopes(0.0, 0.0)


def fit_slopes(long: Sequence[Sample], short: Sequence[Sample], contexts: int) -> Slopes:
    """From steps of the same sizes at two contexts, `contexts` tokens apart: medians by size, least
    squares through zero."""
    sizes = {sample.num_target_tokens: sample.num_reqs for sample in short}
    weights = np.array(list(sizes.values()), np.float64) * contexts

    def slope(milliseconds: Callable[[Sample], float]) -> float:
        def medians(samples: Sequence[Sample]) -> FloatArray:
            of = [[milliseconds(s) for s in samples if s.num_target_tokens == n] for n in sizes]
            return np.array([float(np.median(times)) for times in of])

        return max(float((medians(long) - medians(short)) @ weights / (weights @ weights)), 0.0)

    return Slopes(slope(lambda s: s.drafter_ms), slope(lambda s: s.forward_ms))


def without_context(samples: Sequence[Any], slopes: Slopes, context: int) -> list[Any]:
    """What the samples, dataclasses of `context` tokens a sequence, would have taken without."""

    def rest(milliseconds: float, attention: float) -> float:
        return max(milliseconds - attention, LEAST * milliseconds)

    tokens = [context * sample.num_reqs for sample in samples]
    return [
        replace(
            sample,
            forward_ms=rest(sample.forward_ms, slopes.verify * count),
            drafter_ms=rest(sample.drafter_ms, slopes.draft * count),
        )
        for sample, count in zip(samples, tokens, strict=True)
    ]


def cost_model(tables: tuple[FloatArray, FloatArray], slopes: Slopes) -> CostModel:
    """Of whole steps: rows are tokens, batches sequences. tables: vLLM's without context,
    milliseconds of a draft by sequences and of a verification by tokens."""
    draft, verify = tables
    most = len(draft) - 1
    tokens = tuple(range(len(verify)))
    batches = sorted({min(2**i, most) for i in range(most.bit_length() + 1)})
    seconds = {batch: (verify + draft[batch]) / 1e3 for batch in batches}
    curves = {batch: Curve(tokens, tuple(table.tolist())) for batch, table in seconds.items()}
    return CostModel(curves, DEFAULT_DRAFT, sequence_token=sum(slopes) / 1e3)


class _Step(NamedTuple):
    """sequences, tokens, mean context."""

    batch: int
    tokens: int
    context: float


class SmartVerification:
    """What ours adds to vLLM's AdaptiveVerificationManager, next in the order of methods."""

    cost_tables: tuple[FloatArray, FloatArray]
    req_states: Any

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._timed = 0, 0  # steps at start-up: vLLM's, and ours
        self._context = 0  # tokens of each sequence in the former
        self._known: CostModel | None = None  # the same on all ranks
        self._learned: CostModel | None = None
        self._step: _Step | None = None  # under way
        self._start: Any = None
        self._pending: deque[tuple[_Step, Any, Any]] = deque(maxlen=PENDING)
        self._steps = 0

    def batches_to_profile(self, capture_sizes: list[int]) -> Iterator[dict[str, int]]:
        """vLLM's, then some of them with a shorter context."""
        batches = list(super().batches_to_profile(capture_sizes))  # type: ignore[misc]
        if not batches or "context_len" not in batches[0]:
            raise ConfigError(f"vLLM's batches_to_profile gives no context_len; {WITHOUT}")
        self._context = min(batches[0]["context_len"], self.req_states.max_model_len)
        short = {**batches[0], "context_len": max(self._context // SHORTER, 1)}
        ours = [{**short, "num_tokens": n} for n in _spread(capture_sizes) for _ in range(REPLAYS)]
        self._timed = len(batches), len(ours)
        yield from batches
        yield from ours

    def set_initial_cost_curves(self, samples: list[Any]) -> None:
        """vLLM's tables, and ours from them."""
        theirs, ours = self._timed
        if len(samples) != theirs + ours:
            raise ConfigError(f"vLLM timed {len(samples)} steps of {theirs + ours}; {WITHOUT}")
        longer = self._context - max(self._context // SHORTER, 1)
        slopes = fit_slopes(samples[:theirs], samples[theirs:], longer) if longer else NO_SLOPES
        slopes = _from_first_rank(slopes)
        plain = without_context(samples[:theirs], slopes, self._context)
        super().set_initial_cost_curves(plain)  # type: ignore[misc]
        self._known = cost_model(self.cost_tables, slopes)
        self._learned = self._known

    def get_num_tokens(
        self, num_tokens_per_req: dict[str, int], draft_tokens: dict[str, list[int]]
    ) -> int:
        """vLLM's scan, over what each budget costs now."""
        self._learn()
        step, drafts = self._describe(num_tokens_per_req, draft_tokens)
        self.cost_tables = self._tables(step, drafts)
        tokens = super().get_num_tokens(num_tokens_per_req, draft_tokens)  # type: ignore[misc]
        decoding = step.tokens == step.batch  # prompts cost otherwise
        self._step = step._replace(tokens=tokens) if decoding else None
        return int(tokens)

    def reallocate_drafts(self, req_ids: list[str], idx_mapping: Any) -> Any:
        """vLLM's, called where the device is about to begin the step."""
        if self._step is not None:
            self._start = _event()
            self._start.record()
        return super().reallocate_drafts(req_ids, idx_mapping)  # type: ignore[misc]

    def record_confidences(self, confidence_probs: Any, input_batch: Any) -> None:
        """vLLM's, called where the step has verified and drafted."""
        super().record_confidences(confidence_probs, input_batch)  # type: ignore[misc]
        if self._step is not None and self._start is not None:
            end = _event()
            end.record()
            self._pending.append((self._step, self._start, end))
        self._step = None
        self._start = None

    def _describe(
        self, num_tokens_per_req: Mapping[str, int], draft_tokens: Mapping[str, list[int]]
    ) -> tuple[_Step, int]:
        """The step without drafts, and how many there are."""
        drafts = sum(map(len, draft_tokens.values()))
        slots = [self.req_states.req_id_to_index[id_] for id_ in num_tokens_per_req]
        context = float(self.req_states.num_computed_tokens_np[slots].mean())
        total = sum(num_tokens_per_req.values())
        return _Step(len(slots), total - drafts, context), drafts

    def _tables(self, step: _Step, drafts: int) -> tuple[FloatArray, FloatArray]:
        """As vLLM looks costs up: by sequences and by tokens, added. All is in the latter."""
        assert self._known is not None
        seconds = self._known.verify_curve(step.batch, step.tokens, drafts + 1, step.context)
        table = np.full(step.tokens + drafts + 1, math.nan)
        table[step.tokens :] = 1e3 * seconds
        return np.zeros(step.batch + 1), table

    def _learn(self) -> None:
        """From the steps that have ended; nothing is waited for."""
        assert self._learned is not None
        while self._pending and self._pending[0][2].query():
            step, start, end = self._pending.popleft()
            seconds = start.elapsed_time(end) / 1e3
            sample = VerifySample(step.batch, step.tokens, step.context, seconds)
            self._learned = self._learned.corrected(sample)
        self._steps += 1
        if self._steps % PUBLISH_EVERY == 0:
            correction = _from_first_rank(self._learned.verify_correction)
            self._known = replace(self._learned, verify_correction=correction)


def install() -> None:
    """Puts our manager in the place of vLLM's, in this process; once is enough.

    Raises ConfigError if this vLLM lacks a name that is relied on."""
    import vllm

    refuse_missing(vllm.__version__, "SMART_VLLM_VERIFICATION", missing(VERIFICATION), WITHOUT)
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification as place

    theirs = place.AdaptiveVerificationManager
    if issubclass(theirs, SmartVerification):
        return
    ours = type("SmartVerificationManager", (SmartVerification, theirs), {})
    place.AdaptiveVerificationManager = ours


def _from_first_rank(value: Any) -> Any:
    """What the first of the tensor-parallel ranks says: all must choose alike."""
    from vllm.v1.worker.gpu.spec_decode.adaptive_verification import get_tp_group

    return get_tp_group().broadcast_object(value, src=0)


def _event() -> Any:
    """A CUDA event that keeps the time."""
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _spread(sizes: Sequence[int]) -> list[int]:
    """SIZES of them, evenly by rank, the largest included."""
    ordered = sorted(set(sizes))
    count = min(SIZES, len(ordered))
    return [ordered[(i + 1) * len(ordered) // count - 1] for i in range(count)]
