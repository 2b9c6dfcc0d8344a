"""The benchmark's task for models that take images: long answers about generated pictures.

Neither the pictures nor the wordings of the questions were trained on.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pictures_model.generated.draw import draw
from pictures_model.generated.facts import Picture, random_chart, random_scene
from pictures_model.generated.questions import questions
from pictures_model.generated.wordings import HELD_OUT, LONG_KINDS

SEEDS = 99  # training's are 0 and 1
COUNT = 100


def picture_prompts() -> list[list[dict[str, Any]]]:
    """User messages as content parts. The true answers have 40 tokens or more."""
    prompts: list[list[dict[str, Any]]] = []
    for i in range(COUNT):
        rng = np.random.default_rng((SEEDS, i))
        picture: Picture = random_chart(rng, 5) if i % 2 else random_scene(rng, 5 + i // 2 % 2)
        asked = {question.kind: question.prompt for question in questions(picture, rng, HELD_OUT)}
        text = asked[LONG_KINDS[i // 4 % 2]]
        image = {"type": "image_pil", "image_pil": draw(picture)}
        prompts.append([image, {"type": "text", "text": text}])
    return prompts
