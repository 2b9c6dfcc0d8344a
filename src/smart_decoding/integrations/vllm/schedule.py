"""From measured times to vLLM's `num_speculative_tokens_per_batch_size`, with reasons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from smart_decoding.errors import ConfigError

SCHEDULE = "num_speculative_tokens_per_batch_size"  # vLLM's option
MARGIN = 1.02  # measured speedup over plain decoding above which speculation is switched on


@dataclass(frozen=True, slots=True)
class Timing:
    """One setting at one batch size: seconds of each block, and tokens a block.

    The prompts are the same in all settings. context: mean tokens of a request while it is
    answered, its prompt and half of its answer."""

    seconds: Sequence[float]
    tokens: int
    drafted: int = 0
    accepted: int = 0
    context: float = 0.0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens * len(self.seconds) / sum(self.seconds)


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
    """The best length at one measured batch size.

    ratios: length -> (speedup over plain, its standard error)."""

    batch: int
    length: int
    ratios: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    reason: str = ""


def choose(batch: int, timings: Mapping[int, Timing], margin: float = MARGIN) -> LengthChoice:
    """Return the fastest of the measured lengths, if it is `margin` faster than 0, else 0.

    0 must be among them."""
    plain = timings[0]
    ratios = {length: speedup(plain, timing) for length, timing in timings.items() if length}
    best = max(ratios, key=lambda length: ratios[length][0], default=0)
    length = best if best and ratios[best][0] > margin else 0
    parts = [f"batch {batch}: plain {plain.rate:.1f} tok/s"]
    for k, (ratio, error) in sorted(ratios.items()):
        share = timings[k].accepted / timings[k].drafted if timings[k].drafted else 0.0
        parts.append(f"{k} tokens {ratio:.2f} ± {error:.2f} × ({100 * share:.0f} % accepted)")
    return LengthChoice(batch, length, ratios, ", ".join(parts))


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


def mean_context(measured: Mapping[int, Mapping[int, Timing]]) -> int:
    """Return mean tokens of a request while it is answered, over the blocks of plain decoding."""
    contexts = [timings[0].context for timings in measured.values()]
    return round(sum(contexts) / len(contexts))


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


def report(
    lines: Sequence[Line],
    choices: Sequence[LengthChoice],
    measured: Mapping[int, Mapping[int, Timing]],
) -> Any:
    """Return all measurements, as plain lists and numbers."""
    return {
        "lines": [asdict(line) for line in lines],
        "measured": {
            str(choice.batch): {
                str(length): {
                    **asdict(timing),
                    "seconds": list(timing.seconds),
                    "tokens_per_second": timing.rate,
                }
                for length, timing in measured[choice.batch].items()
            }
            for choice in choices
        },
    }


def speedup(plain: Timing, other: Timing) -> tuple[float, float]:
    """Return speedup over plain and its standard error over the blocks, which are pairs."""
    pairs = list(zip(plain.seconds, other.seconds, strict=True))
    ratio = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    logs = [math.log(a / b) for a, b in pairs]
    if len(logs) < 2:
        return ratio, math.inf
    mean = sum(logs) / len(logs)
    variance = sum((x - mean) ** 2 for x in logs) / (len(logs) - 1)
    return ratio, ratio * math.sqrt(variance / len(logs))
