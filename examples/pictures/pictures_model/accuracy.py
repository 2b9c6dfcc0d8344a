"""How well a vision-language model answers questions about held-out pictures, and blank ones.

    python -m pictures_model accuracy --pictures 150 --json accuracy.json

The pictures come from seeds of their own, so that none was trained on. Each kind of question is
asked in the trained wordings, in wordings that were kept for this, and in the trained ones beside a
blank picture. An answer is right if it holds all the facts asked for; greedy decoding.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pictures_model.assembly import HEAD, model_folder
from pictures_model.generated.draw import draw
from pictures_model.generated.facts import random_picture
from pictures_model.generated.questions import Question, questions
from pictures_model.generated.wordings import HELD_OUT, KINDS, TRAIN
from smart_decoding import LLM, SamplingParams
from smart_decoding.measuring.machine import machine, versions

SEEDS = 77  # training uses 0, its own measurements 1
CONDITIONS = {"trained": (TRAIN, False), "held-out": (HELD_OUT, False), "blank": (TRAIN, True)}


def _arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pictures_model accuracy", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--model", help="name, hub id or folder (default: the demonstration model)")
    parser.add_argument(
        "--pictures", type=int, default=150, help="held-out pictures in each condition"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument(
        "--speculative", action="store_true", help="draft as by default (the answers are the same)"
    )
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Prints a table with a row for each kind of question."""
    args = _arguments(argv)
    ours = args.speculative and args.model is None
    llm = LLM(
        args.model or model_folder(),
        dtype=args.dtype,
        speculative_config={"model": str(HEAD)} if ours else bool(args.speculative),
        max_num_seqs=32,
        max_model_len=512,
    )
    found = {
        name: measure(llm, args.pictures, *condition) for name, condition in CONDITIONS.items()
    }
    print(table(found))
    if args.json:
        record: dict[str, Any] = {"pictures": args.pictures, "right and asked, by kind": found}
        record["provenance"] = {
            "command": shlex.join(sys.argv),
            "seed": SEEDS,
            "weights": llm.provenance["weights"],
            "hardware": machine(),
            "versions": versions(),
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


def measure(llm: LLM, count: int, wordings: int, blank: bool) -> dict[str, list[int]]:
    """Right answers and all, by kind of question."""
    asked: list[Question] = []
    chats: list[Sequence[dict[str, Any]]] = []
    for i in range(count):
        rng = np.random.default_rng((SEEDS, i))
        picture = random_picture(rng)
        image = Image.new("RGB", (96, 96), "white") if blank else draw(picture)
        for question in questions(picture, rng, wordings):
            parts = [
                {"type": "image_pil", "image_pil": image},
                {"type": "text", "text": question.prompt},
            ]
            asked.append(question)
            chats.append([{"role": "user", "content": parts}])
    outputs = llm.chat(chats, SamplingParams(temperature=0, max_tokens=128))
    right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for question, output in zip(asked, outputs, strict=True):
        right[question.kind][0] += question.is_right(output.outputs[0].text)
        right[question.kind][1] += 1
    return dict(right)


def table(found: dict[str, dict[str, list[int]]]) -> str:
    """Markdown: a row for each kind of question, a column for each condition."""
    lines = [f"| kind | {' | '.join(found)} |", f"|---|{'---:|' * len(found)}"]
    for kind in KINDS:
        shares = [_share([right.get(kind, [0, 0])]) for right in found.values()]
        lines.append(f"| {kind} | {' | '.join(shares)} |")
    overall = [_share(list(right.values())) for right in found.values()]
    lines.append(f"| **all** | {' | '.join(overall)} |")
    return "\n".join(lines)


def _share(counts: list[list[int]]) -> str:
    right, asked = (sum(column) for column in zip(*counts, strict=True))
    return f"{100 * right / asked:.0f} % of {asked}" if asked else "–"
