"""`EngineArgs`: the options of `LLM`, in vLLM's names, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.models import chat_template
from smart_decoding.models.registry import DEFAULT_MODEL
from smart_decoding.multimodal.images import Limits

DEFAULT_MODEL_LEN = 4096  # where the model and the KV memory allow it

QUANTIZATIONS = (None, "off", "int8", "int4")


@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """What `LLM` takes.

    model: built-in name, hub id, folder of safetensors, or GGUF file.
    speculative_config: None (the model's default head under the policy `smart`, if it has one),
        False (plain decoding), or a dict: method (eagle, draft_model, ngram, recycling, union,
        none), policy (off, chain, static, eagle2, paper, pooled_chain, throughput_chain, smart),
        and either's options.
    dtype: bfloat16 or float32, of weights and KV cache.
    quantization: None keeps weights as they are stored: quants of GGUF, GPTQ and AWQ files stay
        quants on the CPU kernels in bfloat16. off expands them to dtype. int8 and int4 round
        matrices to so many bits when they are loaded.
    activations: int8 rounds what quants are multiplied with to 8 bits, in groups of 32, as
        llama.cpp does: faster, a slightly different model, and still the same words under every
        policy. Only on CPUs with VNNI or i8mm, in bfloat16.
    device: cpu or cuda; auto takes CUDA where there is one.
    max_model_len: longest prompt plus answer, in tokens (4,096, or what the model or
        kv_cache_tokens allows if that is less).
    max_num_seqs: requests in a round. max_num_batched_tokens: prompt tokens in a round (256, on
        CUDA 2,048).
    kv_cache_tokens: KV memory, in tokens over all requests (up to 16 of 2,048; on CUDA what
        gpu_memory_utilization leaves); at least max_model_len.
    gpu_memory_utilization: part of a GPU's memory that weights and KV memory may fill.
    enable_prefix_caching: keep the keys of finished requests for prompts that begin alike.
    seed: what the seeds of requests without their own are drawn from.
    stop_at_loops: end an answer that only repeats itself.
    profile_later: costs that are not known yet are guessed, until `LLM.take_profile` is called.
    chat_template: what makes prompts of conversations, instead of the model's own template: a file,
        a built-in name (vicuna), or the text itself.
    trust_pickle: load pytorch_model.bin where a model or draft head has no safetensors, of which
        only tensors are read; safetensors only without.
    enforce_eager: no CUDA graphs.
    allow_slow: run plain torch on a CPU where the CPU kernels cannot run; an error without it.

    Of vision-language models:
    limit_mm_per_prompt: images of a prompt by modality (image 16, video 1).
    allowed_local_media_path: the folder that messages may name files in (none).
    mm_processor_kwargs: options of the image processor, such as max_pixels.
    max_image_pixels: of one image as it is sent.

    Raises ConfigError or CapacityError for values that cannot be.
    """

    model: str | Path = DEFAULT_MODEL
    speculative_config: Mapping[str, Any] | bool | None = None
    dtype: str = "bfloat16"
    quantization: str | None = None
    activations: str | None = None
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    seed: int = 0
    stop_at_loops: bool = False
    profile_later: bool = False
    chat_template: str | Path | None = None
    trust_pickle: bool = False
    enforce_eager: bool = False
    allow_slow: bool = False
    limit_mm_per_prompt: Mapping[str, int] | None = None
    allowed_local_media_path: str | Path | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    max_image_pixels: int = Limits().pixels

    def __post_init__(self) -> None:
        from smart_decoding.models.target import dtype_of  # imported late: torch is slow

        dtype_of(self.dtype)
        self.template()
        if self.activations not in (None, "int8"):
            raise ConfigError(f"activations={self.activations!r} is not supported: use int8")
        if self.quantization not in QUANTIZATIONS:
            known = ", ".join(map(str, QUANTIZATIONS))
            raise ConfigError(f"quantization={self.quantization!r} is not supported: use {known}")
        self.media_limits()
        self._at_least(
            1, "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_tokens"
        )
        self._at_least(0, "seed")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} is not allowed: "
                "it must be above 0 and at most 1"
            )

    @classmethod
    def of(cls, **options: Any) -> EngineArgs:
        """From keyword arguments. Raises ConfigError for one that is not known."""
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                close = get_close_matches(name, known, 1)
                hint = f"did you mean {close[0]!r}?" if close else f"use {', '.join(known)}"
                raise ConfigError(f"unknown option {name!r}: {hint}")
        return cls(**options)

    def template(self) -> str | None:
        """The text of the chat template asked for; None for the model's own."""
        return None if self.chat_template is None else chat_template.read(self.chat_template)

    def media_limits(self) -> Limits:
        """What a prompt may hold beside text."""
        counts = {**Limits().per_prompt, **(self.limit_mm_per_prompt or {})}
        folder = self.allowed_local_media_path
        return Limits(
            counts, None if folder is None else Path(folder).expanduser(), self.max_image_pixels
        )

    def longest(self, positions: int) -> int:
        """The longest prompt plus answer of a model of so many positions. Raises CapacityError if
        the one asked for can never be held."""
        asked = self.max_model_len
        memory = self.kv_cache_tokens
        if asked is None:
            return min(DEFAULT_MODEL_LEN, positions, memory or positions)
        if memory is not None and asked > memory:
            raise CapacityError(
                f"max_model_len={asked} exceeds the KV memory of {memory} tokens: "
                "lower it or raise kv_cache_tokens"
            )
        return asked

    def kv_tokens(self, longest: int) -> int:
        """Tokens of KV memory where an answer and its prompt may be `longest` tokens."""
        usual = min(longest, 2048) * min(self.max_num_seqs, 16)
        return self.kv_cache_tokens or max(longest, usual)

    def chunk(self, on_cuda: bool) -> int:
        """Prompt tokens in a round."""
        return self.max_num_batched_tokens or (2048 if on_cuda else 256)

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value} is not allowed: it must be at least {least}")
