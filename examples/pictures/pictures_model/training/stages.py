"""`python -m pictures_model train STAGE --output FOLDER`: trains the model, or goes on.

STAGE is `seeing` (tower and projector), `reading` (the language model, from true captions; both can
run side by side), when they are done, `answering` (the language model goes on with what the tower
makes of pictures), and last `comparing`, which goes on with more questions that compare two things,
and writes the parts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pictures_model.generated.wordings import HELD_OUT, TRAIN
from pictures_model.training.answering import AnsweringLoss, Show, from_the_tower, true_captions
from pictures_model.training.model import BASE, IMAGE_ID, WIDTH, build, export, prompt_of
from pictures_model.training.schedule import Stage, load_trained
from pictures_model.training.tower import Namer, SeeingLoss, Words
from smart_decoding.models.checkpoints.loading import load_checkpoint
from smart_decoding.models.text.tokenizer import Tokenizer

SEEING_RATE = 1e-3
READING_RATE = 2e-3
ANSWERING_RATE = 1e-3
COMPARING_RATE = 1e-3
COMPARISONS = 3  # how often a picture's things are compared, in the last stage


def main(argv: list[str]) -> int:
    """Trains one stage, or goes on with it."""
    args = _arguments(argv)
    torch.manual_seed(args.seed)
    training = _Training(args)
    stages = {
        "seeing": training.seeing,
        "reading": training.reading,
        "answering": training.answering,
        "comparing": training.comparing,
    }
    stages[args.stage]()
    return 0


class _Training:
    """The model, and its stages."""

    def __init__(self, args: argparse.Namespace) -> None:
        checkpoint = load_checkpoint(BASE)
        self._args = args
        self._tokenizer = Tokenizer.load(checkpoint.tokenizer_source)
        self._model = build(checkpoint)
        embedding = checkpoint.weights["model.embed_tokens.weight"]
        self._words = Words(embedding, self._tokenizer)
        llava = self._model.model
        self._vision = {"tower": llava.vision_tower, "projector": llava.multi_modal_projector}
        self._text = {"decoder": llava.language_model}

    def seeing(self) -> None:
        """Tower and projector."""
        args = self._args
        tower = self._vision["tower"]
        namer = Namer(WIDTH)
        loss = SeeingLoss(tower, self._vision["projector"], namer, self._words, args.pictures)
        matrices = [p for name, p in tower.named_parameters() if ".layers." in name and p.ndim == 2]
        modules = {**self._vision, "namer": namer}
        Stage("seeing", args.seeing_steps, modules, SEEING_RATE, loss, matrices).run(args.output)

    def reading(self) -> None:
        """The language model, from true captions."""
        loss = self._loss(true_captions(self._words))
        self._run("reading", self._args.reading_steps, READING_RATE, loss)

    def answering(self) -> None:
        """The language model, from what the tower makes of pictures."""
        load_trained(self._args.output, "seeing", self._vision)
        load_trained(self._args.output, "reading", self._text)
        loss = self._loss(from_the_tower(self._model))
        self._run("answering", self._args.answering_steps, ANSWERING_RATE, loss)

    def comparing(self) -> None:
        """The same with more comparisons; then the parts are measured and written."""
        args = self._args
        load_trained(args.output, "seeing", self._vision)
        load_trained(args.output, "answering", self._text)
        loss = self._loss(from_the_tower(self._model), 2_000_000, COMPARISONS)
        self._run("comparing", args.comparing_steps, COMPARING_RATE, loss)
        record = {"arguments": {key: value for key, value in vars(args).items() if key != "output"}}
        record["word_for_word"] = _figures(loss, args.held_out)
        export(self._model, args.output / "parts", record)
        print(json.dumps(record, indent=1))

    def _loss(self, show: Show, *comparing: int) -> AnsweringLoss:
        """comparing: `first` and `comparisons` of the loss, where they are not the usual ones."""
        return AnsweringLoss(
            self._model,
            prompt_of(self._tokenizer),
            lambda text: self._tokenizer.encode(text, add_special_tokens=False),
            IMAGE_ID,
            show,
            self._args.rows,
            *comparing,
        )

    def _run(self, name: str, steps: int, rate: float, loss: AnsweringLoss) -> None:
        Stage(name, steps, self._text, rate, loss).run(self._args.output)


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m pictures_model train", description=__doc__)
    parser.add_argument("stage", choices=["seeing", "reading", "answering", "comparing"])
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder of checkpoints and, at the end, the parts",
    )
    parser.add_argument("--seeing-steps", type=int, default=1600)
    parser.add_argument("--reading-steps", type=int, default=500)
    parser.add_argument("--answering-steps", type=int, default=600)
    parser.add_argument("--comparing-steps", type=int, default=140)
    parser.add_argument(
        "--pictures", type=int, default=64, help="pictures of a step of the tower's stage"
    )
    parser.add_argument(
        "--rows", type=int, default=2, help="pictures of a step of the language model's stages"
    )
    parser.add_argument(
        "--held-out", type=int, default=100, help="held-out pictures of the closing measurement"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(argv)


def _figures(answering: AnsweringLoss, pictures: int) -> dict[str, Any]:
    """Shares of held-out questions that greedy decoding answers word for word, by kind."""
    found: dict[str, Any] = {}
    for name, wordings, blank in (
        ("trained wordings", TRAIN, False),
        ("held-out wordings", HELD_OUT, False),
        ("blank picture", TRAIN, True),
    ):
        right = answering.exact(pictures, wordings, blank)
        total = [sum(column) for column in zip(*right.values(), strict=True)]
        shares = {kind: round(good / count, 3) for kind, (good, count) in sorted(right.items())}
        found[name] = {"all": round(total[0] / total[1], 3), "questions": total[1], **shares}
    return found
