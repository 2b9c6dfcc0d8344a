"""SMART inside SGLang's `--speculative-adaptive`: how large stock drafts are at each batch size.

Chains are chosen by steps, trees by tiers of steps and nodes. SGLang finds `register` by itself, as
a plugin. It does nothing unless SMART_SGLANG_COSTS names a file of measured costs (docs/sglang.md),
and imports nothing of SGLang before that.
"""

from __future__ import annotations

import logging
import os

from smart_decoding.integrations.sglang.costs import COSTS, read_costs

# The class that is replaced.
TARGET = "sglang.srt.speculative.adaptive_spec_params.AdaptiveSpeculativeParams"

logger = logging.getLogger("sglang.smart_decoding")


def register() -> None:
    """Put SMART's policy in the place of SGLang's own; SGLang's plugin entry point.

    If SGLang lacks a required name, one warning says so and nothing is changed."""
    if not os.environ.get(COSTS):
        return
    from smart_decoding.integrations.sglang.seams import lacking

    names = lacking()
    if names:
        logger.warning(
            "SMART leaves speculation to SGLang: this version lacks, or calls otherwise, %s",
            ", ".join(names),
        )
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from smart_decoding.integrations.sglang.policy import SmartSpecPolicy

    HookRegistry.register(TARGET, SmartSpecPolicy, HookType.REPLACE)
    if read_costs().nodes:
        from smart_decoding.integrations.sglang.trees import HOOKS

        for target, hook, kind in HOOKS:
            HookRegistry.register(target, hook, HookType[kind])
