"""Heads written in published layouts: what is read back is the same head to the bit, and it
proposes the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smart_decoding.cli.main import main
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.kernels.weights import QuantizedTensor, as_tensor
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.checkpoints.registry import shipped_head
from smart_decoding.models.checkpoints.rounding import RoundedWeights
from smart_decoding.models.families.rope import RopeScaling, scaling_from_hf
from smart_decoding.models.heads.export import (
    check_layout,
    check_rope,
    layout_of,
    smart_config,
    write_head,
)
from smart_decoding.models.heads.files import HeadFiles, load_head
from smart_decoding.training.head import Form, TrainableHead, form_of

from .checkpoints import LLAMA3, computed, config_of
from .reference_head import ReferenceHead, write
from .test_published_heads import (
    LAYOUTS,
    PROMPT,
    VOCAB,
    drafted,
    target_config,
    target_model,
)

AUX_LAYERS = (2, 4, 8)


def checkpoint() -> Checkpoint:
    return Checkpoint(
        target_config(), target_model().state_dict(), Path("nowhere"), {"model": "tiny"}
    )


def ours(folder: Path) -> Path:
    """A head as `smart train` writes it: aux_layers normed, output rows the target's."""
    torch.manual_seed(7)
    config = target_config()
    head = TrainableHead(Form(replace(config, layers=1), len(AUX_LAYERS)))
    for parameter in head.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    weights = {**head.exported(), "draft_ids": torch.arange(0, VOCAB, 3)}
    return write(folder, smart_config(config, AUX_LAYERS, len(weights["draft_ids"])), weights)


@pytest.mark.parametrize("family", ["mistral", "gemma3"])
def test_a_head_of_ours_is_a_plain_layer_whatever_its_target(family: str, tmp_path: Path) -> None:
    config = target_config()
    target = replace(
        config, family=family, windows=(8,) * config.layers, local_theta=1e4, query_scalar=8
    )
    shape = load_head(ours(tmp_path), target).shape
    assert (shape.family, shape.windows, shape.local_theta) == ("llama", (), None)
    assert Form(target.of_head(), 3).shape == shape


def test_training_starts_at_the_norm_before_the_feed_forward_network() -> None:
    """Which Gemma calls otherwise: its post_attention_layernorm is of what attention adds."""
    for name, norm in (("llama", "post_attention"), ("gemma3", "pre_feedforward")):
        config, weights = config_of(name), computed(name)
        head = TrainableHead(Form(config.of_head(), 3))
        head.start_from(weights, config, 1.0)
        expected = weights[f"model.layers.{config.layers - 1}.{norm}_layernorm.weight"]
        assert torch.equal(head.post_attention_layernorm.weight, expected)


def published(name: str, folder: Path) -> Path:
    config, tensors, pickled, *_ = LAYOUTS[name]
    return write(folder, config, tensors, pickled)


def assert_same(mine: HeadFiles, theirs: HeadFiles) -> None:
    assert mine.weights.keys() == theirs.weights.keys()
    for name, tensor in theirs.weights.items():
        assert torch.equal(mine.weights[name], tensor), name
    assert (mine.aux_layers, mine.fused, mine.norm_before_residual) == (
        theirs.aux_layers,
        theirs.fused,
        theirs.norm_before_residual,
    )
    sizes = (
        "layers",
        "hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "ffn",
        "vocab",
        "rms_eps",
        "qkv_bias",
        "o_bias",
    )
    assert all(getattr(mine.shape, size) == getattr(theirs.shape, size) for size in sizes)
    for mine_part, theirs_part in zip(
        mine.shape.inverse_frequencies(), theirs.shape.inverse_frequencies(), strict=True
    ):
        np.testing.assert_array_equal(mine_part, theirs_part)


def assert_same_proposals(mine: Path, theirs: Path) -> None:
    """To the bit on the kernels; torch's products depend on where a tensor lies in memory."""
    for native, tolerance in ((True, 0.0), (False, 1e-6)):
        a = drafted(mine, native)
        b = drafted(theirs, native)
        for column in ("owner", "token", "parent"):
            np.testing.assert_array_equal(getattr(a, column), getattr(b, column))
        np.testing.assert_allclose(a.draft_prob, b.draft_prob, rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_published_heads_come_back_as_they_were(name: str, tmp_path: Path) -> None:
    config, tensors, *_ = LAYOUTS[name]
    before = published(name, tmp_path)
    files = load_head(before, target_config(), trust_pickle=True)
    layout = layout_of(files)
    write_head(files, checkpoint(), layout, tmp_path / "again")
    assert_same(load_head(tmp_path / "again", target_config()), files)
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()
    assert (
        json.loads((tmp_path / "again" / "config.json").read_text())["architectures"]
        == config["architectures"]
    )
    assert_same_proposals(tmp_path / "again", before)


def in_quants(before: Path, scheme: str, folder: Path) -> HeadFiles:
    """The head of ours in `before`, written anew with its matrices rounded."""
    files = load_head(before, target_config())
    config = {**files.config, "quantization": scheme}
    rounded = replace(files, config=config, weights={**RoundedWeights(files.weights, scheme)})
    write_head(rounded, checkpoint(), "smart", folder)
    return load_head(folder, target_config())


@pytest.mark.parametrize(("scheme", "format_"), [("int8", "Q8_0"), ("int4", "Q4_1")])
def test_a_head_in_quants(scheme: str, format_: str, tmp_path: Path) -> None:
    """Its matrices are what rounding at load makes of them, it comes back as it was, and it
    proposes what the rounded numbers would."""
    (tmp_path / "ours").mkdir()
    before = ours(tmp_path / "ours")
    files = in_quants(before, scheme, tmp_path / "q")
    plain = load_head(before, target_config())
    rounded = RoundedWeights(plain.weights, scheme)
    for name, weight in files.weights.items():
        if isinstance(rounded[name], QuantizedTensor):
            assert isinstance(weight, QuantizedTensor)
            assert weight.format == format_
        assert torch.equal(as_tensor(weight), as_tensor(rounded[name])), name
    kinds = {name for name, weight in files.weights.items() if isinstance(weight, QuantizedTensor)}
    assert {"fc.weight", "midlayer.self_attn.q_proj.weight"} <= kinds
    write_head(files, checkpoint(), "smart", tmp_path / "again")
    again, first = (load_file(tmp_path / each / "model.safetensors") for each in ("again", "q"))
    assert again.keys() == first.keys()
    assert all(torch.equal(again[name], first[name]) for name in first)
    widened = {name: as_tensor(weight) for name, weight in files.weights.items()}
    config = smart_config(target_config(), AUX_LAYERS, len(widened["draft_ids"]))
    assert_same_proposals(write(tmp_path, config, widened), tmp_path / "q")
    write_head(files, checkpoint(), "speculators", tmp_path / "s")
    assert_same_proposals(tmp_path / "s", tmp_path / "q")
    head = TrainableHead(form_of(files))
    head.start_at(files.weights)
    assert torch.equal(head.fc.weight, widened["fc.weight"].float())


def test_quants_that_are_damaged_are_refused(tmp_path: Path) -> None:
    (tmp_path / "ours").mkdir()
    in_quants(ours(tmp_path / "ours"), "int4", tmp_path / "q")
    path = tmp_path / "q" / "config.json"
    config = json.loads(path.read_text())
    for scheme, said in (("int3", "int8, int4"), ("int8", "no whole groups of 34 bytes")):
        path.write_text(json.dumps({**config, "quantization": scheme}))
        with pytest.raises(ModelError, match=said):
            load_head(tmp_path / "q", target_config())
    path.write_text(json.dumps({**config, "quantization": None}))
    with pytest.raises(ModelError, match="fc"):
        load_head(tmp_path / "q", target_config())


@pytest.mark.parametrize(("name", "layout"), [("eagle3", "speculators"), ("speculators", "eagle3")])
def test_from_one_layout_to_the_other(name: str, layout: str, tmp_path: Path) -> None:
    before = published(name, tmp_path)
    write_head(
        load_head(before, target_config(), trust_pickle=True),
        checkpoint(),
        layout,
        tmp_path / "other",
    )
    assert layout_of(load_head(tmp_path / "other", target_config())) == layout
    assert_same_proposals(tmp_path / "other", before)


def test_our_head_as_a_speculators_one(tmp_path: Path) -> None:
    """Its output rows are the target's: they become its own."""
    before = ours(tmp_path)
    write_head(
        load_head(before, target_config(), trust_pickle=True),
        checkpoint(),
        "speculators",
        tmp_path / "s",
    )
    tensors = load_file(tmp_path / "s" / "model.safetensors")
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert {name for name in tensors if not name.startswith("layers.0.")} == {
        "fc.weight",
        "fc_norm.0.weight",
        "fc_norm.1.weight",
        "fc_norm.2.weight",
        "norm.weight",
        "lm_head.weight",
        "d2t",
        "t2d",
    }
    assert config["fc_norm"]
    assert config["eagle_aux_hidden_state_layer_ids"] == list(AUX_LAYERS)
    assert config["norm_before_residual"] is False  # vLLM takes a missing one for true
    assert_same_proposals(tmp_path / "s", before)


def test_configs_say_what_the_engines_read(tmp_path: Path) -> None:
    """As vLLM 0.32 reads a speculators config, and the two senses of layer ids in an EAGLE-3
    one."""
    files = load_head(published("speculators", tmp_path), target_config())
    write_head(files, checkpoint(), "speculators", tmp_path / "s")
    config: dict[str, Any] = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["transformer_layer_config"]["model_type"] == "llama"
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] > 0
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "tiny",
        "architectures": ["LlamaForCausalLM"],
    }
    write_head(files, checkpoint(), "eagle3", tmp_path / "e")
    config = json.loads((tmp_path / "e" / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 3, 6]
    assert config["eagle_config"] == {
        "eagle_aux_hidden_state_layer_ids": [0, 2, 5],
        "use_aux_hidden_state": True,
    }
    assert config["draft_vocab_size"] == len(files.weights["draft_ids"])
    assert config["norm_before_residual"] is True


def test_scaled_positions_come_back(tmp_path: Path) -> None:
    files = load_head(published("eagle3", tmp_path), target_config())
    scaled = replace(
        files,
        shape=replace(files.shape, rope_scaling=scaling_from_hf(LLAMA3, 512), max_positions=512),
    )
    write_head(scaled, checkpoint(), "speculators", tmp_path / "s")
    assert_same(load_head(tmp_path / "s", target_config()), scaled)


def test_what_a_layout_has_no_words_for_is_refused(tmp_path: Path) -> None:
    two = load_head(published("speculators, two layers", tmp_path), target_config())
    with pytest.raises(ModelError, match="2 layers, and 'eagle3' one only"):
        write_head(two, checkpoint(), "eagle3", tmp_path / "x")
    with pytest.raises(ModelError, match="it takes one"):
        form_of(two)
    one = load_head(published("eagle1", tmp_path), target_config())
    with pytest.raises(ModelError, match="an EAGLE-1/2 head"):
        check_layout(one, "eagle3")
    with pytest.raises(ConfigError, match="unknown layout 'gguf'"):
        check_layout(one, "gguf")
    folder = tmp_path / "ours"
    folder.mkdir()
    with pytest.raises(ModelError, match="fc_norm"):
        write_head(load_head(ours(folder), target_config()), checkpoint(), "eagle3", tmp_path / "x")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "two" not in name])
def test_training_starts_from_a_published_head(name: str, tmp_path: Path) -> None:
    """In training it says what the conventions say, and unchanged it is written as it was read."""
    config, tensors, _, entries, normed = LAYOUTS[name]
    files = load_head(published(name, tmp_path), target_config(), trust_pickle=True)
    head = TrainableHead(form_of(files))
    head.start_at(files.weights)
    expected = ReferenceHead(target_model(), config, tensors, entries, PROMPT, normed)
    with torch.no_grad():
        model = target_model()
        states = model(
            torch.tensor([expected.prompt[:-1]]), output_hidden_states=True
        ).hidden_states
        g = head.features(torch.cat([states[i] for i in entries or (-1,)], dim=-1))
        out = head(g, expected.embedding[expected.prompt[1:]][None], [])[0, -1]
        if files.fused:
            logits = model.get_output_embeddings().weight @ out
        else:
            assert head.lm_head is not None
            logits = head.lm_head(head.norm(out))
    probs = torch.zeros(VOCAB)
    probs[files.weights["draft_ids"]] = logits.softmax(-1)
    torch.testing.assert_close(probs, expected.probs([]), rtol=1e-4, atol=1e-6)
    for tensor, weight in head.exported().items():
        assert torch.equal(weight, files.weights[tensor].bfloat16()), tensor
    written = {*head.exported(), "draft_ids"}
    assert written == files.weights.keys() - {"embed_tokens.weight"}


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("target", "head", "two"):
        (tmp_path / name).mkdir()
    target_model().save_pretrained(tmp_path / "target")
    head = published("speculators", tmp_path / "head")
    two = published("speculators, two layers", tmp_path / "two")
    # only built-in names have one
    assert shipped_head(str(head)) is shipped_head(str(tmp_path / "target")) is None
    model = f"--model {tmp_path / 'target'}"
    out = f"--output {tmp_path / 'out'}"
    assert main(f"export {head} {model} --layout eagle3 {out}".split()) == 0
    assert layout_of(load_head(tmp_path / "out", target_config())) == "eagle3"
    assert_same_proposals(tmp_path / "out", head)
    refused = {
        "give the head's target": f"export {head} --layout eagle3 {out}",
        "is the head itself": f"export {head} {model} --layout eagle3 --output {head}",
        "and 'eagle3' one only": f"export {two} {model} --layout eagle3 {out}",
        "cannot be chosen with --init": f"train --init {head} --aux-layers 2 {model} {out}",
        "it takes one": f"train --init {two} {model} {out}",
        "an EAGLE-3 head, not one of": f"train --init {head} --export eagle {model} {out}",
        "needs an EAGLE-1/2 head": f"train --export eagle {model} {out}",
        "holds no training data": f"train --init {head} --skip-generation {model} {out}",
    }
    capsys.readouterr()
    for reason, command in refused.items():
        assert main(command.split()) == 2
        assert reason in capsys.readouterr().err


@pytest.mark.model
def test_the_shipped_head_proposes_the_same_through_smart_export(tmp_path: Path) -> None:
    from smart_decoding import LLM, SamplingParams

    assert (
        main(
            [
                "export",
                "smollm2-135m",
                "--layout",
                "speculators",
                "--output",
                str(tmp_path / "head"),
            ]
        )
        == 0
    )
    outputs = []
    for options in ({"method": "eagle"}, {"method": "eagle", "model": str(tmp_path / "head")}):
        llm = LLM(
            "smollm2-135m", speculative_config={**options, "policy": "eagle2"}, max_num_seqs=1
        )
        (output,) = llm.generate(
            "Write a story about a dog.", SamplingParams(temperature=0.0, max_tokens=16)
        )
        metrics = output.outputs[0].metrics
        outputs.append(
            (output.outputs[0].token_ids, metrics.rounds, metrics.drafted, metrics.accepted)
        )
    assert outputs[0] == outputs[1]


def test_what_vllm_needs_beside_the_tensors(tmp_path: Path) -> None:
    """It has no map where the draft vocabulary is all of the target's, asks for the count of aux
    layers, and looks for the target by its name on the hub."""
    files = load_head(ours(tmp_path), target_config())
    whole = replace(files, weights={**files.weights, "draft_ids": torch.arange(VOCAB)})
    named = replace(checkpoint(), provenance={"model": "qwen2.5-coder-1.5b@hub"})
    write_head(whole, named, "speculators", tmp_path / "s")
    assert not {"d2t", "t2d"} & load_file(tmp_path / "s" / "model.safetensors").keys()
    back = load_head(tmp_path / "s", target_config())
    assert torch.equal(back.weights["draft_ids"], whole.weights["draft_ids"])
    config = json.loads((tmp_path / "s" / "config.json").read_text())
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == len(AUX_LAYERS)
    verifier = config["speculators_config"]["verifier"]["name_or_path"]
    assert verifier == "Qwen/Qwen2.5-Coder-1.5B-Instruct"


def test_a_gguf_files_rope_factors_have_no_words_in_other_layouts() -> None:
    """Said before hours of training."""
    target = replace(target_config(), rope_scaling=RopeScaling("factors", {}, (1.0,) * 8))
    check_rope(target, "smart")
    for layout in ("eagle3", "speculators", "eagle"):
        with pytest.raises(ModelError, match="take the model's safetensors"):
            check_rope(target, layout)
