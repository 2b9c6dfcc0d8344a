"""Everything but the logits that decides a row's token: history, seed, grammar and penalties."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from smart_decoding.core.tree import DraftTrees
    from smart_decoding.engine.request import Request
    from smart_decoding.engine.sampling_params import SamplingParams
    from smart_decoding.engine.structured import Constraint


class TokenHistory:
    """The distinct tokens of one request and how often each occurs in its output.

    The arrays span the distinct tokens, not the vocabulary: a row of the tree copies a few
    kilobytes."""

    def __init__(self, prompt: Iterable[int] = (), output: Iterable[int] = ()) -> None:
        self._slot: dict[int, int] = {}
        self._tokens = np.zeros(64, np.int64)
        self._counts = np.zeros(64, np.int32)
        for token in prompt:
            self._slot_of(int(token))
        self.append(output)

    def append(self, tokens: Iterable[int]) -> None:
        """Commit output tokens."""
        for token in tokens:
            slot = self._slot_of(int(token))  # first: it may replace the arrays
            self._counts[slot] += 1

    def at(self, path: Sequence[int] = ()) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Return the distinct tokens of prompt, output and `path`, and each one's count in output
        and path; both [distinct]. path: tree tokens from the first level to the row. The arrays are
        to be read only: without a path they are views."""
        size = len(self._slot)
        tokens = self._tokens[:size]
        counts = self._counts[:size]
        if not len(path):
            return tokens, counts
        new = dict.fromkeys(int(t) for t in path if int(t) not in self._slot)
        slot = {token: size + i for i, token in enumerate(new)}
        tokens = np.concatenate((tokens, np.fromiter(new, np.int64, len(new))))
        counts = np.concatenate((counts, np.zeros(len(new), np.int32)))
        for token in map(int, path):
            counts[slot[token] if token in slot else self._slot[token]] += 1
        return tokens, counts

    def _slot_of(self, token: int) -> int:
        slot = self._slot.setdefault(token, len(self._slot))
        if slot == len(self._tokens):
            self._tokens = np.concatenate((self._tokens, np.zeros_like(self._tokens)))
            self._counts = np.concatenate((self._counts, np.zeros_like(self._counts)))
        self._tokens[slot] = token
        return slot


@dataclass(frozen=True, slots=True)
class SampleSpec:
    """Everything but the logits that decides the token of one row.

    params: the request's.
    seed: the request's seed, resolved (params.seed may be None).
    sample: index of the answer among the request's `n`.
    position: how many output tokens precede the drawn one, tree tokens on the path included.
    history: the request's committed tokens; needed only if `params.needs_history`.
    path: tree tokens from the first level to this row; () at the root.
    eos_ids: end-of-sequence ids, which `min_tokens` forbids.
    constraint: the request's grammar, if it has one.
    output: the request's committed output tokens; needed only for `params.bad_words`.
    """

    params: SamplingParams
    seed: int = 0
    sample: int = 0
    position: int = 0
    history: TokenHistory | None = None
    path: Sequence[int] = ()
    eos_ids: Sequence[int] = ()
    constraint: Constraint | None = None
    output: Sequence[int] = ()

    def ends_with(self, tokens: Sequence[int]) -> bool:
        """Return whether output and path end with these tokens."""
        if not len(tokens):
            return True
        last = self.path if len(self.path) else self.output
        if not len(last) or last[-1] != tokens[-1]:  # nearly always, and much faster
            return False
        count = len(tokens)
        return [*self.output[-count:], *self.path][-count:] == list(tokens)


def specs_of(
    rows: Iterable[int], requests: Sequence[Request], nodes: DraftTrees, eos: Sequence[int]
) -> list[SampleSpec]:
    """Return one spec for each row, in the numbering of `core.tree.accept`: roots first, then
    nodes."""
    specs = []
    for row in rows:
        owner = row
        path: list[int] = []
        if row >= len(requests):
            node = row - len(requests)
            owner = int(nodes.owner[node])
            path = nodes.token[nodes.path(node)].tolist()
        request = requests[owner]
        specs.append(
            SampleSpec(
                request.params,
                request.seed,
                request.sample,
                len(request.output) + len(path),
                request.history,
                path,
                eos,
                request.constraint,
                request.output,
            )
        )
    return specs
