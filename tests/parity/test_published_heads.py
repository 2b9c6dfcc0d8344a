"""Published draft heads: tiny random checkpoints in the exact layouts, against the conventions in
plain torch.

The expected values share no code with the package: the target's hidden states are transformers'
own, the head is written out in reference_head.py from docs/eagle-heads.md, one full causal forward
for each drafted token.
"""

from __future__ import annotations

import functools
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.families.reading import config_from_hf
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import head_path, load_head

from . import reference_head
from .reference_head import PAGES, SCRATCH, Drafting, ReferenceHead, layer_tensors, random, write

if TYPE_CHECKING:
    from smart_decoding.core.tree import DraftTrees
    from smart_decoding.models.families.config import ModelConfig

LAYERS, D, VOCAB, DRAFT, EPS = 8, 64, 97, 40, 1e-5
HEADS = 4
HEAD_DIM = 32  # the head's own: the target has heads of 16 dimensions and another theta
PROMPT = np.random.default_rng(3).integers(0, VOCAB, 24).tolist()


@functools.cache
def target_model() -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=D,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=80,
        vocab_size=VOCAB,
        initializer_range=0.1,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        rms_norm_eps=1e-5,
    )
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    return model


def target_config() -> ModelConfig:
    return config_from_hf(
        {**target_model().config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    )


LAYER = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "intermediate_size": 48,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "model_type": "llama",
    "max_position_embeddings": 256,
    "rms_norm_eps": EPS,
}
eagle3_tensors = functools.partial(reference_head.eagle3_tensors, layer=LAYER, draft=DRAFT)


def second_layer() -> dict[str, Tensor]:
    """An ordinary Llama layer."""
    torch.manual_seed(4)
    return {
        **layer_tensors("layers.1.", LAYER, D),
        "layers.1.input_layernorm.weight": 1 + random(D),
    }


def eagle1_tensors(bias: bool) -> dict[str, Tensor]:
    torch.manual_seed(2)
    fc = {"fc.weight": random(D, 2 * D), **({"fc.bias": random(D)} if bias else {})}
    return {
        **layer_tensors("layers.0.", LAYER, D),
        **fc,
        "embed_tokens.weight": random(VOCAB, D, scale=0.5),
    }


EAGLE3 = {**LAYER, "architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": DRAFT}
SPECULATORS = {
    "architectures": ["Eagle3Speculator"],
    "speculators_model_type": "eagle3",
    "draft_vocab_size": DRAFT,
    "norm_before_residual": True,
    "target_hidden_size": None,
    "eagle_aux_hidden_state_layer_ids": [1, 3, 6],
    "transformer_layer_config": {**LAYER, "rope_theta": 20_000.0},
    "speculators_config": {"algorithm": "eagle3", "verifier": {"name_or_path": "x"}},
}
TWO_LAYERS = {
    **SPECULATORS,
    "transformer_layer_config": {**LAYER, "rope_theta": 20_000.0, "num_hidden_layers": 2},
}
EAGLE1 = {**LAYER, "architectures": ["LlamaForCausalLM"], "bias": False}

# name -> (config.json, tensors, pickled?, layers whose inputs are read, norm_before_residual)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Tensor], bool, tuple[int, ...], bool]] = {
    "eagle3": (EAGLE3, eagle3_tensors("midlayer."), False, (2, 4, 5), False),
    "eagle3 pickled, own embeddings and biases": (
        EAGLE3,
        eagle3_tensors("midlayer.", embedding=True, bias=True),
        True,
        (2, 4, 5),
        False,
    ),
    "speculators": (SPECULATORS, eagle3_tensors("layers.0."), False, (1, 3, 6), True),
    "speculators, two layers": (
        TWO_LAYERS,
        {**eagle3_tensors("layers.0."), **second_layer()},
        False,
        (1, 3, 6),
        True,
    ),
    "eagle1": (EAGLE1, eagle1_tensors(False), False, (), False),
    "eagle1, two layers": (
        {**EAGLE1, "num_hidden_layers": 2},
        {**eagle1_tensors(False), **second_layer()},
        False,
        (),
        False,
    ),
    "eagle2 pickled, with a bias": (
        {**EAGLE1, "bias": True},
        eagle1_tensors(True),
        True,
        (),
        False,
    ),
}


def drafting(folder: Path, native: bool) -> Drafting:
    config = target_config()
    weights = target_model().state_dict()
    decoder = Decoder(config, weights, torch.float32, torch.device("cpu"), PAGES, 128, native)
    head = EagleHead(load_head(folder, config, trust_pickle=True), decoder, PAGES, SCRATCH, 128)
    return Drafting(decoder, head, PROMPT)


def drafted(folder: Path, native: bool) -> DraftTrees:
    return drafting(folder, native).round()


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_proposals_are_those_of_the_conventions(name: str, native: bool, tmp_path: Path) -> None:
    """After the prompt, and again two tokens later: one that was drafted, one that was not."""
    config, tensors, pickled, entries, normed = LAYOUTS[name]
    run = drafting(write(tmp_path, config, tensors, pickled), native)

    def check(trees: DraftTrees, tokens: list[int]) -> None:
        ReferenceHead(target_model(), config, tensors, entries, tokens, normed).check(trees)

    trees = run.round()
    check(trees, PROMPT)
    run.request.tokens.extend([int(trees.token[1]), 7])
    check(run.round(), run.request.tokens)


def test_what_a_config_leaves_out_is_as_in_the_public_code(tmp_path: Path) -> None:
    """Not the target's: its theta is 500,000 and its eps 1e-5."""
    config = {
        name: value
        for name, value in EAGLE3.items()
        if name not in ("rms_norm_eps", "num_key_value_heads")
    }
    tensors = eagle3_tensors("midlayer.")
    for name in "kv":
        tensors[f"midlayer.self_attn.{name}_proj.weight"] = random(HEADS * HEAD_DIM, 2 * D)
    shape = load_head(write(tmp_path, config, tensors), target_config()).shape
    assert (shape.rms_eps, shape.rope_theta, shape.kv_heads, shape.rope_scaling) == (
        1e-6,
        10_000.0,
        HEADS,
        None,
    )


def without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


TENSORS = eagle3_tensors("midlayer.")
BROKEN: list[tuple[dict[str, Any], dict[str, Tensor], str]] = [
    (EAGLE3, without(TENSORS, "norm.weight"), "lacks the tensor norm.weight"),
    (
        EAGLE3,
        without(TENSORS, "midlayer.hidden_norm.weight"),
        "lacks the tensor midlayer.hidden_norm.weight",
    ),
    (EAGLE3, {**TENSORS, "fc.weight": random(D, 2 * D)}, "fc.weight has shape"),
    (
        EAGLE3,
        {**TENSORS, "layers.1.mlp.up_proj.weight": random(2, 2)},
        "holds the tensor layers.1.mlp.up_proj.weight",
    ),
    (EAGLE3, {**TENSORS, "d2t": TENSORS["d2t"] + VOCAB}, "within the model's vocabulary"),
    (EAGLE3, {**TENSORS, "t2d": TENSORS["t2d"].logical_not()}, "contradict"),
    (
        {**EAGLE3, "num_hidden_layers": 2},
        TENSORS,
        "lacks the tensor layers.1.input_layernorm.weight",
    ),
    ({**EAGLE3, "hidden_size": 32}, TENSORS, "hidden_size 32, but the model has 64"),
    ({**EAGLE3, "hidden_act": "gelu"}, TENSORS, "hidden_act 'gelu'"),
    ({**SPECULATORS, "norm_before_fc": True}, eagle3_tensors("layers.0."), "lacks .* input_norm"),
    ({**SPECULATORS, "speculators_model_type": "dflash"}, {}, "holds DFlash, .* an EAGLE head"),
    ({**SPECULATORS, "speculators_model_type": "peagle"}, {}, "holds P-EAGLE, .* an EAGLE head"),
    ({**EAGLE3, "architectures": ["DFlashDraftModel"]}, {}, "holds DFlash, .* an EAGLE head"),
    ({**EAGLE3, "quantization_config": {"quant_method": "fp8"}}, {}, "quantised .* bf16"),
    ({**EAGLE3, "layer_types": ["sliding_attention"]}, {}, "sliding window, .* full attention"),
    ({**EAGLE3, "use_sliding_window": True}, {}, "sliding window"),
    (
        EAGLE3,
        {**TENSORS, "midlayer.mlp.experts.0.up_proj.weight": random(2, 2)},
        "mixture of experts as its layer, .* a dense one",
    ),
    (
        EAGLE3,
        {**TENSORS, "midlayer.self_attn.kv_a_proj_with_mqa.weight": random(2, 2)},
        r"latent attention \(MLA\)",
    ),
    (
        {**SPECULATORS, "eagle_aux_hidden_state_layer_ids": [2, 2, 5]},
        eagle3_tensors("layers.0."),
        "distinct",
    ),
    (
        {**SPECULATORS, "architectures": ["EagleSpeculator"], "speculators_model_type": "eagle"},
        {"fusion_fc.weight": random(D, 2 * D), "pre_lm_head_layernorm.weight": random(D)},
        "speculators' layout of EAGLE-1, which is not supported",
    ),
    ({"architectures": ["Other"]}, TENSORS, "lacks 'num_attention_heads' in its config"),
    ({**EAGLE1, "bias": True}, eagle1_tensors(False), "lacks the tensor fc.bias"),
]


@pytest.mark.parametrize(
    ("config", "tensors", "reason"), BROKEN, ids=[reason for *_, reason in BROKEN]
)
def test_what_does_not_fit_is_named(
    config: dict[str, Any], tensors: dict[str, Tensor], reason: str, tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=reason):
        load_head(write(tmp_path, config, tensors), target_config())


def test_numbers_that_are_not_finite_are_refused_in_a_pickle_too(tmp_path: Path) -> None:
    name = next(iter(TENSORS))
    broken = {**TENSORS, name: torch.full_like(TENSORS[name], torch.nan)}
    write(tmp_path, EAGLE3, broken, pickled=True)
    with pytest.raises(ModelError, match=f"tensor {name} holds numbers that are not finite"):
        load_head(tmp_path, target_config(), trust_pickle=True)


class Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("harm-was-done"),))


def test_a_pickle_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path, EAGLE3, {**TENSORS, "x": Harmful()}, pickled=True)  # type: ignore[dict-item]
    with pytest.raises(ModelError, match=r"pickles are refused: .* --trust-pickle"):
        load_head(tmp_path, target_config())
    with pytest.raises(ModelError, match="more than tensors"):
        load_head(tmp_path, target_config(), trust_pickle=True)
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps([1, 2])[:-1])
    with pytest.raises(ModelError, match="corrupt"):
        load_head(tmp_path, target_config(), trust_pickle=True)
    assert not Path("harm-was-done").exists()


def test_safetensors_are_preferred(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert load_head(write(tmp_path, EAGLE3, TENSORS), target_config()).aux_layers == (2, 4, 5)


def test_a_head_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pickled weights are downloaded only where the repository has no others."""
    import huggingface_hub

    downloads: list[list[str]] = []

    def snapshot_download(repository: str, allow_patterns: list[str], **_: object) -> str:
        if repository == "nobody/nothing":
            raise OSError("404")
        downloads.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    nothing = SimpleNamespace(siblings=[], sha="")
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: nothing)
    assert head_path(tmp_path) == tmp_path
    assert not downloads
    with pytest.raises(ModelError, match="pickles are refused"):
        head_path("owner/head")
    del downloads[:]
    assert head_path("owner/head", trust_pickle=True) == tmp_path
    assert downloads == [["config.json", "*.safetensors"], ["config.json", "pytorch_model.bin"]]
    write(tmp_path, EAGLE3, TENSORS)
    assert head_path("owner/head") == tmp_path
    assert len(downloads) == 3
    with pytest.raises(DownloadError, match="404"):
        head_path("nobody/nothing")
    with pytest.raises(ModelError, match="no draft head"):
        head_path("./not/here")
