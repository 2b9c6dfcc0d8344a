"""`python -m smart_decoding.training.pictures --output FOLDER`: trains the demonstration model, or goes on with it.

Several processes: `torchrun --nproc-per-node 2 -m smart_decoding.training.pictures --output FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from smart_decoding.backends.torch.loading import load_checkpoint
from smart_decoding.pictures.captions import VOCABULARY
from smart_decoding.pictures.questions import HELD_OUT, TRAIN
from smart_decoding.tokenizer import Tokenizer
from smart_decoding.training.pictures.answering import AnsweringLoss
from smart_decoding.training.pictures.model import BASE, IMAGE_ID, WIDTH, build, export, prompt_of
from smart_decoding.training.pictures.schedule import Stage, Workers
from smart_decoding.training.pictures.tower import CaptionLoss, Namer, NamingLoss, word_embeddings

RATES = {"tower": 1e-3, "projector": 1.5e-3, "namer": 1e-3}
LATE_RATES = {"tower": 4e-4, "projector": 6e-4, "namer": 4e-4, "decoder": 1.5e-3}

TAUGHT = 0.5  # of the last stage's steps, in which true captions are shown, too


def main() -> int:
    args = _arguments()
    torch.manual_seed(args.seed)
    checkpoint = load_checkpoint(BASE)
    tokenizer = Tokenizer.load(checkpoint.tokenizer_source)
    model, namer = build(checkpoint), Namer(WIDTH)
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    words = word_embeddings(checkpoint.weights["model.embed_tokens.weight"], tokenizer, VOCABULARY)

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False)

    args.output.mkdir(parents=True, exist_ok=True)
    naming = NamingLoss(tower, namer, args.pictures)
    Stage("naming", args.naming_steps, {"tower": tower, "namer": namer}, RATES, naming).run(args.output)
    seeing = {"tower": tower, "projector": projector, "namer": namer}
    captions = CaptionLoss(tower, projector, namer, words, args.pictures)
    Stage("captions", args.caption_steps, seeing, RATES, captions).run(args.output)
    captions.batch = args.pictures // 2
    taught = int(TAUGHT * args.steps * Workers().count)
    answering = AnsweringLoss(model, prompt_of(tokenizer), encode, IMAGE_ID, captions, args.rows, taught)
    modules = {**seeing, "decoder": model.model.language_model}
    Stage("answering", args.steps, modules, LATE_RATES, answering, warm_up=20).run(args.output)
    if Workers().rank == 0:
        record = {"arguments": {key: str(value) for key, value in vars(args).items() if key != "output"}}
        record["word_for_word"] = _figures(answering, args.held_out)
        export(model, args.output / "parts", record)
        print(json.dumps(record, indent=1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m smart_decoding.training.pictures", description=__doc__)
    parser.add_argument(
        "--output", type=Path, required=True, help="folder of checkpoints and, at the end, of the parts"
    )
    parser.add_argument("--naming-steps", type=int, default=1000, help="first stage: the tower names what patches show")
    parser.add_argument(
        "--caption-steps", type=int, default=1000, help="second stage: tower and projector say captions"
    )
    parser.add_argument("--steps", type=int, default=800, help="last stage: the language model answers questions")
    parser.add_argument("--pictures", type=int, default=64, help="pictures of a step of the first stages, per process")
    parser.add_argument("--rows", type=int, default=2, help="pictures of a step of the last stage, per process")
    parser.add_argument("--held-out", type=int, default=100, help="held-out pictures of the closing measurement")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def _figures(answering: AnsweringLoss, pictures: int) -> dict[str, Any]:
    """Shares of held-out questions that greedy decoding answers word for word, by kind."""
    found: dict[str, Any] = {}
    for name, wordings, blank in (
        ("trained wordings", TRAIN, False), ("held-out wordings", HELD_OUT, False), ("blank picture", TRAIN, True),
    ):  # fmt: skip
        right = answering.exact(pictures, wordings, blank)
        total = [sum(column) for column in zip(*right.values(), strict=True)]
        shares = {kind: round(good / count, 3) for kind, (good, count) in sorted(right.items())}
        found[name] = {"all": round(total[0] / total[1], 3), "questions": total[1], **shares}
    return found


if __name__ == "__main__":
    sys.exit(main())
