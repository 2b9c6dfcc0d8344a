"""Conversations about pictures, as a draft head is trained on, and what it reads of them: MSD's
input, or the text behind them only."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from smart_decoding.cli import main as cli
from smart_decoding.core.tree import ROOT
from smart_decoding.engine.kv import PAGE
from smart_decoding.errors import ConfigError
from smart_decoding.llm import LLM
from smart_decoding.models.checkpoints.loading import Checkpoint, load_checkpoint
from smart_decoding.models.heads.files import load_head
from smart_decoding.training import generate
from smart_decoding.training.seeds import held_out, image_turn, read_questions
from smart_decoding.training.train import Conversation, Trainer, TrainOptions, load_conversations

from .test_vision_heads import first_trees, outputs, reference_layer, save_head
from .vision import IMAGE, picture, save_llava, save_text

CHAT = [
    {
        "role": "user",
        "content": [{"type": "image", "image": picture(3)}, {"type": "text", "text": "What?"}],
    }
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA model, and in `data` conversations that it wrote about `questions.jsonl`."""
    made = tmp_path_factory.mktemp("llava")
    save_llava(made)
    turn = partial(image_turn, read_questions(save_questions(made, 40)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "CONCURRENT", 4)
        patch.setattr(generate, "ANSWER_TOKENS", 24)
        for name, aux_layers in (("data", (3,)), ("aux", (1, 2, 3))):
            llm = LLM(
                made,
                speculative_config=False,
                max_model_len=512,
                dtype="float32",
                enable_prefix_caching=False,
            )
            recorder = generate.Recorder(aux_layers)
            llm.engine.listen(recorder)
            generate.generate(llm, recorder, made / name, 1200, turn=turn)
    return made


def save_questions(folder: Path, count: int) -> Path:
    """Pictures, with two questions about each."""
    lines = []
    for seed in range(count):
        picture(seed).save(folder / f"{seed:02d}.png")
        for question in ("What is it?", f"Which of {seed + 2} colours is the most frequent?"):
            lines.append(json.dumps({"image": f"{seed:02d}.png", "question": question}))
    path = folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def said(checkpoint: Checkpoint, item: Conversation) -> torch.Tensor:
    """What the target's output matrix reads: [n, hidden]."""
    return F.rms_norm(
        item.aux_hidden.float(), (96,), checkpoint.weights["model.norm.weight"].float(), 1e-5
    )


def test_the_features_are_those_of_the_tokens(folder: Path) -> None:
    checkpoint = load_checkpoint(folder)
    found, _ = load_conversations(folder / "data", supports_images=True)
    right = total = 0
    for item in found:
        best = (said(checkpoint, item) @ checkpoint.weights["lm_head.weight"].float().T).argmax(-1)
        right += int((best[item.answer - 1 : -1] == item.tokens[item.answer :]).sum())
        total += len(item.tokens) - item.answer
        assert (item.tokens == IMAGE).nonzero()[:, 0].tolist() == item.visual.tolist()
        assert item.embeddings.shape == (len(item.visual), 96)
    assert len(found) > 5
    assert right > 0.75 * total


def test_without_sight_a_conversation_begins_where_the_picture_ends(folder: Path) -> None:
    whole, _ = load_conversations(folder / "data", supports_images=True)
    found, _ = load_conversations(folder / "data")
    for item, all_of_it in zip(found, whole, strict=True):
        start = len(all_of_it.tokens) - len(item.tokens)
        assert start % PAGE == 0
        assert start <= int(all_of_it.visual[-1]) + 1 < start + PAGE
        assert item.tokens.equal(all_of_it.tokens[start:])
        assert item.aux_hidden.equal(all_of_it.aux_hidden[start:])
        assert item.answer == all_of_it.answer - start
        assert not len(item.visual)


def test_what_is_recorded_of_pictures_is_what_the_target_read(folder: Path) -> None:
    llm = LLM(folder, speculative_config=False, max_model_len=512, dtype="float32")
    recorder = generate.Recorder((3,))
    llm.engine.listen(recorder)
    prompt = llm.chat_prompt(CHAT)
    recorder.request_ids.add("it")
    llm.engine.add_request(
        "it", prompt.tokens, generate.SamplingParams(max_tokens=4, ignore_eos=True), prompt.media
    )
    while not recorder.done:
        llm.engine.step()
    ((_, features, ((first, shown),)),) = recorder.done
    (image,) = prompt.media.pictures
    assert first == image.first
    assert len(features) >= len(prompt.tokens)
    torch.testing.assert_close(shown, llm.target.encode_image(image.pixels))


@pytest.mark.parametrize("sees", [True, False])
def test_a_head_is_trained_on_what_it_reads_when_it_drafts(
    folder: Path, tmp_path: Path, sees: bool
) -> None:
    """A fused head's first step, against transformers' layer on inputs written out here: of a
    visual position MSD's head reads the embedding alone."""
    checkpoint = load_checkpoint(folder)
    head = save_head(tmp_path / "head", visual_positions="decoupled" if sees else "dropped")
    init = load_head(head, checkpoint.config)
    options = TrainOptions((3,), layout="eagle", supports_images=sees)
    trainer = Trainer(checkpoint, folder / "data", tmp_path / "out", options, init=init)
    trainer._fast_bf16 = False
    item = load_conversations(folder / "data", supports_images=sees)[0][0]
    layer = reference_layer(head)
    with torch.no_grad():
        student, _, _ = next(trainer._unrolled([item], 1))
        embedded = checkpoint.weights["model.embed_tokens.weight"].float()[item.tokens[1:-1]]
        x = layer.fc(torch.cat((embedded, said(checkpoint, item)[:-2]), -1))
        if sees:
            x[item.visual - 1] = item.embeddings.float()
        out = outputs(layer, x, 0)[item.answer - 2 :]
        expected = out @ checkpoint.weights["lm_head.weight"].float().T
    torch.testing.assert_close(student, expected, rtol=1e-3, atol=1e-4)
    assert trainer.files().supports_images == sees


@pytest.mark.parametrize("sees", [True, False])
def test_an_eagle3_head_proposes_what_it_was_trained_to(
    folder: Path, tmp_path: Path, sees: bool
) -> None:
    """The engine's first children behind a picture, and what the trainer's head says of the same
    conversation."""
    head = save_head(
        tmp_path / "head", eagle3=True, visual_positions="decoupled" if sees else "dropped"
    )
    config = {"model": str(head), "policy": "static"}
    drafting = LLM(folder, speculative_config=config, max_model_len=256, dtype="float32")
    root, trees = first_trees(drafting, drafting.chat_prompt(CHAT))
    llm = LLM(folder, speculative_config=False, max_model_len=512, dtype="float32")
    recorder = generate.Recorder((1, 2, 3))
    llm.engine.listen(recorder)
    prompt = llm.chat_prompt(CHAT)
    recorder.request_ids.add("it")
    llm.engine.add_request(
        "it",
        prompt.tokens,
        generate.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True),
        prompt.media,
    )
    while not recorder.done:
        llm.engine.step()
    ((request, aux_hidden, ((first, shown),)),) = recorder.done
    end = len(prompt.tokens)
    assert request.tokens[end] == root
    visual = first + torch.arange(len(shown))
    item = Conversation(
        torch.tensor(request.tokens[: end + 2]), aux_hidden[: end + 2], end, visual, shown, 0
    )
    checkpoint = load_checkpoint(folder)
    options = TrainOptions((1, 2, 3), layout="eagle3", supports_images=sees)
    trainer = Trainer(
        checkpoint,
        folder / "aux",
        tmp_path / "out",
        options,
        init=load_head(head, checkpoint.config),
    )
    trainer._fast_bf16 = False
    with torch.no_grad():
        student, _, _ = next(trainer._unrolled([item if sees else item.behind_pictures()], 1))
    best = student[-1].softmax(-1).topk(4)
    firsts = [i for i in range(len(trees)) if trees.parent[i] == ROOT]
    assert trees.token[firsts].tolist() == best.indices.tolist()
    torch.testing.assert_close(
        torch.tensor(trees.draft_prob[firsts]).float(), best.values, rtol=0.03, atol=1e-3
    )


def test_smart_train_makes_a_head_that_reads_images(folder: Path, tmp_path: Path) -> None:
    """From a head in MSD's layout, which is EAGLE-1's; it drafts, and no token changes."""
    (tmp_path / "images").mkdir()
    for seed in range(3):
        picture(seed).save(tmp_path / "images" / f"{seed}.png")
    start = save_head(tmp_path / "msd", visual_positions="decoupled")
    about = f"--images {tmp_path / 'images'} --skip-generation --data {folder / 'data'}"
    head = f"--init {start} --output {tmp_path / 'head'} --seconds 1 --prior-prompts 2"
    assert cli.main(f"train --model {folder} {about} {head}".split()) == 0
    params = generate.SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    config = {"model": str(tmp_path / "head"), "policy": "static"}
    drafting = LLM(folder, speculative_config=config, max_model_len=256, dtype="float32")
    plain = LLM(folder, speculative_config=False, max_model_len=256, dtype="float32")
    assert drafting.engine.drafter.supports_images
    assert (tmp_path / "head" / "prior.json").is_file()
    (ours,) = drafting.chat(CHAT, params)
    (expected,) = plain.chat(CHAT, params)
    assert ours.outputs[0].token_ids == expected.outputs[0].token_ids
    assert ours.outputs[0].metrics.verified


def test_conversations_about_images_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture(1).save(tmp_path / "one.png")
    questions = read_questions(tmp_path)
    turns = [image_turn(questions, np.random.default_rng(i))[0]["content"] for i in range(20)]
    assert {image["image"] for image, _ in turns} == {(tmp_path / "one.png").read_bytes()}
    assert len({text["text"] for _, text in turns}) > 5
    (tmp_path / "none").mkdir()
    words = ["train", "--images", str(tmp_path / "none"), "--output", str(tmp_path / "head")]
    assert cli.main(words) == 2
    assert "holds no images" in capsys.readouterr().err


def test_conversations_about_questions_of_a_file(tmp_path: Path) -> None:
    questions = read_questions(save_questions(tmp_path, 20))
    assert questions[2] == (tmp_path / "01.png", "What is it?")
    assert len(questions) == 40
    (image, text) = image_turn(questions[3:4], np.random.default_rng(0))[0]["content"]
    assert image["image"] == (tmp_path / "01.png").read_bytes()
    assert text["text"] == "Which of 3 colours is the most frequent?"


def test_every_tenth_image_is_kept_for_the_prior(tmp_path: Path) -> None:
    questions = read_questions(save_questions(tmp_path, 20))
    train, kept = held_out(questions)
    assert sorted({image.name for image, _ in kept}) == ["09.png", "19.png"]
    assert len(kept) == 4
    assert sorted(train + kept) == sorted(questions)
    assert held_out(questions[:8]) == (questions[:8], questions[:8])  # too few to keep any


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("what?", "line 2 is not of the form"),
        ('["a.png"]', "line 2 is not of the form"),
        ('{"image": "one.png"}', "line 2 is not of the form"),
        ('{"image": 3, "question": "What?"}', "line 2 is not of the form"),
        ('{"image": "one.png", "question": " "}', "line 2 has an empty question"),
        ('{"image": "two.png", "question": "What?"}', "there is no image"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, line: str, words: str) -> None:
    picture(1).save(tmp_path / "one.png")
    path = tmp_path / "asked.jsonl"
    path.write_text('{"image": "one.png", "question": "What?"}\n' + line + "\n")
    with pytest.raises(ConfigError, match=words):
        read_questions(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="holds no questions"):
        read_questions(path)
    with pytest.raises(ConfigError, match="cannot read"):
        read_questions(tmp_path / "none.jsonl")


def test_images_are_for_models_that_see(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_text(tmp_path / "text")
    picture(1).save(tmp_path / "one.png")
    words = ["train", "--model", str(tmp_path / "text"), "--images", str(tmp_path)]
    assert cli.main([*words, "--output", str(tmp_path / "head")]) == 2
    assert "reads text only" in capsys.readouterr().err
