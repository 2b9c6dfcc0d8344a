"""N-gram drafter: what followed the last tokens earlier in the same prompt and answer, as a tree.

Like prompt lookup, but all recent occurrences count: their continuations merge into a trie whose
frequencies are the draft probabilities. It costs no model, and pays where text repeats: code,
quotes, summaries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from smart_decoding.core.policies.base import require_int
from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.drafters.free import FreeDrafter, free_trees
from smart_decoding.errors import ConfigError

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.protocols import Features
    from smart_decoding.engine.request import Request

SHORTER = 0.25  # weight of an occurrence per token that it matches less than the longest match


class NgramIndex:
    """Where each n-gram of one growing text was followed by what; amortised O(1) per token, as
    LZ77's hash chains.

    newest[n][gram]: the last position that follows an occurrence of the gram.
    older[n][i]: the position that follows the preceding occurrence of the gram before position i,
    or -1."""

    def __init__(self, min_n: int, max_n: int) -> None:
        self.sizes = range(max_n, min_n - 1, -1)
        self.newest: dict[int, dict[tuple[int, ...], int]] = {n: {} for n in self.sizes}
        self.older: dict[int, list[int]] = {n: [] for n in self.sizes}
        self.length = 0

    def update(self, tokens: Sequence[int]) -> None:
        """Adds what `tokens`, the whole text, has beyond the text seen so far."""
        for n in self.sizes:
            newest = self.newest[n]
            older = self.older[n]
            for i in range(self.length, len(tokens)):
                gram = tuple(tokens[max(i - n, 0) : i])  # the first n are too short to be found
                older.append(newest.get(gram, -1))
                newest[gram] = i
        self.length = len(tokens)

    def occurrences(self, tokens: Sequence[int], limit: int) -> dict[int, int]:
        """Positions that follow earlier occurrences of the text's last tokens -> tokens matched, at
        most `limit`.

        Longest matches first, the newest first among equals; a match longer than max_n counts as
        max_n."""
        found: dict[int, int] = {}
        for n in self.sizes:
            at = self.newest[n].get(tuple(tokens[-n:]), -1) if len(tokens) > n else -1
            while at >= 0 and len(found) < limit:
                found.setdefault(at, n)
                at = self.older[n][at]
        return found


@dataclass(slots=True)
class Trie:
    """Continuations of one request, parents before children; node 0 is the root. Lists have one
    entry per node.

    seen: weighted occurrences that came here; went_on: those of them whose next token is known;
    context: tokens that agree with the text before this node's token (0 for the root)."""

    token: list[int] = field(default_factory=lambda: [ROOT])
    parent: list[int] = field(default_factory=lambda: [ROOT])
    depth: list[int] = field(default_factory=lambda: [0])
    seen: list[float] = field(default_factory=lambda: [0.0])
    went_on: list[float] = field(default_factory=lambda: [0.0])
    context: list[int] = field(default_factory=lambda: [0])
    child: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, continuation: Sequence[int], weight: float, matched: int) -> None:
        """One occurrence; those with long matches come first."""
        node = 0
        for token in continuation:
            self.went_on[node] += weight
            node = self.child.get((node, token)) or self._new(node, token, matched)
            self.seen[node] += weight

    def best(self, count: int) -> list[tuple[int, int, int, float, float]]:
        """The `count` likeliest nodes, parents first and renumbered: (token, parent, depth,
        draft_prob, path_prob).

        draft_prob: the share of the parent's continuations, times 1 - 2^-context: short matches are
        chance."""
        draft = [1.0]
        path = [1.0]
        for node in range(1, len(self.token)):
            parent = self.parent[node]
            draft.append(self.seen[node] / self.went_on[parent] * (1.0 - 0.5 ** self.context[node]))
            path.append(path[parent] * draft[node])
        # Stable: a parent is at least as likely as its child and comes before it, so the choice is
        # prefix-closed.
        chosen = sorted(sorted(range(1, len(path)), key=lambda node: -path[node])[:count])
        number = {0: ROOT, **{node: i for i, node in enumerate(chosen)}}
        return [
            (self.token[n], number[self.parent[n]], self.depth[n], draft[n], path[n])
            for n in chosen
        ]

    def _new(self, parent: int, token: int, matched: int) -> int:
        node = self.child[parent, token] = len(self.token)
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.seen.append(0.0)
        self.went_on.append(0.0)
        self.context.append(matched + self.depth[parent])
        return node


class NgramDrafter(FreeDrafter):
    """Proposes what followed the last min_n .. max_n tokens before.

    max_nodes, max_depth: bounds of a request's tree. occurrences: how many are looked at, longest
    matches first. Raises ConfigError for values that make no sense."""

    name = "ngram"

    def __init__(
        self,
        min_n: int = 2,
        max_n: int = 4,
        max_nodes: int = 16,
        max_depth: int = 8,
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

    def start(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """The likeliest continuations of each request."""
        owner: list[int] = []
        rows: list[tuple[int, int, int, float, float]] = []
        for i, request in enumerate(requests):
            first = len(rows)
            best = self._continuations(request).best(self.max_nodes)
            for token, parent, depth, draft, path in best:
                owner.append(i)
                above = parent if parent == ROOT else first + parent
                rows.append((token, above, depth, draft, path))
        if not rows:
            return DraftTrees.empty(len(requests))
        columns = (np.array(column) for column in zip(*rows, strict=True))
        return free_trees(len(requests), (owner, *columns))

    def extend(
        self, request: Request, features: Features, first: int, tokens: Sequence[int]
    ) -> None:
        """Indexes request.tokens: these, those found in the prefix cache, and the root."""
        self._indexed(request)

    def extend_each(self, requests: Sequence[Request], features: Features) -> None:
        """The same for all."""
        for request in requests:
            self._indexed(request)

    def release(self, request: Request) -> None:
        """Forgets the request's index."""
        self._index.pop(request, None)

    def _indexed(self, request: Request) -> NgramIndex:
        index = self._index.get(request)
        if index is None:
            index = self._index[request] = NgramIndex(self.min_n, self.max_n)
        index.update(request.tokens)
        return index

    def _continuations(self, request: Request) -> Trie:
        trie = Trie()
        tokens = request.tokens
        found = self._indexed(request).occurrences(tokens, self.occurrences)
        longest = max(found.values(), default=0)
        for at, matched in found.items():
            trie.add(tokens[at : at + self.max_depth], SHORTER ** (longest - matched), matched)
        return trie
