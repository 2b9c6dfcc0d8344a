"""Models load as they are published, and answer as transformers does from the same files."""

from __future__ import annotations

import json
import logging
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedTokenizerFast

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.checkpoints.memory import weight_bytes
from smart_decoding.models.checkpoints.weight_files import open_weights
from smart_decoding.models.families import rope

from .published import LAYOUTS, LLAMA3_ROPE, save_published
from .vision import picture

TEXT = [name for name in LAYOUTS if "text_config" not in LAYOUTS[name].config and "VL" not in name]
VICUNAS = [name for name in LAYOUTS if name.startswith("vicuna")]
TURNS = [
    {"role": "user", "content": "Hello there, USER?"},
    {"role": "assistant", "content": "The end."},
    {"role": "user", "content": "And then 1234?\n"},
]
GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture
def folder(name: str, root: Path) -> Path:
    made = root / name
    if not made.exists():
        save_published(name, made)
    return made


def load(folder: Path, **options: Any) -> LLM:
    """In float32, whatever is stored; pickles trusted."""
    defaults = {
        "max_model_len": 512,
        "max_num_seqs": 2,
        "dtype": "float32",
        "speculative_config": False,
        "trust_pickle": True,
    }
    vicuna = {"chat_template": "vicuna"} if folder.name in VICUNAS else {}
    return LLM(folder, **{**defaults, **vicuna, **options})


@cache
def reference(folder: Path) -> Any:
    """transformers' model from the very files, in float32."""
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(transformers, config["architectures"][0])
    return kind.from_pretrained(folder, dtype=torch.float32).eval()


def greedy(folder: Path, tokens: list[int], **pictures: torch.Tensor) -> list[int]:
    inputs = {"input_ids": torch.tensor([tokens]), **pictures}
    with torch.no_grad():
        out = reference(folder).generate(
            **inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False, eos_token_id=None
        )
    return out[0, len(tokens) :].tolist()


@pytest.mark.parametrize("name", LAYOUTS)
def test_greedy_answers_are_those_of_transformers(name: str, folder: Path) -> None:
    llm = load(folder)
    (out,) = llm.chat(TURNS, GREEDY)
    answer = out.outputs[0].token_ids
    assert answer == greedy(folder, out.prompt_token_ids)
    assert len(set(answer)) > 4  # not a loop that any model would make
    drafted = load(folder, speculative_config={"method": "ngram", "policy": "static", "min_n": 1})
    assert drafted.chat(TURNS, GREEDY)[0].outputs[0].token_ids == answer


@pytest.mark.parametrize("name", LAYOUTS)
def test_types_and_end_tokens_are_those_of_the_files(name: str, folder: Path) -> None:
    layout = LAYOUTS[name]
    checkpoint = load_checkpoint(folder, trust_pickle=True)
    half = layout.config["torch_dtype"] == "float16"
    assert checkpoint.provenance["dtype"] == ("F16" if half else "BF16")
    ends = layout.generation["eos_token_id"]
    assert set(checkpoint.config.eos_token_ids) >= set(ends if isinstance(ends, list) else [ends])
    assert len(list(folder.glob(layout.weights.partition("-")[0] + "-*"))) == layout.shards


@pytest.mark.parametrize("name", [name for name in TEXT if name not in VICUNAS])
def test_prompts_are_those_of_transformers(name: str, folder: Path) -> None:
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    llm = load(folder)
    theirs.bos_token = llm.tokenizer.specials["bos_token"]
    theirs.chat_template = llm.tokenizer.template
    expected = theirs.apply_chat_template(TURNS, add_generation_prompt=True).input_ids
    assert llm.chat_prompt(TURNS).tokens == expected
    assert expected[0] == 128_000
    assert expected.count(128_000) == 1
    text = "Hello 12345, it's\n\nhere "
    plain = theirs.encode(text)
    begun = [] if plain[0] == expected[0] else expected[:1]  # R1's file leaves that to its class
    assert llm.tokenizer.encode(text) == begun + plain


@pytest.mark.parametrize("name", ["Llama-3.1-8B-Instruct", "Llama-3.3-70B-Instruct"])
def test_llamas_frequencies_are_stretched(name: str, folder: Path) -> None:
    config = load_checkpoint(folder).config
    assert config.rope_scaling is not None
    assert config.rope_scaling.kind == "llama3"
    assert config.max_positions == 131_072
    plain, _ = rope.inverse_frequencies(500_000.0, 16, None)
    stretched, _ = config.inverse_frequencies()
    assert stretched[-1] == pytest.approx(plain[-1] / LLAMA3_ROPE["factor"])
    assert np.array_equal(stretched[:2], plain[:2])


@pytest.mark.parametrize("name", VICUNAS)
def test_vicunas_prompts_have_the_tokens_of_fastchat(name: str, folder: Path) -> None:
    """FastChat encodes the whole conversation at once by the slow tokenizer: `</s>` cuts it. Behind
    that, the files of version 1.3 begin with a blank again, and those of 1.5 do not."""
    from sentencepiece import SentencePieceProcessor

    pieces = SentencePieceProcessor(str(folder / "tokenizer.model"))
    llm = load(folder)
    prompt = llm.chat_prompt(TURNS)
    first, _, second = prompt.text.partition("</s>")
    behind = pieces.encode(second)
    if name.endswith("1.5"):
        mark = pieces.encode("\n")  # a text that nothing merges with keeps the blank from `second`
        behind = pieces.encode("\n" + second)[len(mark) :]
    assert prompt.tokens == [1, *pieces.encode(first), 2, *behind]
    once = llm.chat_prompt(TURNS[:1])
    assert once.tokens == [1, *pieces.encode(once.text)]
    assert llm.tokenizer.decode(pieces.encode("The end.")) == "The end."


@pytest.mark.parametrize("name", ["vicuna-13b-v1.3"])
def test_vicuna_needs_trust_and_a_template(
    name: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ModelError, match="--trust-pickle"):
        load(folder, trust_pickle=False)
    llm = load(folder, chat_template=None)
    (warning,) = [r.getMessage() for r in caplog.records if r.name == "smart.llm"]
    assert "--chat-template vicuna" in warning
    with pytest.raises(ConfigError, match="--chat-template"):
        llm.chat(TURNS, GREEDY)
    caplog.clear()
    load(folder)
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and "smart" in r.name]


@pytest.mark.parametrize("name", ["llava-1.5-7b-hf", "Qwen2-VL-7B-Instruct"])
def test_pictures_are_seen_as_by_transformers(name: str, folder: Path) -> None:
    llm = load(folder)
    content = [{"type": "image", "image": picture(1, 90, 60)}, {"type": "text", "text": "What?"}]
    prompt = llm.chat_prompt([{"role": "user", "content": content}])
    (image,) = prompt.media.pictures
    values = torch.from_numpy(image.pixels.values)
    if name.startswith("llava"):
        pictures = {"pixel_values": values[None]}
    else:
        kinds = (torch.tensor([prompt.tokens]) == 151_655).int()
        grid = torch.tensor([image.pixels.grid])
        pictures = {"pixel_values": values, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    (out,) = llm.generate(prompt, GREEDY)
    assert out.outputs[0].token_ids == greedy(folder, prompt.tokens, **pictures)
    content[0]["image"] = picture(2, 90, 60)
    (other,) = llm.chat([{"role": "user", "content": content}], GREEDY)
    assert other.outputs[0].token_ids != out.outputs[0].token_ids


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_estimate_of_memory_counts_every_weight(name: str, folder: Path) -> None:
    checkpoint = load_checkpoint(folder, trust_pickle=True)
    shapes = open_weights(folder, trust_pickle=True).shapes
    used = [shape for tensor, shape in shapes.items() if not tensor.endswith("inv_freq")]
    assert weight_bytes(checkpoint, torch.bfloat16, torch.device("cpu")) == 2 * sum(map(prod, used))
