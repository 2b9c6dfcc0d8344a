"""The shipped model that sees: it answers about pictures that it was not trained on, and about
blank ones it cannot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pictures_model.__main__ import main
from pictures_model.assembly import HEAD, model_folder
from pictures_model.generated.draw import draw, example_chart
from pictures_model.generated.facts import random_picture
from pictures_model.generated.questions import questions
from pictures_model.generated.wordings import HELD_OUT, LONG_KINDS
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.llm import LLM

pytestmark = pytest.mark.model

SEEDS = 31  # training and the benchmarks use others
LONG = SamplingParams(temperature=0, max_tokens=128)


def test_what_is_the_tallest_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw(example_chart(), 384).save(tmp_path / "chart.png")
    assert main(["ask", "--image", str(tmp_path / "chart.png"), "What is the tallest bar?"]) == 0
    assert "red" in capsys.readouterr().out


def test_it_answers_from_the_picture() -> None:
    llm = LLM(model_folder(), speculative_config=False, max_model_len=512, max_num_seqs=32)
    pictures = [random_picture(np.random.default_rng((SEEDS, i))) for i in range(10)]
    asked = [
        [q for q in questions(p, np.random.default_rng(i)) if q.kind not in LONG_KINDS]
        for i, p in enumerate(pictures)
    ]
    shares = []
    for blank in (False, True):
        chats = []
        wanted = []
        for picture, about in zip(pictures, asked, strict=True):
            image = Image.new("RGB", (96, 96), "white") if blank else draw(picture)
            for question in about:
                parts = [
                    {"type": "image_pil", "image_pil": image},
                    {"type": "text", "text": question.prompt},
                ]
                chats.append([{"role": "user", "content": parts}])
                wanted.append(question)
        answers = llm.chat(chats, SamplingParams(temperature=0, max_tokens=48))
        right = [
            q.is_right(answer.outputs[0].text) for q, answer in zip(wanted, answers, strict=True)
        ]
        shares.append(sum(right) / len(right))
    seen, unseen = shares
    assert seen >= 0.85, shares
    assert seen - unseen >= 0.3, shares


def test_drafting_changes_no_word_of_a_long_answer() -> None:
    options = {"dtype": "float32", "max_model_len": 256, "max_num_seqs": 4}
    plain = LLM(model_folder(), speculative_config=False, **options)
    drafting = LLM(model_folder(), speculative_config={"model": str(HEAD)}, **options)
    drafting.take_profile()
    chats = []
    for i in range(4):
        rng = np.random.default_rng((SEEDS, 100 + i))
        picture = random_picture(rng, ["scene", "chart"][i % 2])
        asked = {q.kind: q for q in questions(picture, rng, HELD_OUT)}["description"]
        parts = [
            {"type": "image_pil", "image_pil": draw(picture)},
            {"type": "text", "text": asked.prompt},
        ]
        chats.append([{"role": "user", "content": parts}])
    ours = [answer.outputs[0] for answer in drafting.chat(chats, LONG)]
    assert [answer.outputs[0].token_ids for answer in plain.chat(chats, LONG)] == [
        each.token_ids for each in ours
    ]
    assert max(each.tokens_per_round for each in ours) > 1.5
