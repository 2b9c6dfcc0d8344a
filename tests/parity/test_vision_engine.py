"""Pictures through the whole engine: the same tokens whatever drafts, chunks, shares and makes way;
errors."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from smart_decoding.bench.blocks import Prompt, run_block
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import CapacityError, ConfigError, ModelError

from .test_vision import load, message
from .vision import SEE, picture, save_llava, save_qwen2_vl

if TYPE_CHECKING:
    from smart_decoding.llm import LLM
    from smart_decoding.models.cpu.native_verification import NativeVerified

CHATS = [
    message(picture(1), "What is it?"),
    message("Only words here, no picture at all."),
    message(picture(2), "What is it?"),
    message("Two: ", picture(1), picture(3), "same?"),
    message(picture(1), "What is it?"),
]
CONFIGS: dict[str, dict[str, Any]] = {
    "union, small chunks": {
        "speculative_config": {"method": "union", "policy": "static"},
        "max_num_batched_tokens": 7,
    },
    "ngram, tight memory": {
        "speculative_config": {"method": "ngram", "policy": "eagle2", "min_n": 1},
        "max_model_len": 128,
    },
    "no caching": {
        "speculative_config": False,
        "enable_prefix_caching": False,
        "max_num_batched_tokens": 16,
    },
}


def sampling(temperature: float) -> list[SamplingParams]:
    return [
        SamplingParams(temperature=temperature, max_tokens=30, seed=i, ignore_eos=True)
        for i in range(len(CHATS))
    ]


def counted_rounds(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> list[NativeVerified]:
    """The rounds to come that are verified in one call."""
    rounds: list[NativeVerified] = []
    assert llm.target.native is not None
    verify = llm.target.native.verify
    monkeypatch.setattr(
        llm.target.native, "verify", lambda batch: rounds.append(verify(batch)) or rounds[-1]
    )
    return rounds


@pytest.fixture(scope="module", params=["llava", "qwen2-vl"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp(request.param)
    (save_llava if request.param == "llava" else save_qwen2_vl)(made)
    return made


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[float, list[list[int]]]:
    """Plain decoding step by step, each chat with nothing else around."""
    llm = load(folder, speculative_config=False, enable_prefix_caching=False)
    assert llm.target.native is not None
    llm.target.native = None
    return {
        t: [llm.chat(c, p)[0].outputs[0].token_ids for c, p in zip(CHATS, sampling(t), strict=True)]
        for t in (0.0, 0.8)
    }


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_plain_decoding_alone(
    folder: Path,
    alone: dict[float, list[list[int]]],
    name: str,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "tight" in name:
        monkeypatch.setattr("smart_decoding.llm.pages_for", lambda *_: 8)
    llm = load(folder, **CONFIGS[name])
    rounds = counted_rounds(llm, monkeypatch)
    outputs = llm.chat(CHATS, sampling(temperature))
    assert rounds
    assert [out.outputs[0].token_ids for out in outputs] == alone[temperature]
    assert alone[temperature][0] != alone[temperature][2]  # other picture, other answer
    metrics = [out.outputs[0].metrics for out in outputs]
    llm.engine.check_integrity()
    if "tight" in name:
        assert sum(m.preemptions for m in metrics) > 0
    elif CONFIGS[name]["speculative_config"] and temperature == 0:
        assert sum(m.accepted for m in metrics) > 0


def test_the_prefix_cache_tells_pictures_apart(
    folder: Path, alone: dict[float, list[list[int]]]
) -> None:
    llm = load(folder)
    system = [{"role": "system", "content": "Answer in as few words as you can, please."}]
    answers = {}
    for number in (1, 2, 1):
        (out,) = llm.chat(system + message(picture(number), "What is it?"), sampling(0.0)[0])
        answer = out.outputs[0].token_ids
        metrics = out.outputs[0].metrics
        if number in answers:
            assert answer == answers[number]
            assert metrics.cached_tokens >= 64
            assert metrics.vision_seconds == 0
        else:
            first = out.prompt_token_ids.index(llm.prompts._reader.placeholders["image"])
            assert metrics.cached_tokens <= first
            assert metrics.vision_seconds > 0
        answers[number] = answer
    assert answers[1] != answers[2]


def test_the_tower_runs_once_a_picture(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = load(folder, enable_prefix_caching=False, max_num_batched_tokens=8)
    runs = []
    run = llm.target._tower._run
    monkeypatch.setattr(
        llm.target._tower, "_run", lambda pixels: runs.append(pixels) or run(pixels)
    )
    llm.chat(
        [message(picture(1), "a"), message(picture(2), picture(1), "b")],
        SamplingParams(n=2, max_tokens=3),
    )
    assert len(runs) == 2


def test_answers_of_n_samples_with_pictures(folder: Path) -> None:
    llm = load(folder)
    params = SamplingParams(temperature=0.8, n=3, seed=5, max_tokens=10, ignore_eos=True)
    (together,) = llm.chat(message(picture(1), "What?"), params)
    apart = load(folder, enable_prefix_caching=False, max_num_seqs=1).chat(
        message(picture(1), "What?"), params
    )[0]
    assert [o.token_ids for o in together.outputs] == [o.token_ids for o in apart.outputs]
    assert len({tuple(o.token_ids) for o in together.outputs}) > 1


def test_streaming_and_prompts_with_pictures(folder: Path) -> None:
    llm = load(folder)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    (chat,) = llm.chat(message("Look: ", picture(1), "What?"), params)
    assert (
        "".join(llm.stream(message("Look: ", picture(1), "What?"), params)) == chat.outputs[0].text
    )
    text = llm.chat_prompt(message("Look: ", picture(1), "What?")).text
    for request in ({"prompt": text}, {"prompt_token_ids": llm.tokenizer.encode(text)}):
        (out,) = llm.generate({**request, "multi_modal_data": {"image": picture(1)}}, params)
        assert out.outputs[0].token_ids == chat.outputs[0].token_ids
        assert out.prompt_token_ids == chat.prompt_token_ids


def test_what_cannot_be_read_is_one_clear_error(folder: Path) -> None:
    llm = load(folder, limit_mm_per_prompt={"image": 2}, max_image_pixels=5000)
    see = picture(1)
    is_llava = "llava" in folder.name
    for call, text in (
        (lambda: llm.chat(message(see, see, see)), "3 images in one prompt: at most 2 are allowed"),
        (
            lambda: llm.chat(message(picture(1, 100, 60))),
            "100 x 60 pixels exceeds the limit of 5000",
        ),
        (
            lambda: llm.chat(message("What is <image>?")),
            "0 images for a prompt of 1 image placeholders: too few",
        ),
        (
            lambda: llm.generate({"prompt": "<image>", "multi_modal_data": {"image": [see, see]}}),
            "too many",
        ),
        (
            lambda: llm.generate({"prompt": "x", "multi_modal_data": {"audio": see}}),
            "multi_modal_data has 'audio'",
        ),
        (lambda: llm.generate({"text": "x"}), "a prompt's keys are"),
    ):
        with pytest.raises(ConfigError, match=text):
            call()
    assert not llm.engine.has_unfinished_requests
    if is_llava:
        with pytest.raises(ConfigError, match="does not read a video"):
            llm.chat(message([see, see]))
    else:
        with pytest.raises(ConfigError, match="200"):
            llm.chat(message(picture(1, 2010, 2)))
        with pytest.raises(ConfigError, match="all have the same size"):
            llm.chat(message([see, picture(1, 10, 10)]))
        assert SEE in llm.chat_prompt(message(see)).tokens


def test_a_picture_that_does_not_fit_the_context_is_refused(folder: Path) -> None:
    llm = load(folder, max_model_len=24)
    with pytest.raises(CapacityError, match="must fit into max_model_len=24"):
        llm.chat(message(picture(1, 80, 80), "What is it?"))


def test_options_of_the_image_processor_change_the_size(folder: Path) -> None:
    if "llava" in folder.name:
        with pytest.raises(ConfigError, match="'max_pixels' is unknown; this model has crop_size"):
            load(folder, mm_processor_kwargs={"max_pixels": 28 * 28})
        return
    small = load(folder, mm_processor_kwargs={"max_pixels": 28 * 28}).chat_prompt(
        message(picture(1, 80, 80))
    )
    assert (
        small.media.pictures[0].length
        == 4
        < load(folder).chat_prompt(message(picture(1, 80, 80))).media.pictures[0].length
    )


def test_a_text_model_refuses_pictures(tmp_path: Path) -> None:
    import transformers

    from smart_decoding.models.text.tokenizer import Tokenizer

    from .vision import TEXT, VOCAB

    save_llava(tmp_path / "vision")
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**TEXT, vocab_size=VOCAB)
    ).save_pretrained(tmp_path / "blind")
    Tokenizer.load(tmp_path / "vision").save(tmp_path / "blind")
    llm: LLM = load(tmp_path / "blind")
    for call in (
        lambda: llm.chat(message(picture(1), "What?")),
        lambda: llm.generate({"prompt": "x", "multi_modal_data": {"image": picture(1)}}),
    ):
        with pytest.raises(ConfigError, match="reads text only"):
            call()
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    parts = message("What ", "is it?")
    plain = [{"role": "user", "content": "What \nis it?"}]
    assert (
        llm.chat(parts, params)[0].outputs[0].token_ids
        == llm.chat(plain, params)[0].outputs[0].token_ids
    )


def test_a_folder_without_image_processor_is_refused(folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match=r"preprocessor_config.json in .* is missing"):
        load(copy)


def test_each_block_of_a_benchmark_sees_its_pictures_anew(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = load(folder, speculative_config=False, enable_prefix_caching=False)
    ready = llm.chat_prompt(message(picture(1), "What is it?"))
    prompts = [
        Prompt(
            0, "pictures", ready.tokens, SamplingParams(temperature=0, max_tokens=4), ready.media
        )
    ]
    requests, add_request = [], llm.engine.add_request

    def noted(*args: Any) -> Any:
        requests.extend(found := add_request(*args))
        return found

    monkeypatch.setattr(llm.engine, "add_request", noted)
    for _ in range(2):
        run_block(llm.engine, prompts, [], 1)
    assert len(requests) == 2
    assert all(request.metrics.vision_seconds > 0 for request in requests)
