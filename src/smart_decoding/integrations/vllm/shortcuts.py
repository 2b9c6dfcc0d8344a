"""Steps that verify no drafts, without what vLLM does for drafts in every step once a drafter is configured.

With a --speculative-config vLLM sends all logits through its rejection sampler, drafts or none: it copies them and runs
some twenty small operations. Without drafts its plain sampler gives the same tokens; that is what is called then. It
holds in the process that the scheduler runs in, which is the worker's, too, where there is one rank.
"""

from __future__ import annotations

import functools
from typing import Any


def install() -> None:
    """Once per process."""
    from vllm.v1.sample.rejection_sampler import RejectionSampler

    original = RejectionSampler.forward
    if getattr(original, "_shortcut", False):
        return

    @functools.wraps(original)
    def forward(self: Any, metadata: Any, draft_probs: Any, logits: Any, sampling_metadata: Any) -> Any:
        if any(metadata.num_draft_tokens) or len(logits) != len(metadata.num_draft_tokens):
            return original(self, metadata, draft_probs, logits, sampling_metadata)
        return self.sampler(logits=logits, sampling_metadata=sampling_metadata)

    forward._shortcut = True  # type: ignore[attr-defined]
    RejectionSampler.forward = forward
