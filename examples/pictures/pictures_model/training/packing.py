"""Conversations about pictures as training rows: one picture, then many questions with answers.

Each question attends to the picture and itself only, as if it were the first one asked. That shares
the picture's positions among all its questions, and nothing is answered by reading an earlier
answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from pictures_model.generated.questions import Question, questions
from pictures_model.generated.wordings import COMPARISONS, LONG_KINDS

if TYPE_CHECKING:
    from pictures_model.generated.facts import Picture

Encode = Callable[[str], list[int]]


@dataclass(frozen=True, slots=True)
class Prompt:
    """The tokens around a question: before it (with the image's positions), and between it and the
    answer."""

    before: tuple[int, ...]
    between: tuple[int, ...]
    end: int


@dataclass(slots=True)
class Row:
    tokens: list[int]
    positions: list[int]
    segments: list[int]  # 0: the picture and what precedes it; i: the i-th question
    asked: list[Question]
    answers: list[slice]  # where each answer lies, its end token included


def pack(prompt: Prompt, asked: Sequence[Question], encode: Encode, room: int) -> Row:
    """As many of the questions as fit into `room` tokens, in order."""
    start = len(prompt.before)
    row = Row(list(prompt.before), list(range(start)), [0] * start, [], [])
    for question in asked:
        turn = [*encode(question.prompt), *prompt.between]
        answer = [*encode(question.answer), prompt.end]
        if len(row.tokens) + len(turn) + len(answer) > room:
            continue
        first = len(row.tokens) + len(turn)
        row.asked.append(question)
        row.answers.append(slice(first, first + len(answer)))
        row.tokens += turn + answer
        row.positions += range(start, start + len(turn) + len(answer))
        row.segments += [len(row.asked)] * (len(turn) + len(answer))
    return row


def fill(
    prompt: Prompt,
    picture: Picture,
    rng: np.random.Generator,
    encode: Encode,
    room: int,
    wordings: int,
    comparisons: int = 0,
) -> Row:
    """Mostly a long answer, then, as far as there is room, short ones of every kind, and again.

    comparisons: how often the questions are drawn whose comparisons come before the other short
    ones."""
    asked = [question for _ in range(comparisons) for question in questions(picture, rng, wordings)]
    asked = [question for question in asked if question.kind in COMPARISONS]
    asked += [question for _ in range(3) for question in questions(picture, rng, wordings)]
    long = [question for question in asked if question.kind in LONG_KINDS]
    long = long[: int(rng.random() < 0.6)]
    short = {question.prompt: question for question in asked if question.kind not in LONG_KINDS}
    return pack(prompt, [*long, *short.values()], encode, room)


@dataclass(frozen=True, slots=True)
class Batch:
    """tokens, positions [rows, length]; mask [rows, 1, length, length], true where attended; `at`
    and `wanted` [answer tokens]: flat indices of the positions that predict, and what they should
    say."""

    tokens: Tensor
    positions: Tensor
    mask: Tensor
    at: Tensor
    wanted: Tensor


def batch_of(rows: Sequence[Row], pad: int) -> Batch:
    length = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), length), pad)
    positions = torch.zeros_like(tokens)
    segments = torch.full_like(tokens, -1)
    at: list[int] = []
    for i, row in enumerate(rows):
        n = len(row.tokens)
        tokens[i, :n] = torch.tensor(row.tokens)
        positions[i, :n] = torch.tensor(row.positions)
        segments[i, :n] = torch.tensor(row.segments)
        at += [i * length + j - 1 for part in row.answers for j in range(part.start, part.stop)]
    same = segments[:, :, None] == segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (same | (segments[:, None, :] == 0)) & causal
    where = torch.tensor(at)
    return Batch(tokens, positions, mask[:, None], where, tokens.flatten()[where + 1])
