"""Writes a draft head in a published layout, so that other engines (and this one) load it as it is.

`load_head` reads back what is written here to the same bits. docs/eagle-heads.md says which engine
reads which field.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.files import whole
from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.checkpoints.registry import NAMED_MODELS, hub_id_of
from smart_decoding.models.checkpoints.rounding import stored
from smart_decoding.models.families.reading import config_to_hf
from smart_decoding.models.heads.files import ARCHITECTURE, AUX_NORM, FIRST, HeadFiles

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

# what a speculators config must name; engines that read it let the user choose another
TOKENS_PER_STEP = 3


def layout_of(files: HeadFiles) -> str:
    """Return the layout in which a head was read: 'smart', 'eagle', 'speculators' or 'eagle3'."""
    if files.config.get("architectures") == [ARCHITECTURE]:
        return "smart"
    if files.fused:
        return "eagle"
    return "speculators" if "speculators_model_type" in files.config else "eagle3"


def check_layout(files: HeadFiles, layout: str) -> None:
    """Raise ConfigError for an unknown layout, ModelError for a head that the layout has no words
    for."""
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}; choose one of: {', '.join(LAYOUTS)}")
    if files.fused != (layout == "eagle"):
        kind = "an EAGLE-3 head, not one of EAGLE-1/2"
        if files.fused:
            kind = "an EAGLE-1/2 head, whose layout is 'eagle'"
        raise ModelError(f"the head cannot be written as {layout!r}: it is {kind}")
    if layout == "eagle3" and "fc_norm.0.weight" in files.weights:
        raise ModelError(
            "the head norms each aux layer before fc (fc_norm), "
            "for which the layout 'eagle3' has no words: write it as 'speculators', "
            "or train one with smart train --export eagle3"
        )
    if layout == "eagle3" and files.shape.qk_norm:
        raise ModelError(
            "the head norms queries and keys, for which the layout 'eagle3' has no words: write it "
            "as 'speculators'"
        )
    if layout == "eagle3" and files.shape.layers > 1:
        raise ModelError(
            f"the head has {files.shape.layers} layers, and 'eagle3' one only: "
            "write it as 'speculators'"
        )


def check_rope(target: ModelConfig, layout: str) -> None:
    """Raise ModelError for a target whose frequencies no other engine reads, as a head has the
    target's."""
    if layout != "smart" and target.rope_scaling and target.rope_scaling.kind == "factors":
        raise ModelError(
            f"a head of this GGUF file cannot be written as {layout!r}, which has no words for its "
            "RoPE factors: take the model's safetensors"
        )


def write_head(files: HeadFiles, checkpoint: Checkpoint, layout: str, folder: Path) -> None:
    """Write model.safetensors and config.json. checkpoint: the target, whose output rows a head may
    have borrowed.

    Raises ConfigError or ModelError, before anything is written."""
    check_layout(files, layout)
    check_rope(files.shape, layout)
    tensors, config = LAYOUTS[layout](files, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    with whole(folder / "model.safetensors") as path:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            path,
            metadata={"format": "pt"},
        )
    with whole(folder / "config.json") as path:
        path.write_text(json.dumps(config, indent=1) + "\n")


def _eagle(files: HeadFiles, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        _by_number(name): tensor for name, tensor in _tensors(files).items() if name != "draft_ids"
    }
    config = {
        **_layer_config(files.shape),
        "architectures": ["LlamaForCausalLM"],
        "bias": "fc.bias" in tensors,
    }
    return tensors, config


def _eagle3(files: HeadFiles, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = _eagle3_tensors(files, checkpoint)
    config = {
        **_layer_config(files.shape),
        "architectures": ["LlamaForCausalLMEagle3"],
        "draft_vocab_size": len(files.weights["draft_ids"]),
        "norm_before_residual": files.norm_before_residual,
        "norm_before_fc": AUX_NORM in files.weights,
        "norm_output": files.form.feeds_back_normed,
        # vLLM: layers whose inputs are read
        "eagle_aux_hidden_state_layer_ids": list(files.aux_layers),
        "eagle_config": {  # SGLang: layers whose outputs are read
            "eagle_aux_hidden_state_layer_ids": [layer - 1 for layer in files.aux_layers],
            "use_aux_hidden_state": True,
        },
    }
    return tensors, config


def _speculators(
    files: HeadFiles, checkpoint: Checkpoint
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {
        _by_number(name): tensor for name, tensor in _eagle3_tensors(files, checkpoint).items()
    }
    target = config_to_hf(checkpoint.config)
    proposal: dict[str, Any] = {"proposal_type": "greedy", "speculative_tokens": TOKENS_PER_STEP}
    proposal |= {"verifier_accept_k": 1, "accept_tolerance": 0.0}
    config = {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "draft_vocab_size": len(files.weights["draft_ids"]),
        "norm_before_residual": files.norm_before_residual,
        "norm_before_fc": AUX_NORM in files.weights,
        "norm_output": files.form.feeds_back_normed,
        "fc_norm": "fc_norm.0.weight" in files.weights,
        "target_hidden_size": None,  # that of the head
        "eagle_aux_hidden_state_layer_ids": list(files.aux_layers),
        "transformer_layer_config": {
            **_layer_config(files.shape),
            "num_aux_hidden_states": len(files.aux_layers),
        },
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {
                "name_or_path": _on_hub(checkpoint.provenance["model"]),
                "architectures": target["architectures"],
            },
        },
        "torch_dtype": "bfloat16",
    }
    return tensors, config


def _smart(files: HeadFiles, checkpoint: Checkpoint) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Ours: the layer has the target's shape but for its feed-forward network's width, and the
    output rows are the target's."""
    ids = as_tensor(files.weights["draft_ids"]).int()
    config = smart_config(checkpoint.config, files.aux_layers, len(ids))
    config["intermediate_size"] = files.shape.ffn
    if files.config.get("quantization"):
        config["quantization"] = files.config["quantization"]
    return stored(files.weights) | {"draft_ids": ids}, config


def smart_config(
    target: ModelConfig, aux_layers: tuple[int, ...], draft_vocab: int
) -> dict[str, Any]:
    """config.json of a head of ours: the shape of the target that it fits, and the layers that it
    reads."""
    return {
        **config_to_hf(target.of_head()),
        "architectures": [ARCHITECTURE],
        "target_num_hidden_layers": target.layers,
        "draft_vocab_size": draft_vocab,
        "taps": list(aux_layers),
        "fc_norm": True,
    }


Parts = Callable[[HeadFiles, Checkpoint], tuple[dict[str, Tensor], dict[str, Any]]]
LAYOUTS: Mapping[str, Parts] = {
    "smart": _smart,
    "eagle3": _eagle3,
    "speculators": _speculators,
    "eagle": _eagle,
}


def _eagle3_tensors(files: HeadFiles, checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return tensors in which the output rows are the head's own, and the draft vocabulary is
    written as both engines read it."""
    weights = _tensors(files)
    ids = weights.pop("draft_ids").long()
    if "lm_head.weight" not in weights:
        weights["lm_head.weight"] = output_rows(checkpoint)[ids]
    vocab = checkpoint.config.vocab
    if torch.equal(ids, torch.arange(vocab)):  # all of it, in order: vLLM knows no map then
        return weights
    return {
        **weights,
        "d2t": ids - torch.arange(len(ids)),
        "t2d": torch.isin(torch.arange(vocab), ids),
    }


def _tensors(files: HeadFiles) -> dict[str, Tensor]:
    return {name: as_tensor(weight) for name, weight in files.weights.items()}


def _on_hub(model: str) -> str:
    """Return what other programs know a built-in model by; other names as they are."""
    known = NAMED_MODELS.get(model.partition("@")[0])
    if known:
        return known.repository.removesuffix("-GGUF")
    hub_id = hub_id_of(model)
    return hub_id[1].removesuffix("-GGUF") if hub_id else model


def output_rows(checkpoint: Checkpoint) -> Tensor:
    """[vocab, hidden] the target's output matrix."""
    tied = checkpoint.config.tie_embeddings
    return as_tensor(checkpoint.weights["model.embed_tokens.weight" if tied else "lm_head.weight"])


def _layer_config(shape: ModelConfig) -> dict[str, Any]:
    plain = replace(shape, tie_embeddings=False)
    return {**config_to_hf(plain), "attention_bias": shape.qkv_bias or shape.o_bias}


def _by_number(name: str) -> str:
    return "layers.0." + name.removeprefix(FIRST) if name.startswith(FIRST) else name
