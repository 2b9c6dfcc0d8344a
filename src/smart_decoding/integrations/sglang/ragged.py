"""Trees of several sizes in one verification: SGLang's, of one size, without what is not kept.

Nodes keep their places [batch, width] in all that SGLang does before and after the target's
forward; the forward itself has only the rows that are kept, one request after the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from smart_decoding.core.tree import BoolArray, FloatArray, IntArray


class KeptScores:
    """Path probabilities of the drafted nodes, which SGLang itself drops once it has its trees."""

    def __init__(self) -> None:
        self._last: torch.Tensor | None = None

    def __call__(
        self,
        original: Callable[..., Any],
        score_list: list[torch.Tensor],
        token_list: list[torch.Tensor],
        parents_list: list[torch.Tensor],
        num_draft_token: int,
    ) -> Any:
        """Around SGLang's `organize_draft_results`."""
        result = original(score_list, token_list, parents_list, num_draft_token)
        scores = torch.cat(score_list, dim=1).flatten(1)
        self._last = scores.gather(1, result[1])
        return result

    def take(self) -> FloatArray:
        """[batch, nodes] of the round that was drafted last; waits for the device."""
        assert self._last is not None
        scores = self._last.double().cpu().numpy()
        self._last = None
        return scores


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a forward. lengths: of each request, its last token included; places: [rows] in
    [batch * width]; width: nodes of an unpruned tree, its root included."""

    lengths: list[int]
    places: torch.Tensor
    width: int

    @classmethod
    def of(cls, keep: BoolArray, device: torch.device | str) -> Rows:
        """keep: [batch, width - 1], which drafted nodes to verify. Roots are always there."""
        roots = np.ones((len(keep), 1), np.bool_)
        kept = np.concatenate((roots, keep), axis=1)
        places = torch.from_numpy(np.flatnonzero(kept)).to(device)
        return cls(kept.sum(axis=1).tolist(), places, kept.shape[1])

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """[rows, ...] -> [batch * width, ...], zero where nothing was verified."""
        whole = packed.new_zeros((len(self.lengths) * self.width, *packed.shape[1:]))
        whole[self.places] = packed
        return whole


def pruned(
    first: torch.Tensor, sibling: torch.Tensor, rows: Rows, topk: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """First children and next siblings ([batch, width], -1: none) without what is not kept.

    topk: children of a node at most."""
    kept = torch.zeros(first.numel(), dtype=torch.bool, device=first.device)
    kept[rows.places] = True
    kept = kept.view(first.shape)

    def skip(link: torch.Tensor) -> torch.Tensor:
        for _ in range(topk):
            to = link.clamp(min=0)
            stays = (link < 0) | kept.gather(1, to)
            link = torch.where(stays, link, sibling.gather(1, to))
        return link

    return skip(first), skip(sibling)


def mask_starts(context: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """[batch + 1] where the mask [rows, context + rows] of each request starts.

    context: [batch] tokens before the root; lengths: [batch] rows."""
    sizes = lengths * (context + lengths)
    return torch.nn.functional.pad(sizes.to(torch.int64).cumsum(0), (1, 0))


def packed_mask(mask: torch.Tensor, context: torch.Tensor, rows: Rows) -> torch.Tensor:
    """The flat mask of the kept rows.

    mask: flat [batch][width, context + width], SGLang's FULL_MASK, of which only the columns of
    nodes are read; context: [batch] tokens before the root."""
    device = mask.device
    lengths = torch.tensor(rows.lengths, device=device)
    context = context.to(torch.int64)
    starts = mask_starts(context, lengths)
    before = mask_starts(context, torch.full_like(lengths, rows.width))
    # The cells: each row of a request with each of its rows.
    owner, row, column = (torch.from_numpy(part).to(device) for part in _cells(rows.lengths))
    first = (lengths.cumsum(0) - lengths)[owner]
    place = rows.places % rows.width
    of_row, of_column, ahead = place[first + row], place[first + column], context[owner]
    source = before[owner] + of_row * (ahead + rows.width) + ahead + of_column
    target = starts[owner] + row * (ahead + lengths[owner]) + ahead + column
    packed = torch.ones(int(starts[-1]), dtype=torch.bool, device=device)
    packed[target] = mask[source].to(torch.bool)
    return packed


def _cells(lengths: list[int]) -> tuple[IntArray, IntArray, IntArray]:
    """Owner, row and column of each cell of squares of such lengths."""
    owner = np.repeat(np.arange(len(lengths)), np.square(lengths))
    row = np.concatenate([np.repeat(np.arange(n), n) for n in lengths])
    column = np.concatenate([np.tile(np.arange(n), n) for n in lengths])
    return owner, row, column
