"""The tokens that a layer for multi-token prediction proposes: a cache of those used last.

Such a layer ranks with the model's output matrix, which is most of what a level reads in models of
some billion weights. A level that reads rows of some tokens only is faster, and loses what the
others would have been. Which tokens a text needs, the text before it says best: of Qwen2.5's ids
below 32,768, fewest merges of byte pairs, English answers take 93 % and Chinese ones 24 %.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from smart_decoding.core.tree import IntArray

USUAL_SIZE = 32_768  # as FR-Spec (arXiv 2502.14856) and published EAGLE-3 heads


class DraftVocabulary:
    """The least recently used tokens make way for new ones. At first the lowest ids are there,
    which byte-level BPE merged first; those not used since make way from the highest id on.

    ids: [size] the first tokens, by place; vocab: of the model."""

    def __init__(self, ids: IntArray, vocab: int) -> None:
        self._ids = ids.copy()
        size = len(ids)
        self._place = np.full(vocab, -1, np.int64)  # of each token, -1: it has none
        self._place[ids] = np.arange(size)
        self._used = -np.arange(size)  # when the token at each place was used last
        self._now = 0

    def use(self, tokens: IntArray) -> tuple[IntArray, IntArray]:
        """Note tokens of a text. Return places that have changed, and the tokens that are there
        now."""
        self._now += 1
        known = self._place[tokens]
        self._used[known[known >= 0]] = self._now
        new = np.unique(tokens[known < 0])[: len(self._ids) // 2]
        if not len(new):
            return new, new
        places = np.argpartition(self._used, len(new))[: len(new)]
        self._place[self._ids[places]] = -1
        self._place[new] = places
        self._ids[places] = new
        self._used[places] = self._now
        return places, new
