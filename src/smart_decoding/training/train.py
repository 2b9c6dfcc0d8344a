"""Train a draft head on the target's own conversations: unrolled like drafting, resumable."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from smart_decoding.core.policies.base import require_int, require_number
from smart_decoding.errors import ConfigError, ModelError
from smart_decoding.files import whole
from smart_decoding.kernels.weights import as_tensor
from smart_decoding.models.checkpoints.rounding import ROUNDED, RoundedWeights
from smart_decoding.models.heads.export import write_head
from smart_decoding.models.heads.files import HeadFiles
from smart_decoding.models.heads.forms import EAGLE2, EAGLE3
from smart_decoding.training.conversations import (
    Conversation,
    Keep,
    bucketed,
    check_layers,
    frequent_tokens,
    hold_out,
    load_conversations,
    padded,
    put_pictures,
    recorded_layers,
)
from smart_decoding.training.head import Form, TrainableHead, form_of
from smart_decoding.training.interrupt import deferred_interrupt
from smart_decoding.training.objective import Objective, SoftCrossEntropy, append_choices

if TYPE_CHECKING:
    from smart_decoding.kernels.weights import Matrix
    from smart_decoding.models.checkpoints.loading import Checkpoint

SAVE_EVERY = 120.0  # seconds
STEP_WEIGHT = 0.85  # of a further unrolled step's loss
WARM_UP = 50  # steps
DEPTHS = 6  # at which a head is measured
# Shares of the time at which one more step is unrolled: starting deep is far worse.
UNROLL_STARTS = (0.15, 0.4, 0.7)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a head is trained.

    seconds: training time in all, over resumed runs. draft_vocab: output rows of the head, of
    frequent tokens. layout: of the files that are written (`head_export.LAYOUTS`). supports_images:
    the head reads pictures' embeddings in place of their tokens'; else its conversations begin on
    the page in which the last picture ends, as in drafting. intermediate_size: neurons of its
    feed-forward network (None: as many as where it starts). quantization: of the matrices that are
    written, int8 or int4 (None: bf16)."""

    aux_layers: tuple[int, ...]
    seconds: float = 2400.0
    draft_vocab: int = 8192
    batch_tokens: int = 2500
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.02
    max_unroll: int = 4
    seed: int = 0
    layout: str = "smart"
    supports_images: bool = False
    intermediate_size: int | None = None
    quantization: str | None = None

    def __post_init__(self) -> None:
        require_number("seconds", self.seconds, 0.0, 1e9)
        require_int("draft_vocab", self.draft_vocab, 1, 1 << 20)
        if self.quantization not in (None, *ROUNDED):
            raise ConfigError(f"quantization={self.quantization!r} is none of {', '.join(ROUNDED)}")
        if self.quantization is not None and self.layout != "smart":
            raise ConfigError(f"the layout {self.layout!r} has no words for a head in quants")
        if self.intermediate_size is not None:
            require_int("intermediate_size", self.intermediate_size, 32, 1 << 20)
            if self.intermediate_size % 32:  # the kernels' quants come in such groups
                raise ConfigError(
                    f"intermediate_size={self.intermediate_size} is no multiple of 32"
                )


class Trainer:
    """Owns the head, its optimiser and the schedule by elapsed time.

    init: the head to start from, with options.aux_layers. Raises ModelError."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        output: Path,
        options: TrainOptions,
        keep: Keep | None = None,
        init: HeadFiles | None = None,
    ) -> None:
        torch.manual_seed(options.seed)
        self.options = options
        self.output = output
        self.config = checkpoint.config
        self._checkpoint = checkpoint
        self._init = init
        form = form_of(init) if init else self._new_form()
        if options.intermediate_size is not None:
            form = replace(form, shape=replace(form.shape, ffn=options.intermediate_size))
        self._load(folder, keep)
        self.draft_ids = self._draft_vocabulary()
        self._objective = Objective(checkpoint, self.draft_ids, init)
        self.head = TrainableHead(form)
        if init:
            self.head.start_at(init.weights)
        else:
            self.head.start_from(checkpoint.weights, self.config, self._aux_scale())
        self._optimiser = torch.optim.AdamW(
            self.head.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
        )
        self.elapsed = 0.0
        self.steps = 0
        self.trained = 0  # conversations, over all epochs
        self._fast_bf16 = bf16_is_faster()
        self._resume()

    def _new_form(self) -> Form:
        fc_norm = self.options.layout != "eagle3"
        return Form(self.config.of_head(), len(self.options.aux_layers), fc_norm)

    def _load(self, folder: Path, keep: Keep | None) -> None:
        options = self.options
        data, self._dropped = load_conversations(folder, keep, options.supports_images)
        recorded = recorded_layers(options.aux_layers, self.config.layers)
        check_layers(data, folder, recorded, self.config.hidden)
        append_choices(data, self._checkpoint)
        self._train, self._held = hold_out(data)
        if not self._train:
            raise ModelError(
                f"{folder} holds {len(data)} conversations: too few to train on; "
                "write more (--tokens)"
            )

    def _draft_vocabulary(self) -> Tensor:
        """Return the vocabulary of the head to start from, if its output rows are its own.

        Rows shared with the target can be exchanged for rows of frequent tokens in the
        conversations."""
        vocab = self.config.vocab
        if self._init is None:
            return frequent_tokens(self._train, vocab, min(self.options.draft_vocab, vocab))
        known = as_tensor(self._init.weights["draft_ids"]).long()
        if "lm_head.weight" in self._init.weights:
            return known
        return frequent_tokens(self._train, vocab, len(known), known)

    def _aux_scale(self) -> float:
        end = len(self.options.aux_layers) * self.config.hidden
        part = slice(end - self.config.hidden, end)
        last = torch.cat([item.aux_hidden[:, part].float() for item in self._train[:50]])
        return float(last.pow(2).mean().sqrt())

    @property
    def epochs(self) -> float:
        """How often each conversation has been trained on."""
        return self.trained / len(self._train)

    def held_out_prompts(self) -> list[list[int]]:
        """Return tokens of the held-out prompts."""
        return [list(item.prompt) for item in self._held]

    def run(self) -> dict[str, Any]:
        """Train until the time is used up; returns the card's figures.

        A checkpoint is written every two minutes and at Ctrl-C."""
        limit = self.options.seconds
        with (
            tqdm(
                total=round(limit), initial=round(self.elapsed), unit="s", desc="training the head"
            ) as bar,
            deferred_interrupt() as interrupt,  # a step that is half done must not be saved
        ):
            batches = self._batches()
            last_saved = time.monotonic()
            while self.elapsed < limit and not interrupt.is_set():
                started = time.monotonic()
                loss = self._step(next(batches))
                self.elapsed += time.monotonic() - started
                bar.set_postfix(loss=f"{loss:.3f}", step=self.steps, epoch=f"{self.epochs:.2f}")
                bar.n = round(min(self.elapsed, limit))
                bar.refresh()
                if time.monotonic() - last_saved > SAVE_EVERY:
                    self._save_state()
                    last_saved = time.monotonic()
            self._save_state()
        if interrupt.is_set():
            raise KeyboardInterrupt
        files = self.files()
        if self.options.quantization is not None:  # evaluate the rounded head that is written
            self.head.start_at(files.weights)
        figures = self.evaluate()
        self._export(files, figures)
        return figures

    def _batches(self) -> Iterator[list[Conversation]]:
        """Yield the batches of all epochs, after the `trained` conversations."""
        while True:
            epoch, done = divmod(self.trained, len(self._train))
            rng = np.random.default_rng((self.options.seed, epoch))
            for batch in bucketed(self._train, self.options.batch_tokens, rng):
                done -= len(batch)
                if done < 0:
                    yield batch

    def _step(self, batch: list[Conversation]) -> float:
        progress = min(1.0, self.elapsed / self.options.seconds)
        for group in self._optimiser.param_groups:
            group["lr"] = self._learning_rate(progress)
        unroll = min(1 + sum(progress >= start for start in UNROLL_STARTS), self.options.max_unroll)
        loss = torch.zeros(())
        for j, (student, p_target, _) in enumerate(self._unrolled(batch, unroll)):
            one = SoftCrossEntropy.apply(student, p_target)  # type: ignore[no-untyped-call]
            loss = loss + STEP_WEIGHT**j * cast(Tensor, one)
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self._optimiser.step()
        self.steps += 1
        self.trained += len(batch)
        return float(loss.detach()) / sum(STEP_WEIGHT**j for j in range(unroll))

    def _learning_rate(self, progress: float) -> float:
        """Return the rate: a warm-up, then a cosine down to 2 %."""
        warm = min(1.0, (self.steps + 1) / WARM_UP)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.options.learning_rate * warm * (0.02 + 0.98 * cosine)

    def _unrolled(
        self, batch: list[Conversation], unroll: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield for each unrolled step, of the answers' tokens within the unrolled chain: the
        head's logits and the target's probabilities [n, draft vocabulary], and the target's choices
        in draft ids [n] (-1: not in the draft vocabulary)."""
        tokens, aux_hidden, answer = padded(batch)
        pairs = tokens.shape[1] - 2  # pair t reads token t + 1 and predicts token t + 2
        hidden = self.config.hidden
        in_answer = answer[:, 2:]  # whether the predicted token is part of an answer
        # index_select, since the backward of a boolean index is slow.
        first = in_answer.flatten().nonzero()[:, 0]
        chosen = self._objective.draft_of[tokens[:, 2:].flatten()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._fast_bf16):
            last = aux_hidden[:, 1 : pairs + 1, -hidden:].flatten(0, 1).index_select(0, first)
            p_first = self._objective.p_target(last, chosen[first])
            embedded = F.embedding(tokens[:, 1 : pairs + 1], self._objective.embedding)
            visual = put_pictures(embedded, batch)
            read = aux_hidden[:, :pairs, : len(self.options.aux_layers) * hidden]
            g = self._objective.features(self.head, read)
            chain: list[tuple[Tensor, Tensor]] = []
            for j in range(unroll):
                out = self.head(g, embedded, chain, visual)
                use = in_answer.clone()
                use[:, :j] = False
                at = use.flatten().nonzero()[:, 0]
                rows = torch.searchsorted(first, at)
                p_target = p_first if j == 0 else p_first.index_select(0, rows)
                outputs = out.flatten(0, 1).index_select(0, at)
                yield self._objective.student(self.head, outputs), p_target, chosen[at]
                g = F.pad(out, (0, 0, 1, 0))[:, :pairs]

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Return the card's figures.

        Above all: the held-out share of the target's choices among the head's 1, 2 and 4 best, by
        depth (true prefix)."""
        ranks: list[list[Tensor]] = [[] for _ in range(DEPTHS)]
        for batch in bucketed(self._held, self.options.batch_tokens, np.random.default_rng(0)):
            for depth, (student, _, chosen) in enumerate(self._unrolled(batch, DEPTHS)):
                rank = (student > student.gather(1, chosen.clamp(min=0)[:, None])).sum(-1)
                ranks[depth].append(torch.where(chosen < 0, len(self.draft_ids), rank))
        top = {}
        for depth, parts in enumerate(ranks, start=1):
            rank = torch.cat(parts)
            top[str(depth)] = [round(float((rank < k).float().mean()), 4) for k in (1, 2, 4)]
        answers = sum(len(item.tokens) - item.answer for item in self._train)
        return {
            "held_out_top_1_2_4_by_depth": top,
            "training_answer_tokens": answers,
            "training_conversations": len(self._train),
            "held_out_conversations": len(self._held),
            "conversations_dropped_for_overlap": self._dropped,
            "steps": self.steps,
            "epochs": round(self.epochs, 2),
            "training_seconds": round(self.elapsed),
        }

    def _resume(self) -> None:
        """Go on from a checkpoint in the output folder.

        Raises ModelError if it is corrupt or of another head."""
        path = self.output / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            self.head.load_state_dict(state["head"])
            self._optimiser.load_state_dict(state["optimiser"])
            self.elapsed = state["elapsed"]
            self.steps = state["steps"]
            self.trained = state["seen"]
        except Exception as error:  # a damaged file may raise anything
            raise ModelError(
                f"{path} is corrupt, or of a head with other --aux-layers, --init or another "
                "model: remove it to start anew"
            ) from error

    def _save_state(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        state = {
            "head": self.head.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "elapsed": self.elapsed,
            "steps": self.steps,
            "seen": self.trained,
        }
        with whole(self.output / "state.pt") as path, path.open("wb") as file:
            torch.save(state, file)  # into a path it would not say why it cannot write

    def _export(self, files: HeadFiles, figures: dict[str, Any]) -> None:
        write_head(files, self._checkpoint, self.options.layout, self.output)
        card = {"figures": figures, "options": asdict(self.options)}
        with whole(self.output / "training.json") as path:
            path.write_text(json.dumps(card, indent=1) + "\n")

    def files(self) -> HeadFiles:
        """Return the head as it is now, rounded as the options say."""
        form = self.head.form
        scheme = self.options.quantization
        weights: dict[str, Matrix] = {**self.head.exported()}
        if self._init and "embed_tokens.weight" in self._init.weights:
            weights["embed_tokens.weight"] = self._init.weights["embed_tokens.weight"]
        weights["draft_ids"] = self.draft_ids
        return HeadFiles(
            {"quantization": scheme},
            {**RoundedWeights(weights, scheme)} if scheme else weights,
            self.options.aux_layers,
            form.shape,
            EAGLE2 if form.fused else EAGLE3,
            form.norm_before_residual,
            self.options.supports_images,
        )


def bf16_is_faster() -> bool:
    """Return whether this CPU multiplies bf16 matrices clearly faster than fp32.

    With AVX512-BF16 it does so four times as fast, without it more slowly."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.ones(512, 512, dtype=dtype)
        w = torch.ones(512, 512, dtype=dtype)
        F.linear(x, w)
        start = time.perf_counter()
        for _ in range(8):
            F.linear(x, w)
        seconds.append(time.perf_counter() - start)
    return seconds[1] < 0.7 * seconds[0]
