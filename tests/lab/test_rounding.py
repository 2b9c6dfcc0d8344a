"""`smart_lab rounding`: its figures, and llama.cpp's by programs that say what they were asked."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from smart_decoding.errors import ConfigError, ModelError
from smart_lab import rounding

SAID = """
Mean PPL(Q)                   :  29.268517 ±   1.0
Mean PPL(base)                :  29.230238 ±   1.0
Mean    KLD:   0.001745 ±   0.000011
Same top p: 97.373 ± 0.224 %
"""


def test_figures_are_those_of_two_known_distributions() -> None:
    expected = torch.tensor([[0.5, 0.5], [0.75, 0.25]]).log()
    found = torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log()
    difference = rounding.Difference()
    difference.add(expected, found, torch.tensor([0, 0]))
    figures = difference.figures
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert figures["kl"] == pytest.approx(kl / 2)
    assert figures["perplexity"] == pytest.approx((0.25 * 0.75) ** -0.5)
    assert figures["same"] == 50.0


def programs(folder: Path, says: str, code: int = 0) -> Path:
    for name in (rounding.QUANTIZE, rounding.PERPLEXITY):
        path = folder / name
        path.write_text(f"#!{sys.executable}\nprint({says!r})\nraise SystemExit({code})\n")
        path.chmod(0o755)
    return folder


def test_llama_cpps_figures_are_read(tmp_path: Path) -> None:
    found = rounding.theirs(tmp_path / "m.gguf", "text", 2, programs(tmp_path, SAID))
    expected = {"perplexity": 29.268517, "reference": 29.230238, "kl": 0.001745, "same": 97.373}
    assert found == expected
    with pytest.raises(ConfigError, match="does not say perplexity"):
        rounding.theirs(tmp_path / "m.gguf", "text", 2, programs(tmp_path, "nothing"))
    with pytest.raises(ModelError, match="llama-quantize ended with 3: no room"):
        rounding.theirs(tmp_path / "m.gguf", "text", 2, programs(tmp_path, "no room", 3))
