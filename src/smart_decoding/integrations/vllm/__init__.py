"""SMART inside vLLM, of which it needs no patch:

    python -m vllm.entrypoints.openai.api_server --model MODEL --speculative-config '{"method":
        "ngram", ...}' \\
        --scheduler-cls smart_decoding.integrations.vllm.SmartScheduler

and `smart vllm-config`, which measures instead and writes an option of vLLM's own:
docs/integrations.md. Nothing of vLLM is imported before one of the two names is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from smart_decoding.integrations.vllm.scheduler import SmartAsyncScheduler, SmartScheduler

__all__ = ["SmartAsyncScheduler", "SmartScheduler"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from smart_decoding.integrations.vllm import scheduler

    return getattr(scheduler, name)
