"""SMART: speculative decoding with draft trees sized by their cost. Names are imported on first
use: torch is slow."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.engine.structured import StructuredOutputsParams
    from smart_decoding.errors import (
        CapacityError,
        ConfigError,
        DownloadError,
        ModelError,
        SmartError,
    )
    from smart_decoding.llm import LLM

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "CapacityError",
    "ConfigError",
    "DownloadError",
    "ModelError",
    "SamplingParams",
    "SmartError",
    "StructuredOutputsParams",
    "__version__",
]

_HOMES = {
    "LLM": "smart_decoding.llm",
    "SamplingParams": "smart_decoding.engine.sampling_params",
    "StructuredOutputsParams": "smart_decoding.engine.structured",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES.get(name, "smart_decoding.errors")), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
