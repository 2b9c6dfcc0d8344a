"""Names in SGLang that the plugin relies on, beyond its command line. Imports no SGLang.

tests/integrations/test_sglang_seams.py compares them, too.
"""

from __future__ import annotations

from smart_decoding.integrations import seams

NEWER = ("num_steps",)  # parameters of later versions that ours take, too

# REPLACED: AdaptiveSpeculativeParams and, for trees, AdaptiveController, each by a class that is
# constructed and called alike. WRAPPED: for trees. USED: called or read.
REPLACED: dict[str, dict[str, seams.Parameters]] = {
    "sglang.srt.speculative.adaptive_spec_params": {
        "AdaptiveSpeculativeParams.__init__": ("initial_steps", "cfg_path"),
        "AdaptiveSpeculativeParams.candidate_steps": (),
        "AdaptiveSpeculativeParams.set_cuda_graph_bs": ("cuda_graph_bs",),
        "AdaptiveSpeculativeParams.get_steps_for_batch": ("batch_size",),
        "AdaptiveSpeculativeParams.on_verify_complete": (
            "num_correct_drafts_per_req",
            "batch_size",
        ),
        "AdaptiveSpeculativeParams.cuda_graph_bs_for_step": ("step",),
    },
    "sglang.srt.speculative.adaptive_runtime_state": {
        "AdaptiveController.__init__": ("worker", "policy"),
        "AdaptiveSpecWorker.build_adaptive_runtime_state": (
            "speculative_num_steps",
            "speculative_num_draft_tokens",
            "cuda_graph_bs",
        ),
    },
}
WRAPPED: dict[str, dict[str, seams.Parameters]] = {
    "sglang.srt.speculative.adaptive_spec_params": {
        "adaptive_unsupported_reason": ("server_args",)
    },
    "sglang.srt.arg_groups.speculative_hook": {
        "_init_adaptive_speculative_params": ("server_args",)
    },
    "sglang.srt.speculative.spec_info": {
        "SpeculativeAlgorithm.resolve_max_speculative_num_draft_tokens": ("server_args",)
    },
}
USED: dict[str, dict[str, seams.Parameters]] = {
    "sglang.srt.plugins.hook_registry": {
        "HookRegistry.register": ("target", "hook", "hook_type"),
        "HookType.REPLACE": None,
        "HookType.AROUND": None,
        "HookType.AFTER": None,
    },
    "sglang.srt.arg_groups.overrides": {
        "declare_resolution": ("server_args", "source", "fields"),
        "resolving_view": None,
    },
}
# Of a ServerArgs: options, and the list of declarations so far, which `declare_resolution` makes
# and extends.
OPTIONS = (
    "speculative_adaptive",
    "speculative_eagle_topk",
    "speculative_num_steps",
    "speculative_num_draft_tokens",
    "page_size",
)
RECORD = "_resolved_overrides"


def lacking() -> list[str]:
    """Return names that the installed SGLang lacks or changed, as 'module.name'."""
    replaced = seams.lacking(REPLACED, NEWER)
    return [*replaced, *seams.lacking(WRAPPED), *seams.lacking(USED)]
