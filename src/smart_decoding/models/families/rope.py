"""Rotary position embeddings: kinds of frequency scaling, read from config.json or GGUF metadata,
and their formulas.

Sources: linear (Chen et al. 2023, arXiv 2306.15595), llama3 (Llama 3.1 model card), yarn (Peng et
al. 2023, arXiv 2309.00071).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from smart_decoding.errors import ModelError

Frequencies = NDArray[np.float64]

_REQUIRED = {
    "linear": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
    "factors": (),
}
_YARN_OPTIONS = (
    "attention_factor",
    "attn_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched. `kind`: linear, llama3, yarn, or factors (a divisor for
    each frequency, as GGUF files store llama3 scaling). `numbers` holds the options under their
    Hugging Face names."""

    kind: str
    numbers: Mapping[str, float]
    factors: tuple[float, ...] = ()

    def to_hf(self) -> dict[str, Any]:
        """Return the `rope_scaling` entry of config.json."""
        factors = {"factors": list(self.factors)} if self.factors else {}
        return {"rope_type": self.kind, **self.numbers, **factors}


def options_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE options of either generation of config.json: `rope_parameters`, or `rope_theta` and
    `rope_scaling`."""
    top = {
        name: config[name]
        for name in ("rope_theta", "partial_rotary_factor")
        if config.get(name) is not None
    }
    given = config.get("rope_parameters") or {}
    given = given.get("full_attention", given)
    return {**top, **(config.get("rope_scaling") or {}), **given}


def scaling_from_hf(options: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    """Return the scaling that `options_of` describes; ModelError for an unknown kind or a missing
    number."""
    kind = options.get("rope_type", options.get("type", "default"))
    if kind == "default":
        return None
    if kind not in _REQUIRED:
        raise ModelError(
            f"RoPE type {kind!r} is not supported; supported: default, linear, llama3, yarn"
        )
    options = {"original_max_position_embeddings": max_positions, **options}
    missing = [name for name in _REQUIRED[kind] if options.get(name) is None]
    if missing:
        raise ModelError(f"RoPE type {kind!r} lacks {', '.join(missing)}")
    names = (*_REQUIRED[kind], *(_YARN_OPTIONS if kind == "yarn" else ()))
    numbers = {name: float(options[name]) for name in names if options.get(name) is not None}
    return RopeScaling(kind, numbers, tuple(float(x) for x in options.get("factors", ())))


def scaling_from_gguf(
    metadata: Mapping[str, Any],
    own: str,
    max_positions: int,
    factors: NDArray[np.float32] | None,
) -> RopeScaling | None:
    """Return the scaling of a GGUF file; `factors` is its tensor rope_freqs.weight, shape [head_dim
    / 2], or None. own: what the keys of its architecture begin with."""
    prefix = f"{own}rope.scaling."
    kind = metadata.get(prefix + "type", "none")
    if factors is not None:
        if kind not in ("none", "llama3"):
            raise ModelError(
                f"GGUF RoPE scaling {kind!r} together with rope_freqs.weight is not supported"
            )
        return RopeScaling("factors", {}, tuple(float(x) for x in factors))
    if kind != "yarn" and metadata.get(prefix + "attn_factor", 1.0) != 1.0:
        raise ModelError(f"GGUF option {prefix}attn_factor is not supported without yarn")
    names = {
        "factor": "factor",
        "original_context_length": "original_max_position_embeddings",
        "attn_factor": "attn_factor",
    }
    options = {
        ours: metadata[prefix + theirs]
        for theirs, ours in names.items()
        if prefix + theirs in metadata
    }
    return scaling_from_hf(
        {"rope_type": "default" if kind == "none" else kind, **options}, max_positions
    )


def stretched_positions(scaling: RopeScaling | None, positions: int) -> int:
    """Return the context in tokens that a model configured for `positions` reaches with
    `scaling`."""
    if scaling is None or scaling.kind not in ("linear", "yarn"):
        return positions
    return max(
        positions,
        int(scaling.numbers["original_max_position_embeddings"] * scaling.numbers["factor"]),
    )


def inverse_frequencies(
    theta: float, head_dim: int, scaling: RopeScaling | None
) -> tuple[Frequencies, float]:
    """Frequencies in radians per position, shape [head_dim / 2], and the factor on cos and sin (1
    but for yarn)."""
    base = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return base, 1.0
    if scaling.kind == "linear":
        return base / scaling.numbers["factor"], 1.0
    if scaling.kind == "factors":
        return base / np.asarray(scaling.factors), 1.0
    if scaling.kind == "llama3":
        return _llama3(base, scaling.numbers), 1.0
    return _yarn(base, theta, head_dim, scaling.numbers), _yarn_magnitude(scaling.numbers)


def _llama3(base: Frequencies, numbers: Mapping[str, float]) -> Frequencies:
    """Long wavelengths are divided by the factor, short ones kept, those between blended."""
    low = numbers["low_freq_factor"]
    high = numbers["high_freq_factor"]
    rotations = numbers["original_max_position_embeddings"] * base / (2 * math.pi)
    kept = np.clip((rotations - low) / (high - low), 0.0, 1.0)
    return base * (kept + (1 - kept) / numbers["factor"])


def _yarn(
    base: Frequencies, theta: float, head_dim: int, numbers: Mapping[str, float]
) -> Frequencies:
    """Dimensions that rotate often are kept, rare ones interpolated, with a linear ramp between."""

    def dimension(rotations: float) -> float:
        pretrained = numbers["original_max_position_embeddings"]
        return head_dim * math.log(pretrained / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = dimension(numbers.get("beta_fast", 32.0))
    high = dimension(numbers.get("beta_slow", 1.0))
    if numbers.get("truncate", 1.0):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, head_dim - 1)
    ramp = np.clip((np.arange(head_dim // 2) - low) / max(high - low, 0.001), 0.0, 1.0)
    blended: Frequencies = base * (1 - ramp) + base / numbers["factor"] * ramp
    return blended


def _yarn_magnitude(numbers: Mapping[str, float]) -> float:
    """attn_factor: of DeepSeek-R1-0528-Qwen3-8B, which vLLM and llama.cpp multiply by, and
    transformers does not know."""
    if "attention_factor" in numbers:
        return numbers["attention_factor"]
    further = numbers.get("attn_factor", 1.0)

    def magnitude(mscale: float) -> float:
        return 1.0 if numbers["factor"] <= 1 else 0.1 * mscale * math.log(numbers["factor"]) + 1.0

    scale = numbers.get("mscale")
    scale_all = numbers.get("mscale_all_dim")
    if scale and scale_all:
        return further * magnitude(scale) / magnitude(scale_all)
    return further * magnitude(1.0)
