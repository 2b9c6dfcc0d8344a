"""SMART inside SGLang: how many steps EAGLE drafts, at each batch size, under `--speculative-adaptive` with topk 1.

SGLang finds `register` by itself, as a plugin; it does nothing unless SMART_SGLANG_COSTS names a file of measured
costs (docs/integrations.md). Nothing of SGLang is imported before that.
"""

from __future__ import annotations

import os

COSTS = "SMART_SGLANG_COSTS"
TARGET = "sglang.srt.speculative.adaptive_spec_params.AdaptiveSpeculativeParams"  # the class that is replaced


def register() -> None:
    """SGLang's plugin entry point: puts SMART's policy in the place of SGLang's own."""
    if not os.environ.get(COSTS):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from smart_decoding.integrations.sglang.policy import SmartSpecPolicy

    HookRegistry.register(TARGET, SmartSpecPolicy, HookType.REPLACE)
