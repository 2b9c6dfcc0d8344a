"""The short commands. What they do beyond finding this model is the ordinary `smart`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from pictures_model.assembly import HEAD, PARTS_FOLDER, model_folder
from pictures_model.generated.draw import draw
from pictures_model.generated.facts import random_picture
from pictures_model.generated.questions import questions
from pictures_model.generated.wordings import LONG_KINDS
from pictures_model.prompts import picture_prompts

SEEDS = 55  # of the pictures for heads; the model's training and its measurements use others


def ask(argv: list[str]) -> int:
    """`smart run` with this model: the options, and all they need, are its own."""
    from smart_decoding.cli import main as smart

    return smart.main(["run", *_this_model(), *argv])


def bench(argv: list[str]) -> int:
    """`smart bench` with this model, on its own task unless --tasks says otherwise."""
    from smart_decoding.cli import main as smart
    from smart_decoding.measuring.tasks import TASKS

    TASKS["pictures"] = picture_prompts
    return smart.main(["bench", *_this_model(), "--tasks", "pictures", *argv])


def _this_model() -> list[str]:
    return ["--model", str(model_folder()), "--draft", str(HEAD)]


def assemble(argv: list[str]) -> int:
    """Prints the folder of the whole model."""
    parser = argparse.ArgumentParser(prog="python -m pictures_model assemble")
    parser.add_argument("--parts", type=Path, default=PARTS_FOLDER, help="what the base lacks")
    print(model_folder(parser.parse_args(argv).parts))
    return 0


def write_questions(argv: list[str]) -> int:
    """Writes pictures and a file of questions about them, mostly wishes for long answers."""
    parser = argparse.ArgumentParser(prog="python -m pictures_model questions")
    parser.add_argument("folder", type=Path, help="for the pictures and questions.jsonl")
    parser.add_argument("--count", type=int, default=2000, help="pictures, one question each")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(args.count):
        rng = np.random.default_rng((SEEDS, i))
        picture = random_picture(rng)
        asked = questions(picture, rng)
        if rng.random() < 0.75:
            asked = [question for question in asked if question.kind in LONG_KINDS]
        name = f"{i:05d}.png"
        draw(picture).save(args.folder / name)
        lines.append(json.dumps({"image": name, "question": asked[0].prompt}))
    path = args.folder / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(path)
    return 0
