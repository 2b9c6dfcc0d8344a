"""N-gram drafter: proposes the tokens that followed the last tokens earlier in prompt and answer.

It is like prompt lookup, but all recent occurrences count: their continuations merge into a trie
whose frequencies are the draft probabilities. It needs no model, and pays where text repeats: code,
quotes, summaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from heapq import heappop, heappush
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from smart_decoding.core.policies.base import require_int
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.free import FreeDrafter
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.protocols import Features
    from smart_decoding.engine.request import Request

SHORTER = 0.25  # weight of an occurrence per token that it matches less than the longest match


class NgramIndex:
    """The occurrences of each n-gram in one growing text; amortised O(1) per token, as LZ77's hash
    chains.

    newest[n][gram]: the last position that follows an occurrence of the gram.
    older[n][i]: the position that follows the preceding occurrence of the gram before position i,
    or -1."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self.sizes = range(max_n, min_n - 1, -1)
        self.newest: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in self.sizes}
        self.older: dict[int, list[int]] = {n: [] for n in self.sizes}
        self.length = 0

    def update(self, tokens: Sequence[int]) -> None:
        """Add the new part of `tokens`, the whole text."""
        for n in self.sizes:
            newest = self.newest[n]
            older = self.older[n]
            for i in range(self.length, len(tokens)):
                gram = tuple(tokens[max(i - n, 0) : i])  # the first n are too short to be found
                older.append(newest.get(gram, -1))
                newest[gram] = i
        self.length = len(tokens)

    def occurrences(self, tokens: Sequence[int], limit: int) -> dict[int, int]:
        """Return a map of at most `limit` entries: position that follows an earlier occurrence of
        the text's last tokens -> number of matched tokens.

        Longest matches first, the newest first among equals; a match longer than max_n counts as
        max_n."""
        found: dict[int, int] = {}
        for n in self.sizes:
            at = self.newest[n].get(tuple(tokens[-n:]), -1) if len(tokens) > n else -1
            while at >= 0 and len(found) < limit:
                found.setdefault(at, n)
                at = self.older[n][at]
        return found


# An earlier occurrence of the last tokens: the position behind it, its length and its weight.
Occurrence: TypeAlias = tuple[int, int, float]
# A continuation's token, the number of its parent, its depth, draft_prob and path_prob.
Node: TypeAlias = tuple[int, int, int, float, float]


def likeliest(
    text: Sequence[int], found: Mapping[int, int], count: int, max_depth: int
) -> list[Node]:
    """Merge the continuations of `found` into a trie; return its `count` likeliest nodes, the
    likeliest first.

    found: as by `NgramIndex.occurrences`."""
    longest = max(found.values(), default=0)
    occurrences = [(at, matched, SHORTER ** (longest - matched)) for at, matched in found.items()]
    nodes: list[Node] = []
    waiting: list[tuple[float, int, int, int, int, float, list[Occurrence]]] = []
    pushed = 0  # among equals the first one is taken
    number, depth, path_prob = ROOT, 0, 1.0
    while True:
        if depth < max_depth:
            for token, prob, agreeing in _next_tokens(text, occurrences, depth):
                entry = (-path_prob * prob, pushed, token, number, depth + 1, prob, agreeing)
                heappush(waiting, entry)
                pushed += 1
        if not waiting or len(nodes) == count:
            return nodes
        negated, _, token, parent, depth, prob, occurrences = heappop(waiting)
        path_prob = -negated
        number = len(nodes)
        nodes.append((token, parent, depth, prob, path_prob))


def _next_tokens(
    text: Sequence[int], occurrences: list[Occurrence], depth: int
) -> list[tuple[int, float, list[Occurrence]]]:
    """Return the tokens that stand `depth` tokens behind these occurrences, long matches first,
    each with its draft_prob and the occurrences that agree with it.

    draft_prob: the share by weight, times 1 - 2^-context, where `context` tokens agree before:
    short matches are chance."""
    by_token: dict[int, list[Occurrence]] = {}
    total = 0.0
    for occurrence in occurrences:
        at = occurrence[0] + depth
        if at < len(text):
            total += occurrence[2]
            by_token.setdefault(text[at], []).append(occurrence)
    found = []
    for token, agreeing in by_token.items():
        share = 1.0 if len(by_token) == 1 else sum([weight for _, _, weight in agreeing]) / total
        context = agreeing[0][1] + depth
        found.append((token, share * (1.0 - 0.5**context), agreeing))
    return found


class NgramDrafter(FreeDrafter):
    """Proposes the tokens that followed the last min_n .. max_n tokens earlier in the text.

    max_nodes, max_depth: bounds of a request's tree. occurrences: how many to use, longest matches
    first. Raises ConfigError for values out of range."""

    name = "ngram"

    def __init__(
        self,
        min_n: int = 2,
        max_n: int = 4,
        max_nodes: int = 64,
        max_depth: int = 48,
        occurrences: int = 16,
    ) -> None:
        self.min_n = require_int("min_n", min_n, 1, 64)
        self.max_n = require_int("max_n", max_n, 1, 64)
        if min_n > max_n:
            raise ConfigError(f"min_n={min_n} is larger than max_n={max_n}")
        self.max_nodes = require_int("max_nodes", max_nodes, 1, 1024)
        self.max_depth = require_int("max_depth", max_depth, 1, 64)
        self.occurrences = require_int("occurrences", occurrences, 1, 1024)
        self._index: dict[Request, NgramIndex] = {}

    def propose(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Propose the likeliest continuations of each request."""
        owner: list[int] = []
        rows: list[Node] = []
        for i, request in enumerate(requests):
            first = len(rows)
            tokens = request.tokens
            found = self._indexed(request).occurrences(tokens, self.occurrences)
            for node in likeliest(tokens, found, self.max_nodes, self.max_depth):
                owner.append(i)
                above = node[1] if node[1] == ROOT else first + node[1]
                rows.append((node[0], above, *node[2:]))
        if not rows:
            return DraftTrees.empty(len(requests))
        token, parent, depth, draft, path = (np.array(column) for column in zip(*rows, strict=True))
        unknown = np.full(len(rows), np.nan)
        source = np.ones(len(rows), np.int64)  # 0 is a model's, whose nodes can be expanded
        return DraftTrees(
            len(requests), np.array(owner), token, parent, depth, draft, path, unknown, source
        )

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Index all of request.tokens, with tokens found in the prefix cache and the root."""
        self._indexed(request)

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """Index the tokens of all requests."""
        for request in requests:
            self._indexed(request)

    def release(self, request: Request) -> None:
        """Forget the request's index."""
        self._index.pop(request, None)

    def _indexed(self, request: Request) -> NgramIndex:
        index = self._index.get(request)
        if index is None:
            index = self._index[request] = NgramIndex(self.min_n, self.max_n)
        index.update(request.tokens)
        return index
