"""Beginnings of self-written conversations.

These are openings of a user's turn that the target itself completes, whole turns built from a task
and a topic, and questions about images. texts.json was written for this project; none of it comes
from a benchmark. Its {name}, {n}, {thing}, {verb}, {noun} and {topic} are drawn anew each time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from smart_decoding.errors import ConfigError
from smart_decoding.multimodal.images import Limits, read_file

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp")
HELD_OUT_EVERY = 10  # one of so many images is held out
COMPLETED = 0.55  # share of the turns that the target completes
TEXTS: dict[str, list[str]] = json.loads(
    (resources.files("smart_decoding.training") / "texts.json").read_text(encoding="utf-8")
)

ImageQuestion: TypeAlias = tuple[Path, str | None]  # None: any of TEXTS['image_tasks']


def user_turn(rng: np.random.Generator) -> tuple[str, bool]:
    """Return a user's turn and whether it is complete (false: an opening that the target
    completes)."""
    if rng.random() < COMPLETED:
        return _filled(str(rng.choice(TEXTS["openings"])), rng), False
    return str(rng.choice(TEXTS["tasks"])).format(rng.choice(TEXTS["topics"])), True


def read_questions(path: Path) -> list[ImageQuestion]:
    """Return the images of a folder, or the images and questions of a JSONL file, with paths
    relative to it.

    Raises ConfigError if there are none, and for the first line that cannot be used."""
    if not path.is_dir():
        return _questions_of_file(path)
    images = sorted(file for file in path.glob("*") if file.suffix.lower() in IMAGE_SUFFIXES)
    if not images:
        raise ConfigError(f"{path} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    return [(image, None) for image in images]


def _questions_of_file(path: Path) -> list[ImageQuestion]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    found = [
        _question(f"{path}, line {i}", path.parent, line)
        for i, line in enumerate(lines, 1)
        if line.strip()
    ]
    if not found:
        raise ConfigError(f"{path} holds no questions")
    return found


def _question(where: str, folder: Path, line: str) -> ImageQuestion:
    try:
        fields = json.loads(line)
        image = folder / fields["image"]
        question = fields["question"]
    except (ValueError, KeyError, TypeError) as error:
        form = '{"image": "a.png", "question": "What is it?"}'
        raise ConfigError(f"{where} is not of the form {form}") from error
    if not isinstance(question, str) or not question.strip():
        raise ConfigError(f"{where} has an empty question")
    if not image.is_file():
        raise ConfigError(f"{where}: there is no image {image}")
    return image, question


def held_out(questions: Sequence[ImageQuestion]) -> tuple[list[ImageQuestion], list[ImageQuestion]]:
    """Return the questions to train on and the held-out ones: those about every tenth image.

    With fewer than ten images, both hold all questions."""
    images = sorted({image for image, _ in questions})
    kept = set(images[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]) or set(images)
    train = [each for each in questions if each[0] not in kept] or list(questions)
    return train, [each for each in questions if each[0] in kept]


def image_turn(
    questions: Sequence[ImageQuestion], rng: np.random.Generator
) -> list[dict[str, Any]]:
    """Return a conversation that begins with one of the images and its question; without one, with
    a general question."""
    path, question = questions[int(rng.integers(len(questions)))]
    text = question or str(rng.choice(TEXTS["image_tasks"]))
    parts = [{"type": "image", "image": read_file(path, Limits())}, {"type": "text", "text": text}]
    return [{"role": "user", "content": parts}]


def _filled(opening: str, rng: np.random.Generator) -> str:
    for slot in ("name", "thing", "verb", "noun", "topic"):
        words = TEXTS[f"{slot}s"]
        while f"{{{slot}}}" in opening:
            opening = opening.replace(f"{{{slot}}}", str(rng.choice(words)), 1)
    while "{n}" in opening:
        opening = opening.replace("{n}", str(int(rng.integers(2, 100))), 1)
    return opening
