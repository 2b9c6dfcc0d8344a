"""`python -m pictures_model train STAGE --output FOLDER`: trains the demonstration model, or goes
on.

STAGE is `seeing` (tower and projector), `reading` (the language model, from true captions; both can
run side by side), when they are done, `answering` (the language model goes on with what the tower
sees), and last `comparing`, which goes on with more questions that compare two things, and writes
the parts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from pictures_model.generated.wordings import HELD_OUT, TRAIN
from pictures_model.training.answering import AnsweringLoss, Show, true_captions, what_is_seen
from pictures_model.training.model import BASE, IMAGE_ID, WIDTH, build, export, prompt_of
from pictures_model.training.schedule import Stage, load_trained
from pictures_model.training.tower import Namer, SeeingLoss, Words
from smart_decoding.models.loading import load_checkpoint
from smart_decoding.models.tokenizer import Tokenizer

SEEING_RATE, READING_RATE, ANSWERING_RATE, COMPARING_RATE = 1e-3, 2e-3, 1e-3, 1e-3
COMPARISONS = 3  # how often a picture's things are compared, in the last stage


def main(argv: list[str]) -> int:
    args = _arguments(argv)
    torch.manual_seed(args.seed)
    checkpoint = load_checkpoint(BASE)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_source)
    model, words = (
        build(checkpoint),
        Words(checkpoint.weights["model.embed_tokens.weight"], tokenizer),
    )
    seeing = {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}
    reading = {"decoder": model.model.language_model}

    def answering(show: Show, *comparing: int) -> AnsweringLoss:
        return AnsweringLoss(
            model,
            prompt_of(tokenizer),
            lambda text: tokenizer.encode(text, add_special_tokens=False),
            IMAGE_ID,
            show,
            args.rows,
            *comparing,
        )

    if args.stage == "seeing":
        namer = Namer(WIDTH)
        loss = SeeingLoss(seeing["tower"], seeing["projector"], namer, words, args.pictures)
        blocks = [
            p
            for name, p in seeing["tower"].named_parameters()
            if ".layers." in name and p.ndim == 2
        ]
        modules = {**seeing, "namer": namer}
        Stage("seeing", args.seeing_steps, modules, SEEING_RATE, loss, blocks).run(args.output)
    elif args.stage == "reading":
        Stage(
            "reading", args.reading_steps, reading, READING_RATE, answering(true_captions(words))
        ).run(args.output)
    elif args.stage == "answering":
        load_trained(args.output, "seeing", seeing)
        load_trained(args.output, "reading", reading)
        Stage(
            "answering",
            args.answering_steps,
            reading,
            ANSWERING_RATE,
            answering(what_is_seen(model)),
        ).run(args.output)
    else:
        load_trained(args.output, "seeing", seeing)
        load_trained(args.output, "answering", reading)
        last = answering(what_is_seen(model), 2_000_000, COMPARISONS)
        Stage("comparing", args.comparing_steps, reading, COMPARING_RATE, last).run(args.output)
        record = {"arguments": {key: value for key, value in vars(args).items() if key != "output"}}
        record["word_for_word"] = _figures(last, args.held_out)
        export(model, args.output / "parts", record)
        print(json.dumps(record, indent=1))
    return 0


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
