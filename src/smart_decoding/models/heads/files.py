"""Draft heads on disk: those of `smart train`, and published ones in the layouts of EAGLE-1/2,
EAGLE-3, speculators, and llama.cpp's GGUF files.

All are brought to one form, `HeadFiles`; docs/eagle-heads.md has the conventions. Loading is
strict: a tensor that is missing, misshapen or unknown is an error that names it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from smart_decoding.errors import ModelError
from smart_decoding.files import expanded, read_json, reading
from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.checkpoints.gguf_header import is_head_file
from smart_decoding.models.checkpoints.hub_repository import (
    PATIENT,
    download,
    gguf_file,
    listing,
)
from smart_decoding.models.checkpoints.registry import TRUST, USUAL, hub_id_of, is_gguf
from smart_decoding.models.checkpoints.rounding import ROUNDED, restored
from smart_decoding.models.checkpoints.weight_files import unpickle
from smart_decoding.models.families import rope
from smart_decoding.models.families.config import ModelConfig, check_shapes
from smart_decoding.models.heads.forms import EAGLE2, EAGLE3, HeadForm

if TYPE_CHECKING:
    from smart_decoding.kernels.weights import Matrix
    from smart_decoding.models.families.layer import Shapes

ARCHITECTURE = "SmartEagle3Head"
FIRST = "midlayer."  # EAGLE-3's name for the layer
OUTPUTS = "outputs.weight"  # of all tokens: an MTP layer's own output matrix
AUX_NORM = "input_norm.weight"  # of what fc reads, where one norm is over all of it
# what a head reads of images: nothing, or their embeddings
VISUAL_POSITIONS = ("dropped", "decoupled")
_IGNORED = ("t2d", "midlayer.self_attn.rotary_emb.inv_freq")  # what they say is known already
_IDS = ("d2t", "draft_ids")
_OPTIONAL = (*_IDS, *_IGNORED)
# architectures of other drafters, and what speculators calls them
_OTHERS = {"dflash": "DFlash", "dspark": "DSpark", "medusa": "Medusa", "peagle": "P-EAGLE"}
# in names of tensors that other kinds of layers have
_LAYERS = {
    ".experts": "a mixture of experts as its layer, which is not supported: take a dense one",
    ".kv_a_proj": "latent attention (MLA), which is not supported: take one with Llama's layer",
}


@dataclass(frozen=True, slots=True)
class HeadFiles:
    """A head as read from disk, checked against the target.

    weights: EAGLE-3's names, `draft_ids` [draft] (target ids) instead of d2t, and where the head
    has its own: `lm_head.weight` or OUTPUTS, `embed_tokens.weight`, `fc.bias`,
    `fc_norm.{i}.weight` or `input_norm.weight`. EAGLE-1/2 has only fc and the layers. The first
    layer is `midlayer.*`; further ones, ordinary Llama layers, are `layers.1.*`, `layers.2.*`, ...
    Matrices may be quants: of a head of ours, as `quantization` in its config says, and of a GGUF
    file.
    aux_layers: layers of the target whose outputs the head reads. shape: of the head's layers.
    form: how its levels compute.
    norm_before_residual: the layer's residual is the normed features, not the features.
    supports_images: it was trained with images: `visual_positions` is "decoupled" in its config."""

    config: Mapping[str, Any]
    weights: Mapping[str, Matrix]
    aux_layers: tuple[int, ...]
    shape: ModelConfig
    form: HeadForm = EAGLE3
    norm_before_residual: bool = False
    supports_images: bool = False

    @property
    def fused(self) -> bool:
        """Whether it is of EAGLE-1/2's kind: see HeadForm."""
        return self.form.fused


def head_path(name: str | Path, trust_pickle: bool = False) -> Path:
    """Return the folder of a head or its GGUF file: a local one, or from the hub OWNER/NAME or
    OWNER/NAME:FILE.gguf, pickled weights only if there are no others.

    Raises ModelError or DownloadError."""
    path = expanded(name)
    if path.is_dir() or is_gguf(path):
        return path
    hub_id = hub_id_of(str(name))
    if hub_id is None:
        raise ModelError(
            f"no draft head {str(name)!r}: no such folder or GGUF file, nor a hub id such as "
            "OWNER/NAME"
        )
    if hub_id[2]:
        return _gguf_on_hub(hub_id[1], hub_id[2])
    folder = download(hub_id[1], ["config.json", "*.safetensors"], [], PATIENT)
    if not (folder / "config.json").is_file() and listing(hub_id[1], PATIENT).has_only_ggufs:
        return _gguf_on_hub(hub_id[1], "")
    if not any(folder.glob("*.safetensors")):
        if not trust_pickle:
            raise ModelError(
                f"the head {name} has no safetensors, and pickles are refused: {TRUST}"
            )
        folder = download(hub_id[1], ["config.json", "pytorch_model.bin"], [], PATIENT)
    return folder


def _gguf_on_hub(repository: str, requested: str) -> Path:
    """Return a GGUF file of a repository, by its name or quantisation; its only one, or Q4_K_M,
    where none is requested."""
    held = listing(repository, PATIENT)
    only = held.ggufs[0] if len(held.ggufs) == 1 else USUAL
    file = held.gguf_name(requested or only)
    return gguf_file(repository, file, PATIENT, local_only=held.nothing_to_fetch([file]))


def is_head(path: Path) -> bool:
    """Return whether a local folder or GGUF file says that it is a draft head's, though a tokenizer
    may lie in it."""
    if path.is_file():
        return is_head_file(path)
    path = path / "config.json"
    if not path.is_file():
        return False
    with reading(path):
        config = read_json(path)
        names = config.get("architectures") or []
        return "draft_vocab_size" in config or any("eagle" in str(name).lower() for name in names)


def is_for(folder: Path, target: ModelConfig) -> bool:
    """Return whether a head of ours is for a model of the target's sizes."""
    path = folder / "config.json"
    with reading(path):
        config = read_json(path)
    attention = {
        "num_attention_heads": target.heads,
        "num_key_value_heads": target.kv_heads,
        "head_dim": target.head_dim,
    }
    return all(config.get(name) == size for name, size in (_sizes(target) | attention).items())


def load_head(path: Path, target: ModelConfig, trust_pickle: bool = False) -> HeadFiles:
    """Reads a head in a folder or GGUF file, and checks that it fits the target. Its weights are
    read from the disk when they are used. Raises ModelError naming what does not fit.

    trust_pickle: whether its weights may be a pickle, where there are no others."""
    if path.is_file():
        from smart_decoding.models.heads.gguf_head import read_gguf_head  # late: few heads are so

        return _load_published(path, *read_gguf_head(path), target)
    file = path / "config.json"
    if not file.exists():
        raise ModelError(f"{path} is not a draft head: it has no config.json")
    with reading(file):
        config = read_json(file)
        if not _is_ours(config):
            _refuse_options(path, config)
        tensors = _read_tensors(path, trust_pickle)
        load = _load_ours if _is_ours(config) else _load_published
        return load(path, config, tensors, target)


def scheme_of(config: Mapping[str, Any]) -> str | None:
    """Return how a head's matrices are rounded, by its config; None where they are not. Raises
    ValueError for what is not known."""
    scheme = config.get("quantization") if _is_ours(config) else None
    if scheme not in (None, *ROUNDED):
        raise ValueError(f"quantization {scheme!r} is none of {', '.join(ROUNDED)}")
    return scheme


def _is_ours(config: Mapping[str, Any]) -> bool:
    return config.get("architectures") == [ARCHITECTURE]


def _load_ours(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ModelConfig
) -> HeadFiles:
    for name, value in _sizes(target).items():
        _check_equal(folder, name, config.get(name), value)
    aux_layers = _within(folder, config.get("taps") or (), target)
    shape = replace(target.of_head(), ffn=int(config.get("intermediate_size", target.ffn)))
    scheme = scheme_of(config)
    weights: Mapping[str, Matrix] = restored(tensors, scheme) if scheme else tensors
    shapes = eagle3_shapes(shape, target.hidden, aux_layers) | _aux_norms(shape, len(aux_layers))
    _check_shapes(folder, weights, shapes, ("draft_ids",))
    _check_ids(folder, tensors.get("draft_ids"), target.vocab)
    images = _supports_images(folder, config)
    return HeadFiles(config, weights, aux_layers, shape, supports_images=images)


def _sizes(target: ModelConfig) -> dict[str, int]:
    return {
        "hidden_size": target.hidden,
        "vocab_size": target.vocab,
        "target_num_hidden_layers": target.layers,
    }


def _load_published(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Matrix], target: ModelConfig
) -> HeadFiles:
    shape = _shape(folder, config, target)
    weights = {_plain_name(name): tensor for name, tensor in tensors.items()}
    _refuse_layers(folder, weights)
    qk_norm = f"{FIRST}self_attn.q_norm.weight" in weights
    shape = replace(
        shape,
        family="qwen3" if qk_norm else "llama",
        qkv_bias=f"{FIRST}self_attn.q_proj.bias" in weights,
        o_bias=f"{FIRST}self_attn.o_proj.bias" in weights,
        qk_norm=qk_norm,
    )
    fused = weights.keys().isdisjoint((f"{FIRST}hidden_norm.weight", "norm.weight", *_IDS))
    if fused:
        aux_layers: tuple[int, ...] = (target.layers,)
        ids = torch.arange(target.vocab)
        bias: Shapes = {"fc.bias": (shape.hidden,)} if config.get("bias", True) else {}
        shapes = eagle2_shapes(shape) | bias
    else:
        aux_layers = _aux_layers(folder, config, target)
        ids = _draft_ids(folder, weights, target.vocab)
        shapes = eagle3_shapes(shape, target.hidden, aux_layers)
        if config.get("norm_before_fc") or AUX_NORM in weights:
            shapes[AUX_NORM] = (len(aux_layers) * target.hidden,)
        else:
            shapes |= _found_aux_norms(folder, weights, shape, len(aux_layers))
        if "lm_head.weight" in weights or "d2t" in weights:
            shapes["lm_head.weight"] = (len(ids), shape.hidden)
    if "embed_tokens.weight" in weights:
        shapes["embed_tokens.weight"] = (target.vocab, target.hidden)
    _check_shapes(folder, weights, shapes | further_shapes(shape), _OPTIONAL)
    kept = {name: tensor for name, tensor in weights.items() if name not in _OPTIONAL}
    return HeadFiles(
        config,
        kept | {"draft_ids": ids},
        aux_layers,
        shape,
        EAGLE2 if fused else replace(EAGLE3, feeds_back_normed=bool(config.get("norm_output"))),
        # left out it is true in speculators' layout, as vLLM reads it
        bool(config.get("norm_before_residual", "speculators_model_type" in config)),
        _supports_images(folder, config),
    )


def _refuse_layers(folder: Path, names: Collection[str]) -> None:
    """Raise ModelError for a head whose layer is of another kind than Llama's."""
    for part, what in _LAYERS.items():
        if any(part in name for name in names):
            raise ModelError(f"the head in {folder} has {what}")


def _read_tensors(folder: Path, trust_pickle: bool) -> dict[str, Tensor]:
    files = sorted(folder.glob("model*.safetensors"))
    pickled = folder / "pytorch_model.bin"
    if not files and pickled.is_file():
        if not trust_pickle:
            raise ModelError(f"{pickled} is a pickle, and pickles are refused: {TRUST}")
        tensors = unpickle(pickled)
        with reading(pickled):
            _refuse_not_finite(tensors)
        return tensors
    tensors = {}
    for path in files or [folder / "model.safetensors"]:
        with reading(path):
            found = load_file(path)
            _refuse_not_finite(found)
            tensors |= found
    return tensors


def _refuse_not_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise ValueError for NaN or infinity, as a broken training leaves them."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"the tensor {name} holds numbers that are not finite")


def _check_shapes(
    folder: Path, weights: Mapping[str, Matrix], shapes: Shapes, optional: tuple[str, ...]
) -> None:
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    check_shapes(f"the head in {folder}", found, shapes, optional, "this layout", "the model needs")


def _aux_norms(shape: ModelConfig, aux_layers: int) -> Shapes:
    return {f"fc_norm.{i}.weight": (shape.hidden,) for i in range(aux_layers)}


def _found_aux_norms(
    folder: Path, weights: Mapping[str, Matrix], shape: ModelConfig, aux_layers: int
) -> Shapes:
    """Return the same of a published head, which may have none. Raises ModelError if it has some
    only."""
    norms = _aux_norms(shape, aux_layers)
    found = {name for name in weights if name.startswith("fc_norm.")}
    if found and found != norms.keys():
        raise ModelError(
            f"the head in {folder} has {len(found)} tensors fc_norm, but reads {aux_layers} layers"
        )
    return norms if found else {}


def _supports_images(folder: Path, config: Mapping[str, Any]) -> bool:
    how = config.get("visual_positions", VISUAL_POSITIONS[0])
    if how not in VISUAL_POSITIONS:
        known = ", ".join(VISUAL_POSITIONS)
        raise ModelError(f"the head in {folder} has visual_positions {how!r}; supported: {known}")
    return bool(how == VISUAL_POSITIONS[1])


def _shape(folder: Path, config: Mapping[str, Any], target: ModelConfig) -> ModelConfig:
    """Return the head's own layer. What is not said is as in the public code: rope_theta 10000,
    rms_norm_eps 1e-6."""
    layer = config.get("transformer_layer_config") or config
    try:
        heads = int(layer["num_attention_heads"])
        hidden = int(layer["hidden_size"])
        ffn = int(layer["intermediate_size"])
        vocab = int(layer["vocab_size"])
    except KeyError as error:
        raise ModelError(
            f"the head in {folder} lacks {error} in its config: no layout that is known here"
        ) from error
    _check_equal(folder, "hidden_size", hidden, target.hidden)
    _check_equal(folder, "vocab_size", vocab, target.vocab)
    if config.get("target_hidden_size") is not None:
        found = int(config["target_hidden_size"])
        _check_equal(folder, "target_hidden_size", found, target.hidden)
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


def _refuse_options(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise ModelError for a published config of another drafter, or of a kind of head that is not
    computed here."""
    layer = config.get("transformer_layer_config") or config
    kind = config.get("speculators_model_type", "eagle3")
    if kind == "eagle":
        raise ModelError(
            f"the head in {folder} is speculators' layout of EAGLE-1, which is not supported: take "
            "the checkpoint that it was converted from, or an EAGLE-3 head"
        )
    names = " ".join([str(kind), *map(str, config.get("architectures") or ())]).lower()
    for part, other in _OTHERS.items():
        if part in names:
            raise ModelError(f"{folder} holds {other}, which is not supported: take an EAGLE head")
    if config.get("quantization_config"):
        raise ModelError(
            f"the head in {folder} is quantised (quantization_config), which is not supported: "
            "take its bf16 checkpoint, or a GGUF file of it"
        )
    has_window = layer.get("use_sliding_window")
    if has_window or "sliding_attention" in (layer.get("layer_types") or ()):
        raise ModelError(
            f"the head in {folder} has a sliding window, which is not supported: take one of full "
            "attention"
        )
    act = layer.get("hidden_act", "silu")
    if act not in ("silu", "swish"):
        raise ModelError(f"the head in {folder} has hidden_act {act!r}; supported: silu")


def _check_equal(folder: Path, name: str, found: Any, required: int) -> None:
    if found != required:
        raise ModelError(f"the head in {folder} has {name} {found}, but the model has {required}")


def _aux_layers(folder: Path, config: Mapping[str, Any], target: ModelConfig) -> tuple[int, ...]:
    """Return layers whose outputs the head reads, counted from 1: the inputs of layers 2, L // 2
    and L - 3, unless it says so.

    speculators names layer inputs. SpecForge's nested `eagle_config` names layer outputs, which are
    one further on, and NVIDIA's names inputs there: SGLang tells them apart by the first one."""
    listed = config.get("eagle_aux_hidden_state_layer_ids")
    nested = (config.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    if listed is None and nested:
        further = 1 if int(nested[0]) <= 1 else 0
        listed = [int(i) + further for i in nested]
    return _within(folder, listed or (2, target.layers // 2, target.layers - 3), target)


def _within(folder: Path, listed: Sequence[Any], target: ModelConfig) -> tuple[int, ...]:
    """Return the layers a head reads. Raises ModelError unless they are the target's, and in
    order."""
    aux_layers = tuple(int(i) for i in listed)
    ascending = sorted(set(aux_layers)) == list(aux_layers)
    if not aux_layers or not ascending or aux_layers[0] < 1 or aux_layers[-1] > target.layers:
        raise ModelError(
            f"the head in {folder} reads layers {aux_layers} of a model of {target.layers}: "
            "they must be distinct, ascending and within it"
        )
    return aux_layers


def _draft_ids(folder: Path, weights: Mapping[str, Matrix], vocab: int) -> Tensor:
    """[draft] target ids of the head's own vocabulary: i + d2t[i], or what a GGUF file says; else
    all of the target's."""
    if "draft_ids" in weights:
        ids = as_tensor(weights["draft_ids"]).long()
    elif "d2t" in weights:
        offset = as_tensor(weights["d2t"])
        ids = torch.arange(len(offset)) + offset.long()
    else:
        return torch.arange(vocab)
    _check_ids(folder, ids, vocab)
    marked = as_tensor(weights["t2d"]) if "t2d" in weights else None
    if marked is not None and (
        marked.numel() != vocab or not torch.equal(marked.bool().nonzero()[:, 0], ids)
    ):
        raise ModelError(f"the head in {folder} has d2t and t2d that contradict each other")
    return ids


def _check_ids(folder: Path, ids: Tensor | None, vocab: int) -> None:
    if ids is None or not len(ids) or int(ids.min()) < 0 or int(ids.max()) >= vocab:
        raise ModelError(f"the head in {folder} lacks draft_ids within the model's vocabulary")
    if len(torch.unique(ids)) < len(ids):
        raise ModelError(f"the head in {folder} proposes some tokens under several of its own ids")


def _plain_name(name: str) -> str:
    """EAGLE-3's name for a tensor: speculators and EAGLE-1/2 call the layer `layers.0`."""
    return FIRST + name.removeprefix("layers.0.") if name.startswith("layers.0.") else name


def eagle3_shapes(c: ModelConfig, target_hidden: int, aux_layers: tuple[int, ...]) -> Shapes:
    """EAGLE-3: q, k and v read [embedding ; features]."""
    return {
        "fc.weight": (c.hidden, len(aux_layers) * target_hidden),
        "norm.weight": (c.hidden,),
        f"{FIRST}input_layernorm.weight": (c.hidden,),
        f"{FIRST}hidden_norm.weight": (c.hidden,),
        **_first_shapes(c, 2 * c.hidden),
    }


def eagle2_shapes(c: ModelConfig) -> Shapes:
    """EAGLE-1/2: fc reads [embedding ; features], and the layer has no norm at its input."""
    return {"fc.weight": (c.hidden, 2 * c.hidden), **_first_shapes(c, c.hidden)}


def further_shapes(c: ModelConfig) -> Shapes:
    """The layers after the first are ordinary ones: they read what the one before gave, through
    their own norm."""
    shapes: Shapes = {}
    for number, prefix in enumerate(layer_prefixes(c.layers)[1:], 1):
        shapes |= _layer_shapes(c, number, c.hidden, prefix)
    return shapes


def layer_prefixes(layers: int) -> list[str]:
    """Return what the names of each layer's tensors start with in `HeadFiles.weights`."""
    return [FIRST, *(f"layers.{i}." for i in range(1, layers))]


def _layer_shapes(c: ModelConfig, number: int, width: int, prefix: str) -> Shapes:
    return {prefix + name: shape for name, shape in c.layer(number).shapes(width).items()}


def _first_shapes(c: ModelConfig, width: int) -> Shapes:
    """Return those of the first layer, but for norms of what it reads."""
    shapes = _layer_shapes(c, 0, width, FIRST)
    del shapes[f"{FIRST}input_layernorm.weight"]
    return shapes
