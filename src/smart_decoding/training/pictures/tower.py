"""First stage: the vision tower learns to name what each patch shows, and the projector to say it in the language
model's own word embeddings, so that the second stage starts from pictures that already read like text."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def word_embeddings(embedding: Tensor, tokenizer: Any) -> Tensor:
    """The language model's rows for WORDS (mean over a word's tokens): [words, hidden]."""
    ids = [tokenizer.encode(word if word.isdigit() else f" {word}", add_special_tokens=False) for word in WORDS]
    return torch.stack([embedding[tokens].float().mean(0) for tokens in ids])


class Namer(nn.Module):
    """The linear heads of the first stage, thrown away after it: words of each patch, facts of the whole picture."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.words, self.facts = nn.Linear(hidden, len(WORDS)), nn.Linear(hidden, len(fact_names()))


class NamingLoss:
    """Binary cross-entropy of words and facts at every patch, and the distance between each projected patch and the
    sum of the embeddings of its words, scaled to the length of one."""

    def __init__(self, tower: nn.Module, projector: nn.Module, namer: Namer, words: Tensor, batch: int) -> None:
        self.tower, self.projector, self.namer, self.words, self.batch = tower, projector, namer, words, batch

    def __call__(self, step: int, split: int = TRAIN) -> tuple[Tensor, dict[str, float]]:
        pictures = random_pictures(split, step, self.batch)
        labels = torch.from_numpy(np.stack([patch_labels(picture, GRID) for picture in pictures]))
        facts = torch.from_numpy(np.stack([fact_labels(picture) for picture in pictures]))
        wanted = labels @ self.words / labels.sum(-1, keepdim=True).sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            seen = features(self.tower, pixels(pictures))
            named, stated, said = self.namer.words(seen), self.namer.facts(seen), self.projector(seen)
        naming = _cross_entropy(named, labels)
        stating = _cross_entropy(stated, facts[:, None].expand(stated.shape))
        saying = F.mse_loss(said.float(), wanted) / wanted.var()
        words = ((named > 0) == (labels > 0)).all(-1).float().mean()
        true = ((stated.float().mean(1) > 0) == (facts > 0)).all(-1).float().mean()
        figures = {"naming": naming, "stating": stating, "saying": saying, "patches": words, "pictures": true}
        return naming + stating + 0.5 * saying, {key: float(value.detach()) for key, value in figures.items()}


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Summed over the classes, mean over all else."""
    return F.binary_cross_entropy_with_logits(logits.float(), labels, reduction="sum") / labels[..., 0].numel()
