"""What `generate` was asked for beside the model: logits processors, stopping criteria, scores and streamers.

A processor or criterion sees what it would see in `generate`: one sequence's tokens so far, left padding included. The
engine asks only for rows that the walk visits, so that each is called once per token of the answer, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from smart_decoding.backends.torch.sampler import Sampler
from smart_decoding.core.tree import IntArray
from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker

ONE_BY_ONE = ("PrefixConstrainedLogitsProcessor",)  # of transformers' own, those that use the row's number
SLACK = 128  # tokens beyond the longest answer: tree nodes that are looked at, not kept


class HostParams(SamplingParams):
    """Parameters of a request whose tokens are drawn by `Host`: the engine's greedy short cut must not be taken."""

    @property
    def changes_logits(self) -> bool:
        return True


@dataclass(eq=False)
class HostSequence:
    """One row of the batch: tokens [max_length + SLACK] with left padding, `length` of them known.

    scores, logits: [vocab] per token of the answer, processed and raw, where they are wanted."""

    index: int
    tokens: torch.Tensor
    length: int
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def push(self, token: int) -> None:
        self.tokens[self.length] = token
        self.length += 1

    def with_path(self, path: Sequence[int]) -> torch.Tensor:
        """Tokens so far and `path`, the nodes of the tree that the walk has come down."""
        if len(path):
            self.tokens[self.length : self.length + len(path)] = torch.tensor(path, device=self.tokens.device)
        return self.tokens[: self.length + len(path)]

    def append(self, tokens: Sequence[int]) -> None:
        """The engine's word for its own histories; here the stop check has taken the tokens already."""


@dataclass
class Host:
    """The processors, criteria and outputs of one call. batch: its rows. seed: of the draws."""

    processors: Any
    criteria: Any
    batch: int
    do_sample: bool
    seed: int = 0
    keep_scores: bool = False
    keep_logits: bool = False

    def __post_init__(self) -> None:
        self._batched = all(_by_row(p, "transformers.generation.logits_process") for p in self.processors)
        self._criteria_batched = all(_by_row(c, "transformers.generation.stopping_criteria") for c in self.criteria)

    @property
    def plain_greedy(self) -> bool:
        """Whether a token is the argmax of the raw logits, and nothing else is wanted of them."""
        return not (self.do_sample or len(self.processors) or self.keep_scores or self.keep_logits)

    def draw(self, logits: torch.Tensor, specs: Sequence[SampleSpec], sampler: Sampler) -> IntArray:
        """[rows] tokens for logits [rows, vocab]: the processed scores' argmax, or a draw with keyed noise."""
        scores = self._process(logits, specs)
        for i, spec in enumerate(specs):
            sequence: Any = spec.history
            for keep, kept, values in ((self.keep_scores, sequence.scores, scores),
                                       (self.keep_logits, sequence.logits, logits)):  # fmt: skip
                if keep:
                    del kept[spec.position :]
                    kept.append(values[i].clone())
        if not self.do_sample:
            return sampler.argmax(scores)
        whole = SamplingParams(temperature=1.0)  # the processors have applied temperature, top-p and the rest
        keyed = [SampleSpec(whole, spec.seed, spec.sample, spec.position) for spec in specs]
        return sampler.sample(scores, np.arange(len(specs)), keyed)

    def ended(self, sequence: HostSequence) -> bool:
        """Whether a criterion ends the sequence at its last token."""
        ids = sequence.tokens[: sequence.length][None]
        rows = 1 if self._criteria_batched else self.batch
        scores = tuple(row.expand(rows, -1) for row in sequence.scores) if self.keep_scores else None
        done = self.criteria(ids.repeat(rows, 1), scores)
        return bool(done[0 if rows == 1 else sequence.index])

    def _process(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        if not len(self.processors):
            return logits
        scores = torch.empty_like(logits)
        ids = [spec.history.with_path(spec.path) for spec in specs]  # type: ignore[union-attr, attr-defined]
        for rows in _same_length(ids) if self._batched else [[i] for i in range(len(ids))]:
            tokens, values = torch.stack([ids[i] for i in rows]), logits[rows].clone()
            if self._batched or self.batch == 1:
                scores[rows] = self.processors(tokens, values)
            else:  # it may depend on the row's number: show it a whole batch of this row
                index = specs[rows[0]].history.index  # type: ignore[union-attr, attr-defined]
                shown = self.processors(tokens.repeat(self.batch, 1), values.repeat(self.batch, 1))
                scores[rows] = shown[index : index + 1]
        return scores


class HostStop(StopChecker):
    """Ends a request where the call's stopping criteria do."""

    def __init__(self, params: SamplingParams, host: Host, sequence: HostSequence) -> None:
        super().__init__(params, lambda _: "")
        self._host, self._sequence = host, sequence

    def _push_one(self, token: int) -> None:
        self.token_ids.append(token)
        self._sequence.push(token)
        if self._host.ended(self._sequence):
            self.finish_reason = "stop"


class Stream:
    """Feeds a streamer step by step, as `generate` does: one token of every row at a time, padded where one ended."""

    def __init__(self, streamer: Any, prompt: int, pad: int) -> None:
        self._streamer, self._at, self._pad = streamer, prompt, pad

    def advance(self, sequences: Sequence[HostSequence], ended: Sequence[bool]) -> None:
        """Gives out all steps for which every row has a token or has ended."""
        if self._streamer is None:
            return
        known = [s.length for s, end in zip(sequences, ended, strict=True) if not end]
        upto = min(known) if known else max(s.length for s in sequences)
        for at in range(self._at, upto):
            step = [int(s.tokens[at]) if at < s.length else self._pad for s in sequences]
            self._streamer.put(torch.tensor(step))
        self._at = max(self._at, upto)

    def end(self) -> None:
        if self._streamer is not None:
            self._streamer.end()


def _by_row(thing: object, module: str) -> bool:
    """Whether it is transformers' own and treats every row alike, whatever its number."""
    return type(thing).__module__ == module and type(thing).__name__ not in ONE_BY_ONE


def _same_length(ids: Sequence[torch.Tensor]) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        rows.setdefault(len(row), []).append(i)
    return list(rows.values())
