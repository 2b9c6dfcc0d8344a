"""SMART inside SGLang: how large EAGLE drafts, at each batch size, under `--speculative-adaptive`.

Chains: how many steps. Trees (`--speculative-eagle-topk` above 1): which of several pairs of steps
and nodes, the tree of each being SGLang's own. SGLang finds `register` by itself, as a plugin. It
does nothing unless SMART_SGLANG_COSTS names a file of measured costs (docs/integrations.md), and
imports nothing of SGLang before that.
"""

from __future__ import annotations

import logging
import os

from smart_decoding.integrations.sglang.seams import TESTED

COSTS = "SMART_SGLANG_COSTS"
# The class that is replaced.
TARGET = "sglang.srt.speculative.adaptive_spec_params.AdaptiveSpeculativeParams"

logger = logging.getLogger("sglang.smart_decoding")


def register() -> None:
    """SGLang's plugin entry point: puts SMART's policy in the place of SGLang's own."""
    if not os.environ.get(COSTS):
        return
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from sglang.version import __version__ as version

    from smart_decoding.integrations.sglang.costs import read_costs
    from smart_decoding.integrations.sglang.policy import SmartSpecPolicy

    if version not in TESTED:
        logger.warning(
            "SMART leaves speculation to SGLang: %s is not a version that it was tested with (%s)",
            version,
            ", ".join(TESTED),
        )
        return
    HookRegistry.register(TARGET, SmartSpecPolicy, HookType.REPLACE)
    if read_costs().nodes:
        from smart_decoding.integrations.sglang.trees import HOOKS

        for target, hook, kind in HOOKS:
            HookRegistry.register(target, hook, HookType[kind])
