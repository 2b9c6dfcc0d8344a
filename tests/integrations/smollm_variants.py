"""Checkpoints made from SmolLM2's: python smollm_variants.py without_layers SOURCE TARGET FIRST END
| with_idle_layers SOURCE TARGET | with_more_heads SOURCE TARGET."""

from __future__ import annotations

import copy
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def without_layers(source: str, target: str, first: str, end: str) -> None:
    """Leaves out the layers `first` to `end` - 1."""
    model = AutoModelForCausalLM.from_pretrained(source)
    layers = [*model.model.layers]
    replace_layers(model, layers[: int(first)] + layers[int(end) :])
    save(model, source, target)


def with_idle_layers(source: str, target: str) -> None:
    """Puts behind every layer one that adds zeros: the same function at twice the cost."""
    model = AutoModelForCausalLM.from_pretrained(source)
    layers = []
    for layer in model.model.layers:
        idle = copy.deepcopy(layer)
        torch.nn.init.zeros_(idle.self_attn.o_proj.weight)
        torch.nn.init.zeros_(idle.mlp.down_proj.weight)
        layers += [layer, idle]
    replace_layers(model, layers)
    save(model, source, target)


def replace_layers(model: torch.nn.Module, layers: list[torch.nn.Module]) -> None:
    model.model.layers = torch.nn.ModuleList(layers)
    model.config.num_hidden_layers = len(layers)
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = model.config.layer_types[:1] * len(layers)


def with_more_heads(source: str, target: str) -> None:
    """Adds a key-value head and its query heads, all of zeros: they add nothing to the attention's
    output."""
    model = AutoModelForCausalLM.from_pretrained(source)
    config = model.config
    size, group = (
        model.model.layers[0].self_attn.head_dim,
        config.num_attention_heads // config.num_key_value_heads,
    )
    for layer in model.model.layers:
        attention = layer.self_attn
        for name, heads in (("q_proj", group), ("k_proj", 1), ("v_proj", 1)):
            weight = getattr(attention, name).weight
            more = torch.cat(
                (weight, torch.zeros(heads * size, weight.shape[1], dtype=weight.dtype))
            )
            getattr(attention, name).weight = torch.nn.Parameter(more)
        weight = attention.o_proj.weight
        more = torch.cat(
            (weight, torch.zeros(weight.shape[0], group * size, dtype=weight.dtype)), dim=1
        )
        attention.o_proj.weight = torch.nn.Parameter(more)
    config.head_dim = size
    config.num_attention_heads += group
    config.num_key_value_heads += 1
    save(model, source, target)


def save(model: torch.nn.Module, source: str, target: str) -> None:
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source).save_pretrained(target)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
