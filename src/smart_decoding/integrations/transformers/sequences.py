"""The arguments of `generate` besides the model: processors, criteria, scores, streamers.

A processor or criterion gets the same arguments as in `generate`: one sequence's tokens so far,
left padding included. The engine requests only rows that the walk visits, so that each is called
once per token of the answer, in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from smart_decoding.engine.history import SampleSpec
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.engine.stopping import StopChecker

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray
    from smart_decoding.models.sampling.sampler import Sampler

BY_PLACE = (  # transformers' own processors that depend on a row's place in the batch
    "PrefixConstrainedLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "EncoderRepetitionPenaltyLogitsProcessor",
    "EncoderNoRepeatNGramLogitsProcessor",
)
SLACK = 128  # tokens beyond the longest answer, for tree nodes that are visited


class HostParams(SamplingParams):
    """Parameters of a request whose tokens are drawn by `Host`."""

    @property
    def changes_logits(self) -> bool:
        """True, so that the engine does not take its greedy short cut."""
        return True


@dataclass(eq=False)
class HostSequence:
    """One row of the batch: tokens [max_length + SLACK] with left padding, `length` of them known.

    scores, logits: [vocab] per token of the answer, processed and raw, where requested."""

    index: int
    tokens: torch.Tensor
    length: int
    scores: list[torch.Tensor] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)

    def push(self, token: int) -> None:
        """Append a token."""
        self.tokens[self.length] = token
        self.length += 1

    def with_path(self, path: Sequence[int]) -> torch.Tensor:
        """Return the tokens so far and `path`, the visited nodes of the tree."""
        if len(path):
            self.tokens[self.length : self.length + len(path)] = torch.tensor(
                path, device=self.tokens.device
            )
        return self.tokens[: self.length + len(path)]

    def append(self, tokens: Sequence[int]) -> None:
        """Do nothing: the stop check has appended the tokens already."""


@dataclass
class Host:
    """The processors, criteria and outputs of one call.

    batch: its rows. limit: longest row. seed: of the draws. Without an end-of-sequence token to pad
    ended rows, `generate` continues them until the last row ends."""

    processors: Any
    criteria: Any
    batch: int
    limit: int
    do_sample: bool
    seed: int = 0
    keep_scores: bool = False
    keep_logits: bool = False

    def __post_init__(self) -> None:
        self._by_row = all(
            _by_row(p, "transformers.generation.logits_process") for p in self.processors
        )
        self._criteria_by_row = all(
            _by_row(c, "transformers.generation.stopping_criteria") for c in self.criteria
        )
        self._pads = self.batch == 1 or any(hasattr(c, "eos_token_id") for c in self.criteria)
        self._ends: dict[int, int] = {}  # row -> its length where a criterion ended it

    @property
    def length(self) -> int | None:
        """The length of the last row, once all have ended, if ended rows continue; else None."""
        if self._pads or len(self._ends) < self.batch:
            return None
        return max(self._ends.values())

    @property
    def plain_greedy(self) -> bool:
        """Whether a token is the argmax of the raw logits, which have no other use."""
        return not (self.do_sample or len(self.processors) or self.keep_scores or self.keep_logits)

    def draw(self, logits: torch.Tensor, specs: Sequence[SampleSpec], sampler: Sampler) -> IntArray:
        """Return tokens [rows] for logits [rows, vocab]: the argmax of the processed scores, or a
        draw with keyed noise."""
        scores = self._process(logits, specs)
        for i, spec in enumerate(specs):
            sequence: Any = spec.history
            if self.keep_scores:
                _keep(sequence.scores, spec.position, scores[i])
            if self.keep_logits:
                _keep(sequence.logits, spec.position, logits[i])
        if not self.do_sample:
            return sampler.argmax(scores)
        # The processors have applied temperature, top-p and the rest.
        whole = SamplingParams(temperature=1.0)
        keyed = [SampleSpec(whole, spec.seed, spec.sample, spec.position) for spec in specs]
        return sampler.sample(scores, np.arange(len(specs)), keyed)

    def ended(self, sequence: HostSequence, count: int) -> bool:
        """Return whether the sequence ends at its last token, the answer's `count`-th."""
        ids = sequence.tokens[: sequence.length][None]
        rows = 1 if self._criteria_by_row else self.batch
        # A round has scores of all its tokens before its first one is checked.
        known = sequence.scores[:count]
        scores = tuple(row.expand(rows, -1) for row in known) if self.keep_scores else None
        done = self.criteria(ids.repeat(rows, 1), scores)
        if not bool(done[0 if rows == 1 else sequence.index]):
            return self.length is not None and sequence.length >= self.length
        self._ends.setdefault(sequence.index, sequence.length)
        return self._pads or sequence.length >= (self.length or self.limit)

    def _process(self, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> torch.Tensor:
        if not len(self.processors):
            return logits
        scores = torch.empty_like(logits)
        ids = [spec.history.with_path(spec.path) for spec in specs]  # type: ignore[union-attr]
        for rows in _same_length(ids):
            place = list(range(len(rows)))
            shown = rows
            if not self._by_row:
                # Each row must stand at its own place of a whole batch; copies fill the rest.
                place = [specs[i].history.index for i in rows]  # type: ignore[union-attr]
                shown = [rows[0]] * self.batch
                for at, i in zip(place, rows, strict=True):
                    shown[at] = i
            tokens = torch.stack([ids[i] for i in shown])
            # as `generate` does: where the caller's ids are, which may be another device
            processed = self.processors(tokens, logits[shown].to(tokens.device))
            scores[rows] = processed[place].to(scores.device)
        return scores


class HostStop(StopChecker):
    """Ends a request where the call's stopping criteria do."""

    def __init__(self, params: SamplingParams, host: Host, sequence: HostSequence) -> None:
        super().__init__(params, lambda _: "")
        self._host = host
        self._sequence = sequence

    def _goes_on(self, tokens: Sequence[int]) -> bool:
        return False  # the criteria are called after each token

    def _push_one(self, token: int) -> None:
        self.token_ids.append(token)
        self._sequence.push(token)
        if self._host.ended(self._sequence, len(self.token_ids)):
            self.finish_reason = "stop"


class Stream:
    """Feeds a streamer step by step, as `generate` does.

    A step is one token of every row, padded where one ended."""

    def __init__(self, streamer: Any, prompt: int, pad: int) -> None:
        self._streamer = streamer
        self._at = prompt
        self._pad = pad

    def advance(
        self, sequences: Sequence[HostSequence], ended: Sequence[bool], longest: int | None
    ) -> None:
        """Pass on all steps for which every row has a token or has ended.

        longest: `Host.length`."""
        if self._streamer is None:
            return
        known = [s.length for s, end in zip(sequences, ended, strict=True) if not end]
        upto = min(known) if known else longest or max(s.length for s in sequences)
        for at in range(self._at, upto):
            step = [int(s.tokens[at]) if at < s.length else self._pad for s in sequences]
            self._streamer.put(torch.tensor(step))
        self._at = max(self._at, upto)

    def end(self) -> None:
        """End the streamer."""
        if self._streamer is not None:
            self._streamer.end()


def _keep(kept: list[torch.Tensor], position: int, values: torch.Tensor) -> None:
    """Keep the values of the token at `position`; drop those of rejected tokens from there on."""
    del kept[position:]
    kept.append(values.clone())


def _by_row(thing: object, module: str) -> bool:
    """Return whether `thing` is transformers' own and does not depend on a row's number."""
    return type(thing).__module__ == module and type(thing).__name__ not in BY_PLACE


def _same_length(ids: Sequence[torch.Tensor]) -> list[list[int]]:
    rows: dict[int, list[int]] = {}
    for i, row in enumerate(ids):
        rows.setdefault(len(row), []).append(i)
    return list(rows.values())
