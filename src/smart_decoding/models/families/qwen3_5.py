"""Qwen3.5, text alone: three layers of four have linear attention by the gated delta rule, the
fourth has attention of which a quarter of the dimensions rotate and whose outputs are gated.
Published norms are what is beyond 1, but for linear attention's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from smart_decoding.errors import ModelError
from smart_decoding.models.families import rope
from smart_decoding.models.families.family import GGUF_MTP, GGUF_NAMES, Family, RowOrder
from smart_decoding.models.families.layer import LinearAttention

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

_INTERVAL = 4  # one layer in so many has attention
_ROTARY = 0.25  # the part of a head that rotates, where a file does not say it
_BY_VALUE_HEAD = (
    *("attn_gate.weight", "ssm_alpha.weight", "ssm_beta.weight", "ssm_a", "ssm_dt.bias"),
)
_TILED = "linear_value_heads_tiled"  # our own entry: quants of a GGUF file keep its order
_KINDS = ("linear_attention", "full_attention")


def _as_computed(
    config: ModelConfig, linear: LinearAttention, attention: Sequence[int], rotary_dim: int
) -> ModelConfig:
    if config.rope_scaling is not None:
        raise ModelError("RoPE scaling of partial rotary embeddings is not supported")
    return replace(
        config,
        qk_norm=True,
        shifted_norms=True,
        gated=True,
        linear=linear,
        attention_layers=tuple(attention),
        rotary_dim=rotary_dim,
    )


def _from_hf(config: ModelConfig, source: Mapping[str, Any]) -> ModelConfig:
    interval = int(source.get("full_attention_interval") or _INTERVAL)
    kinds = source.get("layer_types") or [
        _KINDS[number in _every(interval, config.layers)] for number in range(config.layers)
    ]
    if len(kinds) != config.layers or not set(kinds) <= set(_KINDS):
        raise ModelError(f"the config has layer_types {kinds} for {config.layers} layers")
    part = float(rope.options_of(source).get("partial_rotary_factor") or _ROTARY)
    linear = LinearAttention(
        key_heads=int(source["linear_num_key_heads"]),
        value_heads=int(source["linear_num_value_heads"]),
        key_dim=int(source["linear_key_head_dim"]),
        value_dim=int(source["linear_value_head_dim"]),
        kernel=int(source["linear_conv_kernel_dim"]),
        tiled=bool(source.get(_TILED)),
    )
    attention = [number for number, kind in enumerate(kinds) if kind == _KINDS[1]]
    return _as_computed(config, linear, attention, int(config.head_dim * part))


def _every(interval: int, layers: int) -> range:
    """Return the layers with attention."""
    return range(interval - 1, layers, interval)


def _from_gguf(config: ModelConfig, metadata: Mapping[str, Any]) -> ModelConfig:
    own = f"{metadata['general.architecture']}."
    further = int(metadata.get(own + "nextn_predict_layers", 0))  # of MTP, counted as blocks
    config = replace(config, layers=config.layers - further)
    value_heads = int(metadata[own + "ssm.time_step_rank"])
    linear = LinearAttention(
        key_heads=int(metadata[own + "ssm.group_count"]),
        value_heads=value_heads,
        key_dim=int(metadata[own + "ssm.state_size"]),
        value_dim=int(metadata[own + "ssm.inner_size"]) // value_heads,
        kernel=int(metadata[own + "ssm.conv_kernel"]),
    )
    interval = int(metadata.get(own + "full_attention_interval", _INTERVAL))
    rotary = int(metadata.get(own + "rope.dimension_count", config.head_dim * _ROTARY))
    return _as_computed(config, linear, _every(interval, config.layers), rotary)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    linear = config.linear
    assert linear is not None
    assert config.rotary_dim is not None
    return {
        "layer_types": [_KINDS[n in config.attention_layers] for n in range(config.layers)],
        "linear_num_key_heads": linear.key_heads,
        "linear_num_value_heads": linear.value_heads,
        "linear_key_head_dim": linear.key_dim,
        "linear_value_head_dim": linear.value_dim,
        "linear_conv_kernel_dim": linear.kernel,
        **({_TILED: True} if linear.tiled else {}),
        "rope_scaling": None,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "partial_rotary_factor": config.rotary_dim / config.head_dim,
        },
    }


def _gguf_order(config: ModelConfig, name: str) -> RowOrder | None:
    """Return the order of value heads in GGUF files: the first of each key head's, then the second
    of each, and so on."""
    linear = config.linear
    assert linear is not None
    each = linear.value_heads // linear.key_heads
    heads = (each, linear.key_heads, -1)
    part = name.partition(".")[2].partition(".")[2]
    if each == 1 or linear.tiled:
        return None
    if part in ("attn_qkv.weight", "ssm_conv1d.weight"):
        return RowOrder(heads, (0, 1), first=2 * linear.keys)
    if part in _BY_VALUE_HEAD:
        return RowOrder(heads, (0, 1))
    return RowOrder(heads, (0, 1), of_columns=True) if part == "ssm_out.weight" else None


QWEN3_5 = Family(
    name="qwen3_5",
    architecture="Qwen3_5ForCausalLM",
    model_type="qwen3_5_text",
    whole="Qwen3_5ForConditionalGeneration",
    gguf="qwen35",
    options=frozenset({"partial_rotary_factor"}),
    gguf_options=frozenset({"rope.dimension_count"}),
    from_hf=_from_hf,
    from_gguf=_from_gguf,
    to_hf=_to_hf,
    gguf_names={
        **GGUF_NAMES,
        "post_attention_norm": "post_attention_layernorm",
        "attn_qkv": "linear_attn.in_proj_qkv",
        "attn_gate": "linear_attn.in_proj_z",
        "ssm_beta": "linear_attn.in_proj_b",
        "ssm_alpha": "linear_attn.in_proj_a",
        "ssm_conv1d": "linear_attn.conv1d",
        "ssm_a": "linear_attn.A_log",
        "ssm_dt.bias": "linear_attn.dt_bias",
        "ssm_norm": "linear_attn.norm",
        "ssm_out": "linear_attn.out_proj",
        **GGUF_MTP,
    },
    gguf_order=_gguf_order,
    mtp=True,
)
