"""From measured times to vLLM's `num_speculative_tokens_per_batch_size`, with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smart_decoding.errors import ConfigError

SCHEDULE = "num_speculative_tokens_per_batch_size"  # vLLM's option


@dataclass(frozen=True, slots=True)
class Line:
    """Batch sizes `first` to `last` draft `length` tokens; `reason`: the measurements."""

    first: int
    last: int
    length: int
    reason: str

    def entry(self) -> list[int]:
        """Return the line in vLLM's form."""
        return [self.first, self.last, self.length]


@dataclass(frozen=True, slots=True)
class LengthChoice:
    """The best length at one measured batch size, and the measurements that say so."""

    batch: int
    length: int
    reason: str = ""


def schedule(choices: Sequence[LengthChoice]) -> list[Line]:
    """Return one line per run of equal lengths.

    Sizes between two measured ones go to the nearer one (by ratio)."""
    if not choices:
        raise ConfigError("no batch size was measured")
    ordered = sorted(choices, key=lambda choice: choice.batch)
    lines: list[Line] = []
    first = 1
    for index, choice in enumerate(ordered):
        last = choice.batch
        if index + 1 < len(ordered):
            last = max(last, math.ceil(math.sqrt(choice.batch * ordered[index + 1].batch)) - 1)
        if lines and lines[-1].length == choice.length:
            before = lines[-1]
            reason = f"{before.reason}; {choice.reason}"
            lines[-1] = Line(before.first, last, choice.length, reason)
        else:
            lines.append(Line(first, last, choice.length, choice.reason))
        first = last + 1
    return lines


def speculative_config(base: Mapping[str, Any], lines: Sequence[Line]) -> dict[str, Any] | None:
    """Return the value of vLLM's --speculative-config; None if plain decoding was best at every
    size.

    vLLM carries the last line's length on to larger batches."""
    longest = max(line.length for line in lines)
    if not longest:
        return None
    entries = [line.entry() for line in lines]
    return {
        **base,
        "num_speculative_tokens": longest,
        SCHEDULE: entries,
    }


def warnings(resolved: Mapping[str, Any]) -> list[str]:
    """Return the drawbacks of a schedule, or why vLLM ignores it. resolved: vLLM's settings under a
    schedule (measure.resolved)."""
    vllm = f"vLLM {resolved['vllm']}"
    without, with_ = resolved["graphs"]
    found = []
    if not resolved["scheduled"]:
        found.append(f"{vllm} ignores a schedule here; its own message above says why")
    elif resolved["all_passes"]:
        found.append(
            f"{vllm} runs all passes of a draft model in Model Runner V2, whatever the schedule "
            "says, and only verifies fewer tokens; VLLM_USE_V2_MODEL_RUNNER=0 makes it follow"
        )
    if with_ != without:
        found.append(
            f"with a schedule {vllm} takes CUDA graphs {with_} in place of {without}: every step "
            "is slower, also those without drafts (vLLM issue 49548); "
            "VLLM_USE_V2_MODEL_RUNNER=1 keeps them, and --check measures what is left"
        )
    return found


def adaptive(resolved: Mapping[str, Any], context: int) -> str:
    """Return whether vLLM's own adaptive verification can run here, and with which options.

    resolved: see measure.resolved. context: mean tokens of a request while it is answered."""
    if resolved["no_adaptive"] is not None:
        return f"vLLM's adaptive verification cannot run here: {resolved['no_adaptive']}"
    return (
        "vLLM's adaptive verification can run here, in place of a schedule: add "
        '"enable_adaptive_verification": true to --speculative-config, and start vLLM with '
        f"VLLM_ADAPTIVE_VERIFICATION_PROFILE_CONTEXT_LEN={context}. Its profile takes contexts of "
        "8192 tokens otherwise, which makes drafts look more expensive than they are"
    )
