"""The last stage: the language model learns, by low-rank changes, to answer from captions: the true ones at first, more
and more those that tower and projector say, which go on learning from other pictures meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from smart_decoding.pictures.facts import Picture
from smart_decoding.training.pictures.packing import Batch, Encode, Prompt, Row, batch_of, fill
from smart_decoding.training.pictures.tower import HELD_OUT, TRAIN, CaptionLoss, features, pixels, random_pictures

ROOM = 352  # tokens of a row
CANDIDATES = 4096


class AnsweringLoss:
    """Cross-entropy of the answers' tokens for `rows` pictures, plus the caption stage's loss.

    It is over the tokens of the step's answers and CANDIDATES others, drawn anew for each step."""

    def __init__(
        self,
        llava: Any,
        prompt: Prompt,
        encode: Encode,
        image_token: int,
        captions: CaptionLoss,
        rows: int,
        taught: int,
    ) -> None:
        """taught: the index from which on no true caption is shown any more."""
        self._model, self._prompt, self._encode, self._image = llava, prompt, encode, image_token
        self._captions, self._rows, self._taught = captions, rows, taught

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        pictures = random_pictures(TRAIN, 1_000_000 + step, self._rows)
        batch = batch_of(self._rows_of(pictures, (TRAIN, step), TRAIN), self._prompt.end)
        head = self._model.lm_head.weight
        rng = np.random.default_rng(step)
        others = torch.from_numpy(rng.integers(0, len(head), CANDIDATES))
        tokens = torch.cat([batch.wanted, others]).unique()
        taught = torch.from_numpy(rng.random(len(pictures)) > step / self._taught)[:, None, None]
        seen = torch.where(taught, self._captions.spoken(pictures), self._seen(pixels(pictures)))
        logits = F.linear(self._hidden(batch, seen), head[tokens]).float()
        answering = F.cross_entropy(logits, torch.searchsorted(tokens, batch.wanted))
        captioning, figures = self._captions(2_000_000 + step)
        figures = {"answering": float(answering.detach()), "words": figures["words"]}
        return answering + captioning, figures

    def _rows_of(self, pictures: Sequence[Picture], seed: tuple[int, ...], wordings: int) -> list[Row]:
        rng = np.random.default_rng(seed)
        return [fill(self._prompt, picture, rng, self._encode, ROOM, wordings) for picture in pictures]

    @torch.no_grad()
    def _seen(self, images: Tensor) -> Tensor:
        model = self._model.model
        with torch.autocast("cpu", torch.bfloat16):
            said: Tensor = model.multi_modal_projector(features(model.vision_tower, images))
        return said.float()

    def _hidden(self, batch: Batch, seen: Tensor) -> Tensor:
        """At the positions that predict an answer's token: [answer tokens, hidden]."""
        model = self._model.model
        embedded = model.language_model.embed_tokens(batch.tokens)
        shown = (batch.tokens == self._image)[..., None].expand(embedded.shape)
        hidden: Tensor = model.language_model(
            inputs_embeds=embedded.masked_scatter(shown, seen.to(embedded.dtype)),
            attention_mask=batch.mask, position_ids=batch.positions, use_cache=False,
        ).last_hidden_state  # fmt: skip
        return hidden.flatten(0, 1).index_select(0, batch.at)

    @torch.no_grad()
    def exact(self, pictures: int, wordings: int, blank: bool = False, seed: int = 0) -> dict[str, list[int]]:
        """By kind of question on held-out pictures: answers that greedy decoding would give word for word, and all."""
        right: dict[str, list[int]] = defaultdict(lambda: [0, 0])
        for start in range(0, pictures, self._rows):
            shown = random_pictures(HELD_OUT, 1_000_000 + seed + start, self._rows)
            rows = self._rows_of(shown, (HELD_OUT, seed, start), wordings)
            batch = batch_of(rows, self._prompt.end)
            images = torch.ones_like(pixels(shown)) if blank else pixels(shown)
            said = self._model.lm_head(self._hidden(batch, self._seen(images))).argmax(-1) == batch.wanted
            parts = said.split([part.stop - part.start for row in rows for part in row.answers])
            for question, part in zip((q for row in rows for q in row.asked), parts, strict=True):
                right[question.kind][0] += bool(part.all())
                right[question.kind][1] += 1
        return dict(right)
