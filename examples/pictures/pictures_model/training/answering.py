"""How the language model learns, by low-rank changes, to answer.

First it learns from true captions, for which no tower is needed, and then from what tower and
projector make of the pictures.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pictures_model.generated.facts import Picture
from pictures_model.training.packing import Batch, Encode, Prompt, Row, batch_of, fill
from pictures_model.training.tower import (
    HELD_OUT,
    TRAIN,
    Words,
    features,
    labels,
    pixels,
    random_pictures,
)

ROOM = 352  # tokens of a row
CANDIDATES = 4096
NOISE = 0.3  # beside true captions, in standard deviations of the words' embeddings

Show: TypeAlias = Callable[[Sequence[Picture]], Tensor]
"""Pictures -> what the language model reads at their positions: [pictures, positions, hidden]."""


def true_captions(words: Words) -> Show:
    """The words of true captions, with some noise."""

    def show(pictures: Sequence[Picture]) -> Tensor:
        said = words.said(*labels(pictures))
        return said + NOISE * words.rows.std() * torch.randn_like(said)

    return show


def from_the_tower(llava: Any) -> Show:
    """What projector and tower make of pictures."""

    @torch.no_grad()
    def show(pictures: Sequence[Picture]) -> Tensor:
        return _projected(llava.model, pixels(pictures))

    return show


def _projected(model: Any, images: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        said: Tensor = model.multi_modal_projector(features(model.vision_tower, images))
    return said.float()


class AnsweringLoss:
    """Cross-entropy of the answers' tokens about `rows` pictures, over the tokens of the step's
    answers and CANDIDATES others, drawn anew for each step."""

    def __init__(
        self,
        llava: Any,
        prompt: Prompt,
        encode: Encode,
        image_token: int,
        show: Show,
        rows: int,
        first: int = 1_000_000,
        comparisons: int = 0,
    ) -> None:
        """first: seed of the first step's pictures; comparisons: see `fill`."""
        self._model = llava
        self._prompt = prompt
        self._encode = encode
        self._image = image_token
        self._show = show
        self._rows = rows
        self._first = first
        self._comparisons = comparisons

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        torch.manual_seed(step)
        pictures = random_pictures(TRAIN, self._first + step, self._rows)
        seed = (TRAIN, self._first + step)
        rows = self._rows_of(pictures, seed, TRAIN, self._comparisons)
        batch = batch_of(rows, self._prompt.end)
        head = self._model.lm_head.weight
        others = torch.randint(len(head), (CANDIDATES,))
        tokens: Tensor = torch.unique(torch.cat([batch.wanted, others]))
        logits = F.linear(self._hidden(batch, self._show(pictures)), head[tokens]).float()
        wanted = torch.searchsorted(tokens, batch.wanted)
        right = (logits.argmax(-1) == wanted).float().mean()
        return F.cross_entropy(logits, wanted), {"tokens": float(right)}

    def _rows_of(
        self,
        pictures: Sequence[Picture],
        seed: tuple[int, ...],
        wordings: int,
        comparisons: int = 0,
    ) -> list[Row]:
        rng = np.random.default_rng(seed)
        return [
            fill(self._prompt, picture, rng, self._encode, ROOM, wordings, comparisons)
            for picture in pictures
        ]

    def _hidden(self, batch: Batch, shown: Tensor) -> Tensor:
        """At the positions that predict an answer's token: [answer tokens, hidden]."""
        decoder = self._model.model.language_model
        embedded = decoder.embed_tokens(batch.tokens)
        places = (batch.tokens == self._image)[..., None].expand(embedded.shape)
        bias = torch.zeros(batch.mask.shape, dtype=embedded.dtype).masked_fill_(~batch.mask, -1e9)
        hidden: Tensor = decoder(
            inputs_embeds=embedded.masked_scatter(places, shown.to(embedded.dtype)),
            attention_mask=bias,
            position_ids=batch.positions,
            use_cache=False,
        ).last_hidden_state
        return hidden.flatten(0, 1).index_select(0, batch.at)

    @torch.no_grad()
    def exact(self, pictures: int, wordings: int, blank: bool = False) -> dict[str, list[int]]:
        """By kind of question: answers that greedy decoding would give word for word, and all.

        The pictures are held-out ones."""
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for start in range(0, pictures, self._rows):
            asked_of = random_pictures(HELD_OUT, 1_000_000 + start, self._rows)
            rows = self._rows_of(asked_of, (HELD_OUT, start), wordings)
            batch = batch_of(rows, self._prompt.end)
            white = torch.ones_like(pixels(asked_of)) if blank else None
            shown = self._show(asked_of) if white is None else _projected(self._model.model, white)
            said = self._model.lm_head(self._hidden(batch, shown)).argmax(-1) == batch.wanted
            parts = said.split([part.stop - part.start for row in rows for part in row.answers])
            for question, part in zip((q for row in rows for q in row.asked), parts, strict=True):
                right[question.kind][0] += bool(part.all())
                right[question.kind][1] += 1
        return dict(right)
