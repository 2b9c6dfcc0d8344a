"""Logit processors: bias, minimum length, penalties, masks and grammar on one row, with that row's
own history."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from smart_decoding.engine.history import SampleSpec

FloatRow = NDArray[np.float32]


def process(row: FloatRow, spec: SampleSpec) -> FloatRow:
    """[vocab] logits with bias, minimum length, penalties, masks and grammar applied; `row` itself
    is not changed."""
    params = spec.params
    if not params.changes_logits:
        return row
    row = row.copy()
    if params.logit_bias:
        row[params.bias_ids] += params.bias_values
    if spec.position < params.min_tokens:
        row[list(spec.eos_ids)] = -np.inf
        row[params.stop_array] = -np.inf
    if params.needs_history:
        _penalise(row, spec)
    if params.allowed_token_ids is not None:
        ids = np.asarray(params.allowed_token_ids, np.int64)
        allowed = row[ids]
        row[:] = -np.inf
        row[ids] = allowed
    for word in params.bad_words_token_ids or ():
        if spec.ends_with(word[:-1]):
            row[word[-1]] = -np.inf
    if spec.constraint is not None:
        row[~spec.constraint.allowed(spec.path)] = -np.inf
    return row


def _penalise(row: FloatRow, spec: SampleSpec) -> None:
    """Repetition (Keskar et al. 2019: divides positive, multiplies negative logits), then frequency
    and presence."""
    if spec.history is None:
        raise ValueError("a penalty is on: SampleSpec.history is needed")
    params = spec.params
    tokens, counts = spec.history.at(spec.path)
    score = row[tokens]
    penalty = np.float32(params.repetition_penalty)
    score = np.where(score > 0, score / penalty, score * penalty)
    score -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    score -= np.float32(params.presence_penalty) * (counts > 0).astype(np.float32)
    row[tokens] = score
