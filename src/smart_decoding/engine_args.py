"""`EngineArgs`: the options of `LLM`, in vLLM's names, checked before anything is loaded."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError, named_options
from smart_decoding.files import expanded
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL
from smart_decoding.models.text import chat_template
from smart_decoding.multimodal.images import Limits

DEFAULT_MODEL_LEN = 4096  # where the model and the KV memory allow it, and few requests run
USUAL_TOKENS, USUAL_REQUESTS = 2048, 16  # of a request; that KV memory holds by default

log = logging.getLogger("smart.llm")

_CHOICES: Mapping[str, tuple[str | None, ...]] = {
    "activations": ("auto", "exact", "int8"),
    "quantization": (None, "off", "int8", "int4"),
}
# names of default sampling parameters: generation_config.json's, and ours
_SAMPLING = {
    **{name: name for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")},
    "max_new_tokens": "max_tokens",
}
# vLLM's options of calls that change nothing here, with the values that they may have.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "lora_request": (None,),
    "priority": (None, 0),
    "chat_template_content_format": ("auto",),
    "continue_final_message": (False,),
}
# What an option's type takes: bool is a number, too, and so are numpy's.
_KINDS: Mapping[str, type] = {
    "int": Integral,
    "float": Real,
    "bool": Integral,
    "str": str,
    "Path": Path,
    "Mapping": Mapping,
    "None": type(None),
}
_CHECKED_APART = ("dtype", "speculative_config")  # their readers give better errors


def _neutral(*allowed: Any, short: str = "") -> Any:
    """Return an option of vLLM's that changes nothing here.

    allowed: its values, the default first; without any the option takes all values and is None.
    short: another flag of the command line."""
    return field(default=next(iter(allowed), None), metadata={"allowed": allowed, "short": short})


@named_options
@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """The options of `LLM`.

    model: built-in name, hub id, folder of safetensors, or GGUF file.
    speculative_config: None (under the policy `smart` drafts the head that comes with the model,
        or its MTP layer, else a smaller model of its family or a built-in one in the cache, else
        n-grams), False (plain decoding), or a dict: method (eagle, mtp, draft_model, ngram, union,
        none), policy (off, chain, static, eagle2, paper, smart), and either's options.
    tokenizer: a folder with another tokenizer than the model's.
    dtype: bfloat16 or float32, of weights and KV cache. auto and half are bfloat16, too.
    quantization: None keeps weights as they are stored: quants of GGUF files stay quants on the
        CPU kernels in bfloat16. off expands them to dtype. int8 and int4 round matrices to so
        many bits when they are loaded.
    activations: the factors of quants on the CPU kernels in bfloat16. int8: rounded to 8 bits in
        groups of 32, as llama.cpp does, on CPUs with AVX2 or i8mm. exact: not rounded, in bfloat16.
        auto: what is measured to be faster at a model's first start (profiling/ways.py). Answers
        are the same under every policy.
    device: cpu or cuda; auto takes CUDA where there is one.
    max_model_len: longest prompt plus answer, in tokens (4,096; 1,024 for each of max_num_seqs, up
        to 16,384, if that is more; what the model or kv_cache_tokens allows if that is less).
    max_num_seqs: requests in a round. max_num_batched_tokens: prompt tokens in a round (256, on
        CUDA 2,048).
    kv_cache_tokens: KV memory, in tokens over all requests (up to 16 of 2,048; on CUDA what
        gpu_memory_utilization leaves); at least max_model_len.
    gpu_memory_utilization: part of a GPU's memory that weights and KV memory may fill.
    enable_prefix_caching: keep the keys of finished requests for prompts that begin alike.
    seed: the seeds of requests without their own are drawn from it.
    stop_at_loops: end an answer that only repeats itself, once so many tokens do; True: 24.
    max_logprobs: the most log probabilities of a token that requests may ask for; -1: any.
    chat_template: makes prompts of conversations, instead of the model's own template: a file, a
        built-in name (vicuna), or the text itself.
    generation_config: where default sampling parameters come from: auto (the model's
        generation_config.json or GGUF file), vllm (nowhere), or a folder with such a JSON file.
        override_generation_config: values in place of its own.
    trust_pickle: load pytorch_model.bin, tensors only, where a model or draft head has no
        safetensors; without it only safetensors are loaded.
    enforce_eager: no CUDA graphs.
    allow_slow: run plain torch on a CPU where the CPU kernels cannot run; an error without it.

    Of vision-language models:
    limit_mm_per_prompt: images of a prompt by modality (image 16, video 1).
    allowed_local_media_path: the folder that messages may name files in (none).
    mm_processor_kwargs: options of the image processor, such as max_pixels.
    max_image_pixels: of one image as sent.

    The other options are vLLM's and have no effect here. Options that change no answer in vLLM,
    such as swap_space, take any value, and so does trust_remote_code: a model's code is never run.
    The rest take only the value that holds here.

    None leaves any option at its default. Raises ConfigError or CapacityError for other values.
    """

    model: str | Path = DEFAULT_MODEL
    speculative_config: Mapping[str, Any] | bool | None = None
    tokenizer: str | Path | None = None
    dtype: str = "bfloat16"
    quantization: str | None = None
    activations: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int = 32
    max_num_batched_tokens: int | None = None
    kv_cache_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enable_prefix_caching: bool = True
    seed: int = 0
    stop_at_loops: bool | int = False
    max_logprobs: int = -1
    chat_template: str | Path | None = None
    generation_config: str | Path = "auto"
    override_generation_config: Mapping[str, Any] | None = None
    trust_pickle: bool = False
    enforce_eager: bool = False
    allow_slow: bool = False
    limit_mm_per_prompt: Mapping[str, int] | None = None
    allowed_local_media_path: str | Path | None = None
    mm_processor_kwargs: Mapping[str, Any] | None = None
    max_image_pixels: int = Limits().pixels
    tensor_parallel_size: int = _neutral(1, short="-tp")
    pipeline_parallel_size: int = _neutral(1, short="-pp")
    data_parallel_size: int = _neutral(1, short="-dp")
    trust_remote_code: bool = _neutral(False, True)
    enable_lora: bool = _neutral(False)
    skip_tokenizer_init: bool = _neutral(False)
    tokenizer_mode: str = _neutral("auto")
    load_format: str = _neutral("auto")
    kv_cache_dtype: str = _neutral("auto")
    runner: str = _neutral("auto", "generate")
    task: str = _neutral("auto", "generate")
    cpu_offload_gb: float = _neutral(0)
    block_size: int | None = _neutral(None, PAGE)
    revision: str | None = _neutral(None)
    tokenizer_revision: str | None = _neutral(None)
    hf_overrides: Mapping[str, Any] | None = _neutral(None, {})
    swap_space: float | None = _neutral()
    enable_chunked_prefill: bool | None = _neutral()
    disable_chunked_mm_input: bool | None = _neutral()
    disable_log_stats: bool | None = _neutral()
    max_seq_len_to_capture: int | None = _neutral()
    compilation_config: Mapping[str, Any] | int | None = _neutral()
    disable_custom_all_reduce: bool | None = _neutral()
    async_scheduling: bool | None = _neutral()
    distributed_executor_backend: str | None = _neutral()

    def __post_init__(self) -> None:
        from smart_decoding.models.target import dtype_of  # imported late: torch is slow

        self._check_kinds()
        dtype_of(self.dtype)
        if self.dtype in ("half", "float16"):
            log.warning("dtype=%r runs in bfloat16: float16 is not supported", self.dtype)
        self._check_neutral()
        self.template()
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is not supported: "
                    f"use {', '.join(map(str, known))}"
                )
        self.media_limits()
        self._at_least(
            1, "max_num_seqs", "max_num_batched_tokens", "max_model_len", "kv_cache_tokens"
        )
        self._at_least(0, "seed", "stop_at_loops")
        self._at_least(-1, "max_logprobs")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization={self.gpu_memory_utilization} is not allowed: "
                "it must be above 0 and at most 1"
            )

    @classmethod
    def add_cli_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Give a parser an option for each, such as --max-model-len, with mappings in JSON.
        `LLM(**vars(args))` takes what it parses."""
        for each in fields(cls):
            _add_cli_arg(parser, each, default=each.default)
        return parser

    @classmethod
    def add_neutral_cli_args(cls, parser: argparse.ArgumentParser) -> None:
        """Give a parser the options that change nothing here, unlisted, None by default."""
        for each in _neutral_fields():
            _add_cli_arg(parser, each, help=argparse.SUPPRESS)

    @classmethod
    def neutral_cli_args(cls, args: argparse.Namespace) -> dict[str, Any]:
        """Return those options as such a parser has read them."""
        return {each.name: getattr(args, each.name) for each in _neutral_fields()}

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> EngineArgs:
        """Return the arguments that a parser with `add_cli_args` has read; others are left out."""
        parsed = vars(args)
        return cls(**{each.name: parsed[each.name] for each in fields(cls) if each.name in parsed})

    def sampling_defaults(
        self, folder: Path, in_file: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the default sampling parameters. folder: the model's; in_file: what its GGUF file
        recommends. Raises ConfigError for values that SamplingParams refuses."""
        from smart_decoding.models.checkpoints.loading import (
            generation_config,  # imported late: torch is slow
        )

        chosen = self.generation_config
        where = folder if chosen == "auto" else chosen
        source = "generation_config.json" + ("" if chosen == "vllm" else f" in {where}")
        found: Mapping[str, Any] | None = {}
        if chosen == "auto" and in_file:
            source, found = "general.sampling of the GGUF file", in_file
        elif chosen != "vllm":
            found = generation_config(expanded(where))
        if found is None and chosen != "auto":
            raise ConfigError(
                f"generation_config={str(chosen)!r} is not supported: give auto, vllm, or a folder "
                "with generation_config.json"
            )
        values = {**(found or {}), **(self.override_generation_config or {})}
        ours = {
            _SAMPLING[name]: value
            for name, value in values.items()
            if name in _SAMPLING and value is not None
        }
        if values.get("do_sample") is True:  # transformers' default temperature
            ours.setdefault("temperature", 1.0)
        try:
            SamplingParams(**ours)
        except ConfigError as error:
            raise ConfigError(
                f"{source}: {error}; generation_config='vllm' leaves it out"
            ) from error
        return ours

    def template(self) -> str | None:
        """Return the text of the option `chat_template`; None for the model's own template."""
        return None if self.chat_template is None else chat_template.read(self.chat_template)

    def media_limits(self) -> Limits:
        """Return the limits on images and videos of a prompt."""
        counts = {**Limits().per_prompt, **(self.limit_mm_per_prompt or {})}
        folder = self.allowed_local_media_path
        return Limits(counts, None if folder is None else expanded(folder), self.max_image_pixels)

    def longest(self, positions: int) -> int:
        """Return the longest prompt plus answer of a model of so many positions. Raises
        CapacityError if max_model_len exceeds the KV memory."""
        requested = self.max_model_len
        memory = self.kv_cache_tokens
        if requested is None:  # half of the memory of many requests: an editor's or a chat's tools
            most = max(DEFAULT_MODEL_LEN, self._requests * USUAL_TOKENS // 2)
            return min(most, positions, memory or positions)
        if memory is not None and requested > memory:
            raise CapacityError(
                f"max_model_len={requested} exceeds the KV memory of {memory} tokens: "
                "lower it or raise kv_cache_tokens"
            )
        return requested

    def kv_tokens(self, longest: int) -> int:
        """Return tokens of KV memory where an answer and its prompt may be `longest` tokens."""
        usual = min(longest, USUAL_TOKENS) * self._requests
        return self.kv_cache_tokens or max(longest, usual)

    @property
    def _requests(self) -> int:
        """Requests that KV memory holds by default."""
        return min(self.max_num_seqs, USUAL_REQUESTS)

    def chunk(self, on_cuda: bool) -> int:
        """Return prompt tokens in a round."""
        return self.max_num_batched_tokens or (2048 if on_cuda else 256)

    def _check_kinds(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            kinds = _kinds(each)
            good = isinstance(value, tuple(_KINDS[kind] for kind in kinds))
            if value is None and not good:
                object.__setattr__(self, each.name, each.default)
            elif not good and each.name not in _CHECKED_APART:
                raise ConfigError(
                    f"{each.name}={value!r} is not allowed: it must be of the type {each.type}"
                )

    def _check_neutral(self) -> None:
        for each in fields(self):
            _require_one_of(each.name, getattr(self, each.name), each.metadata.get("allowed", ()))
        folder = self.tokenizer
        if folder not in (None, self.model) and not expanded(str(folder)).is_dir():
            raise ConfigError(f"tokenizer={str(folder)!r} is not supported: give a folder, or none")
        unknown = sorted(set(self.override_generation_config or ()) - set(_SAMPLING))
        if unknown:
            raise ConfigError(
                f"override_generation_config has an unknown option {unknown[0]!r}: "
                f"use {', '.join(_SAMPLING)}"
            )

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name}={value} is not allowed: it must be at least {least}")


AsyncEngineArgs = EngineArgs  # vLLM's name for the options of `AsyncLLM`


def _neutral_fields() -> list[Field[Any]]:
    return [each for each in fields(EngineArgs) if "allowed" in each.metadata]


def _add_cli_arg(parser: argparse.ArgumentParser, option: Field[Any], **how: Any) -> None:
    flags = ["--" + option.name.replace("_", "-")]
    if short := option.metadata.get("short"):
        flags.append(short)
    kind = _kinds(option)[0]
    if kind == "bool":
        parser.add_argument(*flags, action=argparse.BooleanOptionalAction, **how)
    else:
        parse: Any = {"int": int, "float": float, "Mapping": json.loads}.get(kind, str)
        parser.add_argument(*flags, type=parse, **how)


def require_neutral(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option of vLLM with a value that is not supported here."""
    for name, value in options.items():
        _require_one_of(name, value, _NEUTRAL[name])


def _require_one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if allowed and value not in allowed:
        raise ConfigError(f"{name}={value!r} is not supported: leave it at {allowed[-1]!r}")


def _kinds(option: Field[Any]) -> list[str]:
    """Return the names of an option's types."""
    return [kind.partition("[")[0] for kind in str(option.type).split(" | ")]
