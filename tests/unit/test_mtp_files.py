"""Layers for multi-token prediction are found in safetensors and GGUF files, apart from the model,
and what cannot draft is refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file

from smart_decoding.errors import ModelError
from smart_decoding.kernels.weights import QuantizedTensor
from smart_decoding.models.checkpoints.loading import Checkpoint, load_checkpoint
from smart_decoding.models.families.mtp import check_mtp, mtp_shapes

from .test_loading import assert_refused, change_weights, own_cache, tiny_model, write_gguf

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

__all__ = ["own_cache"]
SHAPES = {  # of a model of hidden size 32, 4 heads of 16 and 2 key heads, written out
    "mtp.fc.weight": (32, 64),
    "mtp.pre_fc_norm_embedding.weight": (32,),
    "mtp.pre_fc_norm_hidden.weight": (32,),
    "mtp.layers.0.input_layernorm.weight": (32,),
    "mtp.layers.0.self_attn.q_proj.weight": (128, 32),
    "mtp.layers.0.self_attn.k_proj.weight": (32, 32),
    "mtp.layers.0.self_attn.v_proj.weight": (32, 32),
    "mtp.layers.0.self_attn.q_norm.weight": (16,),
    "mtp.layers.0.self_attn.k_norm.weight": (16,),
    "mtp.layers.0.self_attn.o_proj.weight": (32, 64),
    "mtp.layers.0.post_attention_layernorm.weight": (32,),
    "mtp.layers.0.mlp.gate_proj.weight": (64, 32),
    "mtp.layers.0.mlp.up_proj.weight": (64, 32),
    "mtp.layers.0.mlp.down_proj.weight": (32, 64),
    "mtp.norm.weight": (32,),
}
NETWORKS = ["mlp.shared_expert", *(f"mlp.experts.{n}" for n in range(4))]
# of a mixture of 4 experts and a shared one
OF_MIXTURES = {
    **{name: shape for name, shape in SHAPES.items() if ".mlp." not in name},
    "mtp.layers.0.mlp.gate.weight": (4, 32),
    "mtp.layers.0.mlp.shared_expert_gate.weight": (1, 32),
    **{
        f"mtp.layers.0.{network}.{part}_proj.weight": (32, 64) if part == "down" else (64, 32)
        for network in NETWORKS
        for part in ("gate", "up", "down")
    },
}
KINDS = {"qwen35": SHAPES, "qwen35moe": OF_MIXTURES}
# what it may have of its own, in place of the model's
EMBEDDING = "mtp.embed_tokens.weight"
OUTPUT = "mtp.lm_head.weight"
OWN = [(), (EMBEDDING,), (OUTPUT,), (EMBEDDING, OUTPUT)]


def tensors(
    seed: int = 1, kind: str = "qwen35", own: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """A random layer, as it is published: norms are what is beyond 1. own: of OWN."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(shape, generator=generator) * 0.2).bfloat16().float()
        for name, shape in (KINDS[kind] | dict.fromkeys(own, (300, 32))).items()
    }


def folder_of(path: Path, more: dict[str, torch.Tensor], kind: str = "qwen35") -> Path:
    """The tiny model as transformers writes it, with further tensors."""
    tiny_model(kind).save_pretrained(path)
    change_weights(path, lambda weights: weights.update(more))
    return path


def check(checkpoint: Checkpoint) -> None:
    check_mtp(checkpoint.config, {} if checkpoint.mtp is None else checkpoint.mtp.shapes, "tiny")


def test_the_shapes_are_those_of_a_layer_with_attention(tmp_path: Path) -> None:
    checkpoint = load_checkpoint(folder_of(tmp_path, {}))
    assert checkpoint.mtp is None
    assert mtp_shapes(checkpoint.config) == SHAPES


@pytest.mark.parametrize(
    ("name", "quantization"), [("tiny.gguf", None), ("tiny.gguf", "off"), ("folder", None)]
)
@pytest.mark.parametrize(
    ("kind", "own"), [*(("qwen35", own) for own in OWN), ("qwen35moe", OWN[3])]
)
def test_a_file_holds_a_layer_apart(
    own: Sequence[str], kind: str, name: str, quantization: str | None, tmp_path: Path
) -> None:
    published = tensors(kind=kind, own=own)
    folder_of(tmp_path / "folder", published, kind)
    write_gguf(tmp_path / "tiny.gguf", kind, mtp=published)
    checkpoint = load_checkpoint(tmp_path / name, quantization=quantization)
    check(checkpoint)
    assert checkpoint.config.layers == 2
    assert not any(each.startswith("mtp.") for each in checkpoint.weights)
    assert checkpoint.mtp is not None
    assert set(checkpoint.mtp) == {*KINDS[kind], *own}
    for each, weight in published.items():
        computed = weight + 1 if "norm" in each else weight
        assert torch.equal(checkpoint.mtp[each], computed), each


def test_its_experts_may_lie_in_one_tensor(tmp_path: Path) -> None:
    published = tensors(kind="qwen35moe")
    prefix = "mtp.layers.0.mlp.experts."
    others = {name: weight for name, weight in published.items() if prefix not in name}
    gate, up, down = (
        torch.stack([published[f"{prefix}{n}.{part}_proj.weight"] for n in range(4)])
        for part in ("gate", "up", "down")
    )
    others |= {f"{prefix}gate_up_proj": torch.cat((gate, up), 1), f"{prefix}down_proj": down}
    checkpoint = load_checkpoint(folder_of(tmp_path, others, "qwen35moe"))
    check(checkpoint)
    assert checkpoint.mtp is not None
    for name in published:
        if prefix in name:
            assert torch.equal(checkpoint.mtp[name], published[name])


def test_its_quants_stay_what_they_are(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = write_gguf(tmp_path / "tiny.gguf", "qwen35", kind, mtp=tensors())
    held = load_checkpoint(tmp_path / "tiny.gguf", quantization=None).mtp
    expanded = load_checkpoint(tmp_path / "tiny.gguf").mtp
    assert held is not None
    assert expanded is not None
    for name in ("mtp.fc.weight", "mtp.layers.0.self_attn.q_proj.weight"):
        assert isinstance(held[name], QuantizedTensor)
        assert torch.equal(held[name].dequantize(), expected[name].float())
        assert torch.equal(expanded[name], expected[name])


def without(name: str) -> dict[str, torch.Tensor]:
    return {each: weight for each, weight in tensors().items() if each != name}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, ["tiny has no layer for multi-token prediction", "'ngram'"]),
        (without("mtp.norm.weight"), ["the MTP layer of tiny lacks the tensor mtp.norm.weight"]),
        (tensors() | {"mtp.fc.weight": torch.zeros(32, 32)}, ["mtp.fc.weight", "(32, 64)"]),
        (tensors() | {OUTPUT: torch.zeros(90, 32)}, [OUTPUT, "shape (90, 32)", "(300, 32)"]),
        (tensors() | {EMBEDDING: torch.zeros(300, 8)}, [EMBEDDING, "shape (300, 8)"]),
        (tensors() | {"mtp.head.weight": torch.zeros(2)}, ["mtp.head.weight", "not use"]),
        (
            tensors() | {"mtp.layers.1.mlp.up_proj.weight": torch.zeros(2)},
            ["2 layers for multi-token prediction, of which one is supported"],
        ),
    ],
)
def test_what_cannot_draft_is_named_and_the_model_loads(
    more: dict[str, torch.Tensor], words: list[str], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(folder_of(tmp_path, more))
    with pytest.raises(ModelError) as caught:
        check(checkpoint)
    assert all(word in str(caught.value) for word in words)


def test_a_gguf_file_of_two_layers_loads_without_them(tmp_path: Path) -> None:
    second = {n.replace("s.0.", "s.1."): w for n, w in tensors(2).items() if ".layers." in n}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf.GGUFWriter, "add_block_count", blocks(4))
        patch.setattr(gguf.GGUFWriter, "add_nextn_predict_layers", further(2))
        write_gguf(tmp_path / "tiny.gguf", "qwen35", mtp=tensors() | second)
    checkpoint = load_checkpoint(tmp_path / "tiny.gguf")
    assert checkpoint.config.layers == 2
    with pytest.raises(ModelError, match="2 layers for multi-token prediction"):
        check(checkpoint)


def blocks(count: int) -> Any:
    return lambda writer, _: writer.add_uint32("qwen35.block_count", count)


def further(count: int) -> Any:
    return lambda writer, _: writer.add_uint32("qwen35.nextn_predict_layers", count)


def test_tensors_of_that_name_in_other_families_are_refused(tmp_path: Path) -> None:
    tiny_model("qwen3").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | tensors(), tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_refused(tmp_path, "holds the tensor mtp.", "Qwen3ForCausalLM does not use")
