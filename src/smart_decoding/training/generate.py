"""Self-distillation data: the target writes its own conversations, and its states are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smart_decoding.drafters.free import FreeDrafter
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.multimodal.prompts import MediaPrompt
from smart_decoding.training.seeds import user_turn
from smart_decoding.training.shards import Recorded, Writer

if TYPE_CHECKING:
    from smart_decoding.engine.engine import Engine
    from smart_decoding.engine.media import MultimodalEmbeddings
    from smart_decoding.engine.request import Request
    from smart_decoding.llm import LLM

CONCURRENT = 128
ANSWER_TOKENS = 256
TURN_TOKENS = 50  # of what the target adds to a user's turn
CODE_TURN_TOKENS = 100

MARKER = "\u241e"  # in place of a user's turn: no template contains it

PictureTurn: TypeAlias = Callable[[np.random.Generator], Sequence[Mapping[str, Any]]]


class Recorder(FreeDrafter):
    """A drafter that never drafts: it keeps the target's features of the requests in
    `request_ids`."""

    name = "recorder"
    free = False
    needs_ends = True

    def __init__(self, aux_layers: tuple[int, ...]) -> None:
        self.aux_layers = self.resting_layers = aux_layers
        self.request_ids: set[str] = set()
        self.features: dict[str, list[Tensor]] = {}
        # Requests with their features and their pictures' embeddings.
        self.done: list[tuple[Request, Tensor, MultimodalEmbeddings]] = []

    def extend(self, request: Request, features: Any, first: int, tokens: Sequence[int]) -> None:
        """Keep features [tokens, layers * hidden]."""
        if request.id in self.request_ids:
            kept = self.features.setdefault(request.id, [])
            kept.append(torch.as_tensor(features).to(torch.bfloat16))

    def extend_each(self, requests: Sequence[Request], features: Any) -> None:
        """Keep features of one token of each request."""
        for i, request in enumerate(requests):
            self.extend(request, features[i : i + 1], request.table.length - 1, [])

    def release(self, request: Request) -> None:
        """Keep the features of a finished request; drop those of a preempted one."""
        parts = self.features.pop(request.id, [])
        if request.finished and parts:
            self.request_ids.discard(request.id)
            media = request.media
            pictures = media.mm_embeds(0, len(request.prompt)) if media is not None else []
            self.done.append((request, torch.cat(parts), pictures))


def generate(
    llm: LLM,
    recorder: Recorder,
    folder: Path,
    tokens: int,
    seed: int = 0,
    turn: PictureTurn | None = None,
) -> None:
    """Write shards until the folder holds about `tokens` tokens, including prompts and earlier
    shards.

    turn: draws the first messages of each conversation, for models that take images. A tenth of the
    answers is sampled at temperature 0.7, the others are greedy; an answer ends where it loops.
    Finished conversations are written even if an error or Ctrl-C ends this early."""
    writer = Writer(folder)
    rng = np.random.default_rng((seed, writer.shards))
    with tqdm(
        total=tokens, initial=min(writer.tokens, tokens), unit="tok", desc="writing conversations"
    ) as bar:
        job = _Conversations(llm, recorder, rng, writer, turn)
        try:
            while writer.tokens < tokens:
                job.fill()
                job.advance(llm.engine)
                for request, aux_hidden, pictures in recorder.done:
                    rows = len(aux_hidden)
                    answer = len(request.prompt)
                    writer.add(Recorded(request.tokens[:rows], answer, aux_hidden, pictures))
                    bar.update(rows)
                recorder.done.clear()
        finally:
            writer.flush()


class _Conversations:
    """Keeps CONCURRENT requests running: user turns that the target completes, then answers."""

    def __init__(
        self,
        llm: LLM,
        recorder: Recorder,
        rng: np.random.Generator,
        writer: Writer,
        turn: PictureTurn | None,
    ) -> None:
        self._llm = llm
        self._recorder = recorder
        self._rng = rng
        self._turn = turn
        # Prompts whose answers are recorded: the same answer again would teach nothing new.
        self._recorded: set[tuple[object, ...]] = {*writer.prompts()}
        self._count = 0
        self._running = 0
        self._begun: dict[str, str] = {}  # turns that the target goes on with, by their request
        self._before = self._after = ""
        if turn is None:
            text = llm.chat_prompt([{"role": "user", "content": MARKER}]).text or ""
            self._before, self._after = text.split(MARKER)

    def fill(self) -> None:
        """Begin conversations until enough are running."""
        while self._running < CONCURRENT:
            self._running += 1
            if self._turn is not None:
                self._record_turn(self._llm.chat_prompt(self._turn(self._rng)))
                continue
            text, complete = user_turn(self._rng)
            if complete:
                self._answer(text)
                continue
            prompt = MediaPrompt(self._encode(self._before + text))
            limit = CODE_TURN_TOKENS if "```" in text else TURN_TOKENS
            seed = int(self._rng.integers(2**62))
            params = SamplingParams(temperature=1.0, top_k=64, max_tokens=limit, seed=seed)
            self._begun[self._add(prompt, params, record=False)] = text

    def advance(self, engine: Engine) -> None:
        """Step the engine; completed turns are answered next."""
        for request in engine.step():
            if not request.finished:
                continue
            self._running -= 1
            if request.id.startswith("turn"):
                self._running += 1
                self._answer(f"{self._begun.pop(request.id)}{request.stop.text}".strip())

    def _answer(self, turn: str) -> None:
        prompt = self._encode(self._before + turn + self._after)
        if tuple(prompt) in self._recorded:
            self._running -= 1
            return
        self._recorded.add(tuple(prompt))
        self._record(MediaPrompt(prompt))

    def _record_turn(self, prompt: MediaPrompt) -> None:
        """Record the answer to a turn about pictures; to a repeated question it is sampled."""
        pictures = prompt.media.pictures if prompt.media is not None else ()
        key = (*prompt.tokens, *(picture.key for picture in pictures))
        self._record(prompt, always_drawn=key in self._recorded)
        self._recorded.add(key)

    def _record(self, prompt: MediaPrompt, always_drawn: bool = False) -> None:
        temperature = 0.7 if self._rng.random() < 0.1 or always_drawn else 0.0
        seed = int(self._rng.integers(2**62))
        params = SamplingParams(
            temperature=temperature, top_k=64, max_tokens=ANSWER_TOKENS, seed=seed
        )
        self._add(prompt, params, record=True)

    def _add(self, prompt: MediaPrompt, params: SamplingParams, record: bool) -> str:
        """Return the request's id."""
        self._count += 1
        name = f"{'answer' if record else 'turn'}-{self._count}"
        if record:
            self._recorder.request_ids.add(name)
        self._llm.engine.add_request(name, prompt.tokens, params, prompt.media)
        return name

    def _encode(self, text: str) -> list[int]:
        return self._llm.tokenizer.encode(text, add_special_tokens=False)
