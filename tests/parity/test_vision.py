"""Vision-language models against transformers: prompts, logits under any cut into chunks, and
greedy answers."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from smart_decoding.core.tree import DraftTrees
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.rows import Span, build_rows
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.llm import LLM
from smart_decoding.models.families.decoder import Decoder
from smart_decoding.multimodal.pixels import load_reader

from .test_decoder import BOTH, TOLERANCE
from .vision import IMAGE, NORMS, VIDEO, picture, save_llava, save_qwen2_vl

if TYPE_CHECKING:
    from smart_decoding.multimodal.prompts import MediaPrompt

Loaded = tuple[LLM, transformers.PreTrainedModel]
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def load(folder: Path, **options: Any) -> LLM:
    defaults = {
        "speculative_config": False,
        "dtype": "float32",
        "max_num_seqs": 4,
        "max_model_len": 512,
    }
    return LLM(folder, **{**defaults, **options})


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("llava")
    model = save_llava(folder)
    return load(folder), model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("qwen2-vl")
    model = save_qwen2_vl(folder)
    return load(folder), model


def message(*parts: str | Image.Image | list[Image.Image]) -> list[dict[str, Any]]:
    kinds = {str: "text", list: "video"}
    content = [{"type": kinds.get(type(p), "image"), kinds.get(type(p), "image"): p} for p in parts]
    return [{"role": "user", "content": content}]


def decoder_of(llm: LLM, native: bool) -> Decoder:
    checkpoint = llm._checkpoint
    return Decoder(
        checkpoint.config, checkpoint.weights, torch.float32, torch.device("cpu"), 40, 600, native
    )


def logits(llm: LLM, prompt: MediaPrompt, native: bool, cuts: tuple[int, ...] = ()) -> torch.Tensor:
    """[prompt, vocab] in chunks between `cuts`."""
    model = decoder_of(llm, native)
    parts = []
    for each in prompt.media.pictures:
        each.embeddings = llm.target.encode_image(each.pixels)
    for start, end in zip((0, *cuts), (*cuts, len(prompt.tokens)), strict=True):
        slots = np.arange(start, end, dtype=np.int32)
        pages = np.arange(-(-end // PAGE), dtype=np.int32)
        rotary = prompt.media.positions(start, end - start)
        mm_embeds = prompt.media.mm_embeds(start, end - start)
        span = Span(prompt.tokens[start:end], start, slots, pages, mm_embeds, rotary)
        rows = build_rows([span], DraftTrees.empty(1), [True])[0]
        rows.logit_rows = None
        parts.append(model.forward(rows).logits.clone())
    return torch.cat(parts)


def ids_of(prompt: MediaPrompt) -> dict[str, torch.Tensor]:
    return {"input_ids": torch.tensor([prompt.tokens])}


def of_llava(prompt: MediaPrompt) -> dict[str, torch.Tensor]:
    return ids_of(prompt) | {
        "pixel_values": torch.stack(
            [torch.from_numpy(p.pixels.values) for p in prompt.media.pictures]
        )
    }


def of_qwen(prompt: MediaPrompt) -> dict[str, torch.Tensor]:
    inputs = ids_of(prompt)
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == IMAGE).int() + 2 * (
        inputs["input_ids"] == VIDEO
    ).int()
    for modality, values, grids in (
        ("image", "pixel_values", "image_grid_thw"),
        ("video", "pixel_values_videos", "video_grid_thw"),
    ):
        found = [p.pixels for p in prompt.media.pictures if p.pixels.modality == modality]
        if found:
            inputs[values] = torch.cat([torch.from_numpy(p.values) for p in found])
            inputs[grids] = torch.tensor([p.grid for p in found])
    return inputs


def reference(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits[0]


def greedy(model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    count = inputs["input_ids"].shape[1]
    with torch.no_grad():
        out = model.generate(
            **inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False, eos_token_id=None
        )
    return out[0, count:].tolist()


@pytest.mark.parametrize("native", BOTH)
def test_llava_logits_are_those_of_transformers(llava: Loaded, native: bool) -> None:
    llm, model = llava
    prompt = llm.chat_prompt(message(picture(1), "What is it? ", picture(2), "And this?"))
    expected = reference(model, of_llava(prompt))
    assert prompt.tokens.count(IMAGE) == 32
    assert expected.std() > 0.5
    blind = reference(model, of_llava(prompt) | {"pixel_values": torch.zeros(2, 3, 28, 28)})
    assert (blind[-1] - expected[-1]).abs().max() > 0.1  # the pictures matter
    for cuts in ((), (10, 17, 40, 41)):
        torch.testing.assert_close(
            logits(llm, prompt, native, cuts), expected, rtol=0, atol=TOLERANCE
        )


MIXES = {
    "image": ("Look: ", picture(1), "What is it?"),
    "wide and tall": (picture(1, 84, 28), "or", picture(2, 28, 70), "?"),
    "video": ("See ", [picture(i, 56, 42) for i in range(5)], "what happens"),
    "image and video": (picture(3, 60, 30), [picture(i) for i in range(4)], "same?"),
}


@pytest.mark.parametrize("native", BOTH)
@pytest.mark.parametrize("mix", MIXES)
def test_qwen2_vl_logits_are_those_of_transformers(qwen: Loaded, mix: str, native: bool) -> None:
    llm, model = qwen
    prompt = llm.chat_prompt(message(*MIXES[mix]))
    expected = reference(model, of_qwen(prompt))
    assert expected.std() > 0.5
    for cuts in ((), (9, 16, 19)):
        torch.testing.assert_close(
            logits(llm, prompt, native, cuts), expected, rtol=0, atol=TOLERANCE
        )


@pytest.mark.parametrize("mix", MIXES)
def test_qwen2_vl_rotary_positions_are_those_of_transformers(qwen: Loaded, mix: str) -> None:
    llm, model = qwen
    prompt = llm.chat_prompt(message(*MIXES[mix]))
    inputs = of_qwen(prompt)
    grids = {name: inputs.get(name) for name in ("image_grid_thw", "video_grid_thw")}
    positions, shift = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], **grids
    )
    assert np.array_equal(prompt.media.rotary, positions[:, 0].T.numpy())
    assert prompt.media.shift == int(shift)


def test_text_goes_on_behind_the_last_step_of_a_long_video(qwen: Loaded) -> None:
    """As in the paper: transformers 5 lets the text begin after the frame's sides, so it gets the
    positions here."""
    llm, model = qwen
    prompt = llm.chat_prompt(message([picture(i, 28, 28) for i in range(12)], "!"))
    (video,) = prompt.media.pictures
    behind = video.first + video.length
    assert video.pixels.grid == (6, 4, 4)
    assert prompt.media.rotary[behind].tolist() == [video.first + 6] * 3
    positions = torch.from_numpy(prompt.media.rotary.T.copy())[:, None]
    expected = reference(model, of_qwen(prompt) | {"position_ids": positions})
    torch.testing.assert_close(
        logits(llm, prompt, llm.target.decoder.native), expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize("mix", MIXES)
def test_qwen2_vl_answers_are_those_of_transformers(qwen: Loaded, mix: str) -> None:
    llm, model = qwen
    messages = message(*MIXES[mix])
    (answer,) = llm.chat(messages, GREEDY)
    assert answer.outputs[0].token_ids == greedy(model, of_qwen(llm.chat_prompt(messages)))


def test_llava_answers_are_those_of_transformers(llava: Loaded) -> None:
    llm, model = llava
    messages = message(picture(4), "Name it.")
    (answer,) = llm.chat(messages, GREEDY)
    assert answer.outputs[0].token_ids == greedy(model, of_llava(llm.chat_prompt(messages)))
    assert answer.outputs[0].metrics.vision_seconds > 0


def test_prompts_are_those_of_transformers_processor(llava: Loaded) -> None:
    llm, _ = llava
    folder = llm._checkpoint.tokenizer_source
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    images = transformers.CLIPImageProcessorPil.from_pretrained(folder)
    processor = transformers.LlavaProcessor(
        images,
        tokenizer,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    text = "user: <image>\nWhat is it?\n>"
    expected = processor(images=[picture(1)], text=text, return_tensors="np")
    prompt = llm.chat_prompt(message(picture(1), "What is it?"))
    assert prompt.text == text
    assert prompt.tokens == expected["input_ids"][0].tolist()
    np.testing.assert_array_equal(
        prompt.media.pictures[0].pixels.values, expected["pixel_values"][0]
    )


def test_video_patches_pair_frames(qwen: Loaded) -> None:
    """Against the layout of transformers' video processor, on frames that need no scaling."""
    llm, _ = qwen
    checkpoint = llm._checkpoint
    reader = load_reader(checkpoint.vision.folder, checkpoint.vision.config)
    frames = [picture(i, 56, 42) for i in range(3)]
    pixels = reader.video(frames)
    video = (
        np.stack(
            [np.asarray(frame, np.float32).transpose(2, 0, 1) for frame in [*frames, frames[-1]]]
        )
        / 255
    )
    mean, std = (
        np.array(NORMS[name], np.float32)[:, None, None] for name in ("image_mean", "image_std")
    )
    cut = ((video - mean) / std).reshape(2, 2, 3, 3, 2, 7, 4, 2, 7)
    expected = cut.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(2 * 6 * 8, -1)
    assert pixels.grid == (2, 6, 8)
    assert pixels.length == 24
    np.testing.assert_allclose(pixels.values, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["default", "full"])
def test_checkpoints_of_older_names_load_too(tmp_path: Path, strategy: str) -> None:
    """The hub's LLaVA has `vision_tower.vision_model.`, later ones `model.language_model.`; a tied
    head is left out."""
    from safetensors.torch import load_file, save_file

    model = save_llava(tmp_path, vision_feature_select_strategy=strategy)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    old = {
        name.replace("vision_tower.", "vision_tower.vision_model."): tensor
        for name, tensor in tensors.items()
    }
    new = {
        "model." + name: t for name, t in tensors.items() if not name.startswith("language_model.")
    }
    for name, tensor in tensors.items():
        if name.startswith("language_model."):
            new[
                name.replace("language_model.model", "model.language_model").replace(
                    "language_model.lm", "lm"
                )
            ] = tensor
    for names in (old, new):
        save_file(names, file, {"format": "pt"})
        llm = load(tmp_path)
        prompt = llm.chat_prompt(message(picture(1), "?"))
        expected = reference(model, of_llava(prompt))
        torch.testing.assert_close(
            logits(llm, prompt, llm.target.decoder.native), expected, rtol=0, atol=TOLERANCE
        )


def test_tied_qwen2_vl_loads(tmp_path: Path) -> None:
    model = save_qwen2_vl(tmp_path, tie_word_embeddings=True)
    llm = load(tmp_path)
    prompt = llm.chat_prompt(message(picture(1), "?"))
    expected = reference(model, of_qwen(prompt))
    torch.testing.assert_close(
        logits(llm, prompt, llm.target.decoder.native), expected, rtol=0, atol=TOLERANCE
    )


@pytest.mark.parametrize(
    ("name", "save"),
    [
        ("llava-hf/llava-1.5-7b-hf", save_llava),
        ("llava-hf/llava-1.5-13b-hf", save_llava),
        ("Qwen/Qwen2-VL-7B-Instruct", save_qwen2_vl),
    ],
)
def test_models_load_by_their_names_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, save: Any
) -> None:
    """The hub is played by a function; the class, the layout and the files are the published ones,
    only tiny."""
    downloads: list[tuple[str, list[str]]] = []

    def snapshot_download(repository: str, allow_patterns: list[str], **options: Any) -> str:
        downloads.append((repository, allow_patterns))
        return str(tmp_path / "snapshot")

    save(tmp_path / "snapshot")
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    llm = load(name)
    needed = {path.name for path in (tmp_path / "snapshot").iterdir()}
    _, (repository, patterns) = downloads  # its configuration comes first
    assert repository == name
    assert needed == {n for n in needed if any(fnmatch(n, p) for p in patterns)}
    (answer,) = llm.chat(message(picture(1), "What is it?"), GREEDY)
    assert len(answer.outputs[0].token_ids) == 12
    assert name in llm.provenance["weights"]
