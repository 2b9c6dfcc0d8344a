"""What a head starts as, beside targets whose layers are no plain ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.layer import Experts, FeedForward, LinearAttention
from smart_decoding.training.head import Form, TrainableHead

from .tiny import TARGET, VOCAB, checkpoint

HYBRID = ModelConfig(
    *("qwen3_5", 4, 32, 4, 2, 16, 48, VOCAB, 1e4, 1e-5, 1024),
    qk_norm=True,
    linear=LinearAttention(2, 4, 8, 8, 4),
    attention_layers=(1,),
    rotary_dim=8,
    gated=True,
)
MIXTURE = replace(TARGET, experts=Experts(4, 2, True, FeedForward(24, gelu=False)))


def started(target: ModelConfig) -> tuple[TrainableHead, dict[str, torch.Tensor]]:
    weights = checkpoint(target).weights
    head = TrainableHead(Form(target.of_head(), 2))
    head.start_from(weights, target, 1.0)
    return head, {name: as_tensor(weight) for name, weight in weights.items()}


@pytest.mark.parametrize(("target", "layer"), [(TARGET, 3), (HYBRID, 1), (MIXTURE, 3)])
def test_attention_is_that_of_the_last_layer_that_has_it(target: ModelConfig, layer: int) -> None:
    head, weights = started(target)
    own = {
        name.rpartition("self_attn.")[2]: tensor
        for name, tensor in head.exported().items()
        if "self_attn" in name
    }
    for name in "qkvo":
        theirs = weights[f"model.layers.{layer}.self_attn.{name}_proj.weight"]
        if name == "q" and target.gated:
            theirs = torch.cat([theirs[32 * head : 32 * head + 16] for head in range(4)])
        ours = own[f"{name}_proj.weight"]
        assert torch.equal(ours[:, -theirs.shape[1] :], theirs.bfloat16())


def test_experts_are_no_start_of_a_network() -> None:
    head, weights = started(MIXTURE)
    assert head.down_proj.weight.count_nonzero() == 0
    assert head.gate_up.weight.count_nonzero() > 0
    head, weights = started(TARGET)
    assert torch.equal(head.down_proj.weight, weights["model.layers.3.mlp.down_proj.weight"])
