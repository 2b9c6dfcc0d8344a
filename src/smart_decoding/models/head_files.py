"""Draft heads on disk: those of `smart train`, and published ones in the layouts of EAGLE-1/2,
EAGLE-3, speculators.

All are brought to one form, `HeadFiles`; docs/eagle-heads.md has the conventions. Loading is
strict: a tensor that is missing, misshapen or unknown is an error that names it.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.models import rope
from smart_decoding.models.config import ModelConfig

ARCHITECTURE = "SmartEagle3Head"
VISUAL_POSITIONS = (
    "dropped",
    "decoupled",
)  # what a head reads of pictures: nothing, or their embeddings
FIRST = "midlayer."  # EAGLE-3's name for the layer
_ATTENTION = f"{FIRST}self_attn."
_TRUST = "convert it to safetensors, or allow it by --trust-pickle (trust_pickle=True)"
_IGNORED = ("t2d", "midlayer.self_attn.rotary_emb.inv_freq")  # what they say is known already
_UNSUPPORTED = {
    "norm_before_fc": "input_norm",
    "norm_output": "norm_output",
}  # speculators options, and what they add


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A head as read from disk, checked against the target.

    weights: EAGLE-3's names, `draft_ids` [draft] (target ids) instead of d2t, and where the head
    has its own:
        `lm_head.weight`, `embed_tokens.weight`, `fc.bias`, `fc_norm.{i}.weight`. EAGLE-1/2 has only
        fc and the layers. The first layer is `midlayer.*`; further ones, ordinary Llama layers, are
        `layers.1.*`, `layers.2.*`, ...
    aux_layers: layers of the target whose outputs the head reads. shape: of the head's layers.
    fused: EAGLE-1/2, whose fc reads [embedding ; features] at every step.
    norm_before_residual: the layer's residual is the normed features, not the features.
    sees: it was trained with pictures: `visual_positions` is "decoupled" in its config."""

    config: Mapping[str, Any]
    weights: Mapping[str, Tensor]
    aux_layers: tuple[int, ...]
    shape: ModelConfig
    fused: bool = False
    norm_before_residual: bool = False
    sees: bool = False


def head_folder(name: str | Path, trust_pickle: bool = False) -> Path:
    """The folder of a head: a local one, or OWNER/NAME from the hub, pickled weights only if there
    are no others.

    Raises ModelError or DownloadError."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if str(name).count("/") != 1 or str(name).startswith((".", "/", "~")):
        raise ModelError(
            f"no draft head {str(name)!r}: no such folder, nor a hub id such as OWNER/NAME"
        )
    folder = _snapshot(str(name), ["config.json", "*.safetensors"])
    if not any(folder.glob("*.safetensors")):
        if not trust_pickle:
            raise ModelError(
                f"the head {name} has no safetensors, and pickles are refused: {_TRUST}"
            )
        folder = _snapshot(str(name), ["config.json", "pytorch_model.bin"])
    return folder


def load_head(folder: Path, target: ModelConfig, trust_pickle: bool = False) -> HeadFiles:
    """Reads a head and checks that it fits the target. Raises ModelError naming what does not.

    trust_pickle: whether its weights may be a pickle, where there are no others."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except FileNotFoundError as error:
        raise ModelError(f"{folder} is not a draft head: it has no config.json") from error
    except ValueError as error:
        raise ModelError(f"config.json in {folder} is corrupt: {error}") from error
    ours = config.get("architectures") == [ARCHITECTURE]
    return (_load_ours if ours else _load_published)(folder, config, target, trust_pickle)


def _load_ours(
    folder: Path, config: Mapping[str, Any], target: ModelConfig, trust_pickle: bool
) -> HeadFiles:
    wanted = {
        "hidden_size": target.hidden,
        "vocab_size": target.vocab,
        "target_num_hidden_layers": target.layers,
    }
    for name, value in wanted.items():
        if config.get(name) != value:
            raise ModelError(
                f"the head in {folder} has {name} {config.get(name)}, but the model has {value}"
            )
    aux_layers = _within(folder, config.get("taps") or (), target)
    shape = replace(target, layers=1, qkv_bias=False, o_bias=False, qk_norm=False)
    weights = _read(folder, trust_pickle)
    fc_norms = {f"fc_norm.{i}.weight": (shape.hidden,) for i in range(len(aux_layers))}
    _check(
        folder, weights, _layer_shapes(shape, target.hidden, aux_layers) | fc_norms, ("draft_ids",)
    )
    _check_ids(folder, weights.get("draft_ids"), target.vocab)
    return HeadFiles(config, weights, aux_layers, shape, sees=_sees(folder, config))


def _load_published(
    folder: Path, config: Mapping[str, Any], target: ModelConfig, trust_pickle: bool
) -> HeadFiles:
    shape = _shape(folder, config, target)
    weights = {_plain_name(name): tensor for name, tensor in _read(folder, trust_pickle).items()}
    fused = (
        "midlayer.hidden_norm.weight" not in weights
        and "d2t" not in weights
        and "norm.weight" not in weights
    )
    shape = replace(
        shape,
        qkv_bias=f"{_ATTENTION}q_proj.bias" in weights,
        o_bias=f"{_ATTENTION}o_proj.bias" in weights,
    )
    more = _further_shapes(shape)
    if fused:
        bias = {"fc.bias": (shape.hidden,)} if config.get("bias", True) else {}
        _check(
            folder, weights, _fused_shapes(shape) | bias | more, ("embed_tokens.weight", *_IGNORED)
        )
        ids = torch.arange(target.vocab)
        aux_layers: tuple[int, ...] = (target.layers,)
    else:
        aux_layers = _aux_layers(folder, config, target)
        ids = _draft_ids(folder, weights, target.vocab)
        norms = {name: (shape.hidden,) for name in weights if name.startswith("fc_norm.")}
        if norms and sorted(norms) != [f"fc_norm.{i}.weight" for i in range(len(aux_layers))]:
            raise ModelError(
                f"the head in {folder} has {len(norms)} tensors fc_norm, but reads {len(aux_layers)} layers"
            )
        output = {"lm_head.weight": (len(ids), shape.hidden)}
        shapes = _layer_shapes(shape, target.hidden, aux_layers) | norms | output | more
        _check(folder, weights, shapes, ("d2t", "embed_tokens.weight", *_IGNORED))
    _check_embedding(folder, weights, target)
    weights = {name: tensor for name, tensor in weights.items() if name not in ("d2t", *_IGNORED)}
    residual = bool(config.get("norm_before_residual", False))
    return HeadFiles(
        config,
        weights | {"draft_ids": ids},
        aux_layers,
        shape,
        fused,
        residual,
        _sees(folder, config),
    )


def _sees(folder: Path, config: Mapping[str, Any]) -> bool:
    how = config.get("visual_positions", VISUAL_POSITIONS[0])
    if how not in VISUAL_POSITIONS:
        known = ", ".join(VISUAL_POSITIONS)
        raise ModelError(f"the head in {folder} has visual_positions {how!r}; supported: {known}")
    return bool(how == VISUAL_POSITIONS[1])


def _shape(folder: Path, config: Mapping[str, Any], target: ModelConfig) -> ModelConfig:
    """The head's own layer. What is not said is as in the public code: rope_theta 10000,
    rms_norm_eps 1e-6."""
    layer = config.get("transformer_layer_config") or config
    if config.get("speculators_model_type") == "eagle":
        raise ModelError(
            f"the head in {folder} is speculators' layout of EAGLE-1, which is not supported"
        )
    for name, adds in _UNSUPPORTED.items():
        if config.get(name):
            raise ModelError(
                f"the head in {folder} has {name}, which is not supported (it adds {adds})"
            )
    if layer.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ModelError(
            f"the head in {folder} has hidden_act {layer['hidden_act']!r}; supported: silu"
        )
    try:
        heads, hidden = int(layer["num_attention_heads"]), int(layer["hidden_size"])
        ffn, vocab = int(layer["intermediate_size"]), int(layer["vocab_size"])
    except KeyError as error:
        raise ModelError(
            f"config.json in {folder} lacks {error}: it is no draft head that is known here"
        ) from error
    sizes = {"hidden_size": (hidden, target.hidden), "vocab_size": (vocab, target.vocab)}
    if config.get("target_hidden_size") is not None:
        sizes["target_hidden_size"] = (int(config["target_hidden_size"]), target.hidden)
    for name, (found, wanted) in sizes.items():
        if found != wanted:
            raise ModelError(f"the head in {folder} has {name} {found}, but the model has {wanted}")
    options = rope.options_of(layer)
    positions = int(layer.get("max_position_embeddings") or target.max_positions)
    return ModelConfig(
        family="llama",
        layers=int(layer.get("num_hidden_layers") or 1),
        hidden=hidden,
        heads=heads,
        kv_heads=int(layer.get("num_key_value_heads") or heads),
        head_dim=int(layer.get("head_dim") or hidden // heads),
        ffn=ffn,
        vocab=vocab,
        rope_theta=float(options.get("rope_theta") or 10_000.0),
        rms_eps=float(layer.get("rms_norm_eps") or 1e-6),
        max_positions=positions,
        rope_scaling=rope.scaling_from_hf(options, positions),
    )


def _aux_layers(folder: Path, config: Mapping[str, Any], target: ModelConfig) -> tuple[int, ...]:
    """Layers whose outputs the head reads, counted from 1: the inputs of layers 2, L // 2 and L -
    3, unless it says so.

    speculators names layer inputs; SpecForge's nested `eagle_config` names layer outputs, which are
    one further on."""
    listed = config.get("eagle_aux_hidden_state_layer_ids")
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if listed is None and nested is not None:
        listed = [int(i) + 1 for i in nested]
    return _within(folder, listed or (2, target.layers // 2, target.layers - 3), target)


def _within(folder: Path, listed: Sequence[Any], target: ModelConfig) -> tuple[int, ...]:
    """The layers a head reads. Raises ModelError unless they are the target's, and in order."""
    aux_layers = tuple(int(i) for i in listed)
    if (
        not aux_layers
        or sorted(set(aux_layers)) != list(aux_layers)
        or aux_layers[0] < 1
        or aux_layers[-1] > target.layers
    ):
        raise ModelError(
            f"the head in {folder} reads layers {aux_layers} of a model of {target.layers}: they must be distinct, ascending "
            "and within it"
        )
    return aux_layers


def _layer_shapes(
    c: ModelConfig, target_hidden: int, aux_layers: tuple[int, ...]
) -> dict[str, tuple[int, ...]]:
    """EAGLE-3: q, k and v read [embedding ; features]."""
    d = c.hidden
    norms = {f"midlayer.{name}.weight": (d,) for name in ("input_layernorm", "hidden_norm")}
    common = _common_shapes(c, 2 * d, FIRST)
    return {
        "fc.weight": (d, len(aux_layers) * target_hidden),
        "norm.weight": (d,),
        **norms,
        **common,
    }


def _fused_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """EAGLE-1/2: fc reads [embedding ; features], and the layer has no norm at its input."""
    return {"fc.weight": (c.hidden, 2 * c.hidden), **_common_shapes(c, c.hidden, FIRST)}


def _further_shapes(c: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The layers after the first are ordinary ones: they read what the one before gave, through
    their own norm."""
    shapes: dict[str, tuple[int, ...]] = {}
    for prefix in layer_prefixes(c.layers)[1:]:
        shapes |= {
            f"{prefix}input_layernorm.weight": (c.hidden,),
            **_common_shapes(c, c.hidden, prefix),
        }
    return shapes


def layer_prefixes(layers: int) -> list[str]:
    """What the names of each layer's tensors start with in `HeadFiles.weights`."""
    return [FIRST, *(f"layers.{i}." for i in range(1, layers))]


def _common_shapes(c: ModelConfig, width: int, prefix: str) -> dict[str, tuple[int, ...]]:
    attention = f"{prefix}self_attn."
    q, kv, d = c.heads * c.head_dim, c.kv_heads * c.head_dim, c.hidden
    rows = {"q_proj": q, "k_proj": kv, "v_proj": kv}
    shapes: dict[str, tuple[int, ...]] = {
        f"{prefix}post_attention_layernorm.weight": (d,),
        **{f"{attention}{name}.weight": (n, width) for name, n in rows.items()},
        f"{attention}o_proj.weight": (d, q),
        f"{prefix}mlp.gate_proj.weight": (c.ffn, d),
        f"{prefix}mlp.up_proj.weight": (c.ffn, d),
        f"{prefix}mlp.down_proj.weight": (d, c.ffn),
    }
    if c.qkv_bias:
        shapes |= {f"{attention}{name}.bias": (n,) for name, n in rows.items()}
    return shapes | ({f"{attention}o_proj.bias": (d,)} if c.o_bias else {})


def _check(
    folder: Path,
    weights: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    optional: tuple[str, ...],
) -> None:
    for name, shape in shapes.items():
        if name not in weights:
            raise ModelError(f"the head in {folder} lacks the tensor {name}")
        if tuple(weights[name].shape) != shape:
            raise ModelError(
                f"the head's {name} has shape {tuple(weights[name].shape)}, but the model needs {shape}"
            )
    unknown = [name for name in weights if name not in shapes and name not in optional]
    if unknown:
        raise ModelError(
            f"the head in {folder} holds the tensor {unknown[0]}, which is not supported"
        )


def _check_embedding(folder: Path, weights: Mapping[str, Tensor], target: ModelConfig) -> None:
    embedding = weights.get("embed_tokens.weight")
    if embedding is not None and tuple(embedding.shape) != (target.vocab, target.hidden):
        raise ModelError(
            f"the head in {folder} has embed_tokens.weight of shape {tuple(embedding.shape)}"
        )


def _draft_ids(folder: Path, weights: Mapping[str, Tensor], vocab: int) -> Tensor:
    """[draft] target ids of the head's own vocabulary: i + d2t[i]; without d2t it is the
    target's."""
    offset = weights.get("d2t")
    if offset is None:
        return torch.arange(vocab)
    ids = torch.arange(len(offset)) + offset.long()
    _check_ids(folder, ids, vocab)
    marked = weights.get("t2d")
    if marked is not None and (
        marked.numel() != vocab or not torch.equal(marked.bool().nonzero()[:, 0], ids)
    ):
        raise ModelError(f"the head in {folder} has d2t and t2d that contradict each other")
    return ids


def _check_ids(folder: Path, ids: Tensor | None, vocab: int) -> None:
    if ids is None or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ModelError(f"the head in {folder} lacks draft_ids within the model's vocabulary")


def _plain_name(name: str) -> str:
    """EAGLE-3's name for a tensor: speculators and EAGLE-1/2 call the layer `layers.0`."""
    return FIRST + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def _read(folder: Path, trust_pickle: bool) -> dict[str, Tensor]:
    """All tensors of the folder; safetensors first."""
    files = sorted(folder.glob("model*.safetensors"))
    pickled = folder / "pytorch_model.bin"
    if not files and pickled.is_file():
        if not trust_pickle:
            raise ModelError(f"{pickled} is a pickle, and pickles are refused: {_TRUST}")
        return _unpickle(pickled)
    tensors: dict[str, Tensor] = {}
    for path in files or [folder / "model.safetensors"]:
        try:
            tensors |= load_file(path)
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path.name} in {folder} is missing or corrupt ({error})") from error
    return tensors


def _unpickle(path: Path) -> dict[str, Tensor]:
    """Tensors of a pickle, which may hold nothing else: no code is run."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} holds more than tensors, or is corrupt: {reason}") from error
    if not isinstance(content, dict) or not all(
        isinstance(tensor, Tensor) for tensor in content.values()
    ):
        raise ModelError(f"{path} is no table of tensors")
    return content


def _snapshot(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download  # imported late: it takes a quarter of a second

    try:
        return Path(str(snapshot_download(repository, allow_patterns=patterns)))
    except (
        Exception
    ) as error:  # the client lets network errors of several libraries through, and its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DownloadError(f"cannot fetch the head {repository} from the hub: {reason}") from error
