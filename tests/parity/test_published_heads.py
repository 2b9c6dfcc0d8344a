"""Published draft heads: tiny random checkpoints in the exact layouts, against the conventions in
plain torch.

The expected values share no code with the package: the target's hidden states are transformers'
own, the head is written out below from docs/eagle-heads.md, one full causal forward for each
drafted token.
"""

from __future__ import annotations

import functools
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.core.rule import NO_NODES, TreeRule
from smart_decoding.core.selection import Beam, KeepBest
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.kv import BlockTable, PagePool
from smart_decoding.engine.request import Request
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker
from smart_decoding.errors import DownloadError, ModelError
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.models.families.reading import config_from_hf
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import HeadFiles, head_folder, load_head

if TYPE_CHECKING:
    from smart_decoding.models.families.config import ModelConfig

LAYERS, D, VOCAB, DRAFT, EPS, PAGES, SCRATCH = 8, 64, 97, 40, 1e-5, 16, 8
HEADS, KV, HEAD_DIM, FFN = (
    4,
    2,
    32,
    48,
)  # the head's own: the target has heads of 16 dimensions and another theta
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


def random(*shape: int, scale: float = 0.2) -> Tensor:
    return torch.randn(*shape) * scale


def layer_tensors(prefix: str, width: int, bias: bool = False) -> dict[str, Tensor]:
    """One Llama layer, its q, k and v reading `width`, without norms at its input."""
    q = HEADS * HEAD_DIM
    kv = KV * HEAD_DIM
    tensors = {
        "self_attn.q_proj.weight": random(q, width),
        "self_attn.k_proj.weight": random(kv, width),
        "self_attn.v_proj.weight": random(kv, width),
        "self_attn.o_proj.weight": random(D, q),
        "mlp.gate_proj.weight": random(FFN, D),
        "mlp.up_proj.weight": random(FFN, D),
        "mlp.down_proj.weight": random(D, FFN),
        "post_attention_layernorm.weight": 1 + random(D),
    }
    if bias:
        tensors |= {
            f"self_attn.{n}_proj.bias": random(size) for n, size in (("q", q), ("k", kv), ("v", kv))
        }
    return {prefix + name: tensor for name, tensor in tensors.items()}


def second_layer() -> dict[str, Tensor]:
    """An ordinary Llama layer."""
    torch.manual_seed(4)
    return {**layer_tensors("layers.1.", D), "layers.1.input_layernorm.weight": 1 + random(D)}


def eagle3_tensors(prefix: str, embedding: bool = False, bias: bool = False) -> dict[str, Tensor]:
    torch.manual_seed(1)
    ids = torch.randperm(VOCAB)[:DRAFT].sort().values
    return {
        **layer_tensors(prefix, 2 * D, bias),
        prefix + "input_layernorm.weight": 1 + random(D),
        prefix + "hidden_norm.weight": 1 + random(D),
        "fc.weight": random(D, 3 * D),
        "norm.weight": 1 + random(D),
        "lm_head.weight": random(DRAFT, D),
        "d2t": ids - torch.arange(DRAFT),
        "t2d": torch.isin(torch.arange(VOCAB), ids),
        **({"embed_tokens.weight": random(VOCAB, D, scale=0.5)} if embedding else {}),
    }


def eagle1_tensors(bias: bool) -> dict[str, Tensor]:
    torch.manual_seed(2)
    fc = {"fc.weight": random(D, 2 * D), **({"fc.bias": random(D)} if bias else {})}
    return {
        **layer_tensors("layers.0.", D),
        **fc,
        "embed_tokens.weight": random(VOCAB, D, scale=0.5),
    }


LAYER = {
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "head_dim": HEAD_DIM,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "model_type": "llama",
    "max_position_embeddings": 256,
    "rms_norm_eps": EPS,
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

# name -> (config.json, tensors, pickled?, entries of transformers' hidden_states that are read,
# rope theta)
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Tensor], bool, tuple[int, ...], float]] = {
    "eagle3": (EAGLE3, eagle3_tensors("midlayer."), False, (2, 4, 5), 1e4),
    "eagle3 pickled, own embeddings and biases": (
        EAGLE3,
        eagle3_tensors("midlayer.", embedding=True, bias=True),
        True,
        (2, 4, 5),
        1e4,
    ),
    "SpecForge": (
        {**EAGLE3, "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}},
        eagle3_tensors("midlayer."),
        False,
        (2, 4, 5),
        1e4,
    ),
    "speculators": (SPECULATORS, eagle3_tensors("layers.0."), False, (1, 3, 6), 2e4),
    "speculators, two layers": (
        TWO_LAYERS,
        {**eagle3_tensors("layers.0."), **second_layer()},
        False,
        (1, 3, 6),
        2e4,
    ),
    "eagle1": (EAGLE1, eagle1_tensors(False), False, (-1,), 1e4),
    "eagle1, two layers": (
        {**EAGLE1, "num_hidden_layers": 2},
        {**eagle1_tensors(False), **second_layer()},
        False,
        (-1,),
        1e4,
    ),
    "eagle2 pickled, with a bias": (
        {**EAGLE1, "bias": True},
        eagle1_tensors(True),
        True,
        (-1,),
        1e4,
    ),
}


def write(
    folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], pickled: bool = False
) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if pickled:
        torch.save(tensors, folder / "pytorch_model.bin")
    else:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()},
            folder / "model.safetensors",
        )
    return folder


class Expected:
    """What a head proposes after a prompt and further tokens, from the conventions alone."""

    def __init__(
        self,
        config: dict[str, Any],
        tensors: dict[str, Tensor],
        entries: tuple[int, ...],
        theta: float,
        prompt: list[int] = PROMPT,
    ) -> None:
        self.w = {
            name.replace("layers.0.", "midlayer."): tensor for name, tensor in tensors.items()
        }
        self.prompt, self.theta, self.one = prompt, theta, entries == (-1,)
        self.normed_residual = config.get("norm_before_residual", False)
        model = target_model()
        with torch.no_grad():
            states = model(torch.tensor([prompt[:-1]]), output_hidden_states=True).hidden_states
        # hidden_states[-1] is taken after the final norm, the others are residual streams.
        aux_layers = torch.cat([states[i][0] for i in entries], dim=-1)
        self.true = aux_layers if self.one else aux_layers @ self.w["fc.weight"].T
        own = self.w.get("embed_tokens.weight")
        self.embedding = model.get_input_embeddings().weight.detach() if own is None else own

    def probs(self, drafted: list[int]) -> Tensor:
        """[vocab] over target ids, after the drafted tokens."""
        features = self.true
        tokens = self.prompt[1:]
        out = self.layer(features, tokens)
        for token in drafted:
            features, tokens = torch.cat((features, out[-1:])), [*tokens, token]
            out = self.layer(features, tokens)
        result = torch.zeros(VOCAB)
        if self.one:
            return (target_model().get_output_embeddings().weight.detach() @ out[-1]).softmax(-1)
        logits = self.w["lm_head.weight"] @ self.norm(out[-1], "norm.weight")
        result[torch.arange(DRAFT) + self.w["d2t"]] = logits.softmax(-1)
        return result

    def layer(self, features: Tensor, tokens: list[int]) -> Tensor:
        """[n, hidden] outputs of the pairs (features[t], tokens[t]) at positions 0 .. n - 1."""
        embedded = self.embedding[tokens]
        if self.one:
            x = torch.cat((embedded, features), -1) @ self.w["fc.weight"].T + self.w.get(
                "fc.bias", 0.0
            )
            read = x
        else:
            normed = self.norm(features, "midlayer.hidden_norm.weight")
            read = torch.cat((self.norm(embedded, "midlayer.input_layernorm.weight"), normed), -1)
            x = normed if self.normed_residual else features
        x = self.block("midlayer.", read, x)
        if "layers.1.input_layernorm.weight" in self.w:
            x = self.block("layers.1.", self.norm(x, "layers.1.input_layernorm.weight"), x)
        return x

    def block(self, prefix: str, read: Tensor, x: Tensor) -> Tensor:
        """Attention over `read` and the MLP, each added to the residual x."""
        n = len(x)
        q, k, v = (
            (
                read @ self.w[f"{prefix}self_attn.{name}_proj.weight"].T
                + self.w.get(f"{prefix}self_attn.{name}_proj.bias", 0.0)
            )
            .view(n, -1, HEAD_DIM)
            .transpose(0, 1)
            for name in "qkv"
        )
        q, k = self.turn(q), self.turn(k)
        k, v = k.repeat_interleave(HEADS // KV, 0), v.repeat_interleave(HEADS // KV, 0)
        scores = (q @ k.transpose(1, 2)) / HEAD_DIM**0.5
        scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf).softmax(-1)
        attended = (scores @ v).transpose(0, 1).reshape(n, -1)
        x = x + attended @ self.w[f"{prefix}self_attn.o_proj.weight"].T
        inner = self.norm(x, f"{prefix}post_attention_layernorm.weight")
        gate = F.silu(inner @ self.w[f"{prefix}mlp.gate_proj.weight"].T)
        up = inner @ self.w[f"{prefix}mlp.up_proj.weight"].T
        return x + (gate * up) @ self.w[f"{prefix}mlp.down_proj.weight"].T

    def norm(self, x: Tensor, name: str) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + EPS).sqrt() * self.w[name]

    def turn(self, x: Tensor) -> Tensor:
        """Rotary positions, half-split."""
        angle = torch.arange(x.shape[1])[:, None] * self.theta ** (
            -torch.arange(0, HEAD_DIM, 2) / HEAD_DIM
        )
        a, b = x.chunk(2, -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)


class Drafting:
    """A target, a head and one request, driven as the engine drives them."""

    def __init__(self, decoder: Decoder, files: HeadFiles) -> None:
        self.decoder = decoder
        self.drafter = EagleDrafter(EagleHead(files, decoder, PAGES, SCRATCH, 128), PAGES, SCRATCH)
        params = SamplingParams(temperature=0.0)
        table = BlockTable(PagePool(PAGES))
        self.request = Request("r", PROMPT, params, 0, table, StopChecker(params, lambda ids: ""))
        decoder.hold_states(1)  # if it has some

    def round(self) -> DraftTrees:
        """The target reads what it has not read yet, but for the root; then three levels are
        drafted: all of the first one expanded, then one node of the second."""
        request = self.request
        table = self.request.table
        first = table.length
        new = request.tokens[table.length : -1]
        slots = table.reserve(len(new))
        span = Span(new, first, slots, np.array(table.pages, np.int32), state=0)
        rows, _, _ = build_rows([span], DraftTrees.empty(1), [True])
        aux_hidden = self.decoder.forward(rows, self.drafter.aux_layers).features
        table.commit(request.tokens, first + len(new))
        self.drafter.extend(request, aux_hidden, first, new)
        rule = TreeRule(3, 3, np.array([9]), NO_NODES, Beam(3), KeepBest(9))
        trees = self.drafter.first_level([request], rule)
        self.drafter.next_level([request], trees, np.arange(3), rule)
        self.drafter.next_level([request], trees, np.array([4, 9]), rule)
        return trees


def drafting_of(folder: Path, native: bool) -> Drafting:
    """A head on the tiny target."""
    config = target_config()
    weights = target_model().state_dict()
    cpu = torch.device("cpu")
    decoder = Decoder(config, weights, torch.float32, cpu, PAGES, 128, native)
    return Drafting(decoder, load_head(folder, config, trust_pickle=True))


def drafted(folder: Path, native: bool) -> DraftTrees:
    return drafting_of(folder, native).round()


def check(trees: DraftTrees, expected: Expected) -> None:
    """The three best of each expanded node with their probabilities, and the products of these
    along all paths."""
    parents = [ROOT, 0, 1, 2, 4, 9]
    assert sorted(set(trees.parent.tolist())) == sorted(parents)
    for parent in parents:
        path = trees.token[trees.path(parent)].tolist() if parent != ROOT else []
        probs = expected.probs(path)
        children = np.flatnonzero(trees.parent == parent)
        best = probs.topk(3)
        assert trees.token[children].tolist() == best.indices.tolist()
        np.testing.assert_allclose(
            trees.draft_prob[children], best.values.numpy(), rtol=2e-3, atol=1e-5
        )
    products = [trees.draft_prob[trees.path(node)].prod() for node in range(len(trees))]
    np.testing.assert_allclose(trees.path_prob, products, rtol=1e-12)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", LAYOUTS)
def test_proposals_are_those_of_the_conventions(name: str, native: bool, tmp_path: Path) -> None:
    """After the prompt, and again two tokens later: one that was drafted, one that was not."""
    config, tensors, pickled, entries, theta = LAYOUTS[name]
    drafting = drafting_of(write(tmp_path, config, tensors, pickled), native)
    trees = drafting.round()
    check(trees, Expected(config, tensors, entries, theta))
    drafting.request.tokens.extend([int(trees.token[1]), 7])
    check(drafting.round(), Expected(config, tensors, entries, theta, drafting.request.tokens))


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
    ({**SPECULATORS, "norm_before_fc": True}, eagle3_tensors("layers.0."), "norm_before_fc"),
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
    ({"architectures": ["Other"]}, TENSORS, "lacks 'num_attention_heads'"),
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
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: object())
    assert head_folder(tmp_path) == tmp_path
    assert not downloads
    with pytest.raises(ModelError, match="pickles are refused"):
        head_folder("owner/head")
    del downloads[:]
    assert head_folder("owner/head", trust_pickle=True) == tmp_path
    assert downloads == [["config.json", "*.safetensors"], ["config.json", "pytorch_model.bin"]]
    write(tmp_path, EAGLE3, TENSORS)
    assert head_folder("owner/head") == tmp_path
    assert len(downloads) == 3
    with pytest.raises(DownloadError, match="404"):
        head_folder("nobody/nothing")
    with pytest.raises(ModelError, match="no draft head"):
        head_folder("./not/here")
