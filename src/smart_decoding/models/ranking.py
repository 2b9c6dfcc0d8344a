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
from smart_decoding.models.device_sampling import gumbel
from smart_decoding.models.noise import noise_key
from smart_decoding.models.rows import download, upload

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
        return tokens[ids].numpy(), probs.double().numpy()
    both = download(torch.stack(_top(logits, tokens, k, scale, keys)))  # ids are exact in float64
    return both[0].astype(np.int64), both[1]


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
    """Tokens and probabilities, [rows, k] float64 each."""
    scores = logits.float()
    if keys is None:  # all are greedy
        top, ids = scores.topk(k)
        total = scores.logsumexp(-1, keepdim=True)
        return tokens[ids].double(), (top - total).exp().double()
    columns = np.stack((scale.astype(np.float64).view(np.int64), keys.view(np.int64)))
    factor, key = upload(columns, logits.device)[..., None]
    scores = scores * factor.view(torch.float64).float()
    total = scores.logsumexp(-1, keepdim=True)
    top, ids = (scores + gumbel(key, tokens) * (key != 0)).topk(k)
    total = torch.where(key != 0, top.logsumexp(-1, keepdim=True), total)
    return tokens[ids].double(), (top - total).exp().double()
