"""model.generate with SMART as custom_generate, against model.generate without: tiny random models,
fp32."""

from __future__ import annotations

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import smart_decoding.integrations
from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.integrations.hub.custom_generate.generate import generate as hub_generate
from smart_decoding.integrations.transformers import (
    checks,
    drafting,
    generate,
    last_report,
    sequences,
)
from smart_decoding.integrations.transformers.checks import cache_of, check
from smart_decoding.kernels import library
from smart_decoding.models.cpu import kernel_check

VOCAB = 13
PAD = 0
EOS = 2
NEW = 48  # tokens of an answer
TOKENS: dict[str, Any] = {
    "vocab_size": VOCAB,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": EOS,
}
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "initializer_range": 0.3,
    "max_position_embeddings": 256,
    **TOKENS,
}
CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, SIZES),
    "qwen2": (transformers.Qwen2Config, SIZES),
    "qwen3": (transformers.Qwen3Config, {**SIZES, "head_dim": 8}),
    "mistral": (transformers.MistralConfig, SIZES),
    "gemma": (transformers.GemmaConfig, {**SIZES, "head_dim": 8}),
    "phi3": (transformers.Phi3Config, SIZES),
    "gpt2": (
        transformers.GPT2Config,
        {**TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    ),
    "opt": (
        transformers.OPTConfig,
        {**SIZES, **TOKENS, "word_embed_proj_dim": 32, "ffn_dim": 64, "init_std": 0.3},
    ),
    "bloom": (
        transformers.BloomConfig,
        {**TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    ),
    "mamba": (
        transformers.MambaConfig,
        {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    ),
    "rwkv": (transformers.RwkvConfig, {**TOKENS, "hidden_size": 32, "num_hidden_layers": 2}),
    "sliding": (transformers.MistralConfig, {**SIZES, "sliding_window": 32}),
}
EIGHT = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "gpt2", "opt")
PROMPTS = torch.tensor(
    [
        [1, 9, 8, 9, 8, 9, 8, 9, 8, 9],
        [PAD, PAD, 1, 5, 6, 7, 5, 6, 7, 5],
        [PAD, PAD, PAD, PAD, PAD, 1, 2, 3, 4, 3],
    ]
)
# A small vocabulary and one-token matches: some drafts are right by chance alone, so that
# acceptance is exercised.
EAGER = {"method": "ngram", "policy": "static", "min_n": 1, "profile_seconds": 0}


@functools.cache
def model_of(name: str, attention: str | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    make, options = CONFIGS[name]
    return AutoModelForCausalLM.from_config(make(**options), attn_implementation=attention).eval()


def inputs(batch: int = 3) -> dict[str, Any]:
    ids = PROMPTS[:batch]
    mask = (torch.cumsum(ids != PAD, 1) > 0).long()
    return {"input_ids": ids, "attention_mask": mask, "max_new_tokens": NEW, "do_sample": False}


def smart(model: PreTrainedModel, config: dict[str, Any] | bool = EAGER, **arguments: Any) -> Any:
    if isinstance(config, dict):
        config = {key: value for key, value in config.items() if value is not None}
    return model.generate(**arguments, custom_generate=generate, speculative_config=config)


def test_missing_kernels_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The model is transformers' own and runs as before; only drafting is slower."""
    kernel_check._warn.cache_clear()
    monkeypatch.setattr(library, "unavailable", lambda: "for this test")
    model, given = model_of("llama"), inputs()
    with caplog.at_level("WARNING", "smart.kernels"):
        outputs = [smart(model, **given) for _ in range(2)]
    assert all(torch.equal(output, model.generate(**given)) for output in outputs)
    messages = [record.getMessage() for record in caplog.records if record.name == "smart.kernels"]
    assert len(messages) == 1
    assert messages[0].startswith("no CPU kernels: for this test")


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", EIGHT)
def test_greedy_tokens_are_those_of_generate(name: str, batch: int) -> None:
    model, given = model_of(name), inputs(batch)
    assert torch.equal(smart(model, **given), model.generate(**given))
    report = last_report(model)
    assert report is not None
    assert report.layout == "tree"
    assert report.drafted >= report.verified > report.accepted > 0


@pytest.mark.parametrize("method", ["ngram", "union", "none"])
@pytest.mark.parametrize("policy", ["smart", "eagle2"])
def test_every_method_gives_the_same_tokens(method: str, policy: str) -> None:
    model, given = model_of("qwen2"), inputs()
    expected = model.generate(**given)
    for _ in range(2):  # the second call goes on with what the first one learned
        assert torch.equal(
            smart(model, {"method": method, "policy": policy, "profile_seconds": 0}, **given),
            expected,
        )
    report = last_report(model)
    assert report is not None
    assert report.drafter == method
    assert (report.accepted == 0) == (method == "none")


def test_a_model_without_tree_masks_drafts_chains() -> None:
    """Bloom makes its position biases from the padding mask."""
    model, given = model_of("bloom"), inputs()
    config = {"method": "ngram", "policy": "static", "profile_seconds": 0}
    assert torch.equal(smart(model, config, **given), model.generate(**given))
    report = last_report(model)
    assert report is not None
    assert report.layout == "chain"
    assert report.accepted > 0
    with pytest.raises(ConfigError, match="tree mask"):
        smart(model, {"method": "union"}, **given)


def test_eager_attention_and_prompts_in_chunks() -> None:
    model, given = model_of("llama", "eager"), inputs()
    expected = model.generate(**given)
    assert torch.equal(smart(model, prefill_chunk_size=4, **given), expected)
    long = PROMPTS[:1].repeat(1, 8)
    short = torch.full_like(long, PAD)
    short[0, -3:] = torch.tensor([1, 5, 6])
    ids = torch.cat((long, short))
    uneven = {**given, "input_ids": ids, "attention_mask": (ids != PAD).long()}
    assert torch.equal(smart(model, prefill_chunk_size=50, **uneven), model.generate(**uneven))


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 20},
        {"bad_words_ids": [[3], [8, 9]]},
        {
            "prefix_allowed_tokens_fn": lambda row, ids: [
                3 + row,
                4 + row,
                5 + (len(ids) + row) % 5,
                EOS,
            ]
        },
        {"eos_token_id": [2, 5]},
        {"forced_eos_token_id": EOS, "exponential_decay_length_penalty": (5, 1.2)},
    ],
    ids=lambda options: "+".join(options),
)
def test_logits_processors(options: dict[str, Any]) -> None:
    accepted = 0
    for name in ("opt", "gemma", "gpt2"):
        model, given = model_of(name), inputs()
        found = smart(model, **given, **options)
        assert torch.equal(found, model.generate(**given, **options))
        report = last_report(model)
        assert report is not None
        accepted += report.accepted
    assert accepted > 0


class RowStops(StoppingCriteria):
    """Row i stops at 4 + 5i new tokens, or where a token has occurred three times in a row."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = torch.tensor(
            [input_ids.shape[1] >= PROMPTS.shape[1] + 4 + 5 * i for i in range(len(input_ids))]
        )
        return done | (input_ids[:, -3:] == input_ids[:, -1:]).all(1)


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.values: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


@pytest.mark.parametrize("eos", [EOS, None])
@pytest.mark.parametrize("name", ["mistral", "gpt2"])
def test_stopping_criteria(name: str, eos: int | None) -> None:
    """Without an end-of-sequence token, rows that ended are not padded: generate writes on in
    them."""
    model, given = model_of(name), {**inputs(), "eos_token_id": eos}
    expected = model.generate(**given, stopping_criteria=[RowStops()])
    assert expected.shape[1] < PROMPTS.shape[1] + NEW
    assert torch.equal(smart(model, **given, stopping_criteria=[RowStops()]), expected)


def test_criteria_see_the_scores_of_tokens_so_far_only() -> None:
    """As ConfidenceCriteria of transformers reads them."""
    noted: list[tuple[int, int]] = []

    class Confidence(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            noted.append((input_ids.shape[1] - PROMPTS.shape[1], len(scores)))
            assert int(scores[-1][0].argmax()) == int(input_ids[0, -1])
            return torch.zeros(len(input_ids), dtype=torch.bool)

    model = model_of("llama")
    given = {**inputs(1), "return_dict_in_generate": True, "output_scores": True}
    smart(model, **given, stopping_criteria=[Confidence()])
    report = last_report(model)
    assert report is not None
    assert report.accepted > 0
    assert noted == [(n, n) for n in range(1, len(noted) + 1)]


@pytest.mark.parametrize("batch", [1, 3])
def test_streamers_get_what_generate_gives_them(batch: int) -> None:
    model, given = model_of("phi3"), inputs(batch)
    plain, ours = Collector(), Collector()
    model.generate(**given, streamer=plain)
    smart(model, **given, streamer=ours)
    assert len(plain.values) > 20
    assert ours.values == plain.values
    assert ours.ended == plain.ended == 1


SETTINGS: dict[str, Any] = {
    "max_new_tokens": 30,
    "do_sample": False,
    "repetition_penalty": 1.4,
    "eos_token_id": [EOS, 7],
    "pad_token_id": 11,
}


@pytest.mark.parametrize("where", ["an argument", "the model's own", "both"])
def test_generation_configs_are_respected(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The object that is given, the one that the model has, and arguments, each before the next
    one."""
    model = model_of("llama")
    prompts = {name: inputs()[name] for name in ("input_ids", "attention_mask")}
    config = GenerationConfig(**SETTINGS)
    other = GenerationConfig(**{**SETTINGS, "max_new_tokens": 3})
    own = {"an argument": model.generation_config, "the model's own": config, "both": other}[where]
    monkeypatch.setattr(model, "generation_config", own)
    given = {} if where == "the model's own" else {"generation_config": config}
    expected = model.generate(**prompts, **given)
    assert torch.equal(smart(model, **prompts, **given), expected)
    short = smart(model, **prompts, **given, max_new_tokens=5)
    assert torch.equal(short, model.generate(**prompts, **given, max_new_tokens=5))
    assert short.shape[1] == 15
    for name, value in (("repetition_penalty", 1.0), ("eos_token_id", EOS), ("pad_token_id", PAD)):
        changed = {**given, name: value}
        answer = smart(model, **prompts, **changed)
        assert torch.equal(answer, model.generate(**prompts, **changed)), name
        assert not torch.equal(answer, expected), name


def test_scores_and_logits() -> None:
    model = model_of("qwen3")
    given = {
        **inputs(),
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    given |= {"repetition_penalty": 1.3, "eos_token_id": None}
    expected, found = model.generate(**given), smart(model, **given)
    assert torch.equal(found.sequences, expected.sequences)
    for mine, theirs in ((found.scores, expected.scores), (found.logits, expected.logits)):
        assert len(mine) == len(theirs) == NEW
        torch.testing.assert_close(torch.stack(mine), torch.stack(theirs), atol=1e-4, rtol=1e-4)
    assert not torch.equal(found.scores[3], found.logits[3])


def test_draws_depend_on_the_seed_and_not_on_the_drafts() -> None:
    model = model_of("llama")
    given = {**inputs(), "do_sample": True, "temperature": 0.7, "top_p": 0.9, "eos_token_id": None}
    answers = []
    for config in (False, EAGER, {**EAGER, "policy": "eagle2"}):
        torch.manual_seed(11)
        answers.append(smart(model, config, **given))
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])
    report = last_report(model)
    assert report is not None
    assert report.accepted > 0
    torch.manual_seed(12)
    assert not torch.equal(smart(model, EAGER, **given), answers[0])


def test_draws_have_the_targets_distribution() -> None:
    """Two tokens after a prompt: counts against the exact joint distribution of the processed
    target."""
    model, count = model_of("llama"), 3000
    prompt = PROMPTS[:1]
    options = {
        "do_sample": True,
        "temperature": 1.5,
        "top_k": 5,
        "eos_token_id": None,
        "max_new_tokens": 2,
    }
    torch.manual_seed(5)
    found = smart(model, EAGER, input_ids=prompt, num_return_sequences=count, **options)[:, -2:]
    report = last_report(model)
    assert report is not None
    assert report.tokens == 2 * count
    joint = np.zeros((VOCAB, VOCAB))
    first = top_k_softmax(model, prompt, 5, 1.5)
    for token in np.flatnonzero(first):
        joint[token] = first[token] * top_k_softmax(
            model, torch.cat((prompt, torch.tensor([[token]])), 1), 5, 1.5
        )
    counts = np.zeros_like(joint)
    np.add.at(counts, tuple(found.T.numpy()), 1)
    assert counts[joint == 0].sum() == 0
    likely = joint * count >= 5
    observed = np.append(counts[likely], counts[~likely].sum())
    expected = np.append(joint[likely], joint[~likely].sum()) * count
    assert chisquare(observed[expected > 0], expected[expected > 0]).pvalue > 1e-3


@torch.no_grad()
def top_k_softmax(
    model: PreTrainedModel, ids: torch.Tensor, k: int, temperature: float
) -> np.ndarray:
    logits = model(ids).logits[0, -1].double() / temperature
    logits[logits < logits.topk(k).values[-1]] = -torch.inf
    return logits.softmax(-1).numpy()


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("mamba", {}, "LinearAttentionLayer of MambaForCausalLM keeps a running state"),
        ("rwkv", {}, "RwkvForCausalLM keeps a recurrent state"),
        ("sliding", {}, "forgets all but 32 tokens"),
        ("llama", {"cache_implementation": "static"}, "StaticCache is not supported"),
        ("llama", {"num_beams": 2}, "beam"),
        ("llama", {"use_cache": False}, "use_cache=False"),
        (
            "llama",
            {"output_attentions": True, "return_dict_in_generate": True},
            "output_attentions",
        ),
        ("llama", {"guidance_scale": 2.0}, "UnbatchedClassifierFreeGuidance"),
        ("llama", {"position_ids": torch.arange(10).repeat(3, 1) + 1}, "position_ids"),
        ("llama", {"attention_mask": torch.tensor([[1] * 9 + [0]] * 3)}, "left padding"),
        ("llama", {"speculative_config": {"method": "medusa"}}, "unknown method 'medusa'"),
        ("llama", {"assistant_model": object()}, "{'method': 'draft_model', 'model': assistant"),
        (
            "llama",
            {"speculative_config": {"policy": "static", "exploration_budget": 0.1}},
            "has an option 'exploration_budget'",
        ),
    ],
)
def test_refusals_come_before_any_forward(
    name: str, options: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name)
    if "speculative_config" not in options or "method" in options["speculative_config"]:
        monkeypatch.setattr(
            type(model), "__call__", lambda *_, **__: pytest.fail("a forward was run")
        )
    with pytest.raises(ConfigError, match=reason):
        model.generate(**{**inputs(), **options}, custom_generate=generate)


def test_a_device_where_no_tokens_are_drawn_is_refused() -> None:
    model = copy.deepcopy(model_of("llama")).to("meta")
    with pytest.raises(ConfigError, match="device 'meta' is not supported: move the model to cpu"):
        check(model, model.generation_config, (), {})


@pytest.mark.parametrize("how", ["tensor parallel", "FSDP", "ZeRO-3", "data parallel"])
def test_a_model_that_lies_in_several_processes_is_refused(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would choose by its own clock; where each has all of it, that does no harm."""
    model = model_of("llama")
    refused = how != "data parallel"
    for processes in (1, 2):
        with monkeypatch.context() as patch:
            patch.setattr(checks, "_is_distributed", lambda: True)
            patch.setattr(checks.distributed, "get_world_size", lambda n=processes: n)
            patch.setattr(checks, "is_fsdp_managed_module", lambda _: how == "FSDP")
            patch.setattr(checks, "is_deepspeed_zero3_enabled", lambda: how == "ZeRO-3")
            patch.setattr(model, "_tp_size", 2 if how == "tensor parallel" else None)
            assert checks._is_spread(model) == (refused and processes > 1)
            if refused and processes > 1:
                with pytest.raises(ConfigError, match="lie in several processes"):
                    check(model, model.generation_config, (), {})


def test_a_sliding_window_that_is_not_reached_is_no_obstacle() -> None:
    model, given = model_of("sliding"), {**inputs(), "max_new_tokens": 22}
    assert torch.equal(smart(model, **given), model.generate(**given))


def test_a_model_that_ignores_our_cache_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    forward = model.model.forward
    monkeypatch.setattr(
        model.model, "forward", lambda *a, **k: forward(*a, **{**k, "position_ids": None})
    )
    with pytest.raises(ModelError, match="other logits"):
        smart(model, **inputs())


def test_costs_are_measured_once_and_kept_on_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smart_decoding.profiling.cache.cache_dir", lambda: tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    config = {"method": "ngram", "profile_seconds": 0.05}
    first = smart(model, config, **inputs(1))
    (cost,) = drafting.state_of(model).costs.values()
    assert cost.verify != CostModel.default().verify
    assert 0 < cost.verify_seconds(1, 1, 64.0) < 10
    assert torch.equal(smart(model, config, **inputs(1)), first)
    assert list(drafting.state_of(model).costs.values()) == [cost]
    assert len(drafting.state_of(model).idle) == 1


def test_the_hub_folder_is_what_transformers_loads() -> None:
    folder = Path(smart_decoding.integrations.__file__).with_name("hub")
    model, given = model_of("llama"), inputs()
    found = model.generate(
        **given, custom_generate=str(folder), trust_remote_code=True, speculative_config=EAGER
    )
    assert torch.equal(found, model.generate(**given))
    report = last_report(model)
    assert report is not None
    assert report.drafter == "ngram"
    assert report.policy == "static"


def test_the_hub_folder_works_where_it_lies_beside_weights() -> None:
    """transformers then makes `model.generate` a partial of that very function."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SIZES)).eval()
    expected = model.generate(**inputs())
    model.generate = functools.partial(hub_generate, model=model)
    assert torch.equal(model.generate(**inputs(), speculative_config=EAGER), expected)


# Private or unwritten names: if a release changes them, these tests say which.


def test_names_of_caches_that_we_rely_on() -> None:
    from transformers.cache_utils import (
        Cache,
        CacheLayerMixin,
        DynamicCache,
        DynamicLayer,
        DynamicSlidingWindowLayer,
    )

    config = model_of("llama").config
    assert {type(layer) for layer in DynamicCache(config=config).layers} == {DynamicLayer}
    sliding = DynamicCache(config=model_of("sliding").config).layers[0]
    assert type(sliding) is DynamicSlidingWindowLayer
    assert sliding.sliding_window == 32
    assert not sliding.is_initialized
    assert CacheLayerMixin.__abstractmethods__ <= {
        "lazy_initialization",
        "update",
        "get_mask_sizes",
        "get_seq_length",
        "get_max_length",
        "get_max_cache_shape",
    }
    assert hasattr(Cache, "is_compileable")
    assert DynamicCache().offloading is False


def test_names_of_processors_and_criteria_that_we_rely_on() -> None:
    from transformers.generation import logits_process, stopping_criteria

    for name in (*checks.STATEFUL, *sequences.BY_PLACE):
        assert getattr(logits_process, name).__module__ == "transformers.generation.logits_process"
    kind = stopping_criteria.EosTokenCriteria
    assert kind.__module__ == "transformers.generation.stopping_criteria"
    assert hasattr(kind(EOS), "eos_token_id")


def test_names_of_models_and_generate_that_we_rely_on() -> None:
    from transformers.cache_utils import DynamicCache
    from transformers.generation import utils

    model = model_of("llama")
    assert model.config._attn_implementation == "sdpa"
    assert inspect.signature(model.forward).parameters.keys() & {"cache", "past_key_values"}
    rope = model.config.rope_parameters
    assert isinstance(rope, dict)
    assert "rope_type" in rope
    noted: list[dict[str, Any]] = []
    model.generate(
        **inputs(1), custom_generate=lambda model, input_ids, **kw: noted.append(kw) or input_ids
    )
    assert int(noted[0]["generation_config"]._pad_token_tensor) == PAD
    assert type(cache_of(noted[0])) is DynamicCache
    inner = inspect.unwrap(utils.GenerationMixin.generate)
    assert inner.__code__.co_name == "generate"
    assert "streamer" in inner.__code__.co_varnames


@pytest.mark.model
def test_smollm2_answers_as_generate_does() -> None:
    from smart_decoding.models.checkpoints.loading import load_checkpoint
    from smart_decoding.models.text.tokenizer import Tokenizer

    folder = load_checkpoint("smollm2-135m").tokenizer_source
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = Tokenizer.load(folder)
    texts = [
        "Repeat this list three times: red, green, blue, red, green, blue.",
        "Count: 1, 2, 3, 1, 2, 3, 1, 2, 3,",
    ]
    rows = [tokenizer.encode_chat([{"role": "user", "content": text}]) for text in texts]
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    given = {
        "input_ids": ids,
        "attention_mask": mask,
        "max_new_tokens": 24,
        "do_sample": False,
        "pad_token_id": PAD,
    }
    assert torch.equal(smart(model, EAGER, **given), model.generate(**given))
    report = last_report(model)
    assert report is not None
    assert report.accepted > 0
