"""Draft heads behind pictures: MSD's input, heads that do not see, and the same tokens whatever
they draft.

What a head must propose is computed by transformers: its own layer, on inputs written out here."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.models.text.tokenizer import Tokenizer

from .test_vision import load, message, of_llava, of_qwen
from .test_vision_engine import CHATS, sampling
from .vision import TEXT, VOCAB, picture, save_llava, save_qwen2_vl

if TYPE_CHECKING:
    from smart_decoding.llm import LLM

D = 96
FFN = 64
HEAD = {
    "hidden_size": D,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": FFN,
    "vocab_size": VOCAB,
    "num_hidden_layers": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "bias": False,
    "max_position_embeddings": 1024,
}


def save_head(folder: Path, eagle3: bool = False, **config: Any) -> Path:
    """A random head in EAGLE-1's layout, which is MSD's, or EAGLE-3's."""
    folder.mkdir()
    torch.manual_seed(3)
    prefix, width = ("midlayer.", 2 * D) if eagle3 else ("layers.0.", D)
    shapes = {"q": (64, width), "k": (32, width), "v": (32, width), "o": (D, 64)}
    weights = {
        f"{prefix}self_attn.{n}_proj.weight": torch.randn(s) * 0.2 for n, s in shapes.items()
    }
    for name, shape in {"gate": (FFN, D), "up": (FFN, D), "down": (D, FFN)}.items():
        weights[f"{prefix}mlp.{name}_proj.weight"] = torch.randn(shape) * 0.2
    weights[f"{prefix}post_attention_layernorm.weight"] = 1 + 0.1 * torch.randn(D)
    weights["fc.weight"] = torch.randn(D, (3 if eagle3 else 2) * D) * 0.1
    if eagle3:
        weights |= {
            f"midlayer.{n}.weight": torch.ones(D) for n in ("input_layernorm", "hidden_norm")
        }
        weights |= {"norm.weight": torch.ones(D), "lm_head.weight": torch.randn(VOCAB, D) * 0.2}
        config["eagle_aux_hidden_state_layer_ids"] = [1, 2, 3]
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**HEAD, **config}))
    return folder


@pytest.fixture(scope="module", params=["llava", "qwen2-vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    (save_llava if request.param == "llava" else save_qwen2_vl)(made)
    return made


def reference_layer(head: Path) -> nn.Module:
    """transformers' layer with the head's weights; EAGLE-1 has no norm at its input."""
    from safetensors.torch import load_file

    layer = LlamaDecoderLayer(
        transformers.LlamaConfig(**{**HEAD, "attn_implementation": "eager"}), 0
    )
    layer.input_layernorm = nn.Identity()
    weights = {
        n.removeprefix("layers.0."): t for n, t in load_file(head / "model.safetensors").items()
    }
    layer.load_state_dict({n: t for n, t in weights.items() if n != "fc.weight"})
    layer.fc = nn.Linear(2 * D, D, bias=False)
    layer.fc.weight.data = weights["fc.weight"]
    return layer.eval()


def outputs(layer: nn.Module, x: Tensor, first: int) -> Tensor:
    """[n, hidden] of inputs x at the positions first, first + 1, ..."""
    at = torch.arange(first, first + len(x))[None]
    rotary = LlamaRotaryEmbedding(transformers.LlamaConfig(**HEAD))(x[None], at)
    mask = torch.full((len(x), len(x)), -torch.inf).triu(1)[None, None]
    out = layer(x[None], attention_mask=mask, position_embeddings=rotary, position_ids=at)
    return (out[0] if isinstance(out, tuple) else out)[0]


def first_trees(llm: LLM, prompt: Any) -> tuple[int, DraftTrees]:
    """The root of the first decoding round, and its trees."""
    found: list[tuple[int, DraftTrees]] = []

    def look(touched: Any) -> None:
        record = llm.engine.last_round
        if not found and len(record.round.trees):
            found.append((roots[-1], record.round.trees))
        roots.append(touched[0].tokens[-1])

    roots: list[int] = []
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True), on_step=look)
    return found[0]


@pytest.mark.parametrize("how", ["decoupled", "dropped"])
def test_a_heads_input_at_visual_positions(folder: Path, tmp_path: Path, how: str) -> None:
    """MSD: a visual position is its embedding alone. Dropped: the head's context begins on the
    picture's last page."""
    head = save_head(tmp_path / "head", visual_positions=how)
    llm = load(
        folder,
        speculative_config={"model": str(head), "policy": "static", "topology": [[0], [1], [0, 0]]},
    )
    prompt = llm.chat_prompt(message("It is about ", picture(1, 84, 84), "What is it then?"))
    (image,) = prompt.media.pictures
    root, trees = first_trees(llm, prompt)
    is_llava = "llava" in folder.name
    kind = transformers.Qwen2VLForConditionalGeneration
    if is_llava:
        kind = transformers.LlavaForConditionalGeneration
    model = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        inputs = (of_llava if is_llava else of_qwen)(prompt)
        # after the final norm
        states = model(**inputs, output_hidden_states=True).hidden_states[-1][0]
        embed = model.get_input_embeddings()
        layer = reference_layer(head)
        tokens = torch.tensor([*prompt.tokens[1:], root])
        x = layer.fc(torch.cat((embed(tokens), states), -1))
        start = 0
        if how == "decoupled":
            at = slice(image.first - 1, image.first - 1 + image.length)
            x[at] = llm.target.encode_image(image.pixels)
        else:
            start = (image.first + image.length) // PAGE * PAGE
            assert start > image.first
        out = outputs(layer, x[start:], start)[-1]
        firsts = [i for i in range(len(trees)) if trees.parent[i] == ROOT]
        check(trees, firsts, model.lm_head(out))
        parent = firsts[0]
        child = layer.fc(torch.cat((embed(torch.tensor([trees.token[parent]])), out[None]), -1))
        out = outputs(layer, torch.cat((x[start:], child)), start)[-1]
        children = [i for i in range(len(trees)) if trees.parent[i] == parent]
        check(trees, children, model.lm_head(out))


def check(trees: DraftTrees, nodes: list[int], logits: Tensor) -> None:
    best = logits.softmax(-1).topk(len(nodes))
    assert nodes
    assert trees.token[nodes].tolist() == best.indices.tolist()
    torch.testing.assert_close(
        torch.tensor(trees.draft_prob[nodes]).float(), best.values, rtol=2e-3, atol=1e-5
    )


CASES: dict[str, dict[str, Any]] = {
    "MSD": {"visual_positions": "decoupled"},
    "EAGLE-1": {},
    "EAGLE-3 that reads images": {"eagle3": True, "visual_positions": "decoupled"},
    "EAGLE-3": {"eagle3": True},
}


@pytest.mark.parametrize("name", CASES)
def test_tokens_are_those_of_plain_decoding(folder: Path, tmp_path: Path, name: str) -> None:
    head = save_head(tmp_path / "head", **CASES[name])
    config = {"model": str(head), "policy": "static"}
    for temperature, chunk in ((0.0, 256), (0.8, 9)):
        plain = load(folder, enable_prefix_caching=False).chat(CHATS, sampling(temperature))
        llm = load(folder, speculative_config=config, max_num_batched_tokens=chunk)
        for _ in range(2):  # the second time from the prefix cache
            outs = llm.chat(CHATS, sampling(temperature))
            assert [o.outputs[0].token_ids for o in outs] == [o.outputs[0].token_ids for o in plain]
            assert all(o.outputs[0].metrics.verified for o in outs)
        llm.engine.check_integrity()
        assert not llm.engine.drafter._states


@pytest.mark.parametrize("name", ["EAGLE-1", "MSD"])
def test_a_picture_may_end_the_text_and_a_page(folder: Path, tmp_path: Path, name: str) -> None:
    head = save_head(tmp_path / "head", **CASES[name])
    llm = load(folder, speculative_config={"model": str(head), "policy": "static"})
    plain = load(folder)
    chat = llm.chat_prompt(message(picture(1)))
    (image,) = chat.media.pictures
    text = {"prompt_token_ids": [3] * (-image.length % PAGE) + [chat.tokens[image.first]]}
    prompt = llm.text_prompt({**text, "multi_modal_data": {"image": [picture(1)]}})
    assert len(prompt.tokens) % PAGE == 0
    assert prompt.media.visual(10**6) == len(prompt.tokens)
    outs, expected = (each.generate([prompt], sampling(0.0)[:1]) for each in (llm, plain))
    assert outs[0].outputs[0].token_ids == expected[0].outputs[0].token_ids
    assert outs[0].outputs[0].metrics.verified


def test_a_text_model_drafts_for_one_that_sees(folder: Path, tmp_path: Path) -> None:
    small = transformers.LlamaForCausalLM(transformers.LlamaConfig(**TEXT, vocab_size=VOCAB))
    small.save_pretrained(tmp_path / "small")
    Tokenizer.load(folder).save(tmp_path / "small")
    config = {"method": "draft_model", "model": str(tmp_path / "small"), "policy": "static"}
    llm = load(folder, speculative_config=config)
    plain = load(folder)
    for _ in range(2):
        outs = llm.chat(CHATS, sampling(0.0))
        expected = plain.chat(CHATS, sampling(0.0))
        assert [o.outputs[0].token_ids for o in outs] == [o.outputs[0].token_ids for o in expected]
        assert all(o.outputs[0].metrics.verified for o in outs)


def test_a_head_that_does_not_see_is_noticed(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    head = save_head(tmp_path / "head")
    with caplog.at_level(logging.WARNING, "smart.speculation"):
        load(folder, speculative_config={"model": str(head), "policy": "static"})
        assert [r.getMessage() for r in caplog.records] == [
            f"the head {head} reads no images: it drafts from the text behind them"
        ]
        caplog.clear()
        load(
            folder,
            speculative_config={
                "model": str(head),
                "policy": "static",
                "visual_positions": "dropped",
            },
        )
        assert not caplog.records
        with_images = {"model": str(head), "policy": "static", "visual_positions": "decoupled"}
        assert load(folder, speculative_config=with_images).engine.drafter.supports_images
        assert not caplog.records
    with pytest.raises(
        ConfigError, match="visual_positions='pooled' is not supported: use dropped or decoupled"
    ):
        load(folder, speculative_config={"model": str(head), "visual_positions": "pooled"})
    other = save_head(tmp_path / "other", visual_positions="both")
    with pytest.raises(
        ModelError, match="has visual_positions 'both'; supported: dropped, decoupled"
    ):
        load(folder, speculative_config={"model": str(other)})
