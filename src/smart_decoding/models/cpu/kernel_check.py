"""Whether the CPU kernels run a model. Where they cannot on a CPU, plain torch runs only if
it was requested."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING

import torch

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.kernels import library
from smart_decoding.kernels.ops import (
    HEAD_DIMS,
    KEYS,
    MAX_QUERIES,
    MOST_INPUTS,
    multiplies_bytes,
)
from smart_decoding.models.torch.torch_layers import ops_for

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.families.layer import LinearAttention

log = logging.getLogger("smart.kernels")

INSTEAD = "plain torch runs, slower, with --allow-slow (in Python: allow_slow=True)"


def unserved(config: ModelConfig) -> str | None:
    """Return why the kernels do not serve a model or head of this shape, with the number; None if
    they do."""
    if config.linear is not None and (reason := _unserved_linear(config.linear)) is not None:
        return reason
    if config.head_dim not in HEAD_DIMS:
        return f"head dimension {config.head_dim} is none of {', '.join(map(str, HEAD_DIMS))}"
    sizes = {"hidden size": config.hidden, "intermediate size": config.ffn}
    if config.experts is not None:
        sizes["experts' intermediate size"] = config.experts.each.width
    for name, size in sizes.items():
        if size % 2:
            return f"{name} {size} is odd"
    shared = config.heads // config.kv_heads
    if shared > MAX_QUERIES:
        return f"{shared} query heads share a key head, more than {MAX_QUERIES}"
    return None


def _unserved_linear(linear: LinearAttention) -> str | None:
    if linear.key_dim % KEYS:
        return f"key dimension {linear.key_dim} of linear attention is no multiple of {KEYS}"
    if linear.values % 2:
        return f"width {linear.values} of linear attention is odd"
    if linear.kernel > MOST_INPUTS:
        return f"a convolution over {linear.kernel} inputs, more than {MOST_INPUTS}"
    return None


def why_slow(config: ModelConfig, device: torch.device) -> str | None:
    """Return why plain torch must run this shape on this CPU; None if the kernels do, or if it is
    no CPU."""
    if device.type != "cpu":
        return None
    return library.unavailable() or unserved(config)


def require_kernels(device: torch.device, allow_slow: bool) -> None:
    """Raise ConfigError for a CPU without any kernels, or CUDA without Triton: before a model is
    fetched, whatever its shape. Sets the number of threads."""
    library.set_threads()
    ops_for(device)
    if device.type == "cpu" and not allow_slow:
        reason = library.unavailable()
        if reason is not None:
            raise ConfigError(f"{reason}; {INSTEAD}")


def require_served(
    config: ModelConfig, device: torch.device, allow_slow: bool, what: str = "this model"
) -> None:
    """Raise ConfigError for a CPU without kernels, ModelError for a shape that they do not
    serve."""
    require_kernels(device, allow_slow)
    if device.type == "cpu" and not allow_slow:
        reason = unserved(config)
        if reason is not None:
            raise ModelError(f"the CPU kernels do not serve {what}: {reason}; {INSTEAD}")


def check_activations(activations: str, holds_quants: bool) -> None:
    """Raise ConfigError for EngineArgs' activations="int8" where it cannot be. holds_quants:
    whether the CPU kernels hold quants as they are stored."""
    if activations != "int8":
        return
    if not holds_quants:
        raise ConfigError(
            "activations='int8' needs quantised weights on the CPU kernels in bfloat16; "
            "these are expanded"
        )
    if not multiplies_bytes():
        raise ConfigError("activations='int8' needs a CPU with AVX2 or Arm's i8mm")


def use_native(config: ModelConfig, device: torch.device, allow_slow: bool = False) -> bool:
    """Return whether the kernels run a model. On a CPU where they cannot: an error, or with
    allow_slow one warning."""
    require_served(config, device, allow_slow)
    reason = why_slow(config, device)
    if reason is not None:
        _warn(reason)
    return device.type == "cpu" and reason is None


def warn_if_missing(device: torch.device) -> None:
    """One warning on a CPU without kernels, where others run the model and only drafting is
    slower. Raises ConfigError for CUDA without Triton."""
    ops_for(device)
    reason = library.unavailable() if device.type == "cpu" else None
    if reason is not None:
        _warn(reason)


@functools.cache
def _warn(reason: str) -> None:
    log.warning(
        "no CPU kernels: %s. Plain torch runs: "
        "slower, and in bf16 near-ties can fall the other way",
        reason,
    )
