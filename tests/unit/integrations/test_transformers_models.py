"""Draft heads and draft models inside model.generate: greedy tokens are those of generate, and
drafts are what they are in SMART's own engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from smart_decoding.core.policies import make_policy
from smart_decoding.drafters.eagle import EagleDrafter
from smart_decoding.engine.engine import Engine, EngineConfig
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, ModelError, SmartError
from smart_decoding.integrations.transformers import draft_models, generate, last_report
from smart_decoding.integrations.transformers.aux_hidden import AuxHidden
from smart_decoding.integrations.transformers.state import state_of
from smart_decoding.models.checkpoints.loading import Checkpoint
from smart_decoding.models.cpu.native_level import NativeLevel
from smart_decoding.models.heads.eagle_head import EagleHead
from smart_decoding.models.heads.files import load_head
from smart_decoding.models.target import TorchTarget

from ...parity import test_published_heads as heads
from .test_transformers import (
    CONFIGS,
    EIGHT,
    NEW,
    PAD,
    PROMPTS,
    SIZES,
    TOKENS,
    VOCAB,
    inputs,
    model_of,
)

D = 32


def with_drafts(
    model: PreTrainedModel,
    method: str,
    source: Any,
    policy: str = "static",
    trust_pickle: bool = False,
    **arguments: Any,
) -> Any:
    config = {"method": method, "model": source, "policy": policy, "profile_seconds": 0}
    config |= {"trust_pickle": True} if trust_pickle else {}
    return model.generate(**arguments, custom_generate=generate, speculative_config=config)


def small(name: str, **changes: Any) -> PreTrainedModel:
    """A draft model of one layer, other weights and the same vocabulary."""
    torch.manual_seed(9)
    make, options = CONFIGS[name]
    layers = {"n_layer": 1} if "n_layer" in options else {"num_hidden_layers": 1}
    return AutoModelForCausalLM.from_config(make(**{**options, **layers, **changes})).eval()


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random EAGLE-3 head on the two layers of the tiny models."""
    folder, tensors = tmp_path_factory.mktemp("head"), {}
    torch.manual_seed(3)
    shapes = {
        "fc.weight": (D, 2 * D),
        "norm.weight": (D,),
        "lm_head.weight": (VOCAB, D),
        "layers.0.hidden_norm.weight": (D,),
        "layers.0.input_layernorm.weight": (D,),
        "layers.0.post_attention_layernorm.weight": (D,),
        "layers.0.self_attn.q_proj.weight": (D, 2 * D),
        "layers.0.self_attn.k_proj.weight": (16, 2 * D),
        "layers.0.self_attn.v_proj.weight": (16, 2 * D),
        "layers.0.self_attn.o_proj.weight": (D, D),
        "layers.0.mlp.gate_proj.weight": (48, D),
        "layers.0.mlp.up_proj.weight": (48, D),
        "layers.0.mlp.down_proj.weight": (D, 48),
    }
    for name, shape in shapes.items():
        tensors[name] = torch.randn(shape) * 0.3 + (len(shape) == 1)
    layer = {
        "hidden_size": D,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "intermediate_size": 48,
        "vocab_size": VOCAB,
        "rms_norm_eps": 1e-5,
    }
    config = {"speculators_model_type": "eagle3", "eagle_aux_hidden_state_layer_ids": [1, 2]}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**config, "transformer_layer_config": layer}))
    return folder


@pytest.mark.parametrize("name", [*EIGHT, "bloom"])
def test_greedy_tokens_are_those_of_generate(name: str, head: Path) -> None:
    """Bloom's attention takes no tree mask: its drafts are chains."""
    model, given = model_of(name), inputs()
    expected = model.generate(**given)
    for method, source in (("eagle", head), ("draft_model", small(name))):
        assert torch.equal(with_drafts(model, method, source, **given), expected)
        report = last_report(model)
        assert report is not None
        assert report.drafter == method
        assert report.layout == ("chain" if name == "bloom" else "tree")
        assert report.drafted >= report.verified > report.accepted > 0


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*EIGHT, "bloom"])
def test_a_draft_model_that_is_the_target_is_always_right(name: str, batch: int) -> None:
    """So its keys, positions and masks are those of the target."""
    model, given = model_of(name), {**inputs(batch), "eos_token_id": None}
    assert torch.equal(
        with_drafts(model, "draft_model", model, "chain", **given), model.generate(**given)
    )
    report = last_report(model)
    assert report is not None
    assert report.accepted == batch * (NEW - 1) - report.rounds * batch
    assert report.rounds < NEW / 3


def test_a_draft_model_that_is_the_target_is_right_in_trees_and_when_sampled() -> None:
    """The child that the target's own noise picks is proposed, the second level below the first."""
    model = model_of("qwen2")
    given = {**inputs(), "do_sample": True, "temperature": 0.8, "top_k": 0, "eos_token_id": None}
    answers = []
    for config in (
        False,
        {"method": "draft_model", "model": model, "policy": "static", "profile_seconds": 0},
    ):
        torch.manual_seed(4)
        answers.append(model.generate(**given, custom_generate=generate, speculative_config=config))
    assert torch.equal(*answers)
    report = last_report(model)
    assert report is not None
    assert report.accepted >= 2 * report.rounds


def test_draws_are_the_same_whatever_drafts(head: Path) -> None:
    model, given = (
        model_of("llama"),
        {**inputs(), "do_sample": True, "temperature": 0.7, "eos_token_id": None},
    )
    answers = []
    for method, source in (
        ("eagle", head),
        ("draft_model", small("llama")),
        ("union", head),
        ("none", None),
    ):
        torch.manual_seed(11)
        config = {"method": method, "policy": "static", "profile_seconds": 0} | (
            {"model": source} if source else {}
        )
        answers.append(model.generate(**given, custom_generate=generate, speculative_config=config))
        report = last_report(model)
        assert report is not None
        assert (report.accepted > 0) == (method != "none")
    assert all(torch.equal(answer, answers[0]) for answer in answers)


def recorded_proposals(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What heads propose from now on, level by level."""
    proposals: list[Any] = []

    def recorded(level: Any) -> Any:
        def run(*given: Any) -> Any:
            ids, probs = level(*given)
            proposals.append(ids.tolist())
            return ids, probs

        return run

    for name in ("first", "deeper"):
        monkeypatch.setattr(NativeLevel, name, recorded(getattr(NativeLevel, name)))
    monkeypatch.setattr(EagleDrafter, "follows", lambda self, rule: False)
    return proposals


def our_engine(weights: Checkpoint, folder: Path) -> Engine:
    """With the head in the folder."""
    limit = 64
    target = TorchTarget(weights, "float32", "cpu", 64, limit)
    files = load_head(folder, weights.config, trust_pickle=True)
    drafter = EagleDrafter(EagleHead(files, target.decoder, 64, 16, limit), 64, 16)
    config = EngineConfig(64, limit)
    return Engine(target, make_policy("static"), drafter, config, lambda skip: lambda ids: "")


@pytest.mark.parametrize("layout", heads.LAYOUTS)
def test_heads_draft_as_in_our_own_engine(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batched and padded: the same proposals in every round, and so the same features, pairs and
    positions."""
    proposals = recorded_proposals(monkeypatch)
    config, tensors, pickled, *_ = heads.LAYOUTS[layout]
    folder = heads.write(tmp_path, config, tensors, pickled)
    model = heads.target_model()
    new = 24
    prompts = [heads.PROMPT, heads.PROMPT[5:20], heads.PROMPT[3:6]]
    weights = Checkpoint(heads.target_config(), model.state_dict(), tmp_path, {"model": "tiny"})
    engine = our_engine(weights, folder)
    params = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True)
    requests = [engine.add_request(str(i), prompt, params)[0] for i, prompt in enumerate(prompts)]
    while engine.has_unfinished_requests:
        engine.step()
    expected = proposals.copy()
    proposals.clear()
    ids = torch.tensor([[0] * (24 - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (24 - len(p)) + [1] * len(p) for p in prompts])
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": new,
        "do_sample": False,
        "pad_token_id": 0,
    }
    found = with_drafts(model, "eagle", folder, trust_pickle=True, eos_token_id=None, **given)
    assert found[:, 24:].tolist() == [request.output for request in requests]
    assert proposals == expected
    assert len(proposals) > 20
    report = last_report(model)
    assert report is not None
    metrics = [request.metrics for request in requests]
    for name in ("drafted", "verified", "accepted"):
        assert getattr(report, name) == sum(getattr(m, name) for m in metrics)


def test_a_draft_model_reads_a_window_of_a_long_prompt() -> None:
    """Of what waits, only the younger part is run; keys then start within the text."""
    model = small("llama", num_hidden_layers=2, max_position_embeddings=1024)
    ids = torch.tensor(np.random.default_rng(0).integers(3, VOCAB, (2, 700)))
    ids[1, :40] = PAD
    given = {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "max_new_tokens": 20,
        "do_sample": False,
    }
    given["eos_token_id"] = None
    assert torch.equal(with_drafts(model, "draft_model", model, **given), model.generate(**given))
    report = last_report(model)
    assert report is not None
    assert report.accepted > 0


def test_heads_and_models_stay_for_later_calls(head: Path) -> None:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    kept = []
    for batch in (1, 3, 1, 2):
        given = inputs(batch)
        assert torch.equal(
            with_drafts(model, "eagle", head, "smart", **given), model.generate(**given)
        )
        kept.append(list(state_of(model).sources.values()))
    assert len(kept[-1]) == 1
    assert all(source == kept[0] for source in kept)
    assert len(state_of(model).idle) == 3 - 1 + 1  # for batches of 1, 2 and up to 4


def test_costs_of_a_draft_model_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once on this machine: another process would read them."""
    monkeypatch.setattr("smart_decoding.profiling.cache.cache_dir", lambda: tmp_path)
    config = {"method": "draft_model", "model": small("llama"), "profile_seconds": 0.05}
    for _ in range(2):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
        model.generate(**inputs(1), custom_generate=generate, speculative_config=config)
        (cost,) = state_of(model).costs.values()
        assert cost.draft_seconds(1, 64.0) > 0
        (path,) = (tmp_path / "profiles").glob("*.json")
        stored = path.read_bytes()
    assert path.read_bytes() == stored


def folder_of(config: Any, path: Path) -> str:
    config.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.LlamaConfig(**{**SIZES, "vocab_size": 14}), "14 tokens instead of 13"),
        (
            transformers.LlamaConfig(**{**SIZES, "max_position_embeddings": 40}),
            "40 positions, but .* may reach 58",
        ),
        (
            transformers.MistralConfig(**{**SIZES, "sliding_window": 20}),
            "forgets all but 20 tokens",
        ),
        (
            transformers.MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=4),
            "keeps a running state",
        ),
        (transformers.T5Config(vocab_size=VOCAB), "encoder-decoder"),
    ],
)
def test_draft_models_that_do_not_fit_are_refused_before_loading(
    config: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    monkeypatch.setattr(
        draft_models.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded")
    )
    monkeypatch.setattr(type(model), "__call__", lambda *_, **__: pytest.fail("a forward was run"))
    with pytest.raises(ModelError, match=reason):
        with_drafts(model, "draft_model", folder_of(config, tmp_path), **inputs())


def test_a_draft_model_that_is_kept_is_checked_for_each_call() -> None:
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    draft = small("llama", max_position_embeddings=40)
    short = {**inputs(1), "max_new_tokens": 8}
    first = with_drafts(model, "draft_model", draft, **short)
    with pytest.raises(ModelError, match=r"40 positions, but .* may reach 58"):
        with_drafts(model, "draft_model", draft, **inputs(1))
    assert torch.equal(with_drafts(model, "draft_model", draft, **short), first)


def test_a_tokenizer_that_differs_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama")
    monkeypatch.setattr(model.config, "_name_or_path", "the target")
    vocabularies = {"the target": {"a": 0, "b": 1}, str(tmp_path): {"a": 0, "c": 1}}
    monkeypatch.setattr(draft_models, "_vocabulary", lambda name, local_only: vocabularies[name])
    folder = folder_of(transformers.LlamaConfig(**SIZES), tmp_path)
    with pytest.raises(ModelError, match="token 'b' is missing instead of 1"):
        with_drafts(model, "draft_model", folder, **inputs())


def test_a_draft_model_from_a_folder(tmp_path: Path) -> None:
    model, given = model_of("gpt2"), inputs()
    small("gpt2").save_pretrained(tmp_path)
    assert torch.equal(
        with_drafts(model, "draft_model", str(tmp_path), **given), model.generate(**given)
    )
    report = last_report(model)
    assert report is not None
    assert report.accepted > 0


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"method": "eagle"}, ConfigError, "needs a head"),
        ({"method": "draft_model"}, ConfigError, "needs a smaller model"),
        ({"method": "eagle", "model": "./not/here"}, ModelError, "no draft head"),
        ({"method": "draft_model", "model": "./not/here"}, ModelError, "no draft model"),
        (
            {"method": "eagle", "model": "smollm2-135m"},
            ModelError,
            "has hidden_size 576, but the model has 32",
        ),
    ],
)
def test_what_is_missing_is_said(
    options: dict[str, Any], error: type[SmartError], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        model_of("llama").generate(**inputs(), custom_generate=generate, speculative_config=options)


@pytest.mark.parametrize("name", [*EIGHT, "bloom"])
def test_taps_are_transformers_hidden_states(name: str) -> None:
    """All but the last layer's output: there transformers gives what comes after the final norm."""
    model = model_of(name)
    with torch.no_grad(), AuxHidden(model, 2).taken((1, 2, 3)) as states:
        expected = model(PROMPTS[:1], output_hidden_states=True).hidden_states
    assert torch.equal(states[1], expected[1])
    assert torch.equal(states[3], expected[2])
    assert states[2].shape == expected[2].shape
    assert not torch.allclose(states[2], states[3])
    hooks = [
        list(part._forward_hooks) for part in AuxHidden(model, 2)._modules
    ]  # transformers leaves its own
    with AuxHidden(model, 2).taken((1, 2)):
        pass
    assert [list(part._forward_hooks) for part in AuxHidden(model, 2)._modules] == hooks


def test_names_of_transformers_that_drafters_with_a_model_rely_on() -> None:
    """Unwritten ones: if a release changes them, this says which."""
    model = model_of("llama")
    for name in ("get_decoder", "get_input_embeddings", "get_output_embeddings"):
        assert callable(getattr(model, name))
    assert model.get_decoder() is model.model
    assert isinstance(model.model.layers, torch.nn.ModuleList)
    config = model.config
    assert config.name_or_path == config._name_or_path == ""
    assert config.get_text_config(decoder=True) is config
    assert {
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "vocab_size",
    } <= config.to_dict().keys()
    assert '"vocab_size"' in config.to_json_string(use_diff=False)
    assert len(transformers.DynamicCache(config=config).layers) == 2
    gpt2 = model_of("gpt2")  # names of older models lead to the same sizes
    assert (
        gpt2.config.num_hidden_layers,
        gpt2.config.hidden_size,
        gpt2.config.num_attention_heads,
    ) == (2, 32, 4)


@pytest.mark.model
def test_the_shipped_head_on_smollm2() -> None:
    from smart_decoding.models.checkpoints.loading import load_checkpoint
    from smart_decoding.models.text.tokenizer import Tokenizer

    folder = load_checkpoint("smollm2-135m").tokenizer_source
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "Write a short story about a dog."
    ids = torch.tensor([Tokenizer.load(folder).encode_chat([{"role": "user", "content": text}])])
    given = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "max_new_tokens": 24,
        "do_sample": False,
    }
    found = with_drafts(model, "eagle", "smollm2-135m", "eagle2", **given)
    assert torch.equal(found, model.generate(**given))
    report = last_report(model)
    assert report is not None
    assert report.accepted > report.rounds / 2
