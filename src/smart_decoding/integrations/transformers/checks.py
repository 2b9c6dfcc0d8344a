"""Refusals of unsupported calls, by name and with the reason, before any forward.

`unsupported` looks at the call; `fitting_layout` then compares the model's logits through our cache
with plain ones, once a model, since a model may take a tree mask and yet make its positions or its
own mask from something else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.generation.configuration_utils import GenerationMode
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_managed_module

from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.integrations.transformers.target import HostTarget

MODES = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
DEVICES = ("cpu", "cuda")  # where tokens are drawn
CACHES = ("cache", "past_key_values", "cache_params")  # its present name, and earlier ones
KNOWN_INPUTS = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", *CACHES)
STATEFUL = ("UnbatchedClassifierFreeGuidanceLogitsProcessor", "SynthIDTextWatermarkLogitsProcessor")
MASKED = ("eager", "sdpa")  # attention implementations that add a mask [batch, 1, queries, keys]


def check(
    model: PreTrainedModel, config: GenerationConfig, processors: Any, inputs: Mapping[str, Any]
) -> None:
    """Raise ConfigError with the reason why this call cannot be run."""
    reason = _unsupported(model, config, processors, inputs)
    if reason:
        raise ConfigError(reason)


def _unsupported(
    model: PreTrainedModel, config: GenerationConfig, processors: Any, inputs: Mapping[str, Any]
) -> str | None:
    if model.device.type not in DEVICES:
        return f"device {model.device.type!r} is not supported: move the model to cpu or cuda"
    if _is_spread(model):
        return (
            "a model whose parts lie in several processes (tensor parallel, FSDP, ZeRO-3) is not "
            "supported: each would choose trees by its own clock; serve it with vLLM or SGLang"
        )
    if inputs.get("assistant_model") is not None:
        return (
            "assistant_model is not read here: give it as "
            "speculative_config={'method': 'draft_model', 'model': assistant_model}"
        )
    return _unsupported_call(model, config, processors, inputs)


def _is_spread(model: PreTrainedModel) -> bool:
    """Return whether several processes must run the same forwards together."""
    processes = distributed.get_world_size() if _is_distributed() else 1
    if processes == 1:
        return False
    zero3 = bool(is_deepspeed_zero3_enabled())  # type: ignore[no-untyped-call]
    is_parallel = (getattr(model, "tp_size", None) or 1) > 1
    return is_parallel or zero3 or bool(is_fsdp_managed_module(model))


def _is_distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _unsupported_call(
    model: PreTrainedModel, config: GenerationConfig, processors: Any, inputs: Mapping[str, Any]
) -> str | None:
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        return f"{name} is an encoder-decoder model: only decoders are supported"
    mode = config.get_generation_mode()
    if mode not in MODES:
        return f"generation mode {mode.value!r} is not supported: use greedy search or sampling"
    for output in ("output_attentions", "output_hidden_states"):
        if getattr(config, output) and config.return_dict_in_generate:
            return (
                f"{output}=True is not supported: "
                "the forwards hold tree nodes that are no part of the answer"
            )
    for processor in processors:
        kind = type(processor).__name__
        if kind in STATEFUL:
            return f"{kind} is not supported: it keeps a state of its own from step to step"
    for key, value in inputs.items():
        if key not in KNOWN_INPUTS and value is not None:
            return (
                f"the model input {key!r} is not supported: "
                "only token ids with an attention mask are"
            )
    if not config.use_cache:
        return "use_cache=False is not supported: speculation needs the keys of earlier tokens"
    return unsupported_cache(name, config, inputs) or _unsupported_rope(model, config)


def cache_of(inputs: Mapping[str, Any]) -> Any:
    """Return the cache that `generate` prepared, or None."""
    return next((inputs[name] for name in CACHES if inputs.get(name) is not None), None)


def unsupported_cache(name: str, config: GenerationConfig, inputs: Mapping[str, Any]) -> str | None:
    """Return why the cache that `generate` chose cannot take back rejected tokens, or None."""
    cache = cache_of(inputs)
    if cache is None:
        return (
            f"{name} keeps a recurrent state, not a cache of keys: "
            "rejected tokens cannot be taken back"
        )
    if type(cache) is not DynamicCache or cache.offloading:
        kind = "an offloaded cache" if type(cache) is DynamicCache else type(cache).__name__
        return f"{kind} is not supported: leave out cache_implementation and past_key_values"
    reasons = (_unsupported_layer(name, layer, config.max_length) for layer in cache.layers)
    return next((reason for reason in reasons if reason is not None), None)


def _unsupported_layer(name: str, layer: Any, max_length: int) -> str | None:
    kind = type(layer).__name__
    window = getattr(layer, "sliding_window", None)
    if window is not None and layer.is_sliding and kind == "DynamicSlidingWindowLayer":
        if max_length > window:
            return (
                f"{kind} of {name} forgets all but {window} tokens and cannot take back rejected "
                f"ones, but prompt and answer may reach {max_length}: keep them within the window"
            )
    elif type(layer) is not DynamicLayer:
        return f"{kind} of {name} keeps a running state: rejected tokens cannot be taken back"
    if layer.is_initialized:
        return "a cache that already holds keys is not supported: pass the whole prompt without it"
    return None


def _unsupported_rope(model: PreTrainedModel, config: GenerationConfig) -> str | None:
    """Return the reason against scalings that follow the longest text so far: beyond a length, rows
    of one forward would disturb each other."""
    text = model.config.get_text_config(decoder=True)
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kind = rope.get("rope_type", rope.get("type"))
    limit = rope.get("original_max_position_embeddings") or getattr(
        text, "max_position_embeddings", None
    )
    if kind in ("dynamic", "longrope") and limit and config.max_length > limit:
        return (
            f"rope scaling {kind!r} changes with the text's length beyond {limit} tokens, "
            f"but prompt and answer may reach {config.max_length}: lower max_new_tokens"
        )
    return None


def fitting_layout(model: PreTrainedModel, layers: int) -> str | None:
    """Return 'tree' if it gives the logits of a plain forward, else 'chain' or None likewise."""
    takes = inspect.signature(model.forward).parameters
    if "attention_mask" not in takes:
        return None
    maskable = "position_ids" in takes and model.config._attn_implementation in MASKED
    for tree in (True, False) if maskable else (False,):
        if _agrees(model, layers, tree):
            return "tree" if tree else "chain"
    return None


def _agrees(model: PreTrainedModel, layers: int, tree: bool) -> bool:
    """Compare two prompts of unlike length and a draft on each with plain forwards of the same
    tokens."""
    from smart_decoding.integrations.transformers.target import HostTarget

    target = HostTarget(model, layers, tree)
    token = (np.arange(3, 28) * 7 + 1) % target.vocab
    prompts = (token[:9].tolist(), token[9:14].tolist())
    pages = [np.array([0], np.int32), np.array([1], np.int32)]
    try:
        _verify(target, [p[:-1] for p in prompts], (0, 0), pages, DraftTrees.empty(2))
        nodes = _drafts(token[14:19], tree)
        starts = (len(prompts[0]) - 1, len(prompts[1]) - 1)
        found = _verify(target, [p[-1:] for p in prompts], starts, pages, nodes)
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False  # the model does not take such inputs
    paths = [
        *prompts,
        *(prompts[nodes.owner[i]] + nodes.token[nodes.path(i)].tolist() for i in range(len(nodes))),
    ]
    inputs = [torch.tensor([path], device=target.device) for path in paths]
    plain = torch.stack(
        [model(input_ids=ids, use_cache=False).logits[0, -1].float() for ids in inputs]
    )
    error = (found.to(plain.device) - plain).abs().mean() / plain.std().clamp_min(1e-12)
    return bool(error < (1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1))


def _drafts(token: IntArray, tree: bool) -> DraftTrees:
    """Return five nodes on two requests: siblings and a grandchild, or chains."""
    nodes = DraftTrees.empty(2)
    nodes.append([0, 1], token[:2], [ROOT, ROOT], [1.0, 1.0])
    if tree:
        nodes.append([0, 0, 1], token[2:], [0, ROOT, ROOT], [1.0] * 3)
    else:
        nodes.append([0, 1], token[2:4], [0, 1], [1.0] * 2)
        nodes.append([0], token[4:], [2], [1.0])
    return nodes


def _verify(
    target: HostTarget,
    tokens: list[list[int]],
    starts: tuple[int, int],
    pages: list[Any],
    nodes: DraftTrees,
) -> torch.Tensor:
    """Return logits [sequences + nodes, vocab] after each sequence's last token and each node."""
    slots = [
        p[0] * PAGE + np.arange(PAGE, dtype=np.int32)[s:]
        for p, s in zip(pages, starts, strict=True)
    ]
    spans = [Span(*parts) for parts in zip(tokens, starts, slots, pages, strict=True)]
    rows, last, node_row = build_rows(spans, nodes, [True, True])
    rows.logit_rows = np.concatenate((last, node_row))
    logits: torch.Tensor = target.forward(rows, ()).logits
    return logits
