"""What a measurement of costs says, where memory is handed out when it is first touched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from smart_decoding.core.cost import VerifySample
from smart_decoding.engine.kv import PAGE
from smart_decoding.profiling.measure import Measurement

if TYPE_CHECKING:
    from smart_decoding.engine.rows import Rows

ROW = 1e-3  # seconds
FAULT = 5e-3  # seconds of a page's first use
PAGES = 4000


class Machine:
    """A clock, and a target whose forwards take a millisecond a row and more for new pages."""

    def __init__(self) -> None:
        self.now = 0.0
        self.touched: set[int] = set()

    def verify(self, rows: Rows, aux_layers: tuple[int, ...]) -> Any:
        used = set((rows.slot_mapping // PAGE).tolist()) | set(rows.pages.tolist())
        self.now += ROW * len(rows.token) + FAULT * len(used - self.touched)
        self.touched |= used
        return SimpleNamespace(greedy=np.zeros(len(rows.token)))


def test_no_cost_has_what_the_first_touch_of_memory_takes() -> None:
    machine = Machine()
    target: Any = SimpleNamespace(
        device=torch.device("cpu"),
        max_positions=4096,
        steps=(12,),
        verify_round=None,
        verify=machine.verify,
    )
    measurement = Measurement(target, None, PAGES, 32, seconds=0.0, clock=lambda: machine.now)
    samples = measurement.run()
    assert {s.batch for s in samples if isinstance(s, VerifySample)} == {1, 2, 4, 8, 16, 32}
    for sample in samples:
        assert isinstance(sample, VerifySample)
        assert sample.seconds == pytest.approx(ROW * sample.rows), sample
