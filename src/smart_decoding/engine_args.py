"""`EngineArgs`: the options of `LLM`, in vLLM's names, checked before anything is loaded."""

from __future__ import annotations

import logging
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from smart_decoding.errors import CapacityError, ConfigError
from smart_decoding.files import expanded
from smart_decoding.models.checkpoints.registry import DEFAULT_MODEL
from smart_decoding.models.text import chat_template
from smart_decoding.multimodal.images import Limits
from smart_decoding.options import add_options, kinds, named_options, option

DEFAULT_MODEL_LEN = 4096  # where the model and the KV memory allow it, and few requests run
USUAL_TOKENS, USUAL_REQUESTS = 2048, 16  # of a request; that KV memory holds by default

log = logging.getLogger("smart.llm")

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


def _neutral(*allowed: Any, flags: tuple[str, ...] = ()) -> Any:
    """Return an option of vLLM's that changes nothing here, and that no help lists.

    allowed: its values, the default first; without any the option takes all values and is None."""
    return option(next(iter(allowed), None), SUPPRESS, allowed=allowed, flags=flags)


@named_options
@dataclass(frozen=True, kw_only=True)
class EngineArgs:
    """The options of `LLM`, listed below.

    The other options are vLLM's and have no effect here. Options that change no answer in vLLM,
    such as swap_space, take any value, and so does trust_remote_code: a model's code is never run.
    The rest take only the value that holds here.

    None leaves any option at its default. Raises ConfigError or CapacityError for other values.
    """

    model: str | Path = option(DEFAULT_MODEL, "built-in name, hub id, folder or GGUF file")
    speculative_config: Mapping[str, Any] | bool | None = option(
        None,
        "method, drafter, policy and their options, such as "
        '{"method": "ngram", "num_speculative_tokens": 4}; false decodes plainly',
        usual="the drafter is the model's own head or MTP layer, else a cached smaller model of "
        "its family, else ngram; the policy is smart",
    )
    tokenizer: str | Path | None = option(
        None, "folder with another tokenizer", usual="the model's"
    )
    dtype: str = option(
        "bfloat16",
        "type of weights and KV cache: bfloat16 or float32; auto and half are bfloat16, too",
        choices=("bf16", "bfloat16", "fp32", "float32", "float", "auto", "half", "float16"),
    )
    quantization: str | None = option(
        None,
        "int8, int4: round the matrices when they are loaded; off: expand a GGUF file's quants to "
        "dtype",
        usual="as the file stores them",
        choices=("off", "int8", "int4"),
    )
    activations: str = option(
        "auto",
        "activations that meet quants on the CPU kernels in bfloat16: exact, rounded to int8 in "
        "groups of 32, as llama.cpp does, or auto, which measures both at a model's first start",
        choices=("auto", "exact", "int8"),
    )
    device: str = option("auto", "cpu or cuda; auto takes CUDA where there is one")
    max_model_len: int | None = option(
        None,
        "longest prompt plus answer, in tokens",
        usual="4096, or 1024 for each of max_num_seqs, up to 16384, if that is more; what the "
        "model and the KV memory allow, if that is less",
    )
    max_num_seqs: int = option(32, "requests that run at once")
    max_num_batched_tokens: int | None = option(
        None, "prompt tokens in a round", usual="256, on CUDA 2048"
    )
    kv_cache_tokens: int | None = option(
        None,
        "KV memory, in tokens over all requests; max_model_len at least",
        usual="up to 16 requests of 2048 tokens; on CUDA what gpu_memory_utilization leaves",
    )
    gpu_memory_utilization: float = option(0.9, "part of a GPU's memory for weights and KV memory")
    enable_prefix_caching: bool = option(
        True, "keep the keys of earlier requests for prompts that begin alike"
    )
    seed: int = option(0, "number that the seeds of requests without one derive from")
    stop_at_loops: bool | int = option(
        False, "end an answer that only repeats itself, once so many tokens do; true is 24"
    )
    max_logprobs: int = option(
        -1, "most log probabilities of a token that requests may ask for", usual="any number"
    )
    chat_template: str | Path | None = option(
        None,
        "template that makes a prompt of a conversation: a file, vicuna, or the text itself",
        usual="the model's own",
    )
    generation_config: str | Path = option(
        "auto",
        "source of the sampling defaults: auto (the model's generation_config.json or GGUF file), "
        "vllm (no file), or a folder with generation_config.json",
    )
    override_generation_config: Mapping[str, Any] | None = option(
        None, "values in place of sampling defaults, such as temperature=0"
    )
    trust_pickle: bool = option(
        False, "load pickled models and draft heads (pytorch_model.bin), tensors only"
    )
    enforce_eager: bool = option(False, "no CUDA graphs")
    allow_slow: bool = option(
        False,
        "run plain torch on a CPU where the CPU kernels cannot run",
        usual="off: an error",
    )
    limit_mm_per_prompt: Mapping[str, int] | None = option(
        None, "most pictures of one prompt, by kind", usual="image=16, video=1"
    )
    allowed_local_media_path: str | Path | None = option(
        None, "folder of files that messages may name"
    )
    mm_processor_kwargs: Mapping[str, Any] | None = option(
        None, "options of the image processor, such as max_pixels=1000000"
    )
    max_image_pixels: int = option(Limits().pixels, "largest picture, in pixels as it is sent")
    tensor_parallel_size: int = _neutral(1, flags=("-tp",))
    pipeline_parallel_size: int = _neutral(1, flags=("-pp",))
    data_parallel_size: int = _neutral(1, flags=("-dp",))
    trust_remote_code: bool = _neutral(False, True)
    enable_lora: bool = _neutral(False)
    skip_tokenizer_init: bool = _neutral(False)
    tokenizer_mode: str = _neutral("auto")
    load_format: str = _neutral("auto")
    kv_cache_dtype: str = _neutral("auto")
    runner: str = _neutral("auto", "generate")
    task: str = _neutral("auto", "generate")
    cpu_offload_gb: float = _neutral(0)
    block_size: int | None = _neutral(None, 16)  # PAGE of engine/kv.py, which needs numpy
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
        self._check_choices()
        self.template()
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
    def add_cli_args(cls, parser: ArgumentParser) -> ArgumentParser:
        """Give a parser an option for each, such as --max-model-len, with mappings in JSON or as
        K=V. `LLM(**vars(args))` takes what it parses."""
        add_options(parser, cls)
        return parser

    @classmethod
    def from_cli_args(cls, args: Namespace) -> EngineArgs:
        """Return the arguments that a parser with `add_cli_args` has read; others are left out."""
        parsed = vars(args)
        return cls(**{each.name: parsed[each.name] for each in fields(cls) if each.name in parsed})

    def sampling_defaults(
        self, folder: Path, in_file: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return the default sampling parameters. folder: the model's; in_file: what its GGUF file
        recommends. Raises ConfigError for values that SamplingParams refuses."""
        from smart_decoding.engine.sampling_params import SamplingParams  # late: numpy is slow
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
            good = isinstance(value, tuple(_KINDS[kind] for kind in kinds(each)))
            if value is None and not good:
                object.__setattr__(self, each.name, each.default)
            elif not good and each.name not in _CHECKED_APART:
                raise ConfigError(
                    f"{each.name}={value!r} is not allowed: it must be of the type {each.type}"
                )

    def _check_choices(self) -> None:
        for each in fields(self):
            known = (each.default, *each.metadata["choices"])
            value = getattr(self, each.name)
            if len(known) > 1 and value not in known and each.name not in _CHECKED_APART:
                raise ConfigError(
                    f"{each.name}={value!r} is not supported: "
                    f"use {', '.join(map(str, dict.fromkeys(known)))}"
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


def require_neutral(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option of vLLM with a value that is not supported here."""
    for name, value in options.items():
        _require_one_of(name, value, _NEUTRAL[name])


def _require_one_of(name: str, value: object, allowed: tuple[Any, ...]) -> None:
    if allowed and value not in allowed:
        raise ConfigError(f"{name}={value!r} is not supported: leave it at {allowed[-1]!r}")
