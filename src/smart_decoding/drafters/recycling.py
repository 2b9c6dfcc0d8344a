"""Token recycling (arXiv 2408.08696): the target's own top-k successors of each token, remembered
from past logits.

Every verified row tells what the target thinks follows its token. The latest such answer is kept
per token id, shared over all requests; a tree is grown from it by products of probabilities. No
model and no training, for every target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from smart_decoding.core.policies.base import require_int
from smart_decoding.core.tree import ROOT, DraftTrees, FloatArray, IntArray
from smart_decoding.drafters.free import FreeDrafter, free_trees
from smart_decoding.engine.protocols import Logits

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.engine.request import Request

# (logits [rows, vocab], k) -> ids [rows, k] and softmax probabilities [rows, k], largest first.
TopK: TypeAlias = Callable[[Logits, int], tuple[NDArray[np.integer], NDArray[np.floating]]]


class RecyclingDrafter(FreeDrafter):
    """Proposes the target's remembered successors. The table takes 8 * vocab * successors bytes.

    successors: kept per token id. max_nodes, max_depth: bounds of a request's tree. top_k: the
    backend's. Raises ConfigError for values that make no sense."""

    name = "recycling"
    wants_logits = True

    def __init__(
        self, vocab: int, top_k: TopK, successors: int = 8, max_nodes: int = 16, max_depth: int = 6
    ) -> None:
        self.successors = require_int("successors", successors, 1, min(64, vocab))
        self.max_nodes = require_int("max_nodes", max_nodes, 1, 1024)
        self.max_depth = require_int("max_depth", max_depth, 1, 64)
        self.table = np.zeros((vocab, successors), np.int32)
        # all 0: nothing is known of this token
        self.probs = np.zeros((vocab, successors), np.float32)
        self._top_k = top_k

    def observe_logits(self, tokens: IntArray, logits: Logits) -> None:
        """Remembers what follows `tokens` [rows] by their logits [rows, vocab]; a token's last row
        counts."""
        if not len(tokens):
            return
        last = len(tokens) - 1 - np.unique(tokens[::-1], return_index=True)[1]
        ids, probs = self._top_k(logits, self.successors)
        self.table[tokens[last]] = ids[last]
        self.probs[tokens[last]] = probs[last]

    def start(self, requests: Sequence[Request], rule: TreeRule) -> DraftTrees:
        """Grows each level from the max_nodes likeliest nodes of the one above, then keeps the
        max_nodes likeliest of all: exactly those of the unbounded tree, since every ancestor of one
        is one."""
        if not requests:
            return DraftTrees.empty(0)
        # [batch, frontier]
        token = np.array([[request.tokens[-1]] for request in requests], np.int64)
        path: FloatArray = np.ones(token.shape)
        levels = []
        first = 0
        parents = np.array([ROOT])
        for depth in range(1, self.max_depth + 1):
            token, above, draft, path = self._children(token, path)
            if not path.any():
                break
            levels.append((token, parents[above], np.full(token.shape, depth), draft, path))
            parents = np.arange(first, first + token.shape[1])
            first += token.shape[1]
        if not levels:
            return DraftTrees.empty(len(requests))
        return self._likeliest(
            *(np.concatenate(columns, axis=1) for columns in zip(*levels, strict=True))
        )

    def _children(
        self, token: IntArray, path: FloatArray
    ) -> tuple[IntArray, IntArray, FloatArray, FloatArray]:
        """The likeliest children of a frontier [batch, frontier]: token, index of the parent in the
        frontier, draft_prob and path_prob, each [batch, children]; path_prob 0 is no node."""
        batch = len(token)
        draft = self.probs[token].astype(np.float64)  # [batch, frontier, successors]
        joint = (path[:, :, None] * draft).reshape(batch, -1)
        best = np.argsort(-joint, axis=1, kind="stable")[:, : self.max_nodes]
        child = np.take_along_axis(self.table[token].reshape(batch, -1), best, axis=1).astype(
            np.int64
        )
        draft = np.take_along_axis(draft.reshape(batch, -1), best, axis=1)
        return child, best // self.successors, draft, np.take_along_axis(joint, best, axis=1)

    def _likeliest(
        self,
        token: IntArray,
        parent: IntArray,
        depth: IntArray,
        draft: FloatArray,
        path: FloatArray,
    ) -> DraftTrees:
        """Trees of the max_nodes likeliest candidates [batch, candidates], whose parents are
        columns before them."""
        best = np.argsort(-path, axis=1, kind="stable")[:, : self.max_nodes]
        keep = np.zeros(path.shape, np.bool_)
        np.put_along_axis(keep, best, True, axis=1)
        keep &= path > 0
        # Native code reads the trees' arrays as they lie.
        owner, column = map(np.ascontiguousarray, np.nonzero(keep))
        number = np.cumsum(keep).reshape(keep.shape) - 1
        above = parent[owner, column]
        above = np.where(above == ROOT, ROOT, number[owner, above])
        at = (owner, column)
        nodes = (owner, token[at], above, depth[at], draft[at], path[at])
        return free_trees(len(token), nodes)
