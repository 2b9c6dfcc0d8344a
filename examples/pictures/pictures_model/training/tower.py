"""How the vision tower learns to see.

The lower half of its layers names what each patch shows. Above, each patch says one word of the
picture's caption, which the projector turns into that word's embedding in the language model, so
that pictures read like text from the start.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pictures_model.generated.captions import QUIET, VOCABULARY, caption
from pictures_model.generated.draw import draw
from pictures_model.generated.facts import Picture, random_picture
from pictures_model.generated.regions import WORDS, patch_labels

MEAN = (0.5, 0.5, 0.5)
STD = (0.5, 0.5, 0.5)
SIDE = 96
PATCH = 16
GRID = SIDE // PATCH
TRAIN = 0  # pictures of these two never come from the same seed
HELD_OUT = 1
NAMED = 3  # layers of the tower after which patches are named
_INDEX = {word: i for i, word in enumerate(VOCABULARY)} | {None: -1}


def random_pictures(split: int, step: int, count: int) -> list[Picture]:
    """The pictures of a step; those of the held-out split are made by other seeds, and none of them
    is trained on."""
    rng = np.random.default_rng((split, step))
    return [random_picture(rng) for _ in range(count)]


def pixels(pictures: Sequence[Picture]) -> Tensor:
    """As the image processor would give them: [pictures, 3, SIDE, SIDE]."""
    images = np.stack([np.asarray(draw(picture, SIDE)) for picture in pictures])
    raw = torch.from_numpy(images).permute(0, 3, 1, 2)
    mean = torch.tensor(MEAN)[:, None, None]
    std = torch.tensor(STD)[:, None, None]
    return (raw.float() / 255 - mean) / std


def features(tower: Any, images: Tensor) -> Tensor:
    """What the projector reads, as LLaVA takes it: the last layer's patches, unnormed, without the
    class token."""
    states: Tensor = tower(pixel_values=images).last_hidden_state
    return states[:, 1:]


class Words:
    """Captions in the language model's own embeddings; `rows` [words, hidden] are those of
    VOCABULARY."""

    def __init__(self, embedding: Tensor, tokenizer: Any) -> None:
        ids = [
            tokenizer.encode(w if w.isdigit() else f" {w}", add_special_tokens=False)
            for w in VOCABULARY
        ]
        # The mean over a word's tokens.
        self.rows = torch.stack([embedding[tokens].float().mean(0) for tokens in ids])

    def said(self, loud: Tensor, quiet: Tensor) -> Tensor:
        """[pictures, words of a caption] each, as `labels` gives them -> [pictures, words of a
        caption, hidden]."""
        return self.rows[loud] + QUIET * self.rows[quiet.clamp(min=0)] * (quiet >= 0)[..., None]


def labels(pictures: Sequence[Picture]) -> tuple[Tensor, Tensor]:
    """Indices of the captions' words, and of those said quietly with them (-1: none): [pictures,
    words] each."""
    said = torch.tensor(
        [[[_INDEX[word], _INDEX[more]] for word, more in caption(picture)] for picture in pictures]
    )
    return said[..., 0], said[..., 1]


class Namer(nn.Module):
    """Linear heads that are used in training only: words of each patch, and a caption's words, loud
    and quiet."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.patches = nn.Linear(hidden, len(WORDS))
        self.loud = nn.Linear(hidden, len(VOCABULARY))
        self.quiet = nn.Linear(hidden, len(VOCABULARY))


class SeeingLoss:
    """Cross-entropy of each patch's words halfway up and of the caption's at the top, and the
    distance of what the projector says from those words' embeddings."""

    def __init__(
        self, tower: Any, projector: nn.Module, namer: Namer, words: Words, batch: int
    ) -> None:
        self._tower = tower
        self._projector = projector
        self._namer = namer
        self._words = words
        self._batch = batch

    def __call__(self, step: int, split: int = TRAIN) -> tuple[Tensor, dict[str, float]]:
        pictures = random_pictures(split, step, self._batch)
        shown = torch.from_numpy(np.stack([patch_labels(picture, GRID) for picture in pictures]))
        loud, quiet = labels(pictures)
        with torch.autocast("cpu", torch.bfloat16):
            out = self._tower(pixel_values=pixels(pictures), output_hidden_states=True)
            top = out.last_hidden_state[:, 1:]
            named = self._namer.patches(out.hidden_states[NAMED][:, 1:]).float()
            says = self._namer.loud(top).float()
            whispers = self._namer.quiet(top).float()
            said = self._projector(top).float()
        naming = F.binary_cross_entropy_with_logits(named, shown, reduction="sum")
        naming = naming / shown[..., 0].numel()
        saying = F.cross_entropy(says.flatten(0, 1), loud.flatten())
        saying = saying + F.cross_entropy(whispers.flatten(0, 1), quiet.flatten(), ignore_index=-1)
        distance = F.mse_loss(said, self._words.said(loud, quiet)) / self._words.rows.var()
        heard = _loudest(said, self._words.rows) == loud
        figures = {
            "naming": naming,
            "distance": distance,
            "patches": ((named > 0) == (shown > 0)).all(-1).float().mean(),
            "words": heard.float().mean(),
            "captions": heard.all(-1).float().mean(),
            "counts": (whispers.argmax(-1) == quiet)[quiet >= 0].float().mean(),
        }
        loss = naming + saying + distance
        return loss, {key: float(value.detach()) for key, value in figures.items()}


def _loudest(said: Tensor, rows: Tensor) -> Tensor:
    """The nearest word."""
    return (said @ rows.T - rows.square().sum(-1) / 2).argmax(-1)
