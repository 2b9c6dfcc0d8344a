"""A smaller model drafts: the tokens equal plain decoding's, and a model that is the target
is always right."""

from __future__ import annotations

import functools
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tokenizers
import torch
from safetensors.torch import save_file

from smart_decoding import speculation
from smart_decoding.core.policies.chain import Chain
from smart_decoding.core.policies.off import Off
from smart_decoding.drafters import levels
from smart_decoding.drafters.draft_model import DraftModelDrafter
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError, ModelError
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints import memory
from smart_decoding.models.checkpoints.registry import shipped_head
from smart_decoding.models.draft_model import DraftModel
from smart_decoding.models.families.config import ModelConfig
from smart_decoding.models.families.reading import config_to_hf
from smart_decoding.models.heads.export import smart_config
from smart_decoding.models.text.tokenizer import Tokenizer
from smart_decoding.speculation import check_speculation
from smart_decoding.training.head import Form, TrainableHead

from .tiny import (
    PAGES,
    SCRATCH,
    SMALL,
    TARGET,
    VOCAB,
    answer,
    ask,
    checkpoint,
    engine_of,
    finish,
    plain,
    prompts,
    target_of,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from smart_decoding.engine.engine import Engine

POLICIES: dict[str, dict[str, Any]] = {
    "chain": {"length": 4},
    "static": {},
    "eagle2": {"depth": 3, "top_k": 4, "total_tokens": 14},
}
DEPTH = {"chain": 4, "static": 5}


@pytest.fixture(params=["kernels", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torch":
        for module in ("target", "draft_model"):
            monkeypatch.setattr(f"smart_decoding.models.{module}.use_native", lambda *_args: False)


def engine(
    policy: str,
    draft: ModelConfig = SMALL,
    seed: int = 1,
    pages: int = PAGES,
    scratch: int = SCRATCH,
    **more: Any,
) -> Engine:
    """An engine with a random draft model; TARGET with seed 0 is the target itself."""
    target = target_of(pages)
    model = DraftModel(checkpoint(draft, seed), target, pages, scratch)
    more = {"options": POLICIES[policy], **more}
    return engine_of(target, DraftModelDrafter(model, pages, scratch), policy, pages, **more)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("path")
def test_tokens_are_those_of_plain_decoding(policy: str, temperature: float) -> None:
    many = prompts(4)
    expected = plain(many, temperature)
    for batch in (1, 2, 4):
        drafted = answer(engine(policy), many[:batch], temperature)
        assert [r.output for r in drafted] == expected[:batch]
        assert all(r.metrics.verified > 0 for r in drafted)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.usefixtures("path")
def test_the_target_itself_drafts_what_it_says(policy: str, temperature: float) -> None:
    """Greedy and drawn: the draft model guesses with the target's own noise."""
    many = prompts(4)
    drafted = answer(engine(policy, TARGET, seed=0), many, temperature)
    assert [r.output for r in drafted] == plain(many, temperature)
    for request in drafted:
        metrics = request.metrics
        if policy == "eagle2":  # its few nodes need not hold the best child of every level
            assert metrics.accepted > metrics.rounds
        else:
            assert metrics.rounds <= -(-39 // (1 + DEPTH[policy])) + 1
        if policy == "chain":
            assert metrics.wasted_rows <= 1


@pytest.mark.parametrize("cut", [False, True])
def test_drafts_are_the_small_models_own_sequence(cut: bool) -> None:
    """Chains across rounds, pages and prompt chunks equal the small model decoding alone after the
    same text; also where every other draft is dropped for somebody who has arrived."""
    drafting = engine("chain", max_num_batched_tokens=7)
    (request,) = ask(drafting, [prompts(1, seed=5)[0] * 3], tokens=30)
    rounds = 0
    while drafting.has_unfinished_requests:
        before = list(request.tokens)
        odd = len(before) % 2 == 1
        touched = drafting.step(lambda arrived=cut and odd: [""] * arrived)
        trees = drafting.last_round.round.trees
        if touched and len(trees):
            assert trees.token.tolist() == alone(SMALL, before, len(trees))
            rounds += 1
    assert rounds > 10


def alone(config: ModelConfig, tokens: list[int], count: int) -> list[int]:
    """`count` greedy tokens of the small model after `tokens`, by an engine whose target it is."""
    from smart_decoding.models.target import TorchTarget

    target = TorchTarget(checkpoint(config, 1), "float32", "cpu", PAGES, 512)
    return answer(engine_of(target, None, "off"), [tokens], tokens=count)[0].output


def test_memory_that_runs_out_and_requests_that_vanish() -> None:
    many = prompts(4, seed=3)
    tight = engine("chain", pages=12, max_model_len=96)
    requests = ask(tight, many, tokens=50)
    for _ in range(4):
        tight.step()
    gone = requests.pop(1)
    tight.abort(gone.id)
    finish(tight)
    expected = plain(many, tokens=50)
    assert [r.output for r in requests] == [expected[i] for i in (0, 2, 3)]
    assert sum(r.metrics.preemptions for r in requests) > 0


def test_few_scratch_pages_only_shrink_the_trees() -> None:
    many = prompts(4)
    drafted = answer(engine("eagle2", scratch=1), many)
    assert [r.output for r in drafted] == plain(many)


# --- windows
# and prefix caching


def first_draft(drafting: Engine, prompt: list[int], tokens: int = 8) -> tuple[list[int], int]:
    """The first tree's tokens of a new request, and the rows of its first level; the request runs
    to its end."""
    (request,) = ask(drafting, [prompt], tokens=tokens, first_seed=len(prompt))
    found = None
    while drafting.has_unfinished_requests:
        drafting.step()
        done = drafting.last_round.round
        if found is None and len(done.trees):
            found = done.trees.token.tolist(), done.level_widths[0]
    assert found is not None
    assert request.finished
    return found


def test_a_cached_prefix_is_not_run_again_and_drafts_alike() -> None:
    first, second = prompts(2, seed=1, common=50)
    caching = engine("eagle2")
    first_draft(caching, first)
    fresh, rows = first_draft(engine("eagle2"), second)
    cached, fewer = first_draft(caching, second)
    assert cached == fresh
    assert fewer == rows - 3 * PAGE


def test_a_cached_prefix_that_was_never_drafted_on_is_run_then() -> None:
    """The first request ends with its prompt's round, so that only the target has its keys."""
    first, second = prompts(2, seed=1, common=50)
    caching = engine("eagle2", pages=12, max_model_len=160)
    for seed in range(11, 15):  # the draft model's keys of other text are in all pages
        first_draft(caching, prompts(1, seed=seed)[0][:1] * 138)
    assert caching.drafter._page_keys[:12].all()  # type: ignore[union-attr]
    answer(caching, [first], tokens=1)
    assert first_draft(caching, second) == first_draft(engine("eagle2"), second)


def test_what_waits_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(levels, "WINDOW", 64)
    prompt = np.random.default_rng(0).integers(0, VOCAB, 150).tolist()
    drafting = engine("chain", TARGET, seed=0, max_num_batched_tokens=20)
    _, rows = first_draft(drafting, prompt, tokens=30)
    assert 16 <= rows <= 64
    # keys of a cut context serve nobody else
    assert first_draft(drafting, [*prompt, 1])[1] <= 64
    assert not drafting.drafter._page_keys.any()


@pytest.mark.parametrize("explicit", [True, False])
def test_weights_are_read_when_they_are_requested(explicit: bool) -> None:
    """Or else with the first draft; a prompt's own pass, the first word, reads none."""
    drafting = engine("chain")
    model = drafting.drafter._model
    (request,) = ask(drafting, prompts(1), tokens=9)
    while not request.output:
        drafting.step()
    assert "_decoder" not in vars(model)
    if explicit:
        model.load()
        assert "_decoder" in vars(model)
    while drafting.has_unfinished_requests:
        drafting.step()
    assert [request.output] == [plain(prompts(1), 0.0)[0][:9]]
    assert request.metrics.verified


# --- vocabularies


def test_vocabularies_may_be_padded_differently() -> None:
    many = prompts(2)
    for vocab in (VOCAB - 7, VOCAB + 9):
        drafting = engine("eagle2", replace(SMALL, vocab=vocab))
        assert [r.output for r in answer(drafting, many)] == plain(many)


def saved(folder: Path, config: ModelConfig, words: list[str], seed: int) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps({**config_to_hf(config), "architectures": [architecture(config)]})
    )
    save_file(dict(checkpoint(config, seed).weights), folder / "model.safetensors")
    model = tokenizers.models.WordLevel(
        {word: i for i, word in enumerate(words)}, unk_token=words[0]
    )
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    return folder


def architecture(config: ModelConfig) -> str:
    return {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM"}[config.family]


WORDS = [f"w{i}" for i in range(VOCAB)]


@pytest.fixture
def target_folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "target", TARGET, WORDS, 0)


@pytest.mark.parametrize(
    ("method", "policy"),
    [("draft_model", "chain"), ("union", "chain"), ("union", "eagle2")],
)
def test_one_line_of_configuration(
    tmp_path: Path, target_folder: Path, method: str, policy: str
) -> None:
    draft = saved(tmp_path / "draft", SMALL, WORDS, 1)
    config = {"method": method, "model": str(draft), "policy": policy}
    llm = LLM(
        target_folder, speculative_config=config, dtype="fp32", max_model_len=128, max_num_seqs=2
    )
    named = {
        "draft_model": f"draft model {draft}",
        "union": f"union of draft model {draft} + ngram",
    }
    assert llm.speculation.description == named[method]
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    (output,) = llm.generate([[1, 2, 3]], params)
    assert output.outputs[0].metrics.verified > 0
    without = LLM(
        target_folder, speculative_config=False, dtype="fp32", max_model_len=128, max_num_seqs=2
    )
    assert (
        output.outputs[0].token_ids == without.generate([[1, 2, 3]], params)[0].outputs[0].token_ids
    )


def test_a_model_to_draft_with_needs_no_method(tmp_path: Path, target_folder: Path) -> None:
    draft = saved(tmp_path / "draft", SMALL, WORDS, 1)
    explicit = drafted_by(target_folder, {"model": str(draft), "policy": "eagle2"})
    assert explicit == f"union of draft model {draft} + ngram"


@pytest.mark.parametrize("same_file", [True, False])
def test_a_draft_model_is_read_once(
    same_file: bool, tmp_path: Path, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = saved(tmp_path / "draft", SMALL, WORDS, 1)
    if not same_file:  # the same tokens still
        with (draft / "tokenizer.json").open("a") as file:
            file.write("\n")
    read = []
    for name, load in (
        ("load_checkpoint", speculation.load_checkpoint),
        ("Tokenizer.load", Tokenizer.load),
    ):
        counted = functools.partial(
            lambda load, folder, **options: (read.append(Path(folder)), load(folder, **options))[1],
            load,
        )
        monkeypatch.setattr(f"smart_decoding.speculation.{name}", counted)
    LLM(
        target_folder,
        speculative_config={"method": "draft_model", "model": draft, "policy": "chain"},
        dtype="fp32",
    )
    assert read.count(Path(draft)) == (1 if same_file else 2)  # its tokenizer is known already
    assert read.count(Path(target_folder)) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS[:-1], "96 tokens instead of 97"),
        ([*WORDS[:5], "other", *WORDS[6:]], "token 'w5' is missing instead of 5"),
        ([*WORDS[:5], "w6", "w5", *WORDS[7:]], "token 'w5' is 6 instead of 5"),
    ],
)
def test_another_vocabulary_is_refused_before_weights_are_loaded(
    tmp_path: Path,
    target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: list[str],
    message: str,
) -> None:
    draft = saved(tmp_path / "draft", SMALL, words, 1)
    monkeypatch.setattr(
        "smart_decoding.models.checkpoints.weight_files.SafetensorsWeights.__getitem__", None
    )
    with pytest.raises(ModelError, match="another vocabulary") as caught:
        LLM(
            target_folder,
            speculative_config={"method": "draft_model", "model": draft},
            dtype="fp32",
        )
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("words", [WORDS[:-1], [*WORDS, "w_of_pictures"]])
def test_tokens_beyond_the_smaller_model_do_not_count(
    tmp_path: Path, target_folder: Path, words: list[str]
) -> None:
    """As the tokens for pictures that the larger models of a family have."""
    draft = saved(tmp_path / "draft", replace(SMALL, vocab=len(words)), words, 1)
    drafting = {"method": "draft_model", "model": draft, "policy": "chain"}
    params = SamplingParams(temperature=0, max_tokens=9)
    answers = []
    for config in (False, drafting):
        llm = LLM(target_folder, speculative_config=config, dtype="fp32")
        answers.append(llm.generate("w1 w2", params)[0].outputs[0].token_ids)
    assert answers[0] == answers[1]


def test_what_is_missing_or_too_short_is_refused(tmp_path: Path, target_folder: Path) -> None:
    with pytest.raises(ConfigError, match="give model=NAME"):
        LLM(target_folder, speculative_config={"method": "draft_model"})
    draft = saved(tmp_path / "draft", replace(SMALL, max_positions=64), WORDS, 1)
    with pytest.raises(
        ModelError, match=r"cannot follow the target: .* 128 tokens exceeds the model's 64"
    ):
        LLM(
            target_folder,
            speculative_config={"method": "draft_model", "model": draft},
            max_model_len=128,
        )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ngram", r"speculative_config='ngram' is not allowed: give a dict"),
        (["ngram"], "give a dict"),
        (1, "give a dict"),
        ({"method": "none", "policy": "smart"}, "policy 'smart' is given: leave out one of them"),
        ({"method": "none", "length": 2}, "'none' takes no options, but 'length' is given"),
        (
            {"method": "none", "policy": "off", "model": "small"},
            r"'none' takes no options, but 'model' \(--draft\) is given",
        ),
        ({"method": "eagle"}, "give model=FOLDER, or --draft FOLDER"),
        ({"method": ["ngram"]}, r"method must be a name, not \['ngram'\]"),
        ({"method": "eagle", "model": 3}, "model must be a name, not 3"),
        ({"policy": Off}, "policy must be a policy or its name, not <class"),
        ({"policy": Off(), "length": 3}, "policy 'off': none"),
        ({"method": "none", "policy": Chain()}, "policy 'chain' is given: leave out one of them"),
        ({"num_speculative_tokens": 3, "max_depth": 2}, "max_depth are the same: give one"),
        ({"method": "ngram", "min_n": "2"}, "min_n must be an integer"),
    ],
)
def test_what_would_be_ignored_is_refused(target_folder: Path, config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(target_folder, speculative_config=config, dtype="fp32")


def test_vllms_names_are_taken(target_folder: Path) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_max": 6}
    config |= {"prompt_lookup_min": 3, "policy": "static"}
    drafter = LLM(target_folder, speculative_config=config, dtype="fp32").speculation.drafter
    assert (drafter.max_depth, drafter.max_n, drafter.min_n) == (5, 6, 3)
    config = {"method": "union", "num_speculative_tokens": 2, "policy": "chain"}
    assert LLM(target_folder, speculative_config=config, dtype="fp32").policy.length == 2
    config["policy"] = "static"
    with pytest.raises(ConfigError, match="unknown option 'num_speculative_tokens'"):
        LLM(target_folder, speculative_config=config, dtype="fp32")


@pytest.mark.parametrize("config", [False, {"method": "none"}, {"method": "none", "policy": "off"}])
def test_nothing_drafts_with_method_none(target_folder: Path, config: Any) -> None:
    llm = LLM(target_folder, speculative_config=config, dtype="fp32")
    assert llm.speculation.drafter is None
    assert llm.policy.name == "off"


NOT_READ: Any = None  # a tokenizer


def smollm2(model: str, parameters: int = 135_000_000, **sizes: int) -> Any:
    """A checkpoint, as far as what drafts depends on it."""
    fields = {"hidden": 576, "vocab": 49_152, "layers": 30, "heads": 9, "kv_heads": 3}
    fields |= {"head_dim": 64, "ffn": 1536, **sizes}
    whole = ModelConfig("llama", **fields, rope_theta=1e5, rms_eps=1e-5, max_positions=8192)
    config = SimpleNamespace(
        **fields, of_head=whole.of_head, expected_shapes=lambda: {"all": (parameters,)}
    )
    return SimpleNamespace(
        provenance={"model": model}, named=None, vision=None, mtp=None, config=config
    )


@pytest.mark.parametrize("method", [None, "eagle", "eagle3", "union"])
@pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m@pypi"])
def test_a_model_named_as_its_own_drafter_means_its_head(method: str | None, name: str) -> None:
    """A model that drafts for itself saves nothing."""
    options = {"model": name} if method is None else {"method": method, "model": name}
    found = check_speculation(options, smollm2("smollm2-135m"), NOT_READ, 64)
    assert found.draft is None
    assert found.head == shipped_head("smollm2-135m")


SHIPPED = shipped_head("smollm2-135m")


@pytest.mark.parametrize("model", ["smollm2-135m", "a/SmolLM2-135M-Instruct-GGUF:Q8_0"])
def test_a_head_is_for_the_copies_of_its_model_that_have_its_sizes(model: str) -> None:
    assert SHIPPED is not None
    found = check_speculation(None, smollm2(model), NOT_READ, 64)
    assert (found.head, found.by_default) == (SHIPPED, True)
    options = {"visual_positions": "dropped", "children": 4}
    less = check_speculation(options, smollm2(model), NOT_READ, 64).without_draft()
    assert (less.method, less.head, less.by_default) == ("ngram", None, False)
    assert less.options == {"children": 4}
    found = check_speculation({"method": "eagle"}, smollm2(model), NOT_READ, 64)
    assert (found.head, found.by_default) == (SHIPPED, False)
    sizes = ({"vocab": 49_153}, {"kv_heads": 9}, {"head_dim": 32})
    for other in (smollm2(model, **each) for each in sizes):
        with pytest.raises(ConfigError, match="'eagle' needs a head"):
            check_speculation({"method": "eagle"}, other, NOT_READ, 64)


@pytest.mark.parametrize("named", [{}, {"model": "smollm2-135m"}])
def test_n_grams_draft_beside_a_head_unless_the_model_is_small(named: Any) -> None:
    """Where a round takes few milliseconds they are a visible part of it."""
    target = smollm2("smollm2-135m", parameters=1_500_000_000)
    found = check_speculation({**named, "min_n": 3} if named else {}, target, NOT_READ, 64)
    assert (found.method, found.head) == ("union", SHIPPED)
    assert check_speculation({"method": "eagle"}, target, NOT_READ, 64).method == "eagle"
    small = check_speculation(named, smollm2("smollm2-135m"), NOT_READ, 64)
    assert (small.method, small.head) == ("eagle", SHIPPED)


def test_a_head_without_room_makes_way(
    target_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Where no option requests it."""
    head = target_folder.parent / "head"
    head.mkdir()
    weights = TrainableHead(Form(TARGET.of_head(), 1)).exported()
    (head / "config.json").write_text(json.dumps(smart_config(TARGET, (4,), VOCAB)))
    save_file(weights | {"draft_ids": torch.arange(VOCAB)}, head / "model.safetensors")

    def little(checkpoint: Any, need: memory.Need, *_: Any) -> None:
        if need.draft:
            raise CapacityError("too little memory")

    monkeypatch.setattr(speculation, "own_head", lambda target: head)
    monkeypatch.setattr(memory, "require_memory", little)
    assert drafted_by(target_folder, {"visual_positions": "dropped"}) == "ngram"
    assert "no memory for the draft model" in caplog.text
    with pytest.raises(CapacityError):
        drafted_by(target_folder, {"method": "eagle"})


@pytest.mark.parametrize("config", [{"policy": "off"}, {"min_n": 3}, {"max_n": 9, "max_depth": 2}])
def test_n_grams_draft_beside_an_unused_head_where_their_options_are_given(config: Any) -> None:
    found = check_speculation(config, smollm2("smollm2-135m"), NOT_READ, 64)
    assert (found.method, found.head) == ("ngram", None)


def test_a_head_that_the_user_names_is_taken_whatever_it_is_called(tmp_path: Path) -> None:
    own = tmp_path / "SmolLM2-135M-Instruct"
    assert SHIPPED is not None
    shutil.copytree(SHIPPED, own)
    found = check_speculation({"model": str(own)}, smollm2("smollm2-135m"), NOT_READ, 64)
    assert found.head == own


# --- the default


def drafted_by(target: Path | str, config: dict[str, Any] | bool | None) -> str:
    llm = LLM(target, speculative_config=config, dtype="fp32", max_model_len=128, max_num_seqs=1)
    return llm.speculation.description


@pytest.fixture
def sibling(
    tmp_path: Path, target_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[list[str]], Path]:
    """Makes a cached smaller model with the tokens given, which the target knows as its sibling."""

    def make(words: list[str]) -> Path:
        draft = saved(tmp_path / "small", SMALL, words, 1)
        monkeypatch.setattr(speculation, "cached_siblings", lambda *_: [str(draft)])
        return draft

    return make


def test_a_cached_sibling_drafts_unless_something_else_is_requested(
    sibling: Callable[[list[str]], Path], target_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draft = sibling(WORDS)
    with caplog.at_level("INFO", "smart.speculation"):
        assert drafted_by(target_folder, None) == f"union of draft model {draft} + ngram"
    (record,) = (each for each in caplog.records if each.name == "smart.speculation")
    assert record.getMessage() == f"{draft} drafts for {target_folder}: it is in the cache"
    assert (
        drafted_by(target_folder, {"policy": "eagle2"}) == f"union of draft model {draft} + ngram"
    )
    assert drafted_by(target_folder, {"method": "ngram", "policy": "eagle2"}) == "ngram"
    assert drafted_by(target_folder, {"policy": "eagle2", "min_n": 3}) == "ngram"
    assert drafted_by(target_folder, {"policy": "off"}) == "ngram"
    assert drafted_by(target_folder, False) == "none"


def test_without_a_sibling_that_fits_n_grams_draft(
    sibling: Callable[[list[str]], Path],
    target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    draft = sibling(WORDS[:-1])
    caplog.set_level("INFO", "smart.speculation")
    assert drafted_by(target_folder, {"policy": "eagle2"}) == "ngram"
    (record,) = (each for each in caplog.records if each.name == "smart.speculation")
    assert record.getMessage().startswith(f"{draft} cannot draft for {target_folder}: ")
    assert "another vocabulary" in record.getMessage()
    monkeypatch.setattr(speculation, "cached_siblings", lambda *_: [])
    caplog.clear()
    assert drafted_by(target_folder, {"policy": "eagle2"}) == "ngram"
    assert not caplog.records


def test_where_one_sibling_does_not_fit_the_next_drafts(
    sibling: Callable[[list[str]], Path],
    target_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draft = sibling(WORDS)
    other = saved(tmp_path / "other", SMALL, WORDS[:-1], 1)
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(b"GGUF")
    found = [str(damaged), str(other), str(draft)]
    monkeypatch.setattr(speculation, "cached_siblings", lambda *_: found)
    assert (
        drafted_by(target_folder, {"policy": "eagle2"}) == f"union of draft model {draft} + ngram"
    )


def test_a_sibling_without_room_makes_way(
    sibling: Callable[[list[str]], Path],
    target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    draft = sibling(WORDS)
    needs: list[int] = []

    def little(checkpoint: Any, need: memory.Need, *_: Any) -> None:
        needs.append(need.total)
        if need.draft:
            raise CapacityError("too little memory")

    monkeypatch.setattr(memory, "require_memory", little)
    assert drafted_by(target_folder, {"policy": "eagle2"}) == "ngram"
    assert needs[0] > needs[1]
    assert "no memory for the draft model" in caplog.text
    with pytest.raises(CapacityError):
        drafted_by(target_folder, {"method": "draft_model", "model": str(draft)})


def play_hub(monkeypatch: pytest.MonkeyPatch, folder: Path, *files: str) -> None:
    """A hub that says that each repository holds these files, and fetches this folder."""
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(folder))


@pytest.mark.parametrize(
    ("files", "config", "is_model"),
    [
        (["tokenizer.json"], {"architectures": ["Qwen2ForCausalLM"]}, True),
        ([], {"architectures": ["LlamaForCausalLM"]}, False),  # EAGLE-1 and 2 call themselves so
        (["tokenizer.json"], {"architectures": ["LlamaForCausalLMEagle3"]}, False),
        (["a-Q4_K_M.gguf"], {}, True),
    ],
)
def test_a_hub_id_drafts_as_what_its_files_say(
    files: list[str],
    config: dict[str, Any],
    is_model: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    play_hub(monkeypatch, tmp_path, *files)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert speculation._is_model("owner/small", ask=True) == is_model
    assert not speculation._is_model("owner/small", ask=False)
    assert speculation._is_model("hf.co/owner/small:Q8_0", ask=True)


@pytest.mark.parametrize(
    ("words", "change", "message"),
    [
        (WORDS, {}, "o/Tiny-0.5B-Chat drafts for o/Tiny-7B-Chat: it is in the cache"),
        (WORDS[:-1], {}, "o/Tiny-0.5B-Chat cannot draft for o/Tiny-7B-Chat"),
        (WORDS, {"ffn": 47}, "n-grams draft: the CPU kernels do not serve the draft model"),
    ],
)
def test_a_smaller_model_of_the_family_in_the_hubs_cache_drafts_if_it_fits(
    words: list[str],
    change: dict[str, int],
    message: str,
    tmp_path: Path,
    target_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    play_hub(monkeypatch, target_folder, "model.safetensors")
    kept = tmp_path / "hub" / "models--o--Tiny-0.5B-Chat"
    (kept / "snapshots").mkdir(parents=True)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text("0123")
    saved(kept / "snapshots" / "0123", replace(SMALL, **change), words, 1)
    fits = "drafts for" in message
    with caplog.at_level("INFO", "smart"):
        drafts = drafted_by("o/Tiny-7B-Chat", None)
    assert drafts == ("union of draft model o/Tiny-0.5B-Chat + ngram" if fits else "ngram")
    assert [r.getMessage() for r in caplog.records if message in r.getMessage()]
