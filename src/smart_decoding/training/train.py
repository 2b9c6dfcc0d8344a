"""Trains a draft head on the target's own conversations: unrolled like drafting, resumable,
measured by depth."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from smart_decoding.core.policies.common import require_int, require_number
from smart_decoding.engine.kv import PAGE
from smart_decoding.engine.loops import loop_start
from smart_decoding.errors import ModelError
from smart_decoding.files import whole
from smart_decoding.models.config import ModelConfig
from smart_decoding.models.head_export import output_rows, write_head
from smart_decoding.models.head_files import HeadFiles
from smart_decoding.models.loading import Checkpoint
from smart_decoding.training.head import Form, Frozen, TrainableHead, form_of
from smart_decoding.training.interrupt import DeferredInterrupt

HELD_OUT = 0.03
SAVE_EVERY = 120.0  # seconds
STEP_WEIGHT = 0.85
UNROLL_STARTS = (
    0.15,
    0.4,
    0.7,
)  # shares of the time at which one more step is unrolled: starting deep is far worse


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """seconds: training time in all, over resumed runs; draft_vocab: output rows of the head
    (frequent tokens).

    layout: in which the head is written (`head_export.LAYOUTS`). sees: the head reads pictures'
    embeddings in place of their tokens'; else its conversations begin on the page in which the last
    picture ends, as in drafting."""

    aux_layers: tuple[int, ...]
    seconds: float = 2400.0
    draft_vocab: int = 8192
    batch_tokens: int = 2500
    learning_rate: float = 1.2e-3
    weight_decay: float = 0.02
    max_unroll: int = 4
    seed: int = 0
    layout: str = "smart"
    sees: bool = False

    def __post_init__(self) -> None:
        """Raises ConfigError."""
        require_number("seconds", self.seconds, 0.0, 1e9)
        require_int("draft_vocab", self.draft_vocab, 1, 1 << 20)


@dataclass(slots=True)
class Conversation:
    """tokens, aux_hidden [n, width]: of the first n tokens; the one behind them, once known,
    nothing was recorded of. answer: where the answer begins. visual [m]: positions of pictures,
    whose embeddings [m, hidden] the target read."""

    tokens: Tensor
    aux_hidden: Tensor
    answer: int
    visual: Tensor
    embeddings: Tensor

    def behind_pictures(self) -> Conversation:
        """What is left for a head that does not see."""
        start = (int(self.visual[-1]) + 1) // PAGE * PAGE if len(self.visual) else 0
        none = slice(0, 0)
        return Conversation(
            self.tokens[start:],
            self.aux_hidden[start:],
            self.answer - start,
            self.visual[none],
            self.embeddings[none],
        )


Keep: TypeAlias = Callable[
    [Sequence[int]], bool
]  # whether a conversation's tokens may be trained on


def load_conversations(
    folder: Path, keep: Keep | None = None, sees: bool = False
) -> tuple[list[Conversation], int]:
    """The conversations of a data folder that `keep` lets pass, up to where they loop, and how many
    it did not; unless the head `sees`, what lies behind their pictures. Raises ModelError if none
    are left."""
    found, dropped = [], 0
    for path in sorted(folder.glob("shard-*.safetensors")):
        shard = load_file(path)
        starts = shard["starts"].tolist()
        visual = shard.get("visual", torch.zeros(0, dtype=torch.long))
        embeddings = shard.get("embeddings", torch.zeros(0, 0))
        for i, answer in enumerate(shard["answers"].tolist()):
            begins, end = starts[i], starts[i + 1]
            looping = loop_start(shard["tokens"][begins + answer : end].tolist())
            part = slice(begins, end if looping is None else begins + answer + looping)
            if part.stop - begins <= answer + 8:
                continue
            if keep is not None and not keep(shard["tokens"][part].tolist()):
                dropped += 1
                continue
            first, last = torch.searchsorted(visual, torch.tensor([begins, end])).tolist()
            shown = visual[first:last] - begins, embeddings[first:last]
            item = Conversation(shard["tokens"][part].long(), shard["taps"][part], answer, *shown)
            found.append(item if sees else item.behind_pictures())
    if not found:
        raise ModelError(
            f"{folder} holds no training data: run smart train without --skip-generation first"
        )
    return found, dropped


def _unseen(held: list[Conversation], train: list[Conversation]) -> list[Conversation]:
    """Those of `held` whose prompt is not trained on: processes that write side by side repeat
    prompts."""
    known = {tuple(item.tokens[: item.answer].tolist()) for item in train}
    return [item for item in held if tuple(item.tokens[: item.answer].tolist()) not in known]


def recorded_layers(aux_layers: tuple[int, ...], layers: int) -> tuple[int, ...]:
    """What the conversations must hold: what the head reads, and the last layer's output, which is
    the teacher's."""
    return aux_layers if aux_layers[-1] == layers else (*aux_layers, layers)


def frequent_tokens(
    conversations: list[Conversation], vocab: int, size: int, known: Tensor | None = None
) -> Tensor:
    """Ids of the `size` most frequent tokens, ascending; prompts count a little, ties and the rest
    by low id, but after the `known` ones."""
    counts = np.zeros(vocab)
    for item in conversations:
        tokens = item.tokens.numpy()
        counts += np.bincount(tokens[item.answer :], minlength=vocab)
        counts += 0.3 * np.bincount(tokens[: item.answer], minlength=vocab)
    counts += 0.5 / (1 + np.arange(vocab) / 2000)  # byte-pair ids are roughly in order of frequency
    if known is not None:
        counts[known.numpy()] += 0.5
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


class SoftCrossEntropy(torch.autograd.Function):
    """Mean of -sum(wanted * log_softmax(student)) over rows [n, classes], in few passes over
    memory: the gradient is made in the forward pass, in the student's dtype."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, wanted: Tensor) -> Tensor:
        log_prob = student.float().log_softmax(-1)
        loss = -torch.linalg.vecdot(wanted, log_prob).mean()
        grad = (
            log_prob.exp_()
            .mul_(wanted.sum(-1, keepdim=True))
            .sub_(wanted)
            .div_(max(len(student), 1))
        )
        ctx.save_for_backward(grad.to(student.dtype))
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * grads[0].to(ctx.saved_tensors[0].dtype), None


class Trainer:
    """Owns the head, its optimiser and the schedule by elapsed time; `run` trains until the time is
    used up."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        folder: Path,
        output: Path,
        options: TrainOptions,
        keep: Keep | None = None,
        init: HeadFiles | None = None,
    ) -> None:
        """init: the head to start from, with options.aux_layers Raises ModelError."""
        torch.manual_seed(options.seed)
        self.options, self.output, self.config = options, output, checkpoint.config
        self._checkpoint, self._init = checkpoint, init
        form = (
            form_of(init)
            if init
            else Form(_shape(self.config), len(options.aux_layers), options.layout != "eagle3")
        )
        data, self._dropped = load_conversations(folder, keep, options.sees)
        np.random.default_rng(options.seed).shuffle(data)  # type: ignore[arg-type]
        _check_layers(
            data,
            folder,
            recorded_layers(options.aux_layers, self.config.layers),
            self.config.hidden,
        )
        self._complete(data)
        held = max(8, int(len(data) * HELD_OUT))
        self._train = data[held:]
        if not self._train:
            raise ModelError(
                f"{folder} holds {len(data)} conversations: too few to train on; write more (--tokens)"
            )
        unseen = _unseen(data[:held], self._train)
        self._held, self._held_is_new = unseen or data[:held], bool(unseen)
        self.draft_ids = self._draft_vocabulary(init)
        self._frozen = _frozen(checkpoint, self.draft_ids, init)
        self._draft_of = torch.full((self.config.vocab,), -1)
        self._draft_of[self.draft_ids] = torch.arange(len(self.draft_ids))
        self.head = TrainableHead(form)
        if init:
            self.head.start_at(init.weights)
        else:
            self.head.start_from(checkpoint.weights, self.config.layers, self._tap_scale())
        self._optimiser = torch.optim.AdamW(
            self.head.parameters(),
            lr=options.learning_rate,
            betas=(0.9, 0.95),
            weight_decay=options.weight_decay,
        )
        self.elapsed, self.steps, self.seen = 0.0, 0, 0  # seen: conversations, over all epochs
        self._fast_bf16 = bf16_is_faster()
        self._resume()

    @torch.no_grad()
    def _complete(self, data: list[Conversation]) -> None:
        """Appends the target's choice behind the last recorded token. Mostly it is the answer's
        end, which the target never reads; a head that is to propose ends must have seen them."""
        output, norm = (
            output_rows(self._checkpoint).float(),
            self._checkpoint.weights["model.norm.weight"].float(),
        )
        for start in range(0, len(data), 256):
            part = data[start : start + 256]
            last = torch.stack(
                [item.aux_hidden[-1, -self.config.hidden :] for item in part]
            ).float()
            normed = F.rms_norm(last, last.shape[-1:], norm, self.config.rms_eps)
            for item, token in zip(part, F.linear(normed, output).argmax(-1), strict=True):
                item.tokens = torch.cat((item.tokens, token[None]))

    def _draft_vocabulary(self, init: HeadFiles | None) -> Tensor:
        """That of the head to start from, if its output rows are its own. Rows that are the
        target's can be exchanged for those of tokens that the conversations hold."""
        if init is None:
            return frequent_tokens(
                self._train, self.config.vocab, min(self.options.draft_vocab, self.config.vocab)
            )
        known = init.weights["draft_ids"].long()
        if "lm_head.weight" in init.weights:
            return known
        return frequent_tokens(self._train, self.config.vocab, len(known), known)

    @property
    def epochs(self) -> float:
        return self.seen / len(self._train)

    def held_out_prompts(self) -> list[list[int]]:
        """Tokens of the prompts that the head was not trained on."""
        return [item.tokens[: item.answer].tolist() for item in self._held]

    def run(self) -> dict[str, Any]:
        """Trains, writing a checkpoint every two minutes and at Ctrl-C; returns the card's
        figures."""
        limit = self.options.seconds
        with (
            tqdm(
                total=round(limit), initial=round(self.elapsed), unit="s", desc="training the head"
            ) as bar,
            DeferredInterrupt() as interrupt,  # a step that is half done must not be saved
        ):
            batches, last_saved = self._batches(), time.monotonic()
            while self.elapsed < limit and not interrupt.asked:
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
        if interrupt.asked:
            raise KeyboardInterrupt
        figures = self.evaluate()
        self._export(figures)
        return figures

    def _step(self, batch: list[Conversation]) -> float:
        progress = min(1.0, self.elapsed / self.options.seconds)
        warm = min(1.0, (self.steps + 1) / 50)
        for group in self._optimiser.param_groups:
            group["lr"] = (
                self.options.learning_rate
                * warm
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))
            )
        unroll = min(1 + sum(progress >= start for start in UNROLL_STARTS), self.options.max_unroll)
        loss = torch.zeros(())
        for j, (student, wanted, _) in enumerate(self._unrolled(batch, unroll)):
            loss = loss + STEP_WEIGHT**j * cast(Tensor, SoftCrossEntropy.apply(student, wanted))
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.head.parameters(), 1.0)
        self._optimiser.step()
        self.steps += 1
        self.seen += len(batch)
        return float(loss.detach()) / sum(STEP_WEIGHT**j for j in range(unroll))

    def _unrolled(
        self, batch: list[Conversation], unroll: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """For each unrolled step: the head's logits and what they should say [answer tokens, draft
        vocabulary], and the target's choices [answer tokens] within the draft vocabulary (-1: not
        in it)."""
        tokens, aux_hidden, answer = _padded(batch)
        pairs = tokens.shape[1] - 2  # pair t reads token t + 1 and predicts token t + 2
        asked = answer[:, 2:]  # is the predicted token part of an answer?
        first = asked.flatten().nonzero()[
            :, 0
        ]  # index_select: the backward of a boolean index is slow
        chosen = self._draft_of[tokens[:, 2:].flatten()]
        with torch.autocast("cpu", torch.bfloat16, enabled=self._fast_bf16):
            last = (
                aux_hidden[:, 1 : pairs + 1, -self.config.hidden :]
                .flatten(0, 1)
                .index_select(0, first)
            )
            wanted = self._wanted(last, chosen[first])
            embedded = F.embedding(tokens[:, 1 : pairs + 1], self._frozen.embedding)
            visual = _put_pictures(embedded, batch)
            g = self.head.features(self._read(aux_hidden[:, :pairs]))
            chain: list[tuple[Tensor, Tensor]] = []
            for j in range(unroll):
                out = self.head(g, embedded, chain, visual)
                use = asked.clone()
                use[:, :j] = False
                at = use.flatten().nonzero()[:, 0]
                target = wanted if j == 0 else wanted.index_select(0, torch.searchsorted(first, at))
                student = self._student(out.flatten(0, 1).index_select(0, at))
                yield student, target, chosen[at]
                g = F.pad(out, (0, 0, 1, 0))[:, :pairs]

    @torch.no_grad()
    def _wanted(self, last: Tensor, chosen: Tensor) -> Tensor:
        """What the head should say: half the target's distribution over the draft vocabulary, half
        its choice."""
        wanted = self._logits(self._final_norm(last)).float().softmax(-1).mul_(0.5)
        known = (chosen >= 0).nonzero()[:, 0]
        wanted[known, chosen[known]] += 0.5
        return wanted

    def _read(self, aux_hidden: Tensor) -> Tensor:
        """What the head reads of the recorded aux_hidden [..., width]."""
        aux_hidden = aux_hidden[..., : len(self.options.aux_layers) * self.config.hidden]
        return self._final_norm(aux_hidden) if self.head.form.fused else aux_hidden

    def _student(self, out: Tensor) -> Tensor:
        """[n, draft vocabulary] logits of the head's outputs [n, hidden]."""
        if self.head.form.fused:
            return self._logits(out)
        normed = self.head.norm(out)
        return (
            self._logits(normed)
            if self.head.lm_head is None
            else cast(Tensor, self.head.lm_head(normed))
        )

    def _final_norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self._frozen.final_norm, self.config.rms_eps)

    def _logits(self, normed: Tensor) -> Tensor:
        """The target's, of what went through its final norm."""
        return F.linear(normed, self._frozen.head_rows)

    @torch.no_grad()
    def evaluate(self, depths: int = 6) -> dict[str, Any]:
        """Held-out share of the target's choices among the head's 1, 2 and 4 best, by depth (true
        prefix)."""
        ranks: list[list[Tensor]] = [[] for _ in range(depths)]
        for batch in _bucketed(self._held, self.options.batch_tokens, np.random.default_rng(0)):
            for depth, (student, _, chosen) in enumerate(self._unrolled(batch, depths)):
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
            "held_out_prompts_are_new": self._held_is_new,
            "conversations_dropped_for_overlap": self._dropped,
            "steps": self.steps,
            "epochs": round(self.epochs, 2),
            "training_seconds": round(self.elapsed),
        }

    def _batches(self) -> Iterator[list[Conversation]]:
        """The batches of epoch after epoch, from the one on that `seen` has come to."""
        while True:
            epoch, seen = divmod(self.seen, len(self._train))
            rng = np.random.default_rng((self.options.seed, epoch))
            for batch in _bucketed(self._train, self.options.batch_tokens, rng):
                seen -= len(batch)
                if seen < 0:
                    yield batch

    def _tap_scale(self) -> float:
        end = len(self.options.aux_layers) * self.config.hidden
        last = torch.cat(
            [
                item.aux_hidden[:, end - self.config.hidden : end].float()
                for item in self._train[:50]
            ]
        )
        return float(last.pow(2).mean().sqrt())

    # -------------------------------------------------------------------------------------------
    # files

    def _resume(self) -> None:
        """Goes on from a checkpoint in the output folder. Raises ModelError if it is corrupt or of
        another head."""
        path = self.output / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, weights_only=True)
            self.head.load_state_dict(state["head"])
            self._optimiser.load_state_dict(state["optimiser"])
            self.elapsed, self.steps, self.seen = state["elapsed"], state["steps"], state["seen"]
        except Exception as error:  # what a damaged file raises can be anything
            raise ModelError(
                f"{path} is corrupt, or of a head with other --aux-layers, --init or another model: remove it to start anew"
            ) from error

    def _save_state(self) -> None:
        self.output.mkdir(parents=True, exist_ok=True)
        state = {
            "head": self.head.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "elapsed": self.elapsed,
            "steps": self.steps,
            "seen": self.seen,
        }
        with whole(self.output / "state.pt") as path:
            torch.save(state, path)

    def _export(self, figures: dict[str, Any]) -> None:
        files = self.files()
        write_head(files, self._checkpoint, self.options.layout, self.output)
        card = {"figures": figures, "options": asdict(self.options)}
        with whole(self.output / "training.json") as path:
            path.write_text(json.dumps(card, indent=1) + "\n")

    def files(self) -> HeadFiles:
        """The head as it is now."""
        form, weights = self.head.form, self.head.exported()
        if self._init and "embed_tokens.weight" in self._init.weights:
            weights["embed_tokens.weight"] = self._init.weights["embed_tokens.weight"]
        weights["draft_ids"] = self.draft_ids
        shape, sees = form.shape, self.options.sees
        return HeadFiles(
            {}, weights, self.options.aux_layers, shape, form.fused, form.norm_before_residual, sees
        )


def bf16_is_faster() -> bool:
    """Whether this CPU multiplies bf16 matrices clearly faster than fp32 (AVX512-BF16: four times;
    without: slower)."""
    seconds = []
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.ones(512, 512, dtype=dtype), torch.ones(512, 512, dtype=dtype)
        F.linear(x, w)
        start = time.perf_counter()
        for _ in range(8):
            F.linear(x, w)
        seconds.append(time.perf_counter() - start)
    return seconds[1] < 0.7 * seconds[0]


def _shape(target: ModelConfig) -> ModelConfig:
    """The one layer of a new head: as the target's, without its biases and norms of queries and
    keys."""
    return replace(target, layers=1, qkv_bias=False, o_bias=False, qk_norm=False)


def _check_layers(
    data: Sequence[Conversation], folder: Path, aux_layers: tuple[int, ...], hidden: int
) -> None:
    if any(item.aux_hidden.shape[1] != len(aux_layers) * hidden for item in data):
        raise ModelError(
            f"the conversations in {folder} were written with other --aux-layers than {aux_layers}: write new ones"
        )


def _frozen(checkpoint: Checkpoint, draft_ids: Tensor, init: HeadFiles | None) -> Frozen:
    own = None if init is None else init.weights.get("embed_tokens.weight")
    embedding = (checkpoint.weights["model.embed_tokens.weight"] if own is None else own).float()
    rows = output_rows(checkpoint)[draft_ids].float()
    return Frozen(embedding, rows, checkpoint.weights["model.norm.weight"].float())


def _padded(batch: list[Conversation]) -> tuple[Tensor, Tensor, Tensor]:
    """tokens [b, n], aux_hidden [b, n, width] float32, and whether each token belongs to an answer
    [b, n]."""
    n = max(len(item.tokens) for item in batch)
    tokens = torch.zeros(len(batch), n, dtype=torch.long)
    aux_hidden = torch.zeros(len(batch), n, batch[0].aux_hidden.shape[1])
    answer = torch.zeros(len(batch), n, dtype=torch.bool)
    for i, item in enumerate(batch):
        size = len(item.tokens)
        tokens[i, :size], aux_hidden[i, : len(item.aux_hidden)] = (
            item.tokens,
            item.aux_hidden.float(),
        )
        answer[i, item.answer : size] = True
    return tokens, aux_hidden, answer


def _put_pictures(embedded: Tensor, batch: list[Conversation]) -> Tensor:
    """Puts pictures' embeddings into [b, pairs, hidden], pair t of which reads token t + 1; returns
    where they are."""
    visual = torch.zeros(embedded.shape[:2], dtype=torch.bool)
    for i, item in enumerate(batch):
        read = item.visual > 0
        if read.any():
            at = item.visual[read] - 1
            embedded[i, at] = item.embeddings[read].to(embedded.dtype)
            visual[i, at] = True
    return visual


def _bucketed(
    items: list[Conversation], batch_tokens: int, rng: np.random.Generator
) -> list[list[Conversation]]:
    """Batches of similar lengths (little padding), in random order."""
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
    rng.shuffle(batches)  # type: ignore[arg-type]
    return batches
