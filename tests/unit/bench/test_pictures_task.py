"""The pictures task: long answers about pictures that training cannot have made, in wordings kept for it."""

from __future__ import annotations

from smart_decoding.bench.data import DEFAULT_TASKS, load_task
from smart_decoding.bench.pictures import SEEDS
from smart_decoding.pictures.wordings import LONG_KINDS, WORDINGS
from smart_decoding.training.pictures import tower


def test_its_prompts_are_pictures_with_wordings_that_are_not_trained_on() -> None:
    prompts = load_task("pictures", 12)
    assert prompts == load_task("pictures")[:12] and len(load_task("pictures")) == 100
    trained = {wording for kind in LONG_KINDS for wording in WORDINGS[kind][0]}
    asked = set()
    for image, text in prompts:
        assert image["image_pil"].size == (96, 96)
        asked.add(text["text"])
    assert not asked & trained and len(asked) > 3
    assert len({image["image_pil"].tobytes() for image, _ in prompts}) == 12
    assert SEEDS not in (tower.TRAIN, tower.HELD_OUT) and "pictures" not in DEFAULT_TASKS
