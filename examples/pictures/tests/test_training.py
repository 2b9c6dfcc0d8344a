"""Training on pictures: questions that do not see one another, low-rank changes, checkpoints, the
assembled model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from pictures_model.assembly import PARTS, PARTS_FOLDER, assembled_folder
from pictures_model.generated.facts import random_picture
from pictures_model.generated.questions import Question
from pictures_model.generated.wordings import TRAIN
from pictures_model.training.lora import SCALE, LowRank
from pictures_model.training.packing import Prompt, batch_of, fill, pack
from pictures_model.training.schedule import Stage

sys.path.append(str(Path(__file__).parent))
from tiny_text import save_tiny_text

PROMPT = Prompt((1, 2, 3), (7, 8), 9)


def encode(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def test_a_question_sees_the_picture_and_itself_only() -> None:
    one, two = (
        Question("kind", prompt, answer, ()) for prompt, answer in (("ab", "c"), ("d", "ef"))
    )
    row = pack(PROMPT, [one, two], encode, 100)
    assert row.tokens == [1, 2, 3, 97, 98, 7, 8, 99, 9, 100, 7, 8, 101, 102, 9]
    assert row.positions == [0, 1, 2, 3, 4, 5, 6, 7, 8, 3, 4, 5, 6, 7, 8]
    batch = batch_of([row, pack(PROMPT, [two], encode, 100)], 0)
    assert batch.mask[0, 0, 10].nonzero()[:, 0].tolist() == [0, 1, 2, 9, 10]
    assert batch.mask[0, 0, 5].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    assert batch.mask[0, 0, 1].nonzero()[:, 0].tolist() == [0, 1]
    assert batch.wanted.tolist() == [99, 9, 101, 102, 9, 101, 102, 9]
    assert batch.tokens.flatten()[batch.at].tolist() == [8, 99, 8, 101, 102, 8, 101, 102]


def test_a_row_keeps_to_its_room_and_asks_nothing_twice() -> None:
    for seed in range(20):
        rng = np.random.default_rng(seed)
        row = fill(PROMPT, random_picture(rng), rng, encode, 900, TRAIN)
        assert len(row.tokens) <= 900
        assert row.asked
        assert len({question.prompt for question in row.asked}) == len(row.asked)


def test_packed_questions_get_the_logits_that_each_gets_alone() -> None:
    from transformers import LlamaConfig, LlamaModel

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        vocab_size=128,
        head_dim=16,
    )
    model = LlamaModel(config).eval()
    asked = [
        Question("kind", prompt, answer, ())
        for prompt, answer in (("ab", "c"), ("d", "ef"), ("gh", "ijk"))
    ]
    batch = batch_of([pack(PROMPT, asked, encode, 100)], 0)
    with torch.no_grad():
        together = model(
            batch.tokens, attention_mask=batch.mask, position_ids=batch.positions
        ).last_hidden_state
        alone = [
            model(torch.tensor([pack(PROMPT, [q], encode, 100).tokens])).last_hidden_state
            for q in asked
        ]
    start = len(PROMPT.before)
    assert torch.allclose(
        together[0, start:], torch.cat([each[0, start:] for each in alone]), atol=1e-5
    )


def test_a_low_rank_change_starts_at_nothing_and_can_be_merged() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 7, bias=False)
    x = torch.randn(5, 12)
    changed = LowRank(layer, 3)
    assert torch.equal(changed(x), layer(x))
    with torch.no_grad():
        changed.lora_b.normal_()
        merged = layer.weight + SCALE * changed.lora_b @ changed.lora_a
    assert torch.allclose(changed(x), x @ merged.T, atol=1e-5)
    assert [name for name, p in changed.named_parameters() if p.requires_grad] == [
        "lora_a",
        "lora_b",
    ]


def test_a_training_that_was_cut_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    def stage(stop: int | None) -> tuple[Stage, nn.Module]:
        torch.manual_seed(0)
        module = nn.Linear(4, 1)

        def loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
            if step == stop:
                raise RuntimeError("cut")
            torch.manual_seed(step)
            return module(torch.randn(8, 4)).square().mean(), {}

        return Stage("tiny", 6, {"module": module}, 0.1, loss), module

    whole, expected = stage(None)
    whole.run(tmp_path / "whole")
    first, _ = stage(3)
    first.save_every = 0.0
    with pytest.raises(RuntimeError, match="cut"):
        first.run(tmp_path / "cut")
    second, module = stage(None)
    second.run(tmp_path / "cut")
    assert torch.equal(module.weight, expected.weight)
    third, again = stage(0)  # all steps are done: none is made
    third.run(tmp_path / "cut")
    assert torch.equal(again.weight, expected.weight)


def test_the_assembled_folder_is_the_model_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoImageProcessor, AutoTokenizer, LlavaForConditionalGeneration

    from pictures_model.generated.draw import draw
    from pictures_model.training.model import IMAGE_ID, build, export, prompt_of
    from pictures_model.training.tower import features, pixels
    from smart_decoding.models.checkpoints.loading import load_checkpoint
    from smart_decoding.models.text.tokenizer import Tokenizer

    monkeypatch.setenv("SMART_CACHE", str(tmp_path / "cache"))
    checkpoint = load_checkpoint(save_tiny_text(tmp_path / "base"))
    torch.manual_seed(0)
    model = build(checkpoint)
    for name, parameter in model.named_parameters():
        if "lora_b" in name:
            nn.init.normal_(parameter, std=0.02)
    export(model, tmp_path / "parts", {})
    folder = assembled_folder(tmp_path / "parts", tmp_path / "base")
    assert assembled_folder(tmp_path / "parts", tmp_path / "base") == folder

    whole = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    picture = random_picture(np.random.default_rng(0))
    processor = AutoImageProcessor.from_pretrained(folder)
    values = processor(draw(picture), return_tensors="pt")["pixel_values"]
    assert torch.allclose(values, pixels([picture]), atol=1e-5)
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.encode("<image>", add_special_tokens=False) == [IMAGE_ID]
    assert AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<image>") == IMAGE_ID
    tokens = torch.tensor([[*prompt_of(tokenizer).before, *encode("hi")]])
    with torch.no_grad():
        logits = whole(input_ids=tokens, pixel_values=values).logits
        decoder = model.float().model.language_model
        embedded = decoder.embed_tokens(tokens)
        shown = (tokens == IMAGE_ID)[..., None].expand(embedded.shape)
        seen = model.model.multi_modal_projector(features(model.model.vision_tower, values))
        hidden = decoder(inputs_embeds=embedded.masked_scatter(shown, seen)).last_hidden_state
    assert torch.allclose(logits, model.lm_head(hidden), atol=0.05)  # parts are bfloat16


def test_what_is_shipped_is_small_and_says_what_it_is() -> None:
    files = [path for path in PARTS_FOLDER.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 30_000_000
    card = (PARTS_FOLDER / "README.md").read_text()
    assert "demonstration" in card
    assert "generated pictures" in card
    assert json.loads((PARTS_FOLDER / PARTS).read_text())["base"].startswith("smollm2-135m")
