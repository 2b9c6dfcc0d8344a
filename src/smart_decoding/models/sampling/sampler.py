"""The target's token for rows of the verifying forward: greedy rows by argmax, others by `draw`.

The token of a row is a function of its logits, its history and its keyed noise alone, never of the
other rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from smart_decoding.errors import require_finite
from smart_decoding.kernels import library
from smart_decoding.kernels import sampling as kernels
from smart_decoding.models.sampling.drawing import draw, top_k_floor
from smart_decoding.models.torch import device_sampling
from smart_decoding.models.torch.rows import download, upload

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.models.sampling.processors import FloatRow


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log probabilities (natural, of the raw logits) of one position: the drawn token, its rank
    from 1, and the most likely tokens in descending order; `top_tokens` and `top_logprobs` have
    shape [k]."""

    token: int
    logprob: float
    rank: int
    top_tokens: NDArray[np.int64]
    top_logprobs: FloatRow


class Sampler:
    """Draws target tokens from logits [rows, vocab] on any device. Raises ModelError if a row has
    NaN or no finite maximum."""

    def argmax(self, logits: torch.Tensor, which: ArrayLike | None = None) -> NDArray[np.int64]:
        """[which] most likely token of each of the rows `which` (default: all); of several, the
        lowest id."""
        indices = np.arange(len(logits)) if which is None else np.ascontiguousarray(which, np.int64)
        native = logits.device.type == "cpu" and library.unavailable() is None
        if native and logits.dtype == torch.float32:
            tokens = kernels.argmax(logits.contiguous(), indices)
            require_finite((tokens >= 0).all())
            return tokens
        logits = logits.detach()
        if logits.device.type != "cpu":
            # those of all rows, so that the device needs no list of rows
            tokens = download(device_sampling.maxima(logits)).astype(np.int64)[indices]
        else:
            tokens = _first_maximum(logits[torch.from_numpy(indices)]).numpy()
        require_finite((tokens >= 0).all())
        return tokens

    def sample(
        self, logits: torch.Tensor, which: IntArray, specs: Sequence[SampleSpec]
    ) -> NDArray[np.int64]:
        """[len(which)] tokens drawn for the rows `which` of logits [rows, vocab]; `specs[i]`
        belongs to `which[i]`. On a GPU -1 where a row has no finite maximum: all rows are drawn
        there at once, and not all of them count."""
        indices = np.asarray(which, np.int64)
        if len(indices) != len(specs):
            raise ValueError(f"{len(indices)} rows but {len(specs)} specs")
        if logits.device.type != "cpu":
            drawn = device_sampling.draw(logits.detach(), indices, specs)
            return download(drawn).astype(np.int64)
        if all(spec.params.greedy and not spec.params.changes_logits for spec in specs):
            return self.argmax(logits, indices)
        return np.array(draw(_rows(logits, indices), specs), np.int64)

    def logprobs(
        self, logits: torch.Tensor, which: ArrayLike, tokens: ArrayLike, k: ArrayLike
    ) -> list[TokenLogprobs]:
        """Log-softmax of the raw logits at the drawn `tokens` of rows `which`, and of the `k` most
        likely of each row, or of all (-1: all tokens)."""
        rows = _rows(logits, np.asarray(which, np.int64))
        drawn = np.asarray(tokens, np.int64).tolist()
        counts = np.broadcast_to(k, len(rows))
        vocab = logits.shape[1]
        most = np.where(counts < 0, vocab, np.minimum(counts, vocab)).tolist()
        return [_row_logprobs(*one) for one in zip(rows, drawn, most, strict=True)]


def _first_maximum(scores: torch.Tensor) -> torch.Tensor:
    """[rows] lowest id of each row's maximum; -1 where that is not finite."""
    best = scores.amax(-1, keepdim=True)
    ids = torch.arange(scores.shape[-1])
    first = torch.where(scores == best, ids, scores.shape[-1]).amin(-1)
    return torch.where(best[:, 0].isfinite(), first, -1)


def _row_logprobs(row: FloatRow, token: int, k: int) -> TokenLogprobs:
    top = row.max()
    require_finite(np.isfinite(top))
    normaliser = float(top) + math.log(float(np.exp(row - top).sum(dtype=np.float64)))
    ids = np.flatnonzero(row >= top_k_floor(row, k)) if k else np.zeros(0, np.int64)
    ids = ids[np.lexsort((ids, -row[ids]))][:k]
    rank = 1 + int(np.count_nonzero(row > row[token]))
    values = (row[ids].astype(np.float64) - normaliser).astype(np.float32)
    return TokenLogprobs(token, float(row[token]) - normaliser, rank, ids, values)


def _rows(logits: torch.Tensor, indices: NDArray[np.int64]) -> Sequence[FloatRow]:
    """Return the rows as float32 arrays [vocab]: views on a CPU, one transfer elsewhere."""
    if logits.device.type == "cpu":
        plain = logits.dtype == torch.float32 and not logits.requires_grad
        rows = np.ascontiguousarray((logits if plain else logits.detach().float()).numpy())
        return [rows[i] for i in indices.tolist()]
    return list(download(logits.detach()[upload(indices, logits.device)].float()))
