"""Which heads the kernels serve after zeros were added; tests/parity/test_known_heads.py shows that
they propose the same."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smart_decoding.models.cpu.kernel_check import unserved
from smart_decoding.models.heads.files import HeadFiles
from smart_decoding.models.heads.widening import widened, widened_shape

from .tiny import TARGET


@pytest.mark.parametrize(
    ("head_dim", "served"), [(80, 96), (48, 64), (112, 128), (192, 256), (64, 64), (16, 16)]
)
def test_a_head_gets_the_next_head_dimension_that_the_kernels_serve(
    head_dim: int, served: int
) -> None:
    shape = widened_shape(replace(TARGET, head_dim=head_dim))
    assert shape.head_dim == served
    assert unserved(shape) is None
    frequencies, _ = shape.inverse_frequencies()
    theirs, _ = replace(TARGET, head_dim=head_dim).inverse_frequencies()
    assert frequencies.tolist() == theirs.tolist() + [0.0] * ((served - head_dim) // 2)


@pytest.mark.parametrize("shape", [{"head_dim": 320}, {"head_dim": 80, "qk_norm": True}])
def test_others_are_left_to_be_refused(shape: dict[str, int]) -> None:
    given = replace(TARGET, **shape)
    assert widened_shape(given) is given
    assert "head dimension" in str(unserved(given))


def test_a_head_that_is_served_is_left_alone() -> None:
    files = HeadFiles({}, {"fc.weight": torch.ones(1)}, (1,), TARGET)
    assert widened(files) is files
