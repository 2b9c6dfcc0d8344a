"""Shards of recorded conversations, written one by one.

A shard of safetensors holds, for many conversations after one another: `tokens` int32 [n], `taps`
bf16 [n, layers * hidden] (the residual streams that a head reads), `starts` int64
[conversations + 1] and `answers` int64 [conversations], the offset of each answer's first token
within its conversation; of pictures `visual` int64 [m], their rows among the n, and `embeddings`
bf16 [m, hidden], the target's input in these rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from smart_decoding.files import reading, whole

if TYPE_CHECKING:
    from smart_decoding.engine.media import MultimodalEmbeddings

SHARD_TOKENS = 50_000
_NAMES = "shard-*.safetensors"


@dataclass(slots=True)
class Recorded:
    """A conversation as the target wrote it.

    answer: where the answer begins. aux_hidden: [tokens, layers * hidden]. pictures: their first
    positions and embeddings."""

    tokens: list[int]
    answer: int
    aux_hidden: Tensor
    pictures: MultimodalEmbeddings


def shards_in(folder: Path) -> list[Path]:
    """Return the shards in the order of writing."""
    return sorted(folder.glob(_NAMES))


def have_pictures(folder: Path) -> bool:
    """Return whether any conversation in the folder is about pictures."""
    return any("visual" in _header(path) for path in shards_in(folder))


def _header(path: Path) -> dict[str, list[int]]:
    """Name of a tensor -> its shape. Raises ModelError for a damaged file."""
    with reading(path), safe_open(path, "np") as shard:
        return {name: shard.get_slice(name).get_shape() for name in shard.keys()}  # noqa: SIM118


class Writer:
    """Collects conversations and writes whole shards, each under its name only when complete.

    tokens: of all conversations in the folder."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        found = shards_in(folder)
        self.tokens = sum(_header(path)["tokens"][0] for path in found)
        self.shards = 1 + max((int(path.stem.split("-")[1]) for path in found), default=-1)
        self._items: list[Recorded] = []
        self._tokens = 0

    def add(self, item: Recorded) -> None:
        """Add a conversation; write a shard if there is enough for one."""
        self._items.append(item)
        self._tokens += len(item.tokens)
        self.tokens += len(item.tokens)
        if self._tokens >= SHARD_TOKENS:
            self.flush()

    def prompts(self) -> set[tuple[int, ...]]:
        """Return the prompts of all conversations in the folder."""
        found: set[tuple[int, ...]] = set()
        for path in shards_in(self.folder):
            with reading(path), safe_open(path, "np") as shard:
                tokens = shard.get_tensor("tokens")
                starts = shard.get_tensor("starts")
                for start, answer in zip(starts[:-1], shard.get_tensor("answers"), strict=True):
                    found.add(tuple(tokens[start : start + answer].tolist()))
        return found

    def flush(self) -> None:
        """Write the remaining conversations as a last shard."""
        if not self._items:
            return
        # Another process may write to the folder, and then takes the same number.
        name = f"shard-{self.shards:04d}-{uuid4().hex[:8]}.safetensors"
        with whole(self.folder / name) as scratch:
            save_file(_joined(self._items), scratch)
        self.shards += 1
        self._items = []
        self._tokens = 0


def _joined(items: list[Recorded]) -> dict[str, Tensor]:
    starts = np.concatenate(([0], np.cumsum([len(item.tokens) for item in items])))
    tokens = [token for item in items for token in item.tokens]
    tensors = {
        "tokens": torch.tensor(tokens, dtype=torch.int32),
        "taps": torch.cat([item.aux_hidden for item in items]),
        "starts": torch.from_numpy(starts),
        "answers": torch.tensor([item.answer for item in items]),
    }
    pictures = [
        (start + first + torch.arange(len(part)), part)
        for start, item in zip(starts[:-1].tolist(), items, strict=True)
        for first, part in item.pictures
    ]
    if pictures:
        tensors["visual"] = torch.cat([rows for rows, _ in pictures])
        tensors["embeddings"] = torch.cat([part for _, part in pictures]).to(torch.bfloat16)
    return tensors
