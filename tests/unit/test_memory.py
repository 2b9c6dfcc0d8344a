"""The estimate of memory: what published models are known to take, and advice that fits."""

from __future__ import annotations

import errno
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from smart_decoding.errors import CapacityError
from smart_decoding.kernels import limits
from smart_decoding.kernels.weights import Matrix, QuantizedTensor
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints import memory
from smart_decoding.models.checkpoints.loading import Checkpoint, load_checkpoint
from smart_decoding.models.checkpoints.memory import EngineLimits, Need
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.heads.files import HeadFiles
from smart_decoding.models.target import fitting_memory
from smart_decoding.models.torch.layers import KVCache

GB = 10**9
CPU = torch.device("cpu")
HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def config(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> Any:
    head_dim = hidden // heads
    sizes = (layers, hidden, heads, kv_heads, head_dim, ffn, vocab)
    return ModelConfig("llama", *sizes, rope_theta=1e4, rms_eps=1e-5, max_positions=131_072)


LLAMA_8B = config(32, 4096, 32, 8, 14_336, 128_256)
LLAMA_70B = config(80, 8192, 64, 8, 28_672, 128_256)
VICUNA_13B = config(40, 5120, 40, 40, 13_824, 32_000)
LIMITS = EngineLimits(kv_tokens=32_768, pages=2208, rows=256, longest=4096)


def checkpoint(of: ModelConfig) -> Checkpoint:
    return Checkpoint(of, {}, Path(), {"model": "big"})


def need(of: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> Need:
    return memory.need_of(checkpoint(of), dtype, CPU, LIMITS)


@pytest.mark.parametrize(
    ("of", "billions"), [(LLAMA_8B, 8.03), (LLAMA_70B, 70.55), (VICUNA_13B, 13.02)]
)
def test_parameters_are_those_of_the_model_cards(of: ModelConfig, billions: float) -> None:
    assert memory.parameters(of) / 1e9 == pytest.approx(billions, abs=0.005)


def test_keys_and_values_of_a_token() -> None:
    assert memory.kv_bytes(LLAMA_8B, torch.bfloat16) == 131_072
    assert memory.kv_bytes(LLAMA_70B, torch.bfloat16) == 327_680
    assert memory.kv_bytes(VICUNA_13B, torch.float32) == 2 * 819_200


def test_the_parts_of_an_estimate() -> None:
    alone = need(LLAMA_8B)
    assert alone.weights == 2 * memory.parameters(LLAMA_8B)
    assert alone.tokens == 16 * LIMITS.pages
    assert alone.total == alone.weights + alone.work + 131_072 * alone.tokens
    assert 0.1 * GB < alone.work < 0.3 * GB
    assert str(alone).startswith("20.9 GB (weights 16.1 GB, KV of 35328 tokens 4.6 GB, work ")


@pytest.mark.parametrize(("scheme", "bits"), [("int8", 8.5), ("int4", 5.0)])
def test_rounded_weights_count_as_they_are_loaded(scheme: str, bits: float, tmp_path: Path) -> None:
    found = load_checkpoint(tiny(tmp_path), quantization=scheme)
    of = found.config
    table = of.vocab * of.hidden
    norms = (2 * of.layers + 1) * of.hidden
    others = memory.parameters(of) - 2 * table - norms
    expected = 2 * table * 8.5 / 8 + others * bits / 8 + 2 * norms
    assert memory.weight_bytes(found, torch.bfloat16, CPU) == expected
    assert expected == sum(map(held, found.weights.values()))
    for dtype, device in ((torch.float32, CPU), (torch.bfloat16, torch.device("cuda"))):
        size = memory.parameters(of) * dtype.itemsize
        assert memory.weight_bytes(found, dtype, device) == size


def test_what_drafts_counts_too() -> None:
    alone = need(LLAMA_70B)
    both = memory.need_of(checkpoint(LLAMA_70B), torch.bfloat16, CPU, LIMITS, checkpoint(LLAMA_8B))
    assert both.per_token == 327_680 + 131_072
    assert both.draft > 2 * memory.parameters(LLAMA_8B)
    rows = 9 * LLAMA_70B.hidden  # of the target's output matrix
    many = replace(LIMITS, seqs=32)
    waiting = 4 * 32 * 512 * LLAMA_70B.hidden  # features of one layer that wait for the head
    plain = torch.zeros(10, 50)
    quants = QuantizedTensor(np.zeros((4, 34), np.uint8), "Q8_0", 32)
    for weights, size, numbers in (
        ({"fc.weight": plain}, 1000 + rows, 500 + rows),
        ({"fc.weight": quants}, 136 + rows, 128 + rows),
        ({"fc.weight": plain, "lm_head.weight": torch.zeros(9, 20)}, 1360, 680),
    ):
        files = HeadFiles({}, {**weights, "draft_ids": torch.arange(9)}, (1,), LLAMA_70B.of_head())
        head = memory.need_of(checkpoint(LLAMA_70B), torch.bfloat16, CPU, many, head=files)
        assert head.draft == size + waiting
        wide = memory.need_of(checkpoint(LLAMA_70B), torch.float32, CPU, many, head=files)
        assert wide.draft == 4 * numbers + waiting
        assert head.per_token == alone.per_token * 81 // 80


@pytest.mark.parametrize(
    ("of", "dtype", "free", "advice"),
    [
        (LLAMA_8B, torch.bfloat16, 18, "lower kv_cache_tokens to 10"),
        (LLAMA_8B, torch.bfloat16, 16.8, "lower kv_cache_tokens to 1"),
        (LLAMA_8B, torch.bfloat16, 16.4, "lower max_num_seqs, and kv_cache_tokens with it"),
        (
            LLAMA_8B,
            torch.bfloat16,
            16,
            "quantization='int4' (weights of about 5.5 GB) or a 4-bit GGUF file",
        ),
        (LLAMA_8B, torch.float32, 16, "4-bit GGUF file, in bfloat16"),
        (LLAMA_8B, torch.bfloat16, 4, "take a smaller model"),
        (LLAMA_70B, torch.bfloat16, 64, "quantization='int4' (weights of about 45.0 GB)"),
        (LLAMA_70B, torch.bfloat16, 32, "vLLM or SGLang"),
        (VICUNA_13B, torch.bfloat16, 30, "lower kv_cache_tokens to 2"),
    ],
)
def test_advice(of: ModelConfig, dtype: torch.dtype, free: float, advice: str) -> None:
    found = memory.what_fits(of, need(of, dtype), LIMITS, int(free * GB), CPU)
    assert advice in found
    assert ("max_model_len with it" in found) == (free == 16.8 or of is VICUNA_13B)


def test_quants_are_no_advice_where_no_kernels_multiply_them() -> None:
    found = memory.what_fits(LLAMA_8B, need(LLAMA_8B), LIMITS, 16 * GB, torch.device("cuda"))
    assert "smaller model" in found
    assert "int4" not in found


def test_the_kv_memory_advised_fits() -> None:
    """Made as the engine makes it, five pages more for each request."""
    free = 18 * GB
    advice = memory.what_fits(LLAMA_8B, need(LLAMA_8B), LIMITS, free, CPU)
    tokens = int(advice.rpartition(" ")[2])
    pages = tokens // 16 + 5 * 32
    fits = EngineLimits(tokens, pages, LIMITS.rows, LIMITS.longest)
    total = memory.need_of(checkpoint(LLAMA_8B), torch.bfloat16, CPU, fits).total
    assert free - 3 * 16 * 131_072 < total <= free


def test_a_gpus_kv_memory_is_what_weights_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 GB of which others hold 4: 0.9 of the whole in all."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (76 * GB, 80 * GB))
    needed = need(LLAMA_8B)
    tokens = memory.tokens_beside(needed, 0.9, torch.device("cuda"))
    held = needed.weights + needed.work + tokens * needed.per_token
    assert 68 * GB - 131_072 < held <= 68 * GB
    assert memory.tokens_beside(needed, 0.2, torch.device("cuda")) < 0


def anonymous() -> int:
    """Bytes of memory that this process holds, without files."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(n.split()[1]) for n in status.splitlines() if n.startswith("RssAnon"))


@pytest.mark.skipif(
    not HUGE.exists() or "[always]" in HUGE.read_text(), reason="all memory is on huge pages"
)
@pytest.mark.parametrize("pages", [250, 520])  # a plane of 1 MB and of 2.1 MB
def test_a_short_prompt_touches_little_of_a_small_kv_memory(pages: int) -> None:
    kv = KVCache.empty(20, 2, pages, 128, torch.bfloat16, CPU, native=True)
    before = anonymous()
    for part in (kv.keys, kv.values):
        assert part.is_contiguous()
        assert part.data_ptr() % 64 == 0
        part[:, :, :2] = 1.0
        assert not part[:, :, 2].any()
    if pages == 250:
        assert anonymous() - before < kv.bytes / 10


@pytest.mark.parametrize(
    ("error", "lacking"),
    [
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_only_a_lack_of_memory_is_called_one(error: Exception, lacking: bool) -> None:
    with (
        pytest.raises(CapacityError if lacking else type(error), match=r"kv_cache|illegal"),
        fitting_memory("model", 3),
    ):
        raise error


def test_a_draft_model_that_is_too_much_is_said_to_be() -> None:
    both = memory.need_of(checkpoint(LLAMA_8B), torch.bfloat16, CPU, LIMITS, checkpoint(VICUNA_13B))
    assert "ngram" in memory.what_fits(LLAMA_8B, both, LIMITS, 30 * GB, CPU)


def test_free_memory_is_what_linux_and_the_container_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(limits, "GROUPS", tmp_path)
    monkeypatch.setattr(limits, "OWN_GROUPS", tmp_path / "none")
    assert memory.available(CPU) is None
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2048 kB\n")
    assert memory.available(CPU) == 2048 * 1024
    (tmp_path / "memory.max").write_text("1000000\n")
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 5\nactive_file 100\ninactive_file 20\n")
    assert memory.available(CPU) == 100_120
    (tmp_path / "memory.stat").write_text("active_file some\ninactive_file 20\n")
    assert memory.available(CPU) == 100_020
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.available(CPU) == 2048 * 1024


def test_it_is_said_before_weights_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny(tmp_path)
    caplog.set_level(logging.INFO, "smart.memory")
    llm = LLM(folder, max_model_len=64)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "smart.memory"]
    assert line.startswith(f"{folder} needs about ")
    assert line.endswith(" are free")
    need = memory.need_of(llm._checkpoint, torch.bfloat16, CPU, LIMITS)
    assert need.weights == sum(2 * w.numel() for w in llm._checkpoint.weights.values())

    monkeypatch.setattr(
        "smart_decoding.models.checkpoints.weight_files.SafetensorsWeights.__getitem__", None
    )
    monkeypatch.setattr(memory, "available", lambda device: 100_000)
    with pytest.raises(CapacityError) as caught:
        LLM(folder, max_model_len=64)
    message = str(caught.value)
    assert message.startswith(f"{folder} needs about ")
    assert "but 0.1 MB are free" in message
    assert "\n" not in message


def held(weight: Matrix) -> int:
    """Bytes of it in memory."""
    return weight.rows.nbytes if isinstance(weight, QuantizedTensor) else 2 * weight.numel()


def tiny(folder: Path) -> Path:
    """A random model and a tokenizer of its own."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64)).save_pretrained(
        folder
    )
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    tokenizers.Tokenizer(words).save(str(folder / "tokenizer.json"))
    return folder
