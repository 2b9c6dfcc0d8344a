"""SMART inside vLLM, without a patch: `smart tune vllm`, which measures and writes options of
vLLM's own, and a scheduler (docs/vllm.md):

    vllm serve MODEL --speculative-config '{"method": "ngram", ...}' \\
        --scheduler-cls smart_decoding.integrations.vllm.SmartScheduler

vLLM is imported only when one of these is used.
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
