"""Self-distillation data: the target writes its own conversations, and its hidden states are kept
as it writes.

Shards of safetensors hold, for many conversations after one another: `tokens` int32 [n], `taps`
bf16 [n, aux_hidden * hidden] (the residual streams that a head reads), `starts` int64
[conversations + 1] and `answers` int64 [conversations], the offset of each answer's first token
within its conversation; of pictures `visual` int64 [m], the rows among the n that are theirs, and
`embeddings` bf16 [m, hidden], what the target read there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from smart_decoding.core.policies.protocol import DraftPlan
from smart_decoding.core.tree import DraftTrees, IntArray
from smart_decoding.engine.engine import Engine
from smart_decoding.engine.media import MultimodalEmbeddings
from smart_decoding.engine.request import Request
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.files import whole
from smart_decoding.llm import LLM
from smart_decoding.multimodal.prompts import MediaPrompt
from smart_decoding.training.seeds import user_turn

SHARD_TOKENS = 50_000
CONCURRENT = 128
ANSWER_TOKENS = 256

PictureTurn: TypeAlias = Callable[[np.random.Generator], Sequence[Mapping[str, Any]]]


class Recorder:
    """A drafter that never drafts: it keeps the target's features of every token of the requests it
    is told to."""

    name, max_levels, free, grow, wants_logits, wants_ends = "recorder", 0, False, None, False, True

    def __init__(self, aux_layers: tuple[int, ...]) -> None:
        self.aux_layers = aux_layers
        self.wanted: set[str] = set()
        self.features: dict[str, list[torch.Tensor]] = {}
        self.done: list[
            tuple[Request, torch.Tensor, MultimodalEmbeddings]
        ] = []  # with its features and its pictures' embeddings

    def pending_rows(self, requests: Sequence[Request]) -> int:
        return len(requests)

    def start(self, requests: Sequence[Request], plan: DraftPlan) -> DraftTrees:
        return DraftTrees.empty(len(requests))

    def expand(
        self, requests: Sequence[Request], trees: DraftTrees, nodes: IntArray, plan: DraftPlan
    ) -> int:
        raise NotImplementedError("a recorder does not draft")

    def extend(self, request: Request, features: Any, first: int, tokens: Sequence[int]) -> None:
        if request.id in self.wanted:
            self.features.setdefault(request.id, []).append(
                torch.as_tensor(features).to(torch.bfloat16)
            )

    def extend_each(self, requests: Sequence[Request], features: Any) -> None:
        for i, request in enumerate(requests):
            self.extend(request, features[i : i + 1], request.table.length - 1, [])

    def observe_logits(self, tokens: IntArray, logits: Any) -> None:
        """Not wanted."""

    def release(self, request: Request) -> None:
        parts = self.features.pop(request.id, [])
        if request.finished and parts:
            self.wanted.discard(request.id)
            shown = (
                request.media.mm_embeds(0, len(request.prompt)) if request.media is not None else []
            )
            self.done.append((request, torch.cat(parts), shown))


class Writer:
    """Collects conversations and writes whole shards, each under its final name only when
    complete."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.shards = len(list(folder.glob("shard-*.safetensors")))
        self._items: list[tuple[list[int], int, torch.Tensor, MultimodalEmbeddings]] = []
        self._tokens = 0

    def add(
        self, tokens: list[int], answer: int, aux_hidden: torch.Tensor, shown: MultimodalEmbeddings
    ) -> None:
        self._items.append((tokens, answer, aux_hidden, shown))
        self._tokens += len(tokens)
        if self._tokens >= SHARD_TOKENS:
            self.flush()

    def prompts(self) -> set[tuple[int, ...]]:
        """The prompts of all conversations in the folder."""
        found: set[tuple[int, ...]] = set()
        for path in self.folder.glob("shard-*.safetensors"):
            with safe_open(path, "np") as shard:
                tokens, starts = shard.get_tensor("tokens"), shard.get_tensor("starts")
                for start, answer in zip(starts[:-1], shard.get_tensor("answers"), strict=True):
                    found.add(tuple(tokens[start : start + answer].tolist()))
        return found

    def flush(self) -> None:
        if not self._items:
            return
        starts = np.concatenate(([0], np.cumsum([len(item[0]) for item in self._items])))
        shown = [
            (start + first + torch.arange(len(part)), part)
            for start, item in zip(starts.tolist(), self._items, strict=False)
            for first, part in item[3]
        ]
        tensors = {
            "tokens": torch.tensor(
                [token for item in self._items for token in item[0]], dtype=torch.int32
            ),
            "taps": torch.cat([item[2] for item in self._items]),
            "starts": torch.from_numpy(starts),
            "answers": torch.tensor([item[1] for item in self._items]),
        }
        if shown:
            tensors["visual"] = torch.cat([rows for rows, _ in shown])
            tensors["embeddings"] = torch.cat([part for _, part in shown]).to(torch.bfloat16)
        with whole(self.folder / f"shard-{self.shards:04d}.safetensors") as path:
            save_file(tensors, path)
        self.shards += 1
        self._items, self._tokens = [], 0


def generate(
    llm: LLM,
    recorder: Recorder,
    folder: Path,
    tokens: int,
    seed: int = 0,
    turn: PictureTurn | None = None,
) -> None:
    """Writes shards until the folder holds about `tokens` answer tokens; goes on from the shards
    that are there.

    turn: draws the messages that each conversation begins with, for models that see. A tenth of the
    answers is sampled at temperature 0.7, the others are greedy; an answer ends where it loops."""
    writer = Writer(folder)
    have = writer.shards * SHARD_TOKENS
    rng = np.random.default_rng((seed, writer.shards))
    with tqdm(
        total=tokens, initial=min(have, tokens), unit="tok", desc="writing conversations"
    ) as bar:
        job = _Conversations(llm, recorder, rng, writer.shards, writer.prompts(), turn)
        while have < tokens:
            job.fill()
            job.advance(llm.engine)
            for request, aux_hidden, shown in recorder.done:
                rows = len(aux_hidden)
                writer.add(request.tokens[:rows], len(request.prompt), aux_hidden, shown)
                have += rows
                bar.update(rows)
            recorder.done.clear()
    writer.flush()


class _Conversations:
    """Keeps CONCURRENT requests running: user turns that the target completes, then answers."""

    def __init__(
        self,
        llm: LLM,
        recorder: Recorder,
        rng: np.random.Generator,
        salt: int,
        asked: set[tuple[int, ...]],
        turn: PictureTurn | None,
    ) -> None:
        self._llm, self._recorder, self._rng, self._salt = llm, recorder, rng, salt
        self._count, self._running = 0, 0
        self._turn = turn
        self._asked = asked  # prompts so far: the same one again would teach nothing new
        marker = "\u241e"
        text = llm.tokenizer.apply_chat_template([{"role": "user", "content": marker}])
        self._before, self._after = text.split(marker)

    def fill(self) -> None:
        while self._running < CONCURRENT:
            self._running += 1
            if self._turn is not None:
                self._record(self._llm.chat_prompt(self._turn(self._rng)))
                continue
            text, complete = user_turn(self._rng)
            if complete:
                self._answer(self._encode(self._before + text + self._after))
                continue
            prompt = self._encode(self._before + text)
            turn_tokens = 100 if "```" in text else 50
            seed = int(self._rng.integers(2**62))
            params = SamplingParams(temperature=1.0, top_k=64, max_tokens=turn_tokens, seed=seed)
            self._add(MediaPrompt(prompt), params, record=False)

    def advance(self, engine: Engine) -> None:
        for request in engine.step():
            if not request.finished:
                continue
            self._running -= 1
            if request.id.startswith("turn"):
                self._running += 1
                turn = self._llm.tokenizer.decode(request.tokens, skip_special_tokens=False)
                turn = turn.split(self._before, 1)[-1].replace("<|im_end|>", "").strip()
                self._answer(self._encode(self._before + turn + self._after))

    def _answer(self, prompt: list[int]) -> None:
        if tuple(prompt) in self._asked:
            self._running -= 1
            return
        self._asked.add(tuple(prompt))
        self._record(MediaPrompt(prompt))

    def _record(self, prompt: MediaPrompt) -> None:
        sampled = self._rng.random() < 0.1
        seed = int(self._rng.integers(2**62))
        params = SamplingParams(
            temperature=0.7 if sampled else 0.0, top_k=64, max_tokens=ANSWER_TOKENS, seed=seed
        )
        self._add(prompt, params, record=True)

    def _add(self, prompt: MediaPrompt, params: SamplingParams, record: bool) -> None:
        self._count += 1
        name = f"{'answer' if record else 'turn'}-{self._salt}-{self._count}"
        if record:
            self._recorder.wanted.add(name)
        self._llm.engine.add_request(name, prompt.tokens, params, prompt.media)

    def _encode(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text, add_special_tokens=False)
