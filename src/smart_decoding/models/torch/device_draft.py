"""All levels of a round on a GPU, for which the host waits once.

How many nodes a level expands is fixed before the round (`core.selection.Fixed`); which ones, the
device decides, by path probability. Rows of nodes are laid out by the host with the parts open that
depend on that, and completed on the device. What is verified the host chooses among all that was
drafted, as ever.

This never ran on a GPU so far (2026-11-28).
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from smart_decoding.core.tree import ROOT, DraftTrees
from smart_decoding.engine.rows import Rows
from smart_decoding.models.sampling.ranking import best_children, noise_there
from smart_decoding.models.torch.layers import Context
from smart_decoding.models.torch.rows import download, upload

if TYPE_CHECKING:
    from smart_decoding.core.rule import TreeRule
    from smart_decoding.core.selection import Fixed
    from smart_decoding.engine.rows import DraftInputs
    from smart_decoding.models.torch.rows import DeviceRows

DEAD = -torch.inf  # log probability of what a rule would not expand, where there is nothing better


class DeviceDraft:
    """One round."""

    def __init__(self, rule: TreeRule, fixed: Fixed, inputs: DraftInputs, tokens: Tensor) -> None:
        rows = inputs.rows
        self._batch = batch = len(rows.query_start_loc) - 1
        self._k = min(inputs.request.k, len(tokens))
        self._groups = batch if fixed.each else 1  # that nodes are chosen from
        self._widths = (*fixed.widths, 0)  # of levels 2, 3, ...; none behind the last
        self._limited = bool((rule.limits <= rule.levels).any())
        self._tokens = tokens
        self._pages = rows.pages
        self._slots = inputs.slots
        last = rows.query_start_loc[1:] - 1
        of_request = (
            rows.context_len[last],
            rows.block_table_start,
            rows.position[last],
            rule.limits,
            np.arange(batch),
        )
        whole = np.concatenate((*of_request, last, rule.ends), dtype=np.int64)
        mine, self.last, self._ends = torch.split(
            upload(whole, tokens.device), [5 * batch, batch, len(rule.ends)]
        )
        # Of the rows that were run last, [5 + depth, rows]: the above, and slots of their paths.
        self._mine = mine.view(5, batch)
        self._depth = 0
        self._prob = tokens.new_zeros(batch, dtype=torch.float32)  # log path_prob, or DEAD
        self._chosen = self._mine[4]  # which candidates they were: first the requests themselves
        self._children = self._able = self._prob  # [rows, k] their tokens; log path_prob, or DEAD
        self._found: list[Tensor] = []  # of each level [rows, 2 + 2 * k], what the host must know
        noise = noise_there(inputs.request, tokens.device)
        self._noise = None if noise is None else noise.view(2, batch, rule.levels)
        self._marks = [self._mark()]

    def rank(self, logits: Tensor) -> None:
        """Rank the children of the rows that were run last."""
        noise = self._noise
        if noise is not None:
            noise = noise[:, self._mine[4], self._depth].contiguous()
        self._children, logprob = best_children(logits, self._tokens, self._k, noise)
        above = self._prob[:, None]
        self._able = above + logprob
        if self._limited:
            self._able.masked_fill_(self._mine[3, :, None] <= self._depth + 1, DEAD)
        if len(self._ends):
            self._able.masked_fill_((self._children[..., None] == self._ends).any(-1), DEAD)
        parts = (self._chosen[:, None], above, self._children, logprob)
        self._found.append(torch.cat(parts, 1))  # float32, in which such numbers are exact
        self._marks.append(self._mark())

    def expand(self, rotary: tuple[Tensor, Tensor]) -> tuple[Context, Tensor] | None:
        """Return the rows of the next level, and which of the rows that were run last lie above
        them; None behind the last level."""
        able = self._able.numel() // self._groups
        each = min(self._widths[self._depth], able, len(self._slots) // self._groups)
        if not each:
            return None
        count = each * self._groups
        self._chosen = chosen = self._choose(each)
        self._prob = self._able.take(chosen)
        above = chosen // self._k
        self._depth += 1
        own = torch.arange(self._slots.start, self._slots.start + count, device=above.device)
        self._mine = torch.cat((self._mine.index_select(1, above), own[None]))
        context = Context(self._layout(count), *rotary)
        context.on_device = self._completed(context.on_device, self._children.take(chosen))
        self._slots = self._slots[count:]
        return context, above

    def _choose(self, each: int) -> Tensor:
        """Return the best candidates, ascending, so that a request's are neighbours."""
        able = self._able.view(self._groups, -1)
        wide = able.shape[1]
        if each == wide:
            return torch.arange(able.numel(), device=able.device)
        best = able.topk(each).indices.sort().values
        if self._groups > 1:
            best += torch.arange(0, able.numel(), wide, device=able.device)[:, None]
        return best.view(-1)

    def _layout(self, count: int) -> Rows:
        """Return rows of nodes, each a group of its own, without what depends on which they are."""
        wide = np.zeros(count, np.int64)
        nothing = np.zeros(count, np.int32)
        own = np.arange(count + 1, dtype=np.int32)
        slots = own[:count] + np.int32(self._slots.start)
        path = np.zeros(count * self._depth, np.int32)
        starts = own * np.int32(self._depth)
        return Rows(wide, wide, slots, nothing, starts, path, own, nothing, self._pages)

    def _completed(self, there: DeviceRows, token: Tensor) -> DeviceRows:
        """Return the rows on the device, of `token` and these owners and paths."""
        count = len(token)
        size = there.size
        meta = there.meta
        context, table, position = self._mine[:3].unbind()
        meta[size : size + count] = context
        tables = 4 * size + 2 * there.tiles
        meta[tables : tables + count].add_(table)
        paths = tables + there.tiles
        meta[paths : paths + count * self._depth].view(count, -1).copy_(self._mine[5:].t())
        return replace(there, token=token, position=position + self._depth)

    def fetch(self) -> tuple[DraftTrees, list[int], list[float]]:
        """Waits for all of it: the trees, the rows of levels 2, 3, ..., the seconds of levels."""
        whole = download(torch.cat(self._found)).astype(np.float64)
        sizes = [len(part) for part in self._found]
        trees = DraftTrees.empty(self._batch)
        k = self._k
        number = np.full(self._batch, ROOT)  # of each candidate, as a node of the trees
        for level in np.split(whole, np.cumsum(sizes)[:-1]):
            alive = level[:, 1] > DEAD
            above, _, ids, logprobs = np.split(level[alive], [1, 2, 2 + k], axis=1)
            candidate = above[:, 0].astype(np.int64)
            parent = number[candidate]
            owner = trees.owner[parent] if len(trees) else candidate
            number = len(trees) + k * (np.cumsum(alive) - 1)[:, None] + np.arange(k)
            number = number.reshape(-1)
            tokens = ids.astype(np.int64).reshape(-1)
            trees.append(owner.repeat(k), tokens, parent.repeat(k), np.exp(logprobs).reshape(-1))
        return trees, sizes[1:], self._seconds()

    def _mark(self) -> Any:
        """Return a moment: of the device, where it goes by its own clock."""
        if self._tokens.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._tokens.device))
        return event

    def _seconds(self) -> list[float]:
        pairs = zip(self._marks[:-1], self._marks[1:], strict=True)
        if self._tokens.device.type != "cuda":
            return [end - start for start, end in pairs]
        return [start.elapsed_time(end) / 1000 for start, end in pairs]
