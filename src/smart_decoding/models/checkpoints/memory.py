"""Memory that a model needs, estimated before its weights are read, and what would fit where it is
too much."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import WINDOW
from smart_decoding.errors import CapacityError
from smart_decoding.kernels.limits import free_memory
from smart_decoding.kernels.ops import COLUMNS
from smart_decoding.kernels.weights import QuantizedTensor
from smart_decoding.models.checkpoints.gguf import StoredWeights
from smart_decoding.models.checkpoints.rounding import ROUNDED, bytes_per_weight, rounded_bytes
from smart_decoding.models.checkpoints.weight_files import StackedExperts
from smart_decoding.models.cpu.kernel_check import why_slow
from smart_decoding.models.cpu.native_states import ROOM, snapshots_of
from smart_decoding.models.families.mtp import OUTPUT, mtp_shapes, own_shapes

if TYPE_CHECKING:
    from smart_decoding.models.checkpoints.loading import Checkpoint
    from smart_decoding.models.families.config import ModelConfig
    from smart_decoding.models.heads.files import HeadFiles

log = logging.getLogger("smart.memory")

_NODES = 8  # of a request's tree, about
_WORTHWHILE = 256  # tokens of KV memory below which lowering it is no advice
_MEMINFO = Path("/proc/meminfo")


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes: of weights, of what drafts, of working memory, and of each of `tokens` tokens of KV
    memory, those of what drafts included; of recurrent states."""

    weights: int
    draft: int
    work: int
    per_token: int
    tokens: int
    states: int = 0

    @property
    def rest(self) -> int:
        """Bytes of all but KV memory."""
        return self.weights + self.draft + self.work + self.states

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.rest + self.per_token * self.tokens

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            f"KV of {self.tokens} tokens": self.per_token * self.tokens,
            "recurrent states": self.states,
            "drafting": self.draft,
            "work": self.work,
        }
        listed = ", ".join(f"{name} {size(n)}" for name, n in parts.items() if n)
        return f"{size(self.total)} ({listed})"


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What the engine is to hold: `kv_tokens`, for which it makes `pages` (more than they fill),
    rows of a forward, the longest request in tokens, and the most requests at once."""

    kv_tokens: int
    pages: int
    rows: int
    longest: int
    seqs: int = 0


def parameters(config: ModelConfig) -> int:
    """Return weights of a decoder, counted."""
    return sum(map(prod, config.expected_shapes().values()))


def kv_bytes(config: ModelConfig, dtype: torch.dtype) -> int:
    """Return bytes of a token's keys and values."""
    return 2 * config.kv_layers * config.kv_heads * config.head_dim * dtype.itemsize


def state_bytes(config: ModelConfig, seqs: int, native: bool = False) -> int:
    """Return bytes of the recurrent states of so many requests, in float32. native: on the CPU
    kernels, with the rows that wait to be added and snapshots."""
    if (linear := config.linear) is None:
        return 0
    if native:
        waiting = (linear.kernel - 1 + ROOM) * linear.row_size
        each = linear.packed_state_size(COLUMNS) + waiting
        return 4 * config.linear_layers * each * (seqs + snapshots_of(seqs))
    return 4 * config.linear_layers * linear.state_size * (seqs + 1)


def work_bytes(config: ModelConfig, limits: EngineLimits) -> int:
    """Return bytes of activations and logits of the largest forward, in float32, and of the rotary
    table."""
    heads = (2 * config.heads + 2 * config.kv_heads) * config.head_dim
    network = 2 * config.ffn
    if (experts := config.experts) is not None:
        of_each = config.hidden + experts.each.width
        network = max(network, experts.count + experts.per_token * of_each)
    if (linear := config.linear) is not None:
        heads = max(heads, 3 * linear.channels + 2 * linear.values)
    row = 2 * config.hidden + heads + network + config.vocab
    angles = config.head_dim * (2 if config.local_theta else 1)
    nodes = 0  # of a request: on torch the states of a level, on the kernels what they add to one
    if linear is not None:
        of_rows = _NODES * config.linear_layers * linear.row_size
        nodes = max(4 * linear.values * linear.key_dim, of_rows)
    return 4 * (limits.rows * row + limits.longest * angles + limits.seqs * nodes)


def weight_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """Return bytes of a model's weights in memory, its vision part included."""
    vision = checkpoint.vision
    of_vision = 0
    if vision is not None:
        of_vision = sum(prod(vision.weights.shapes[name]) for name in vision.names.values())
    return _decoder_bytes(checkpoint, dtype, device) + of_vision * dtype.itemsize


def _decoder_bytes(checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device) -> int:
    """Return bytes of the weights: quants stay quants on the CPU kernels in bfloat16."""
    config = checkpoint.config
    if _in_quants(config, dtype, device):
        if isinstance(checkpoint.weights, StoredWeights | StackedExperts):
            return checkpoint.weights.nbytes
        if checkpoint.quantization in ROUNDED:
            return rounded_bytes(config.expected_shapes(), checkpoint.quantization)
    return parameters(config) * dtype.itemsize


def _in_quants(config: ModelConfig, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether the CPU kernels multiply quants as they are stored."""
    native = device.type == "cpu" and why_slow(config, device) is None
    return native and dtype == torch.bfloat16


def need_of(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device,
    limits: EngineLimits,
    draft: Checkpoint | None = None,
    head: HeadFiles | None = None,
    mtp_tokens: int = 0,
) -> Need:
    """Return what the model needs with the draft model or draft head that is to speed it up, or its
    MTP layer, if that proposes some tokens."""
    config = checkpoint.config
    per_token = kv_bytes(config, dtype)
    work = work_bytes(config, limits)
    drafting = 0
    if draft is not None:
        drafting = weight_bytes(draft, dtype, device) + work_bytes(draft.config, limits)
        per_token += kv_bytes(draft.config, dtype)
    if mtp_tokens:
        drafting = _mtp_bytes(checkpoint, dtype, device, mtp_tokens)
        drafting += _waiting_bytes(config, limits, 1)
    if head is not None:
        drafting = _head_bytes(head, config, dtype, device)
        drafting += _waiting_bytes(config, limits, len(head.aux_layers))
    if head is not None or mtp_tokens:
        per_token += kv_bytes(config, dtype) // config.kv_layers
    weights = weight_bytes(checkpoint, dtype, device)
    native = device.type == "cpu" and why_slow(config, device) is None
    states = state_bytes(config, limits.seqs, native)
    return Need(weights, drafting, work, per_token, limits.pages * PAGE, states)


def require_memory(
    checkpoint: Checkpoint, need: Need, limits: EngineLimits, device: torch.device
) -> None:
    """Log the estimate. Raises CapacityError, which says what would fit, if it exceeds the free
    memory; where that is not known, nothing is checked."""
    free = available(device)
    name = checkpoint.provenance["model"]
    if free is None:
        log.info("%s needs about %s of memory", name, need)
        return
    log.info("%s needs about %s of memory; %s are free", name, need, size(free))
    if need.total > free:
        advice = what_fits(checkpoint.config, need, limits, free, device)
        raise CapacityError(
            f"{name} needs about {need} of memory, but {size(free)} are free: {advice}"
        )


def tokens_beside(need: Need, utilization: float, device: torch.device) -> int:
    """Return tokens of KV memory in that part of a GPU's memory, beside all else that is needed and
    what others hold."""
    free, whole = torch.cuda.mem_get_info(device)
    room = free - (1 - utilization) * whole - need.rest
    return int(room // need.per_token)


def what_fits(
    config: ModelConfig, need: Need, limits: EngineLimits, free: int, device: torch.device
) -> str:
    """Return what to do where `need` exceeds the `free` bytes of the device."""
    room = (free - need.rest) // need.per_token
    tokens = room - (need.tokens - limits.kv_tokens)  # each request has pages beyond these
    if tokens >= _WORTHWHILE:
        below = ", and max_model_len with it" if tokens < limits.longest else ""
        return f"lower kv_cache_tokens to {tokens - tokens % PAGE}{below}"
    if room >= 2 * _WORTHWHILE:
        return "lower max_num_seqs, and kv_cache_tokens with it"
    rest = need.work + need.states + need.per_token * _WORTHWHILE
    if need.draft and need.weights + rest <= free:
        return "draft with ngram, which needs no weights"
    small = rounded_bytes(config.expected_shapes(), "int4")
    if device.type == "cpu" and small + rest <= free and small < need.weights:
        return (
            f"take quantization='int4' (weights of about {size(small)}) or a 4-bit GGUF file, "
            "in bfloat16, and a smaller kv_cache_tokens"
        )
    return "take a smaller model, or serve it on GPUs with vLLM or SGLang (docs/vllm.md)"


def available(device: torch.device) -> int | None:
    """Free bytes of a device: of a GPU, or what Linux can give this process without swapping; None
    where the system does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    known = [free for free in (_free_of_machine(), free_memory()) if free is not None]
    return min(known, default=None)


def _free_of_machine() -> int | None:
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _head_bytes(
    head: HeadFiles, target: ModelConfig, dtype: torch.dtype, device: torch.device
) -> int:
    """Return its layer, and rows of the target's output matrix where they are not its own: as they
    are stored and in 8 bits on the CPU kernels in bfloat16, elsewhere expanded."""
    weights = {name: weight for name, weight in head.weights.items() if name != "draft_ids"}
    borrows = "lm_head.weight" not in weights and not head.fused
    outputs = target.hidden * len(head.weights["draft_ids"]) if borrows else 0
    if _in_quants(target, dtype, device):
        return outputs + sum(
            weight.rows.nbytes if isinstance(weight, QuantizedTensor) else 2 * weight.numel()
            for weight in weights.values()
        )
    return (outputs + sum(prod(weight.shape) for weight in weights.values())) * dtype.itemsize


def _waiting_bytes(config: ModelConfig, limits: EngineLimits, aux_layers: int) -> int:
    """Return bytes of the target's features, in float32, that wait for a head to catch up: those of
    a window of each request."""
    rows = limits.seqs * min(WINDOW, limits.longest)
    return 4 * rows * aux_layers * config.hidden


def _mtp_bytes(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device, tokens: int
) -> int:
    """Return the bytes of a model's MTP layer, in 8 bits beside quants on the CPU kernels, of its
    own embeddings and output matrix, and of that one's rows that it reads unless they are all of
    the model's."""
    config = checkpoint.config
    layer = sum(map(prod, mtp_shapes(config).values()))
    own = own_shapes(config, checkpoint.mtp or ())
    matrices = sum(map(prod, own.values())) * dtype.itemsize
    outputs = config.hidden * tokens if OUTPUT in own or tokens < config.vocab else 0
    if not _in_quants(config, dtype, device):
        return (layer + outputs) * dtype.itemsize + matrices
    rounded = isinstance(checkpoint.weights, StoredWeights) or checkpoint.quantization in ROUNDED
    each = bytes_per_weight("int8") if rounded else dtype.itemsize
    return round(layer * each) + outputs + matrices


def size(count: float) -> str:
    """Return bytes in words."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
