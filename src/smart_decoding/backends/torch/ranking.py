"""A drafter's best children, guessed with the noise that the target will draw with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.backends.torch import kernels
from smart_decoding.backends.torch.noise import gumbel, noise_key
from smart_decoding.backends.torch.processors import FloatRow
from smart_decoding.core.tree import FloatArray, IntArray
from smart_decoding.drafters.levels import Draw


def ranked(
    logits: Tensor, tokens: Tensor, k: int, temperature: FloatArray, draws: Sequence[Draw], native: bool
) -> tuple[IntArray, FloatArray]:
    """The k most likely of `tokens` [n] after each row of logits [rows, n], best first, and probabilities: [rows, k].

    Greedy rows: softmax over `tokens`. Others: what the drafter would draw at the row's temperature [rows] with the
    noise that the target will draw with (`draws`): the target most often draws the same."""
    k = min(k, len(tokens))
    sampled = temperature > 0
    scale = np.where(sampled, 1.0 / np.maximum(temperature, 1e-3), 1.0).astype(np.float32)
    keys = None
    if sampled.any():
        seed, sample, position = (np.array(column) for column in zip(*draws, strict=True))
        keys = np.where(sampled, noise_key(seed, sample, position), np.uint64(0))
    if native:
        wanted = None if keys is None else torch.from_numpy(keys.view(np.int64))
        ids, probs = kernels.top_k(logits.contiguous(), k, torch.from_numpy(scale), wanted, tokens)
    else:
        ids, probs = _top(logits, tokens, k, scale, keys)
    return tokens[ids].cpu().numpy(), probs.double().cpu().numpy()


def _top(
    logits: Tensor, tokens: Tensor, k: int, scale: FloatRow, keys: NDArray[np.uint64] | None
) -> tuple[Tensor, Tensor]:
    scores = logits.float() * torch.from_numpy(scale).to(logits.device)[:, None]
    total = scores.logsumexp(-1, keepdim=True)
    if keys is not None:
        noise = gumbel(keys[:, None], tokens.cpu().numpy())
        noise[keys == 0] = 0.0
        scores = scores + torch.from_numpy(noise).to(scores.device)
    top, ids = scores.topk(k)
    if keys is not None:
        noisy = torch.from_numpy(keys != 0).to(top.device)[:, None]
        total = torch.where(noisy, top.logsumexp(-1, keepdim=True), total)
    return ids, (top - total).exp()
