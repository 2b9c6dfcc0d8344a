"""Logit processors: bias, minimum length, penalties, masks and grammar on one row, with that row's
own history."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.engine.sampling_params import SamplingParams

FloatRow = NDArray[np.float32]
Ids = NDArray[np.int64]


class Edits(NamedTuple):
    """What a row's processors do, for all devices: numbers are added to scores, tokens penalised,
    then forbidden. Each is None, or empty, where there is nothing to do.

    added: ids, and numbers. penalised: ids, and how often each is in the output. forbidden: ids.
    allowed: ids or masks [vocab]; what one of them leaves out is forbidden, too."""

    added: tuple[Ids, FloatRow] | None
    penalised: tuple[Ids, NDArray[np.int32]] | None
    forbidden: Ids
    allowed: list[NDArray[Any]]


def edits_of(spec: SampleSpec) -> Edits:
    """Bias, penalties, minimum length, masks and grammar of a row."""
    params = spec.params
    forbidden: list[ArrayLike] = []
    if spec.position < params.min_tokens:
        forbidden += [list(spec.eos_ids), params.stop_array]
    words = params.bad_words_token_ids or ()
    forbidden.append([word[-1] for word in words if spec.ends_with(word[:-1])])
    allowed: list[NDArray[Any]] = []
    if params.allowed_token_ids is not None:
        allowed.append(params.allowed_array)
    if spec.constraint is not None:
        allowed.append(spec.constraint.allowed(spec.path))
    if params.needs_history and spec.history is None:
        raise ValueError("a penalty is on: SampleSpec.history is needed")
    return Edits(
        (params.bias_ids, params.bias_values) if params.logit_bias else None,
        spec.history.at(spec.path) if params.needs_history and spec.history else None,
        np.concatenate([np.asarray(ids, np.int64) for ids in forbidden]),
        allowed,
    )


def process(row: FloatRow, spec: SampleSpec) -> FloatRow:
    """[vocab] logits with the edits made; `row` itself is not changed."""
    if not spec.params.changes_logits:
        return row
    row = row.copy()
    edits = edits_of(spec)
    if edits.added is not None:
        ids, numbers = edits.added
        row[ids] += numbers
    if edits.penalised is not None:
        _penalise(row, *edits.penalised, spec.params)
    row[edits.forbidden] = -np.inf
    for allowed in edits.allowed:
        kept = np.full_like(row, -np.inf)
        kept[allowed] = row[allowed]
        row = kept
    return row


def _penalise(
    row: FloatRow, tokens: Ids, counts: NDArray[np.int32], params: SamplingParams
) -> None:
    """Repetition (Keskar et al. 2019: divides positive, multiplies negative logits), then frequency
    and presence."""
    score = row[tokens]
    penalty = np.float32(params.repetition_penalty)
    score = np.where(score > 0, score / penalty, score * penalty)
    score -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    score -= np.float32(params.presence_penalty) * (counts > 0).astype(np.float32)
    row[tokens] = score


def min_p_distance(params: SamplingParams) -> float:
    """Return how far below the best score min_p cuts: where a token has that part of the most
    likely one's probability."""
    return params.temperature * math.log(params.min_p) if params.min_p > 0 else -math.inf
