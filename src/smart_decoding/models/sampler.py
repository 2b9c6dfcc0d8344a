"""Draws the target's token for rows of the verifying forward. The token of a row is a function of
its logits, its history and its keyed noise alone, never of the other rows: greedy rows by argmax,
others by Gumbel-max over the tokens that top-k, top-p and min-p leave.

The reference works on rows in numpy, one by one (on a CPU without a copy), so that all devices draw
the same; the CPU kernels draw for many rows in one call, and leave to it what its rounding would
decide. Ties go to the lowest token id everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from smart_decoding.core.tree import IntArray
from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.verification import require_finite
from smart_decoding.kernels import library
from smart_decoding.kernels import ops as kernels
from smart_decoding.kernels.memory import address
from smart_decoding.models.noise import (
    G_MAX,
    fewest_bits,
    gumbel,
    gumbel_of_bits,
    noise_key,
    uniform_bits,
)
from smart_decoding.models.processors import FloatRow, process

LOWEST = float(np.finfo(np.float32).min)  # forbidden tokens, at -inf, are below every floor
# of a probability: nearer to top_p the kernels' sums are not exact enough to say what is in the
# nucleus
MARGIN = 1e-4
NEAR = 5.0  # nats below the maximum within which noise is evaluated at once; a matter of speed only


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

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._kernels = library.unavailable() is None

    def argmax(self, logits: torch.Tensor, which: ArrayLike | None = None) -> NDArray[np.int64]:
        """[which] most likely token of each of the rows `which` (default: all); of several, the
        lowest id."""
        indices = np.arange(len(logits)) if which is None else np.ascontiguousarray(which, np.int64)
        if logits.device.type == "cpu" and self._kernels and logits.dtype == torch.float32:
            tokens = kernels.argmax(logits.contiguous(), indices)
            require_finite(tokens >= 0)
            return tokens
        if which is not None:
            logits = logits[torch.from_numpy(indices).to(logits.device)]
        if logits.device.type == "cpu":
            rows = logits.detach().float().numpy()
            tokens = rows.argmax(
                -1
            )  # the first maximum, by numpy's contract; torch.argmax gives no such promise
            best = np.take_along_axis(rows, tokens[:, None], -1)
        else:
            tokens, best = (t.cpu().numpy() for t in first_maximum(logits))
        require_finite(np.isfinite(best))
        return np.asarray(tokens, np.int64)

    def sample(
        self, logits: torch.Tensor, which: ArrayLike, specs: Sequence[SampleSpec]
    ) -> NDArray[np.int64]:
        """[len(which)] tokens drawn for the rows `which` of logits [rows, vocab]; `specs[i]`
        belongs to `which[i]`."""
        indices = np.asarray(which, np.int64)
        if len(indices) != len(specs):
            raise ValueError(f"{len(indices)} rows but {len(specs)} specs")
        plain = [spec.params.greedy and not spec.params.changes_logits for spec in specs]
        if all(plain):
            return self.argmax(logits, indices)
        return np.array(draw(_rows(logits, indices), specs), np.int64)

    def logprobs(
        self, logits: torch.Tensor, which: ArrayLike, tokens: ArrayLike, k: int
    ) -> list[TokenLogprobs]:
        """Log-softmax of the raw logits at the drawn `tokens` of rows `which`, and of the `k` most
        likely (-1: all)."""
        k = self.vocab_size if k < 0 else min(k, self.vocab_size)
        indices, drawn = np.asarray(which, np.int64), np.asarray(tokens, np.int64)
        rows = _rows(logits, indices)
        return [_row_logprobs(row, int(token), k) for row, token in zip(rows, drawn, strict=True)]


def first_maximum(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[rows] lowest id of each row's maximum, and [rows] the maximum; where it is NaN, the id is
    `vocab`."""
    best = logits.amax(-1, keepdim=True)
    ids = torch.arange(logits.shape[-1], device=logits.device)
    return torch.where(logits == best, ids, logits.shape[-1]).amin(-1), best[:, 0].float()


def draw(rows: Sequence[FloatRow], specs: Sequence[SampleSpec]) -> list[int]:
    """The tokens of rows [vocab] float32 of raw logits, each by its own spec."""
    processed = [process(row, spec) for row, spec in zip(rows, specs, strict=True)]
    if library.unavailable() is None:
        return _draw_by_kernels(processed, specs)
    return [_draw_alone(row, spec) for row, spec in zip(processed, specs, strict=True)]


def _draw_alone(row: FloatRow, spec: SampleSpec) -> int:
    """The token of one processed row, in numpy."""
    params, top = spec.params, int(row.argmax())
    require_finite(np.isfinite(row[top]))
    if params.greedy:
        return top
    floor = _top_k_floor(row, params.top_k)
    nucleus = _Nucleus(row, top, floor, params)
    floor = max(floor, float(row[top]) + _min_p_distance(params))
    key = noise_key(spec.seed, spec.sample, spec.position)
    token = _gumbel_max(row, top, floor, params.temperature, key)
    while (
        token not in nucleus
    ):  # then nothing that scores no better is in it either: draw again above
        floor = _next_above(row[token])
        token = _gumbel_max(row, top, floor, params.temperature, key)
    return token


def _draw_by_kernels(rows: Sequence[FloatRow], specs: Sequence[SampleSpec]) -> list[int]:
    """The same tokens in one call of the kernels, and another one where top-p cuts what was drawn.
    What rounding decides, the kernels leave to numpy."""
    asked = [_asked(row, spec) for row, spec in zip(rows, specs, strict=True)]
    drawn = kernels.draw(asked, len(rows[0]))
    require_finite(drawn.best >= 0)
    tokens: list[int] = drawn.token.tolist()
    for i, (row, spec, best) in enumerate(zip(rows, specs, drawn.best.tolist(), strict=True)):
        if spec.params.greedy:
            tokens[i] = best
            continue
        nucleus = _Nucleus(row, best, float(drawn.kept[i]), spec.params)
        while tokens[i] >= 0 and tokens[i] not in nucleus:
            where, seed, sample, position, _, scale, *_ = asked[i]
            again = (
                where,
                seed,
                sample,
                position,
                0,
                scale,
                _next_above(row[tokens[i]]),
                -math.inf,
            )
            tokens[i] = int(kernels.draw([again], len(row)).token[0])
        if tokens[i] < 0:
            tokens[i] = _draw_alone(row, spec)
    return tokens


def _asked(row: FloatRow, spec: SampleSpec) -> tuple[int, int, int, int, int, float, float, float]:
    p, few = spec.params, spec.params.top_k <= kernels.MOST_K
    where = address(row), spec.seed, spec.sample, spec.position
    if p.greedy:
        return (*where, kernels.NOT_DRAWN, 1.0, LOWEST, 0.0)
    floor = LOWEST if few else _top_k_floor(row, p.top_k)
    return (*where, max(p.top_k, 0) if few else 0, 1.0 / p.temperature, floor, _min_p_distance(p))


def survivors(row: FloatRow, params: SamplingParams) -> NDArray[np.int64]:
    """Ascending ids of the tokens of processed logits [vocab] that top-k, top-p and min-p leave:
    what `draw` draws from, which itself never lists them."""
    top = int(row.argmax())
    floor = _top_k_floor(row, params.top_k)
    nucleus = _Nucleus(row, top, floor, params)
    tokens = np.flatnonzero(row >= max(floor, float(row[top]) + _min_p_distance(params)))
    return np.array([token for token in tokens if int(token) in nucleus], np.int64)


def _top_k_floor(row: FloatRow, k: int) -> float:
    """The k-th largest score: tokens below are cut, all that tie with it stay (as in transformers
    and vLLM)."""
    if not 0 < k < len(row):
        return LOWEST
    return max(LOWEST, float(np.partition(row, len(row) - k)[len(row) - k]))


def _min_p_distance(params: SamplingParams) -> float:
    """How far below the best score min_p cuts: where a token has that part of the most likely one's
    probability."""
    return params.temperature * math.log(params.min_p) if params.min_p > 0 else -math.inf


def _next_above(score: np.float32) -> float:
    return float(np.nextafter(score, np.float32(np.inf)))


class Sampled:
    """What a target answers by its sampler."""

    sampler: Sampler

    def argmax(self, logits: torch.Tensor, which: IntArray) -> IntArray:
        return self.sampler.argmax(logits, which)

    def sample(
        self, logits: torch.Tensor, which: IntArray, specs: Sequence[SampleSpec]
    ) -> IntArray:
        return self.sampler.sample(logits, which, specs)

    def logprobs(
        self, logits: torch.Tensor, which: IntArray, tokens: Sequence[int], k: int
    ) -> list[TokenLogprobs]:
        return self.sampler.logprobs(logits, which, tokens, k)


class _Nucleus:
    """The top-p set of the scores >= floor: tokens with less than top_p of the mass strictly above
    them.

    Hence ties with the last one stay. Membership is asked of single tokens, so that nothing is
    sorted, and the masses are computed only when a token other than the most likely one is asked
    about."""

    def __init__(self, row: FloatRow, top: int, floor: float, params: SamplingParams) -> None:
        self.row, self.top, self.floor, self.params = row, top, floor, params
        self._mass: FloatRow | None = None
        self._total = 0.0

    def __contains__(self, token: int) -> bool:
        if self.params.top_p >= 1 or token == self.top:
            return True
        if library.unavailable() is None:
            best, scale = float(self.row[self.top]), 1.0 / self.params.temperature
            total, above = kernels.mass(self.row, best, scale, self.floor, float(self.row[token]))
            if abs(above / total - self.params.top_p) > MARGIN:
                return above < self.params.top_p * total
        if self._mass is None:
            self._mass = np.exp(
                (self.row - self.row[self.top]) / np.float32(self.params.temperature)
            )
            self._mass[self.row < self.floor] = 0
            self._total = float(self._mass.sum(dtype=np.float64))
        above = float(self._mass[self.row > self.row[token]].sum(dtype=np.float64))
        return above < self.params.top_p * self._total


def _gumbel_max(
    row: FloatRow, top: int, floor: float, temperature: float, key: NDArray[np.uint64]
) -> int:
    """argmax of row / temperature + noise over the scores >= floor, evaluating the noise of few
    tokens.

    After the tokens near the maximum, a token can win only within G_MAX of the best so far, and
    only if its bits are high enough for the distance; both bounds are exact, slack covers the
    rounding of the comparison."""
    near_floor = max(floor, float(row[top]) - NEAR * temperature)
    near = np.flatnonzero(row >= near_floor)
    token, best = _best(row, near, gumbel(key, near), temperature)
    slack = 1e-5 * (1.0 + abs(float(row[top])))
    reach = max(floor, (best - G_MAX) * temperature - slack)
    if reach >= near_floor:
        return token
    far = np.flatnonzero(row >= reach)
    bits = uniform_bits(key, far)
    lucky = np.flatnonzero(
        bits >= np.uint64(fewest_bits(best - (near_floor + slack) / temperature))
    )
    if not len(lucky):
        return token
    rival, rival_best = _best(row, far[lucky], gumbel_of_bits(bits[lucky]), temperature)
    return min((-best, token), (-rival_best, rival))[1]


def _best(
    row: FloatRow, tokens: NDArray[np.int64], noise: FloatRow, temperature: float
) -> tuple[int, float]:
    """The token with the highest perturbed score, and that score; the lowest id of several."""
    perturbed = (row[tokens] / np.float32(temperature)).astype(np.float64) + noise
    i = int(perturbed.argmax())
    return int(tokens[i]), float(perturbed[i])


def _row_logprobs(row: FloatRow, token: int, k: int) -> TokenLogprobs:
    top = row.max()
    require_finite(np.isfinite(top))
    normaliser = float(top) + math.log(float(np.exp(row - top).sum(dtype=np.float64)))
    ids = np.flatnonzero(row >= _top_k_floor(row, k)) if k else np.zeros(0, np.int64)
    ids = ids[np.lexsort((ids, -row[ids]))][:k]
    rank = 1 + int(np.count_nonzero(row > row[token]))
    values = (row[ids].astype(np.float64) - normaliser).astype(np.float32)
    return TokenLogprobs(token, float(row[token]) - normaliser, rank, ids, values)


def _rows(logits: torch.Tensor, indices: NDArray[np.int64]) -> Sequence[FloatRow]:
    """The rows as float32 arrays [vocab]: views on a CPU, one transfer elsewhere."""
    if logits.device.type == "cpu":
        plain = logits.dtype == torch.float32 and not logits.requires_grad
        rows = np.ascontiguousarray((logits if plain else logits.detach().float()).numpy())
        return [rows[i] for i in indices.tolist()]
    return list(logits.detach()[torch.from_numpy(indices).to(logits.device)].float().cpu().numpy())
