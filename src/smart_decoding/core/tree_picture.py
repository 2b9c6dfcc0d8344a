"""A verified draft tree as text: branches, printable tokens, acceptance probabilities, and the path
that was accepted.

    "The capital of"
    ├─● " France" 0.81
    │ ├─● " is" 0.64
    │ └─○ "," 0.05
    └─○ " Italy" 0.04
    => " Paris"

A filled circle is an accepted node; the last line is the bonus token after the path.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import TextIO

import numpy as np

from smart_decoding.core.tree import ROOT, DraftTrees

TokenText = Callable[[int], str]

_ACCEPTED = "\x1b[1;32m"
_REJECTED = "\x1b[2m"
_RESET = "\x1b[0m"
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


def draw_tree(
    trees: DraftTrees,
    owner: int,
    path: Sequence[int],
    text_of: TokenText,
    *,
    root: str = "",
    bonus_token: int | None = None,
    colour: bool = False,
) -> str:
    """One request's tree. Siblings are ordered by `accept_prob`, or by the drafter's path
    probability where the policy gave none.

    path: indices of the accepted nodes; root: text before the tree; bonus_token: the target's token
    after the path."""
    children: dict[int, list[int]] = {}
    for node in trees.nodes_of(owner):
        children.setdefault(int(trees.parent[node]), []).append(int(node))
    prob = np.where(np.isnan(trees.accept_prob), trees.path_prob, trees.accept_prob)
    accepted = {int(node) for node in path}
    lines = [quoted(root)]

    def add(parent: int, indent: str) -> None:
        siblings = sorted(children.get(parent, []), key=lambda node: -float(prob[node]))
        for node in siblings:
            last = node == siblings[-1]
            text = text_of(int(trees.token[node]))
            label = _label(node in accepted, text, float(prob[node]), colour)
            lines.append(f"{indent}{'└─' if last else '├─'}{label}")
            add(node, indent + ("  " if last else "│ "))

    add(ROOT, "")
    if bonus_token is not None:
        lines.append(f"=> {_painted(quoted(text_of(bonus_token)), _ACCEPTED, colour)}")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """`text` in double quotes, with everything a terminal would act on or not show written as an
    escape."""
    return '"' + "".join(_printable(char) for char in text) + '"'


def wants_colour(stream: TextIO) -> bool:
    """Whether to colour output on `stream`: a terminal, and NO_COLOR (no-color.org) unset or
    empty."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend(policy_scores: bool = True) -> str:
    """What the signs mean; `policy_scores`: whether the numbers are calibrated."""
    calibrated = "calibrated probability of acceptance"
    kind = calibrated if policy_scores else "the drafter's own probability"
    return f"● accepted  ○ rejected  => bonus token; numbers: {kind} of the path"


def scored(trees: DraftTrees, nodes: Collection[int]) -> bool:
    """Whether the policy gave all of `nodes` an acceptance probability."""
    return not np.isnan(trees.accept_prob[list(nodes)]).any()


def _label(accepted: bool, text: str, prob: float, colour: bool) -> str:
    label = f"{'●' if accepted else '○'} {quoted(text)} {prob:.2f}"
    return _painted(label, _ACCEPTED if accepted else _REJECTED, colour)


def _painted(text: str, code: str, colour: bool) -> str:
    return f"{code}{text}{_RESET}" if colour else text


def _printable(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    point = ord(char)
    if point < 0x100:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"
