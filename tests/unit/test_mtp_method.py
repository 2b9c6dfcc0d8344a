"""`method="mtp"`: the default where a file has such a layer, its options, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch

from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError, ModelError
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints import memory
from smart_decoding.models.checkpoints.loading import load_checkpoint

from .test_loading import own_cache, write_gguf
from .test_mtp_files import EMBEDDING, OUTPUT, OWN, SHAPES, tensors

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["own_cache"]
PROMPTS = ["he he he", "hello", "a b c"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_gguf(tmp_path / "tiny.gguf", "qwen35", mtp=tensors())
    return tmp_path / "tiny.gguf"


@pytest.fixture
def without(tmp_path: Path) -> Path:
    """The same model without the layer."""
    write_gguf(tmp_path / "without.gguf", "qwen35")
    return tmp_path / "without.gguf"


def load(path: Path, config: Any = None, dtype: str = "fp32") -> LLM:
    return LLM(path, speculative_config=config, dtype=dtype, allow_slow=True)


def answers(llm: LLM, temperature: float = 0.0) -> list[list[int]]:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=20, ignore_eos=True)
    return [list(each.outputs[0].token_ids) for each in llm.generate(PROMPTS, params)]


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize(
    ("config", "what"),
    [
        (None, "the model's MTP layer"),
        ({"policy": "eagle2", "depth": 2}, "the model's MTP layer"),
        ({"method": "mtp", "draft_vocab_size": 100, "policy": "chain"}, "the model's MTP layer"),
        ({"method": "qwen3_next_mtp", "num_speculative_tokens": 2}, "the model's MTP layer"),
        ({"method": "qwen3_5_mtp", "num_speculative_tokens": 1}, "the model's MTP layer"),
        ({"method": "union", "draft_vocab_size": 100}, "union of the model's MTP layer + ngram"),
        ({"method": "ngram"}, "ngram"),
        ({"min_n": 3}, "ngram"),
    ],
)
def test_what_drafts_changes_no_token(
    config: Any, what: str, temperature: float, path: Path
) -> None:
    llm = load(path, config)
    assert llm.speculation.description == what
    assert isinstance(llm.speculation.drafter, EagleDrafter) == (what == "the model's MTP layer")
    assert answers(llm, temperature) == answers(load(path, False), temperature)


def test_n_grams_draft_beside_it_unless_the_model_is_small(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smart_decoding.speculation.SMALL", 1000)
    assert load(path).speculation.description == "union of the model's MTP layer + ngram"


@pytest.mark.parametrize("own", OWN)
def test_it_drafts_in_bf16_beside_quants(own: Sequence[str], tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    write_gguf(tmp_path / "quants.gguf", "qwen35", kind, mtp=tensors(own=own))
    llm = load(tmp_path / "quants.gguf", {"method": "mtp", "policy": "eagle2"}, "bf16")
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    outputs = llm.generate(PROMPTS, params)
    assert all(len(each.outputs[0].token_ids) == 20 for each in outputs)
    assert sum(each.outputs[0].metrics.verified for each in outputs) > 0


@pytest.mark.parametrize("size", [0, 301, 1.5, "many", True])
def test_a_number_of_tokens_that_cannot_be_is_refused(size: Any, path: Path) -> None:
    with pytest.raises(ConfigError, match=f"draft_vocab_size={size!r} .* 1 to 300"):
        load(path, {"method": "mtp", "draft_vocab_size": size})


def test_what_it_does_not_take_is_refused(path: Path, without: Path) -> None:
    with pytest.raises(ConfigError, match=r"'model' .* method 'mtp' takes: draft_vocab_size"):
        load(path, {"method": "mtp", "model": "smollm2-135m"})
    with pytest.raises(ConfigError, match="unknown option 'draft_vocab_size'"):
        load(path, {"method": "ngram", "draft_vocab_size": 100})
    with pytest.raises(ModelError, match=r"without\.gguf has no layer for multi-token prediction"):
        load(without, {"method": "mtp"})
    assert load(without).speculation.description == "ngram"


def test_a_damaged_layer_is_told_and_does_not_draft(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    held = tensors()
    del held["mtp.fc.weight"]
    write_gguf(tmp_path / "damaged.gguf", "qwen35", mtp=held)
    assert load(tmp_path / "damaged.gguf").speculation.description == "ngram"
    assert "lacks the tensor mtp.fc.weight" in caplog.text


def test_it_counts_as_memory_and_makes_way(
    path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = load_checkpoint(path)
    limits = memory.EngineLimits(kv_tokens=64, pages=8, rows=8, longest=64)
    cpu = torch.device("cpu")

    def need(tokens: int) -> memory.Need:
        return memory.need_of(checkpoint, torch.float32, cpu, limits, mtp_tokens=tokens)

    layer = sum(map(torch.Size.numel, map(torch.Size, SHAPES.values())))
    assert need(0).draft == 0
    assert need(300).draft == 4 * layer
    assert need(100).draft == 4 * (layer + 100 * 32)
    assert need(300).per_token == 2 * need(0).per_token  # one layer of the model has keys

    write_gguf(tmp_path / "own.gguf", "qwen35", mtp=tensors(own=(EMBEDDING, OUTPUT)))
    checkpoint = load_checkpoint(tmp_path / "own.gguf")
    assert need(300).draft == 4 * (layer + 3 * 300 * 32)
    assert need(100).draft == 4 * (layer + (2 * 300 + 100) * 32)

    def little(checkpoint: Any, need: memory.Need, *_: Any) -> None:
        if need.draft:
            raise CapacityError("too little memory")

    monkeypatch.setattr(memory, "require_memory", little)
    assert load(path).speculation.description == "ngram"
    assert "n-grams draft" in caplog.text
    with pytest.raises(CapacityError):
        load(path, {"method": "mtp"})
