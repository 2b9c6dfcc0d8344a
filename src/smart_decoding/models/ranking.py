"""The best tokens of logits: a drafter's children, guessed with the noise that the target will draw
with, and what recycling remembers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.kernels import library
from smart_decoding.kernels import sampling as kernels
from smart_decoding.models.noise import gumbel, noise_key

if TYPE_CHECKING:
    from smart_decoding.drafters.levels import Asked, Ranked
    from smart_decoding.models.processors import FloatRow


def noise_of(asked: Asked) -> tuple[FloatRow, NDArray[np.uint64] | None]:
    """Factors on the logits [rows], and keys of the noise [rows] (0: none), or None if no row has
    any."""
    sampled = asked.temperature > 0
    scale = np.where(sampled, 1.0 / np.maximum(asked.temperature, 1e-3), 1.0).astype(np.float32)
    if not sampled.any():
        return scale, None
    seed, sample, position = (np.array(column) for column in zip(*asked.draws, strict=True))
    return scale, np.where(sampled, noise_key(seed, sample, position), np.uint64(0))


def noise_of_levels(asked: Asked, levels: int) -> tuple[FloatRow | None, NDArray[np.uint64] | None]:
    """The same for each request at `levels` levels: factors [batch], and keys [batch, levels]; None
    where all are greedy."""
    if not len(asked.draws):
        return None, None
    scale, keys = noise_of(asked)
    return np.ascontiguousarray(scale[::levels]), keys


def ranked(logits: Tensor, tokens: Tensor, asked: Asked, native: bool) -> Ranked:
    """The most likely of `tokens` [n] after each row of logits [rows, n], best first, and
    probabilities: [rows, k].

    Greedy rows: softmax over `tokens`. Others: what the drafter would draw at the row's temperature
    [rows] with the noise that the target will draw with: the target most often draws the same."""
    k = min(asked.k, len(tokens))
    scale, keys = noise_of(asked)
    if native:
        wanted = None if keys is None else torch.from_numpy(keys.view(np.int64))
        ids, probs = kernels.top_k(logits.contiguous(), k, torch.from_numpy(scale), wanted, tokens)
    else:
        ids, probs = _top(logits, tokens, k, scale, keys)
    return tokens[ids].cpu().numpy(), probs.double().cpu().numpy()


def torch_top_k(logits: Tensor, k: int) -> tuple[NDArray[np.integer], NDArray[np.floating]]:
    """The recycling drafter's `TopK`: by the CPU kernel where it runs, else by torch.topk."""
    logits = logits.detach()
    on_cpu = (
        logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.is_contiguous()
    )
    if on_cpu and library.unavailable() is None:
        ids, probs = kernels.top_k(logits, k)
    else:
        logits = logits.float()
        values, ids = logits.topk(k, dim=-1)
        probs = (values - logits.logsumexp(-1, keepdim=True)).exp()
    return ids.cpu().numpy(), probs.cpu().numpy()


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
