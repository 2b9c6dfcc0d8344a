"""SMART inside vLLM, of which it needs no patch:

    python -m vllm.entrypoints.openai.api_server --model MODEL --speculative-config '{"method":
        "ngram", ...}' \\
        --scheduler-cls smart_decoding.integrations.vllm.SmartScheduler

`smart vllm-config`, which measures instead and writes an option of vLLM's own. vLLM finds
`register` by itself, as a plugin. It does nothing unless SMART_VLLM_VERIFICATION is 1: then our
costs size the budget of vLLM's `enable_adaptive_verification` (docs/vllm.md). Nothing of vLLM is
imported before one of these is asked for.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.integrations.vllm.scheduler import SmartAsyncScheduler, SmartScheduler

__all__ = ["SmartAsyncScheduler", "SmartScheduler"]


def register() -> None:
    """vLLM's plugin entry point, called in each of its processes."""
    if os.environ.get("SMART_VLLM_VERIFICATION", "0") in ("", "0"):
        return
    from smart_decoding.integrations.vllm.verification import install

    install()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from smart_decoding.integrations.vllm import scheduler

    return getattr(scheduler, name)
