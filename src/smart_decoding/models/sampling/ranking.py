"""The best tokens of logits: a drafter's children, guessed with the noise that the target will draw
with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from smart_decoding.kernels import sampling as kernels
from smart_decoding.models.sampling.noise import gumbel, noise_key
from smart_decoding.models.torch.device_sampling import perturbed
from smart_decoding.models.torch.rows import download, upload

if TYPE_CHECKING:
    from smart_decoding.engine.rows import LevelRequest, Ranked
    from smart_decoding.models.sampling.processors import FloatRow


def noise_of(request: LevelRequest) -> tuple[FloatRow, NDArray[np.uint64] | None]:
    """Return factors on the logits [rows], and keys of the noise [rows] (0: none), or None if no
    row has any."""
    sampled = request.temperature > 0
    scale = np.where(sampled, 1.0 / np.maximum(request.temperature, 1e-3), 1.0).astype(np.float32)
    if not sampled.any():
        return scale, None
    seed, sample, position = (np.array(column) for column in zip(*request.draws, strict=True))
    return scale, np.where(sampled, noise_key(seed, sample, position), np.uint64(0))


def noise_of_levels(
    request: LevelRequest, levels: int
) -> tuple[FloatRow | None, NDArray[np.uint64] | None]:
    """Return the same for each request at `levels` levels: factors [batch], and keys [batch,
    levels]; None where all are greedy."""
    if not len(request.draws):
        return None, None
    scale, keys = noise_of(request)
    return np.ascontiguousarray(scale[::levels]), keys


def ranked(logits: Tensor, tokens: Tensor, request: LevelRequest, native: bool) -> Ranked:
    """Return the most likely of `tokens` [n] after each row of logits [rows, n], best first, and
    probabilities: [rows, k].

    Greedy rows: softmax over `tokens`. Others: what the drafter would draw at the row's temperature
    [rows] with the noise that the target will draw with: the target most often draws the same."""
    k = min(request.k, len(tokens))
    if native:
        scale, keys = noise_of(request)
        key_bits = None if keys is None else torch.from_numpy(keys.view(np.int64))
        factors = torch.from_numpy(scale)
        ids, probs = kernels.top_k(logits.contiguous(), k, factors, key_bits, tokens)
        return tokens[ids].numpy(), probs.double().numpy()
    return fetched(*best_children(logits, tokens, k, noise_there(request, logits.device)))


def fetched(ids: Tensor, logprobs: Tensor) -> Ranked:
    """Both on the host, by one wait: ids below 2^24 are exact in float32."""
    found = download(torch.cat((ids, logprobs), -1))
    k = ids.shape[-1]
    return found[:, :k].astype(np.int64), np.exp(found[:, k:].astype(np.float64))


def packed_noise(scale: FloatRow, keys: NDArray[np.uint64]) -> NDArray[np.int64]:
    """[2, rows] of `noise_of`, as devices take it: the bits of the factors as float64, and keys."""
    return np.stack((scale.astype(np.float64).view(np.int64), keys.view(np.int64)))


def noise_there(request: LevelRequest, device: torch.device) -> Tensor | None:
    """`packed_noise` on a device, or None where all rows are greedy."""
    scale, keys = noise_of(request)
    return None if keys is None else upload(packed_noise(scale, keys), device)


def best_children(
    logits: Tensor, tokens: Tensor, k: int, noise: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return what `ranked` says, where the logits lie: ids and log probabilities, [rows, k]. noise:
    `packed_noise`, or None where all rows are greedy."""
    scores = logits.float() if noise is None else _noisy(logits, tokens, noise)
    best, ids = scores.topk(k)
    total = logits.float().logsumexp(-1, keepdim=True)
    if noise is not None:
        total = torch.where(noise[1][:, None] != 0, best.logsumexp(-1, keepdim=True), total)
    return tokens[ids], best - total


def _noisy(logits: Tensor, tokens: Tensor, noise: Tensor) -> Tensor:
    if logits.device.type != "cpu":
        return perturbed(logits, tokens, noise)
    scale, keys = noise.numpy()
    drawn = gumbel(keys.view(np.uint64)[:, None], tokens.numpy()) * (keys != 0)[:, None]
    factor = torch.from_numpy(scale.view(np.float64)).float()
    return logits.float() * factor[:, None] + torch.from_numpy(drawn)
