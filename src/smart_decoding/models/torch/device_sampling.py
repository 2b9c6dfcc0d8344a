"""Draws on a GPU, where the logits lie: the processors of processors.py in torch, the rest, noise,
cuts and maxima, in one kernel for all rows (triton_sampling.py). Only tokens go to the host.

The CPU's draws are the reference; sums round differently here, so that a near-tie can fall the
other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smart_decoding.models.sampling.noise import noise_key
from smart_decoding.models.sampling.processors import edits_of, min_p_distance
from smart_decoding.models.torch.rows import upload

PART = 1024  # of a row of a drafter's logits, in one program

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.engine.sampling_params import SamplingParams


def draw(logits: Tensor, which: NDArray[np.int64], specs: Sequence[SampleSpec]) -> Tensor:
    """[len(which)] int32 tokens of the rows `which` of raw logits [rows, vocab], each by its own
    spec; -1 where a row has no finite maximum."""
    params = [spec.params for spec in specs]
    if any(p.changes_logits for p in params):
        logits = process(logits[upload(which, logits.device)].float(), specs)
        which = np.arange(len(which))
    if all(p.greedy for p in params):
        return _launch(logits, which[None])
    numbers = np.array([(p.temperature, min_p_distance(p), p.top_p) for p in params])
    keys = noise_key(*np.array([(s.seed, s.sample, s.position) for s in specs]).T)
    ranks = [p.top_k if 0 < p.top_k < logits.shape[1] else 0 for p in params]
    return _launch(logits, np.stack((which, *numbers.view(np.int64).T, keys.view(np.int64), ranks)))


def maxima(logits: Tensor) -> Tensor:
    """[rows] int32: the most likely token of each row, as `draw`."""
    return _launch(logits, None)


def _launch(logits: Tensor, settings: NDArray[np.int64] | None) -> Tensor:
    """settings: [1 or 6, rows] the rows; their temperature (0: greedy), distance of min-p and top-p
    as float64, key of the noise, and top-k (0: all)."""
    from smart_decoding.models.torch import triton_sampling as kernels

    count = len(logits) if settings is None else settings.shape[1]
    out = logits.new_empty(count, dtype=torch.int32)
    kernels.draw[(count,)](
        logits,
        None if settings is None else upload(settings, logits.device),
        out,
        count,
        logits.stride(0),
        logits.shape[1],
        drawn=settings is not None and len(settings) > 1,
        num_warps=8,
    )
    return out


def perturbed(logits: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
    """[rows, n] float32 logits of `tokens` [n] times each row's factor, plus the noise that the
    target will draw those tokens with (key 0: none). noise: `ranking.packed_noise`."""
    from smart_decoding.models.torch import triton_sampling as kernels

    rows, n = logits.shape
    out = logits.new_empty(rows, n, dtype=torch.float32)
    kernels.perturb[(rows, -(-n // PART))](logits, tokens, noise, out, rows, n, block=PART)
    return out


def process(scores: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """[rows, vocab] scores, changed in place as processors.process says, each row by its own
    spec."""
    rows = [(i, s.params, edits_of(s)) for i, s in enumerate(specs) if s.params.changes_logits]
    flat = scores.view(-1)
    added = [(i, *edits.added) for i, _, edits in rows if edits.added is not None]
    if added:
        at, numbers = _listed(added, scores)
        flat[at] += numbers
    penalised = [
        (i, *_penalties(*edits.penalised, params))
        for i, params, edits in rows
        if edits.penalised is not None
    ]
    if penalised:
        at, repetition, frequency, presence = _listed(penalised, scores)
        old = flat[at]
        new = torch.where(old > 0, old / repetition, old * repetition)
        flat[at] = new - frequency - presence
    forbidden = [(i, edits.forbidden) for i, _, edits in rows if len(edits.forbidden)]
    if forbidden:
        flat[_listed(forbidden, scores)[0]] = -torch.inf
    bound = [(i, allowed) for i, _, edits in rows for allowed in edits.allowed]
    if bound:
        masks = np.zeros(scores.shape, np.bool_)
        for i, allowed in bound:
            others = np.ones(scores.shape[1], np.bool_)
            others[allowed] = False
            masks[i] |= others
        scores.masked_fill_(upload(masks, scores.device), -torch.inf)
    return scores


def _penalties(
    tokens: NDArray[Any], counts: NDArray[Any], params: SamplingParams
) -> tuple[NDArray[Any], ...]:
    """Tokens, and for each by what it is divided or multiplied, and what is subtracted."""
    frequency = np.float32(params.frequency_penalty) * counts.astype(np.float32)
    presence = np.float32(params.presence_penalty) * (counts > 0).astype(np.float32)
    return tokens, np.full(len(tokens), params.repetition_penalty), frequency, presence


def _listed(parts: Sequence[tuple[Any, ...]], scores: Tensor) -> list[Tensor]:
    """Places in the flat scores of (row, tokens, numbers, ...), and float32 tensors of each of the
    numbers, by one transfer."""
    row, tokens, *numbers = zip(*parts, strict=True)
    width = scores.shape[1]
    at = [i * width + np.asarray(ids, np.int64) for i, ids in zip(row, tokens, strict=True)]
    floats = [np.concatenate(of).astype(np.float32).view(np.int32) for of in numbers]
    whole = upload(np.stack((np.concatenate(at), *floats)), scores.device)
    return [whole[0], *(part.int().view(torch.float32) for part in whole[1:])]
