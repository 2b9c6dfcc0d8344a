"""Which tokens min-p, top-k and top-p keep: vLLM's, by numpy and every variant of the kernels."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.kernels import library
from smart_decoding.models.sampling.drawing import draw
from smart_decoding.models.sampling.noise import gumbel, noise_key
from smart_decoding.models.sampling.processors import min_p_distance

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.usefixtures("variant")
DRAWS = 400  # of each row, enough that every token kept is drawn

HALF = (0.5, 0.3, 0.1, 0.1)
TWINS = (0.4, 0.4, 0.2)
TABLE: list[tuple[tuple[float, ...], dict[str, Any], set[int]]] = [
    (HALF, {}, {0, 1, 2, 3}),
    (HALF, {"min_p": 0.0, "top_p": 1.0, "top_k": -1}, {0, 1, 2, 3}),
    (HALF, {"min_p": 0.3}, {0, 1}),
    (HALF, {"min_p": 1.0}, {0}),
    (HALF, {"top_p": 0.6}, {0, 1}),
    (HALF, {"top_p": 0.6, "min_p": 0.3}, {0}),  # 0.625 of the mass after min-p
    (HALF, {"top_p": 0.65, "min_p": 0.3}, {0, 1}),
    (HALF, {"top_p": 0.85, "min_p": 0.19}, {0, 1, 2, 3}),
    (HALF, {"top_p": 0.85}, {0, 1, 2, 3}),  # the last two tie
    (HALF, {"top_p": 0.01}, {0}),
    (HALF, {"top_k": 2}, {0, 1}),
    (HALF, {"top_k": 3}, {0, 1, 2, 3}),
    (HALF, {"top_k": 4}, {0, 1, 2, 3}),
    (HALF, {"top_k": 1000}, {0, 1, 2, 3}),
    (HALF, {"top_k": 2, "top_p": 0.6}, {0}),
    (HALF, {"top_k": 3, "top_p": 0.6, "min_p": 0.3}, {0}),
    (HALF, {"top_k": 1000, "top_p": 0.6, "min_p": 0.3}, {0}),
    (HALF, {"top_k": 1, "min_p": 0.1}, {0}),
    (HALF, {"temperature": 2.0, "min_p": 0.3}, {0, 1, 2, 3}),
    (HALF, {"temperature": 2.0, "min_p": 0.5, "top_p": 0.55}, {0}),
    (HALF, {"temperature": 2.0, "top_p": 0.55}, {0, 1}),
    (HALF, {"temperature": 0.5, "min_p": 0.3, "top_p": 0.7}, {0}),
    (HALF, {"temperature": 0.5, "min_p": 0.3, "top_p": 0.75}, {0, 1}),
    (HALF, {"temperature": 0.0, "min_p": 0.1}, {0}),
    (TWINS, {"min_p": 1.0}, {0, 1}),
    (TWINS, {"min_p": 1.0, "top_p": 0.45}, {0, 1}),
    (TWINS, {"min_p": 0.6, "top_p": 0.45}, {0, 1}),
    (TWINS, {"temperature": 0.0, "min_p": 1.0}, {0}),
]


def kept_by_vllm(row: NDArray[np.float32], params: SamplingParams) -> list[int]:
    """The ascending ids that vLLM V1 leaves to draw from, in float64: temperature, min-p, top-k,
    then top-p, on scores [vocab]. Of tokens that tie with the least one all stay here, where
    vLLM's sort may cut some."""
    scores = row.astype(np.float64) / params.temperature
    probs = softmax(scores)
    scores[probs < probs.max() * params.min_p] = -np.inf
    k = params.top_k if 0 < params.top_k < len(row) else len(row)
    scores[scores < np.sort(scores)[-k]] = -np.inf
    ascending = np.argsort(scores, kind="stable")
    cut = np.cumsum(softmax(scores)[ascending]) <= 1 - params.top_p
    cut[-1] = False
    least = scores[ascending[~cut][0]]
    found: list[int] = np.flatnonzero((scores >= least) & np.isfinite(scores)).tolist()
    return found


def softmax(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()


def drawn_by(
    row: NDArray[np.float32], params: SamplingParams, seeds: range, kernels: bool
) -> list[int]:
    specs = [SampleSpec(params, seed=seed) for seed in seeds]
    with pytest.MonkeyPatch.context() as patch:
        if not kernels:
            patch.setattr(library, "unavailable", lambda: "for this test")
        return draw([row] * len(specs), specs)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(("probs", "options", "kept"), TABLE)
def test_exactly_the_tokens_of_the_table_are_drawn(
    probs: tuple[float, ...], options: dict[str, Any], kept: set[int], kernels: bool
) -> None:
    row = np.log(np.array(probs, np.float32))
    params = SamplingParams(**options)
    if not params.greedy:
        assert kept_by_vllm(row, params) == sorted(kept)
    assert {*drawn_by(row, params, range(DRAWS), kernels)} == kept


def without_near_ties(row: NDArray[np.float32], params: SamplingParams) -> list[int]:
    """What vLLM keeps, if rounding does not decide it."""
    kept = kept_by_vllm(row, params)
    for factor in (1 - 1e-4, 1 + 1e-4):
        top_p = min(params.top_p * factor, 1.0)
        min_p = min(params.min_p * factor, 1.0)
        assume(kept_by_vllm(row, replace(params, top_p=top_p, min_p=min_p)) == kept)
    return kept


@settings(max_examples=200, deadline=None)
@given(
    size=st.integers(1, 40),
    grid=st.sampled_from((0.0, 0.5)),
    forbidden=st.sets(st.integers(1, 39), max_size=4),
    temperature=st.floats(0.5, 2),
    min_p=st.floats(0.02, 0.6) | st.sampled_from((0.0, 1.0)),
    top_k=st.sampled_from((0, 3, 12, 45)),
    top_p=st.floats(0.2, 0.99) | st.just(1.0),
    seed=st.integers(0, 2**40),
)
def test_the_best_noisy_token_of_those_that_vllm_keeps_is_drawn(
    size: int,
    grid: float,
    forbidden: set[int],
    temperature: float,
    min_p: float,
    top_k: int,
    top_p: float,
    seed: int,
) -> None:
    """Ties, on a grid, and forbidden tokens included."""
    row = np.random.default_rng(seed).normal(size=size).astype(np.float32)
    if grid:
        row = np.round(row / np.float32(grid)) * np.float32(grid)
    row[[token for token in forbidden if token < size]] = -np.inf
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    kept = np.array(without_near_ties(row, params))
    seeds = range(seed, seed + 40)
    noise = gumbel(noise_key(np.array(seeds), 0, 0)[:, None], kept)
    expected = kept[(row[kept] / np.float32(temperature) + noise).argmax(1)].tolist()
    assert drawn_by(row, params, seeds, True) == expected
    assert drawn_by(row, params, seeds, False) == expected


def test_min_p_cuts_below_the_same_float_with_and_without_the_kernels() -> None:
    """Beside the border, which is no float itself: it is rounded to the nearest one."""
    rng = np.random.default_rng(0)
    borders = 0
    for seed in range(300):
        params = SamplingParams(temperature=rng.uniform(0.3, 2), min_p=rng.uniform(0.4, 0.9))
        top = np.float32(rng.uniform(-8, 8))
        border = np.float32(float(top) + min_p_distance(params))
        below, above = np.nextafter(border, np.float32([-np.inf, np.inf]))
        row = np.array([top, below, border, above], np.float32)
        seeds = range(8 * seed, 8 * seed + 8)
        drawn = drawn_by(row, params, seeds, True)
        assert drawn == drawn_by(row, params, seeds, False)
        assert 1 not in drawn
        borders += drawn.count(2)
    assert borders > 300
