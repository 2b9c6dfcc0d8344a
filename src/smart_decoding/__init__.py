"""SMART: speculative decoding with draft trees sized by their cost. Names are imported on first
use: torch is slow."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from smart_decoding.kernels import children

if TYPE_CHECKING:
    from smart_decoding.async_llm import AsyncLLM
    from smart_decoding.engine.outputs import CompletionOutput, Logprob, RequestOutput
    from smart_decoding.engine.sampling_params import RequestOutputKind, SamplingParams
    from smart_decoding.engine.structured import StructuredOutputsParams
    from smart_decoding.engine_args import AsyncEngineArgs, EngineArgs
    from smart_decoding.errors import (
        CapacityError,
        ConfigError,
        DownloadError,
        EngineStoppedError,
        ModelError,
        SmartError,
    )
    from smart_decoding.llm import LLM
    from smart_decoding.multimodal.prompts import TextPrompt, TokensPrompt

# How often OpenMP's threads look for work before they sleep. The default of 300,000 takes
# milliseconds in which no other process can run: beside one, `LLM` is then half as fast, and torch
# a sixth. The number counts between forwards and in torch, where 150 and 1,000 are equally fast;
# within a forward the kernels wait by themselves (csrc/team.h). OpenMP reads it when torch is
# imported. If that was earlier, the kernels set it when they are loaded.
SPINS = "150"
if "OMP_WAIT_POLICY" not in os.environ and "torch" not in sys.modules:
    children.set_for_us("GOMP_SPINCOUNT", SPINS)

__version__ = "0.2.0"

__all__ = [
    "LLM",
    "AsyncEngineArgs",
    "AsyncLLM",
    "CapacityError",
    "CompletionOutput",
    "ConfigError",
    "DownloadError",
    "EngineArgs",
    "EngineStoppedError",
    "Logprob",
    "ModelError",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "SmartError",
    "StructuredOutputsParams",
    "TextPrompt",
    "TokensPrompt",
    "__version__",
]

_HOMES = {
    "AsyncEngineArgs": "smart_decoding.engine_args",
    "AsyncLLM": "smart_decoding.async_llm",
    "CompletionOutput": "smart_decoding.engine.outputs",
    "EngineArgs": "smart_decoding.engine_args",
    "LLM": "smart_decoding.llm",
    "Logprob": "smart_decoding.engine.outputs",
    "RequestOutput": "smart_decoding.engine.outputs",
    "RequestOutputKind": "smart_decoding.engine.sampling_params",
    "SamplingParams": "smart_decoding.engine.sampling_params",
    "StructuredOutputsParams": "smart_decoding.engine.structured",
    "TextPrompt": "smart_decoding.multimodal.prompts",
    "TokensPrompt": "smart_decoding.multimodal.prompts",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "smart_decoding.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
