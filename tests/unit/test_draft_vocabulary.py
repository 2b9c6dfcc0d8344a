"""The tokens that a layer for multi-token prediction proposes are those used last."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from smart_decoding.kernels.weights import pack, pack_bytes, replace_rows
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.mtp import mtp_files
from smart_decoding.models.heads.vocabulary import DraftVocabulary

from ..parity.reference_head import PAGES, SCRATCH, check
from .drafters.tiny import ways_to_run
from .test_loading import own_cache
from .test_mtp_files import OWN, tensors
from .test_mtp_levels import Expected, decoder_of, drafting_of, file_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["own_cache"]


def test_new_tokens_take_the_places_of_those_unused_for_longest() -> None:
    vocabulary = DraftVocabulary(np.arange(4), 10)
    places, tokens = vocabulary.use(np.array([2, 8, 8]))
    assert (places.tolist(), tokens.tolist()) == ([3], [8])  # the highest id goes first
    places, tokens = vocabulary.use(np.array([9]))
    assert (places.tolist(), tokens.tolist()) == ([1], [9])  # 2 and 8 were used
    places, tokens = vocabulary.use(np.array([0, 9]))
    assert not len(places)
    places, tokens = vocabulary.use(np.array([5, 6]))
    assert sorted(places.tolist()) == [2, 3]  # of 2 and 8, used together
    assert tokens.tolist() == [5, 6]


def test_a_text_of_many_tokens_takes_half_of_the_places_at_most() -> None:
    places, tokens = DraftVocabulary(np.arange(6), 100).use(np.arange(50, 90))
    assert len(places) == len(tokens) == 3


@given(st.lists(st.lists(st.integers(0, 39), max_size=12), max_size=12), st.integers(1, 30))
def test_places_hold_each_token_once_and_the_last_text_is_there(
    texts: list[list[int]], size: int
) -> None:
    vocabulary, held = DraftVocabulary(np.arange(size), 40), np.arange(size)
    for text in texts:
        before = set(held.tolist())
        places, tokens = vocabulary.use(np.array(text, np.int64))
        assert len(set(places.tolist())) == len(places)
        assert not before & set(tokens.tolist())
        held[places] = tokens
        assert len(set(held.tolist())) == size
        new = set(text) - before
        assert len(new & set(held.tolist())) == min(len(new), size // 2)
        if len(before & set(text)) + len(new) <= size // 2:
            assert set(text) <= set(held.tolist())


@pytest.mark.parametrize("kind", ["bytes", "fp32", "bf16"])
@pytest.mark.parametrize("width", [4, 12, 64])
def test_replaced_rows_are_those_of_a_new_packing(kind: str, width: int) -> None:
    packing: Any = {
        "bytes": pack_bytes,
        "fp32": lambda weight: (pack([weight]),),
        "bf16": lambda weight: (pack([weight.bfloat16()]),),
    }[kind]
    weight = torch.randn(77, width)
    at = torch.tensor([5, 76, 0, 33, 31])
    changed = weight.clone()
    changed[at] = torch.randn(5, width)
    packed, *others = packing(weight)
    new, *of_new = packing(changed[at])
    replace_rows(packed, at, new)
    expected, *of_expected = packing(changed)
    assert torch.equal(packed.memory, expected.memory)
    for held, other, wanted in zip(others, of_new, of_expected, strict=True):
        held[at] = other[: len(at)]
        assert torch.equal(held, wanted)


@pytest.mark.parametrize(
    ("kind", "own", "quantization"),
    [
        ("qwen35", OWN[0], None),
        ("qwen35", OWN[3], "off"),
        ("qwen35moe", OWN[1], None),
        ("qwen35moe", OWN[2], "off"),
    ],
)
def test_what_was_said_is_proposed(
    quantization: str | None, own: Sequence[str], kind: str, tmp_path: Path
) -> None:
    """Beside the tokens of the lowest ids, with probabilities among all that are there, by rows of
    the output matrix that ranks them."""
    weights = tensors(kind=kind, own=own)
    path = file_of(tmp_path, kind, "tiny.gguf", weights)
    for native in ways_to_run(load_checkpoint(path).config):
        drafting = drafting_of(path, 120, quantization, native)
        drafting.round()
        drafting.request.tokens.extend([250, 299, 140])
        trees = drafting.round()
        there = [*range(117), 140, 250, 299]
        check(trees, Expected(kind, drafting.request.tokens, there, weights).probs)


def test_heads_of_the_same_files_change_apart(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(file_of(tmp_path, "qwen35", "tiny.gguf", tensors()))
    assert checkpoint.mtp is not None
    files = mtp_files(checkpoint.config, checkpoint.mtp, 120)
    for native in ways_to_run(checkpoint.config):
        decoder = decoder_of(checkpoint, native)
        one, other = (EagleHead(files, decoder, PAGES, SCRATCH, 128) for _ in range(2))
        one.use(np.array([250]))
        assert 250 in one.draft_ids.tolist()
        assert other.draft_ids.tolist() == [*range(120)]
