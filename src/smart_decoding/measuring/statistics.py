"""Paired ratios with bootstrap intervals.

A pair is the same block of prompts run by a policy and by the baseline, some rounds each in turn,
so that changes of the machine hit both. The speedup over several pairs is a ratio of times for the
same work, as a user would see it: sum_k w_k / base_k over sum_k w_k / policy_k, with rates in
tokens per second and w_k the baseline's tokens of pair k.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 4000


@dataclass(frozen=True, slots=True)
class Pair:
    """One pair of blocks: rates in tokens/s, `weight` in tokens; `stratum` is resampled by itself
    (the task)."""

    policy: float
    baseline: float
    weight: float = 1.0
    stratum: str = ""


@dataclass(frozen=True, slots=True)
class Ratio:
    """A speedup with its 95 % interval over `pairs` pairs; NaN without pairs, an infinitely wide
    interval with one."""

    value: float
    low: float
    high: float
    pairs: int


def paired_ratio(pairs: Sequence[Pair], seed: int = 0, resamples: int = RESAMPLES) -> Ratio:
    """Return the speedup over `pairs` and its bootstrap interval (percentiles of resampled pairs,
    stratum by stratum).

    The percentiles are widened about the value: by sqrt(n / df), since resampling n values
    understates their variance by that much, and by Student's t over the normal quantile, df being n
    less the strata. Pairs without a finite positive rate on both sides are left out."""
    usable = [
        p
        for p in pairs
        if p.policy > 0 and p.baseline > 0 and np.isfinite([p.policy, p.baseline]).all()
    ]
    if not usable:
        return Ratio(float("nan"), float("nan"), float("nan"), 0)
    base = np.array([p.weight / p.baseline for p in usable])  # seconds for the pair's work
    ours = np.array([p.weight / p.policy for p in usable])
    value = float(base.sum() / ours.sum())
    if len(usable) == 1:
        return Ratio(value, 0.0, float("inf"), 1)
    which = _resample([p.stratum for p in usable], resamples, np.random.default_rng(seed))
    logs = np.log(base[which].sum(axis=1) / ours[which].sum(axis=1)) - np.log(value)
    count, strata = len(usable), len({p.stratum for p in usable})
    df = count - strata if count > strata else count - 1
    widen = np.sqrt(count / df) * student_t(df, 0.975) / NormalDist().inv_cdf(0.975)
    low, high = np.exp(np.log(value) + widen * np.percentile(logs, [2.5, 97.5]))
    return Ratio(value, min(value, float(low)), max(value, float(high)), len(usable))


@lru_cache
def student_t(df: int, share: float) -> float:
    """Return the quantile of Student's t with `df` degrees of freedom, share above 0.5; it must be
    below 64.

    With t = sqrt(df) tan(a), the density of a is proportional to cos(a)^(df - 1): it is integrated
    on [0, a], and t is found by halving."""
    nodes, weights = np.polynomial.legendre.leggauss(64)
    log_scale = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(math.pi) / 2
    low, high = 0.0, 64.0  # of one degree of freedom the quantile of 0.99 is 32
    for _ in range(60):
        t = (low + high) / 2
        half = math.atan(t / math.sqrt(df)) / 2
        density = np.exp(log_scale + (df - 1) * np.log(np.cos(half * (nodes + 1))))
        below = 0.5 + float(weights @ density) * half
        low, high = (t, high) if below < share else (low, t)
    return low


def _resample(strata: Sequence[str], resamples: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """[resamples, pairs] indices drawn with replacement within each stratum. A stratum of one pair
    is resampled with all others: by itself it would seem to have no variance."""
    names, of = np.unique(strata, return_inverse=True)
    members = [np.flatnonzero(of == i) for i in range(len(names))]
    single = np.concatenate([m for m in members if len(m) == 1] or [np.zeros(0, np.int64)])
    groups = [m for m in members if len(m) > 1]
    parts = [m[rng.integers(0, len(m), (resamples, len(m)))] for m in groups]
    if len(single):
        parts.append(rng.integers(0, len(strata), (resamples, len(single))))
    return np.concatenate(parts, axis=1)
