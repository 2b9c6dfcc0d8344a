"""Draws on a GPU, where the logits lie: the noise, the processors and the cuts of noise.py,
processors.py and drawing.py in torch. Only tokens go to the host.

The noise has the same bits: it is integer arithmetic, and int64 wraps as uint64 does. The CPU's
draws are the reference; sums round differently here, so that a near-tie can fall the other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smart_decoding.models.drawing import LOWEST, min_p_distance
from smart_decoding.models.noise import BITS, noise_key
from smart_decoding.models.processors import edits_of
from smart_decoding.models.rows import upload

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.engine.sampling_params import SamplingParams

_STEP = 0x9E3779B97F4A7C15 - 2**64  # SplitMix64's constants, as int64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def uniform_bits(key: Tensor, token: Tensor) -> Tensor:
    """noise.uniform_bits of int64 keys and tokens, broadcast."""
    z = token * _STEP + (key + _STEP)
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return _shifted(z ^ _shifted(z, 31), 64 - BITS)


def _shifted(z: Tensor, by: int) -> Tensor:
    """z >> by of unsigned numbers."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def gumbel(key: Tensor, token: Tensor) -> Tensor:
    """noise.gumbel of int64 keys and tokens, broadcast: float32."""
    uniform = (uniform_bits(key, token).double() + 0.5) * 0.5**BITS
    return (-(-uniform.log()).log()).float()


def first_maximum(scores: Tensor) -> Tensor:
    """[rows] lowest id of each row's maximum; -1 where that is not finite."""
    best = scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[-1], device=scores.device)
    first = torch.where(scores == best, ids, scores.shape[-1]).amin(-1)
    return torch.where(best[:, 0].isfinite(), first, -1)


def draw(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """[rows] the tokens of rows of raw logits [rows, vocab] float32, each by its own spec; -1 where
    a row has no finite maximum."""
    scores = process(logits, specs)
    top = first_maximum(scores)
    params = [spec.params for spec in specs]
    if all(p.greedy for p in params):
        return top
    numbers = np.array(
        [
            [1.0 if p.greedy else p.temperature for p in params],
            [min_p_distance(p) for p in params],
            [p.top_p for p in params],
        ]
    )
    keys = noise_key(*np.array([(s.seed, s.sample, s.position) for s in specs]).T)
    drawn = np.array([not p.greedy for p in params])
    ranks = np.array([p.top_k if 0 < p.top_k < scores.shape[1] else 0 for p in params])
    columns = (*numbers.view(np.int64), keys.view(np.int64), drawn, ranks)
    whole = upload(np.stack(columns), top.device)
    temperature, distance, top_p = whole[:3].view(torch.float64)[..., None]
    key, is_drawn, rank = whole[3:][..., None]
    perturbed = (scores / temperature.float()).double() + gumbel(
        key, torch.arange(scores.shape[1], device=scores.device)
    )
    floor = scores.amax(-1, keepdim=True) + distance
    if ranks.any() or (numbers[2] < 1).any():
        floor = floor.maximum(_cut(scores, temperature, rank, top_p))
    perturbed = perturbed.masked_fill(scores < floor.clamp(min=LOWEST).float(), -torch.inf)
    token = torch.where(is_drawn[:, 0] > 0, first_maximum(perturbed), top)
    return torch.where(top < 0, -1, token)


def _cut(scores: Tensor, temperature: Tensor, rank: Tensor, top_p: Tensor) -> Tensor:
    """[rows, 1] the lowest score that top-k and top-p leave; what ties with it stays."""
    ordered = scores.sort(-1, descending=True).values
    floor = torch.where(rank > 0, ordered.gather(1, (rank - 1).clamp(min=0)), LOWEST)
    mass = ((ordered - ordered[:, :1]) / temperature.float()).exp().double()
    mass = mass.masked_fill(ordered < floor, 0.0).cumsum(-1)
    above = torch.cat((torch.zeros_like(top_p), mass[:, :-1]), -1)
    kept = (above < top_p * mass[:, -1:]).sum(-1, keepdim=True)
    nucleus = ordered.gather(1, (kept - 1).clamp(min=0))
    return floor.maximum(torch.where(top_p < 1, nucleus, LOWEST))


def process(logits: Tensor, specs: Sequence[SampleSpec]) -> Tensor:
    """[rows, vocab] logits as processors.process changes them, each row by its own spec."""
    rows = [(i, s.params, edits_of(s)) for i, s in enumerate(specs) if s.params.changes_logits]
    if not rows:
        return logits
    scores = logits.clone()
    added = [(i, *edits.added) for i, _, edits in rows if edits.added is not None]
    if added:
        at, numbers = _listed(added, scores)
        scores.view(-1)[at] += numbers
    penalised = [
        (i, *_penalties(*edits.penalised, params))
        for i, params, edits in rows
        if edits.penalised is not None
    ]
    if penalised:
        at, repetition, frequency, presence = _listed(penalised, scores)
        old = scores.view(-1)[at]
        new = torch.where(old > 0, old / repetition, old * repetition)
        scores.view(-1)[at] = new - frequency - presence
    forbidden = [(i, edits.forbidden) for i, _, edits in rows if len(edits.forbidden)]
    if forbidden:
        scores.view(-1)[_listed(forbidden, scores)[0]] = -torch.inf
    bound = [(i, allowed) for i, _, edits in rows for allowed in edits.allowed]
    if bound:
        masks = np.zeros(logits.shape, np.bool_)
        for i, allowed in bound:
            others = np.ones(logits.shape[1], np.bool_)
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
