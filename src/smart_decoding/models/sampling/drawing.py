"""Draws tokens by Gumbel-max over what min-p, top-k and top-p leave of rows of logits, in that
order, as in vLLM.

The reference works on rows in numpy, one by one, so that all devices draw the same. The CPU kernels
draw for many rows in one call, and leave to it what their rounding would decide. Ties go to the
lowest token id everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from smart_decoding.errors import require_finite
from smart_decoding.kernels import library
from smart_decoding.kernels import sampling as kernels
from smart_decoding.kernels.memory import address
from smart_decoding.models.sampling.noise import (
    G_MAX,
    fewest_bits,
    gumbel,
    gumbel_of_bits,
    noise_key,
    uniform_bits,
)
from smart_decoding.models.sampling.processors import FloatRow, min_p_distance, process

if TYPE_CHECKING:
    from smart_decoding.engine.history import SampleSpec
    from smart_decoding.engine.sampling_params import SamplingParams

LOWEST = float(np.finfo(np.float32).min)  # forbidden tokens, at -inf, are below every floor
NEAR = 5.0  # nats below the maximum within which noise is evaluated at once; a matter of speed only


def draw(rows: Sequence[FloatRow], specs: Sequence[SampleSpec]) -> list[int]:
    """Return the tokens of rows [vocab] float32 of raw logits, each by its own spec."""
    processed = [process(row, spec) for row, spec in zip(rows, specs, strict=True)]
    if library.unavailable() is None:
        return _draw_by_kernels(processed, specs)
    return [_draw_alone(row, spec) for row, spec in zip(processed, specs, strict=True)]


def _draw_alone(row: FloatRow, spec: SampleSpec) -> int:
    params = spec.params
    top = int(row.argmax())
    require_finite(np.isfinite(row[top]))
    if params.greedy:
        return top
    floor = max(top_k_floor(row, params.top_k), float(row[top]) + min_p_distance(params))
    nucleus = _Nucleus(row, top, floor, params)
    key = noise_key(spec.seed, spec.sample, spec.position)
    token = _gumbel_max(row, top, floor, params.temperature, key)
    while token not in nucleus:  # nor is what scores no better: draw again above it
        floor = float(np.nextafter(row[token], np.float32(np.inf)))
        token = _gumbel_max(row, top, floor, params.temperature, key)
    return token


def _draw_by_kernels(rows: Sequence[FloatRow], specs: Sequence[SampleSpec]) -> list[int]:
    """Return the same tokens in one call of the kernels. What rounding would decide, they leave to
    numpy."""
    draws = [_draw_of(spec, address(row)) for row, spec in zip(rows, specs, strict=True)]
    drawn = kernels.draw(kernels.draw_structs(draws), len(rows[0]))
    require_finite((drawn.best >= 0).all())
    tokens: list[int] = drawn.token.tolist()
    for i, (row, spec) in enumerate(zip(rows, specs, strict=True)):
        if spec.params.greedy:
            tokens[i] = int(drawn.best[i])
        elif tokens[i] < 0:
            tokens[i] = _draw_alone(row, spec)
    return tokens


def draws_of(specs: Sequence[SampleSpec]) -> NDArray[np.void]:
    """[specs] what the kernels draw, of rows that they know themselves."""
    return kernels.draw_structs([_draw_of(spec) for spec in specs])


def _draw_of(spec: SampleSpec, row: int = 0) -> kernels.Draw:
    """row: the address of the processed row."""
    params = spec.params
    if params.greedy:
        return kernels.Draw(row, 0, 0, 0, kernels.NOT_DRAWN, 1.0, 0.0, 1.0)
    return kernels.Draw(
        row,
        spec.seed,
        spec.sample,
        spec.position,
        max(params.top_k, 0),
        1.0 / params.temperature,
        min_p_distance(params),
        params.top_p,
    )


def top_k_floor(row: FloatRow, k: int) -> float:
    """Return the k-th largest score: tokens below are cut, all that tie with it stay (as in
    transformers and vLLM)."""
    if not 0 < k < len(row):
        return LOWEST
    return max(LOWEST, float(np.partition(row, len(row) - k)[len(row) - k]))


class _Nucleus:
    """The top-p set of the scores >= floor: tokens with less than top_p of the mass strictly above
    them.

    Hence ties with the last one stay. Membership is computed for single tokens, so that nothing is
    sorted; the most likely one needs no masses."""

    def __init__(self, row: FloatRow, top: int, floor: float, params: SamplingParams) -> None:
        self.row = row
        self.top = top
        self.floor = floor
        self.params = params
        self._mass: FloatRow | None = None
        self._total = 0.0

    def __contains__(self, token: int) -> bool:
        if self.params.top_p >= 1 or token == self.top:
            return True
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
    """Return the token with the highest perturbed score, and that score; the lowest id of
    several."""
    perturbed = (row[tokens] / np.float32(temperature)).astype(np.float64) + noise
    i = int(perturbed.argmax())
    return int(tokens[i]), float(perturbed[i])
