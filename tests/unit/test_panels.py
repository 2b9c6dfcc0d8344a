"""Packed quants in the cache: later starts map them, the same bits; what does not fit is packed."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType

from smart_decoding.kernels import library, weights
from smart_decoding.models.checkpoints.loading import load_checkpoint, with_rounded_activations
from smart_decoding.models.cpu.panels import KeptPanels
from smart_decoding.models.target import TorchTarget
from smart_decoding.profiling.measure import verification

from .test_loading import write_gguf

Usage = namedtuple("Usage", "total used free")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(params=["qwen3", "qwen3moe"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", request.param, GGMLQuantizationType.Q8_0)
    return tmp_path / "tiny.gguf"


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Strips packed by each call."""
    counts: list[int] = []
    kernels = weights._lib()

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(kernels, name)

        def smart_pack_quants(self, *given: object) -> None:
            counts.append(given[1])  # type: ignore[arg-type]
            kernels.smart_pack_quants(*given)

    monkeypatch.setattr(weights, "_lib", Counting)
    return counts


def load(file: Path, in_bytes: bool = False) -> TorchTarget:
    checkpoint = load_checkpoint(file, quantization=None)
    if in_bytes:
        checkpoint = with_rounded_activations(checkpoint)
    return TorchTarget(checkpoint, "bfloat16", "cpu", 16, 128)


def logits(target: TorchTarget) -> torch.Tensor:
    run = verification(target, 2, 8, 20, 16)
    assert run is not None
    run()
    assert target.decoder.model is not None
    return target.decoder.model._logits[:8].clone()


def kept(cache: Path) -> list[Path]:
    return sorted((cache / "converted").glob("*-panels-*"))


def damage_a_byte(panels: Path) -> None:
    content = bytearray(panels.read_bytes())
    content[-100] ^= 1
    panels.write_bytes(content)


def cut(panels: Path) -> None:
    os.truncate(panels, 100)


def exchange_strips(panels: Path) -> None:
    """With a checksum that is right, as a version that packs in another order would leave them."""
    content = panels.read_bytes()
    sample = len(content) // 3 // 64 * 64
    shutil.rmtree(panels.parent)
    made = next(path for path in panels.parent.parent.iterdir() if path.name.endswith("-stored"))
    parts = [
        torch.frombuffer(bytearray(part), dtype=torch.uint8)
        for part in (content[sample:], content[:sample])
    ]
    KeptPanels(made, False).write(parts)


def test_a_later_start_packs_nothing_and_computes_the_same_bits(
    file: Path, own_cache: Path, packed: list[int]
) -> None:
    first = load(file)
    expected = logits(first)
    assert not kept(own_cache)  # until it is asked for
    first.decoder.keep_panels()
    whole, packed[:] = list(packed), []
    later = load(file)
    assert max(whole) > 2
    assert packed == [2] * len(whole)  # to compare
    assert torch.equal(logits(later), expected)
    made = (kept(own_cache)[0] / "panels").stat()
    later.decoder.keep_panels()  # nothing to do
    assert (kept(own_cache)[0] / "panels").stat().st_ino == made.st_ino


@pytest.mark.parametrize("harm", [damage_a_byte, cut, exchange_strips])
def test_panels_that_are_not_those_are_packed_again(
    harm: Callable[[Path], None], file: Path, own_cache: Path, packed: list[int]
) -> None:
    first = load(file)
    expected = logits(first)
    first.decoder.keep_panels()
    harm(kept(own_cache)[0] / "panels")
    packed.clear()
    later = load(file)
    assert max(packed) > 2
    assert torch.equal(logits(later), expected)
    later.decoder.keep_panels()
    packed.clear()
    assert torch.equal(logits(load(file)), expected)
    assert max(packed) == 2


def test_those_of_older_kernels_and_of_an_older_file_are_not_used(
    file: Path, own_cache: Path, packed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    load(file).decoder.keep_panels()
    old = kept(own_cache)
    monkeypatch.setattr(library, "identity", lambda name: "another build")
    packed.clear()
    later = load(file)
    assert max(packed) > 2
    later.decoder.keep_panels()
    assert len(kept(own_cache)) == 2  # the other build may be in use, too
    os.utime(old[0], (0, 0))
    shutil.rmtree(next(path for path in kept(own_cache) if path != old[0]))
    load(file).decoder.keep_panels()
    assert len(kept(own_cache)) == 1
    assert kept(own_cache) != old
    os.utime(file, (1, 1))
    packed.clear()
    load(file)
    assert max(packed) > 2


def test_panels_whose_strips_lie_one_after_the_other_are_packed_again(
    file: Path, own_cache: Path, packed: list[int]
) -> None:
    """As products in 8 bits read them before super-blocks of two strips took turns."""
    if not weights._lib().smart_multiplies_bytes():
        pytest.skip("this CPU multiplies no bytes")
    first = load(file, in_bytes=True)
    expected = logits(first)
    first.decoder.keep_panels()
    strips = list(first.decoder._arena.strips)
    strips[3] = one_after_the_other(strips[3])
    assert not torch.equal(strips[3], first.decoder._arena.strips[3])
    panels = first.decoder._panels
    assert panels is not None
    shutil.rmtree(kept(own_cache)[0])
    panels.write(strips)
    packed.clear()
    later = load(file, in_bytes=True)
    assert max(packed) > 2
    assert torch.equal(logits(later), expected)


def one_after_the_other(down: torch.Tensor) -> torch.Tensor:
    """The matrix of a layer whose rows have two blocks, with panels of two whole strips."""
    strip_and_block = 2, 2, 34 * weights.vector_width()
    whole = len(down) - len(down) % int(np.prod(strip_and_block))
    turns = down.numpy()[:whole].reshape(-1, *strip_and_block)
    return torch.cat([torch.from_numpy(turns.swapaxes(1, 2).reshape(-1)), down[whole:]])


def test_products_in_8_bits_have_panels_of_their_own(file: Path, own_cache: Path) -> None:
    if not weights._lib().smart_multiplies_bytes():
        pytest.skip("this CPU multiplies no bytes")
    for in_bytes in (False, True):
        load(file, in_bytes).decoder.keep_panels()
    assert len(kept(own_cache)) == 2
    both = [logits(load(file, in_bytes)) for in_bytes in (False, True)]
    shutil.rmtree(own_cache)
    for in_bytes in (False, True):
        assert torch.equal(both[in_bytes], logits(load(file, in_bytes)))


def test_without_room_a_line_says_that_nothing_is_kept(
    file: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    target = load(file)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10, 10, 0))
    target.decoder.keep_panels()
    assert not kept(own_cache)
    (line,) = caplog.messages
    assert line.startswith("packed weights are not kept, each start packs them: the cache")
    assert "\n" not in line


def test_only_quants_as_they_are_stored_are_kept(file: Path, own_cache: Path) -> None:
    for dtype, quantization in (("float32", None), ("bfloat16", "off"), ("bfloat16", "int4")):
        checkpoint = load_checkpoint(file, quantization=quantization)
        TorchTarget(checkpoint, dtype, "cpu", 16, 128).decoder.keep_panels()
    assert not kept(own_cache)
