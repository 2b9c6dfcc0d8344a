"""The floor of plain decoding: bytes are counted, and the rate of reading is measured."""

from __future__ import annotations

import pytest
import torch

from smart_decoding.models.families.config import ModelConfig
from smart_lab import floor


def test_weights_are_read_once_and_every_cached_key() -> None:
    sizes = {"layers": 2, "hidden": 8, "heads": 4, "kv_heads": 2, "head_dim": 2, "ffn": 16}
    config = ModelConfig(
        "llama", **sizes, vocab=100, rope_theta=1e4, rms_eps=1e-5, max_positions=64
    )
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16  # q; k and v; output; gate, up and down
    kv = 2 * 2 * 4
    assert floor.bytes_moved(config, 2, 3, 10.0) == 2 * (2 * layer + 800 + 3 * 10 * kv)


def test_a_rate_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "SECONDS", 0.02)
    assert 0.1 < floor.read_rate(torch.device("cpu")) < 10_000


def test_near_the_floor_plain_decoding_is_what_to_compare_with() -> None:
    limit = 1.15 * 2.0 + 1.0
    assert floor.near_floor(limit, 2.0)
    assert not floor.near_floor(limit + 1e-3, 2.0)
