"""The vision tower's two stages. It learns to name what each patch shows; then tower and projector learn to say the
picture's caption in the language model's own word embeddings, so that pictures read like text from the start."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smart_decoding.pictures.captions import QUIET, VOCABULARY, caption
from smart_decoding.pictures.draw import draw
from smart_decoding.pictures.facts import Picture, random_picture
from smart_decoding.pictures.regions import WORDS, fact_labels, fact_names, patch_labels

MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SIDE, PATCH = 96, 16
GRID = SIDE // PATCH
TRAIN, HELD_OUT = 0, 1  # pictures of these two never come from the same seed


def random_pictures(split: int, step: int, count: int) -> list[Picture]:
    """The pictures of a step; those of the held-out split are made by other seeds, and none of them is trained on."""
    rng = np.random.default_rng((split, step))
    return [random_picture(rng) for _ in range(count)]


def pixels(pictures: list[Picture]) -> Tensor:
    """As the image processor would give them: [pictures, 3, SIDE, SIDE]."""
    raw = torch.from_numpy(np.stack([np.asarray(draw(picture, SIDE)) for picture in pictures])).permute(0, 3, 1, 2)
    return (raw.float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def features(tower: Any, images: Tensor) -> Tensor:
    """What the projector reads, as LLaVA takes it: the last layer's patches, unnormed, without the class token."""
    states: Tensor = tower(pixel_values=images).last_hidden_state
    return states[:, 1:]


def word_embeddings(embedding: Tensor, tokenizer: Any, words: Sequence[str]) -> Tensor:
    """The language model's rows for some words (mean over a word's tokens): [words, hidden]."""
    ids = [tokenizer.encode(word if word.isdigit() else f" {word}", add_special_tokens=False) for word in words]
    return torch.stack([embedding[tokens].float().mean(0) for tokens in ids])


class Namer(nn.Module):
    """The linear heads of the first stage: words of each patch, facts of the whole picture."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.words, self.facts = nn.Linear(hidden, len(WORDS)), nn.Linear(hidden, len(fact_names()))


class NamingLoss:
    """Binary cross-entropy of the words and of the facts, at every patch."""

    def __init__(self, tower: nn.Module, namer: Namer, batch: int) -> None:
        self.tower, self.namer, self.batch = tower, namer, batch

    def __call__(self, step: int) -> tuple[Tensor, dict[str, float]]:
        pictures = random_pictures(TRAIN, step, self.batch)
        labels = torch.from_numpy(np.stack([patch_labels(picture, GRID) for picture in pictures]))
        with torch.autocast("cpu", torch.bfloat16):
            seen = features(self.tower, pixels(pictures))
            named, stated = self.namer.words(seen), self.namer.facts(seen)
        naming, stating = _cross_entropy(named, labels), _stating(stated, pictures)
        right = ((named > 0) == (labels > 0)).all(-1).float().mean()
        return naming + stating, {"naming": float(naming.detach()), "patches": float(right)}


class CaptionLoss:
    """What the projected patches say, against the caption: the distance to the words' embeddings, and cross-entropy
    over the words by that distance; the facts at every patch, too."""

    def __init__(self, tower: nn.Module, projector: nn.Module, namer: Namer, words: Tensor, batch: int) -> None:
        self.tower, self.projector, self.namer, self.words, self.batch = tower, projector, namer, words, batch
        self._index = {word: i for i, word in enumerate(VOCABULARY)}

    def __call__(self, step: int, split: int = TRAIN) -> tuple[Tensor, dict[str, float]]:
        pictures = random_pictures(split, step, self.batch)
        loud, quiet = self._labels(pictures)
        wanted = self._spoken(loud, quiet)
        with torch.autocast("cpu", torch.bfloat16):
            seen = features(self.tower, pixels(pictures))
            said, stated = self.projector(seen).float(), self.namer.facts(seen)
        distance = F.mse_loss(said, wanted) / self.words.var()
        logits = said @ self.words.T - self.words.square().sum(-1) / 2
        choosing = F.cross_entropy(logits.flatten(0, 1), loud.flatten())
        right = logits.argmax(-1) == loud
        rest = said.detach() - self.words[loud]
        counted = (rest @ self.words.T - QUIET * self.words.square().sum(-1) / 2).argmax(-1) == quiet
        figures = {
            "distance": distance, "choosing": choosing, "words": right.float().mean(),
            "captions": right.all(-1).float().mean(), "counts": counted[quiet >= 0].float().mean(),
        }  # fmt: skip
        loss = 2 * distance + 2 * choosing + 0.3 * _stating(stated, pictures)
        return loss, {key: float(value.detach()) for key, value in figures.items()}

    def spoken(self, pictures: list[Picture]) -> Tensor:
        """The captions as they should be said: [pictures, words of a caption, hidden]."""
        return self._spoken(*self._labels(pictures))

    def _spoken(self, loud: Tensor, quiet: Tensor) -> Tensor:
        return self.words[loud] + QUIET * self.words[quiet.clamp(min=0)] * (quiet >= 0)[..., None]

    def _labels(self, pictures: list[Picture]) -> tuple[Tensor, Tensor]:
        """Indices of the words, and of those said quietly with them (-1: none): [pictures, words of a caption]."""
        captions = [caption(picture) for picture in pictures]
        loud = torch.tensor([[self._index[word] for word, _ in said] for said in captions])
        quiet = torch.tensor([[self._index[more] if more else -1 for _, more in said] for said in captions])
        return loud, quiet


def _stating(stated: Tensor, pictures: list[Picture]) -> Tensor:
    facts = torch.from_numpy(np.stack([fact_labels(picture) for picture in pictures]))
    return _cross_entropy(stated, facts[:, None].expand(stated.shape))


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the classes, mean over all else."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / labels[..., 0].numel()
