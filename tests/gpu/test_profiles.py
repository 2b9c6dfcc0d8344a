"""What is measured on a GPU says what large trees cost there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from smart_decoding.core.costs import VerifySample
from smart_decoding.models.torch.rows import BUCKETS
from smart_decoding.profiling.fit import fit_costs
from smart_decoding.profiling.measure import _points, largest_batch, longest_context

GPU = torch.device("cuda")
PAGES = 40_000


def measured(device: torch.device, max_positions: int = 8192, seqs: int = 64) -> list[VerifySample]:
    """Every point of a profile, as a GPU would take that reads weights in 4.5 ms and multiplies
    33,000 rows a second."""
    target: Any = SimpleNamespace(
        experts=None,
        states=0,
        vocab=32,
        device=device,
        max_positions=max_positions,
        steps=BUCKETS,
        native=None,
    )
    found = []
    for point in _points(target, None, PAGES, seqs):
        asked = point.sample(0.0)
        assert isinstance(asked, VerifySample)
        found.append(VerifySample(asked.batch, asked.rows, asked.context, seconds(asked)))
    return found


def seconds(s: VerifySample) -> float:
    return max(4.5e-3, s.rows / 33e3) + 4e-8 * s.batch * s.context + 2e-9 * s.rows * s.context


def test_a_gpu_is_measured_until_arithmetic_is_all_that_costs() -> None:
    """Far beyond what a CPU's points know, which extrapolate a flat line."""
    on_gpu = measured(GPU)
    assert max(s.rows for s in on_gpu) == 1024
    assert {s.context for s in on_gpu} == {128.0, 1024.0, 4096.0}
    assert len(on_gpu) < 300  # 20 ms each, twice: seconds
    rows = np.array([1, 100, 200, 384, 700, 1024, 1500])
    exact = np.array([seconds(VerifySample(8, n, 3000.0, 0.0)) for n in rows])
    far = {}
    for device in (GPU, torch.device("cpu")):
        cost = fit_costs(measured(device))
        far[device.type] = np.abs(cost.verify_seconds(8, rows, 3000.0) / exact - 1).max()
        if device == GPU:  # where arithmetic begins to cost, in a large batch
            near = np.arange(64, 320)
            known = np.array([seconds(VerifySample(64, n, 500.0, 0.0)) for n in near])
            assert np.abs(cost.verify_seconds(64, near, 500.0) / known - 1).max() < 0.05
    assert far["cuda"] < 0.1
    assert far["cpu"] > 0.3


@pytest.mark.parametrize(("positions", "longest"), [(100, 0), (600, 128), (2048, 1024)])
def test_short_models_are_measured_as_far_as_they_go(positions: int, longest: int) -> None:
    assert longest_context(positions, GPU) == longest
    assert max((int(s.context) for s in measured(GPU, positions)), default=0) == longest
    assert largest_batch(PAGES, 100, GPU) == 64
