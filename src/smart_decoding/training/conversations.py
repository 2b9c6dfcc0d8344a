"""The conversations that a head is trained on, as they are read from shards and batched."""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.loops import loop_start
from smart_decoding.errors import ModelError
from smart_decoding.files import reading
from smart_decoding.training.shards import shards_in

SHORTEST = 8  # tokens; answers up to this length are left out
HELD_OUT = 0.03  # share of the prompts
HELD_OUT_AT_LEAST = 8  # conversations

Keep: TypeAlias = Callable[[Sequence[int]], bool]
"""Whether a conversation's tokens may be trained on."""


@dataclass(slots=True)
class Conversation:
    """One recorded conversation.

    tokens [n + 1]; aux_hidden [n, width]: of all but the last token, which `append_choices` adds.
    answer: where the answer begins. visual [m]: positions of pictures, whose embeddings [m, hidden]
    the target read. prompt_hash: 32 bits of the prompt, pictures included."""

    tokens: Tensor
    aux_hidden: Tensor
    answer: int
    visual: Tensor
    embeddings: Tensor
    prompt_hash: int

    def behind_pictures(self) -> Conversation:
        """Return the part behind the pictures, for a head that reads none."""
        start = (int(self.visual[-1]) + 1) // PAGE * PAGE if len(self.visual) else 0
        return Conversation(
            self.tokens[start:],
            self.aux_hidden[start:],
            self.answer - start,
            self.visual[:0],
            self.embeddings[:0],
            self.prompt_hash,
        )

    @property
    def prompt(self) -> tuple[int, ...]:
        """The tokens before the answer."""
        return tuple(self.tokens[: self.answer].tolist())


def load_conversations(
    folder: Path, keep: Keep | None = None, supports_images: bool = False
) -> tuple[list[Conversation], int]:
    """Return the conversations of a data folder that `keep` accepts, and how many it refused.

    Conversations end where they loop. Unless the head `supports_images`, they begin behind their
    pictures. Raises ModelError if there are none."""
    found = []
    dropped = 0
    for path in shards_in(folder):
        with reading(path):
            shard = load_file(path)
        for item in _of_shard(shard):
            if keep is not None and not keep(item.tokens.tolist()):
                dropped += 1
                continue
            found.append(item if supports_images else item.behind_pictures())
    if not found:
        raise ModelError(
            f"{folder} holds no training data: run smart train without --skip-generation first"
        )
    return found, dropped


def _of_shard(shard: Mapping[str, Tensor]) -> Iterator[Conversation]:
    bounds = shard["starts"].tolist()
    visual = shard.get("visual", torch.zeros(0, dtype=torch.long))
    embeddings = shard.get("embeddings", torch.zeros(0, 0))
    for i, answer in enumerate(shard["answers"].tolist()):
        start, end = bounds[i : i + 2]
        looping = loop_start(shard["tokens"][start + answer : end].tolist())
        part = slice(start, end if looping is None else start + answer + looping)
        if part.stop - start <= answer + SHORTEST:
            continue
        first, last = torch.searchsorted(visual, torch.tensor([start, end])).tolist()
        yield Conversation(
            shard["tokens"][part].long(),
            shard["taps"][part],
            answer,
            visual[first:last] - start,
            embeddings[first:last],
            _hash(shard["tokens"][start : start + answer], embeddings[first:last]),
        )


def _hash(*parts: Tensor) -> int:
    value = 0
    for part in parts:
        value = zlib.crc32(part.contiguous().view(torch.uint8).numpy().tobytes(), value)
    return value


def hold_out(data: list[Conversation]) -> tuple[list[Conversation], list[Conversation]]:
    """Return the conversations to train on and the held-out ones, in the order of the prompts'
    hashes.

    A prompt is held out if its hash is low. So a prompt that several writers repeat is never on
    both sides, and later data moves no training prompt to the held-out ones."""
    ordered = sorted(data, key=lambda item: item.prompt_hash)
    hashes = [item.prompt_hash for item in ordered]
    highest = max(round(HELD_OUT * 2**32), hashes[:HELD_OUT_AT_LEAST][-1])
    held = bisect_right(hashes, highest)
    return ordered[held:], ordered[:held]


def recorded_layers(aux_layers: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """Return the layers that conversations must hold: those that the head reads, and the target's
    last one."""
    return aux_layers if aux_layers[-1] == layers else (*aux_layers, layers)


def check_layers(
    data: Sequence[Conversation], folder: Path, aux_layers: tuple[int, ...], hidden: int
) -> None:
    """Raise ModelError unless exactly the states after `aux_layers` were recorded."""
    if any(item.aux_hidden.shape[1] != len(aux_layers) * hidden for item in data):
        raise ModelError(
            f"the conversations in {folder} were written with other --aux-layers than "
            f"{aux_layers}: write new ones"
        )


def frequent_tokens(
    conversations: list[Conversation], vocab: int, size: int, known: Tensor | None = None
) -> Tensor:
    """Return ids of the `size` most frequent tokens, ascending.

    Prompts count a little. Of equally frequent tokens the `known` ones come first, then low ids."""
    counts = np.zeros(vocab)
    for item in conversations:
        tokens = item.tokens.numpy()
        counts += np.bincount(tokens[item.answer :], minlength=vocab)
        counts += 0.3 * np.bincount(tokens[: item.answer], minlength=vocab)
    counts += 0.5 / (1 + np.arange(vocab) / 2000)  # byte-pair ids are roughly in order of frequency
    if known is not None:
        counts[known.numpy()] += 0.5
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def padded(batch: list[Conversation]) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens [b, n], aux_hidden [b, n - 1, width] float32, and a mask of answers [b, n]."""
    tokens = pad_sequence([item.tokens for item in batch], batch_first=True)
    aux_hidden = pad_sequence([item.aux_hidden for item in batch], batch_first=True).float()
    places = torch.arange(tokens.shape[1])
    answers = [(item.answer <= places) & (places < len(item.tokens)) for item in batch]
    return tokens, aux_hidden, torch.stack(answers)


def put_pictures(embedded: Tensor, batch: list[Conversation]) -> Tensor:
    """Put pictures' embeddings into [b, pairs, hidden]; return the mask of them [b, pairs].

    Pair t reads token t + 1."""
    visual = torch.zeros(embedded.shape[:2], dtype=torch.bool)
    for i, item in enumerate(batch):
        read = item.visual > 0
        if read.any():
            at = item.visual[read] - 1
            embedded[i, at] = item.embeddings[read].to(embedded.dtype)
            visual[i, at] = True
    return visual


def bucketed(
    items: list[Conversation], batch_tokens: int, rng: np.random.Generator
) -> list[list[Conversation]]:
    """Return batches of similar lengths (little padding), in random order."""
    noise = rng.uniform(0.9, 1.1, len(items))
    order = np.argsort([len(item.tokens) * x for item, x in zip(items, noise, strict=True)])
    batches: list[list[Conversation]] = [[]]
    longest = 0
    for i in order:
        longest = max(longest, len(items[i].tokens))
        if batches[-1] and longest * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
            longest = len(items[i].tokens)
        batches[-1].append(items[i])
    rng.shuffle(batches)
    return batches
