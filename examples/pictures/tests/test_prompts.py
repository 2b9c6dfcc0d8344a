"""The pictures task: long answers about pictures that training cannot have made, in wordings kept
for it."""

from __future__ import annotations

from pictures_model.generated.wordings import LONG_KINDS, WORDINGS
from pictures_model.prompts import SEEDS, picture_prompts
from pictures_model.training import tower


def test_its_prompts_are_pictures_with_wordings_that_are_not_trained_on() -> None:
    prompts = picture_prompts()[:12]
    assert prompts == picture_prompts()[:12]
    assert len(picture_prompts()) == 100
    trained = {wording for kind in LONG_KINDS for wording in WORDINGS[kind][0]}
    asked = set()
    for image, text in prompts:
        assert image["image_pil"].size == (96, 96)
        asked.add(text["text"])
    assert not asked & trained
    assert len(asked) > 3
    assert len({image["image_pil"].tobytes() for image, _ in prompts}) == 12
    assert SEEDS not in (tower.TRAIN, tower.HELD_OUT)
