"""What decides the token of each visited row, gathered from its request and its path in the
tree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from smart_decoding.engine.history import SampleSpec

if TYPE_CHECKING:
    from smart_decoding.core.tree import DraftTrees
    from smart_decoding.engine.request import Request


def specs_of(
    rows: Sequence[int], asking: Sequence[Request], nodes: DraftTrees, eos: Sequence[int]
) -> list[SampleSpec]:
    """One spec per row, in the numbering of core.acceptance: roots first, then nodes."""
    return [_spec(row, asking, nodes, eos) for row in rows]


def _spec(row: int, asking: Sequence[Request], nodes: DraftTrees, eos: Sequence[int]) -> SampleSpec:
    path: list[int] = []
    if row >= len(asking):
        node = row - len(asking)
        path = nodes.token[nodes.path(node)].tolist()
        row = int(nodes.owner[node])
    request = asking[row]
    position = len(request.output) + len(path)
    return SampleSpec(
        request.params,
        request.seed,
        request.sample,
        position,
        request.history,
        path,
        eos,
        request.constraint,
        request.output,
    )
