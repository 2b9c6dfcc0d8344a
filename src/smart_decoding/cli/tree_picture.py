"""A verified draft tree as text: branches, tokens, acceptance probabilities, the accepted path.

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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import numpy as np

from smart_decoding.core.tree import ROOT, DraftTrees

TokenText = Callable[[int], str]

_ACCEPTED = "\x1b[1;32m"
_REJECTED = "\x1b[2m"
_RESET = "\x1b[0m"
_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t", '"': '\\"', "\\": "\\\\"}


@dataclass(frozen=True, slots=True)
class TreeStyle:
    """How nodes are written. text_of: a token's text; colour: with a terminal's escapes."""

    text_of: TokenText
    colour: bool = False

    def node(self, accepted: bool, token: int, prob: float) -> str:
        """Return a node's sign, text and probability."""
        label = f"{'●' if accepted else '○'} {quoted(self.text_of(token))} {prob:.2f}"
        return self._painted(label, _ACCEPTED if accepted else _REJECTED)

    def bonus(self, token: int) -> str:
        """Return the last line."""
        return f"=> {self._painted(quoted(self.text_of(token)), _ACCEPTED)}"

    def _painted(self, text: str, code: str) -> str:
        return f"{code}{text}{_RESET}" if self.colour else text


def draw_tree(
    trees: DraftTrees,
    owner: int,
    path: Sequence[int],
    style: TreeStyle,
    *,
    root: str = "",
    bonus_token: int | None = None,
) -> str:
    """Return one request's tree.

    Siblings are ordered by `accept_prob`, or by the drafter's path probability where the policy
    gave none. path: indices of the accepted nodes; root: text before the tree.
    """
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
            label = style.node(node in accepted, int(trees.token[node]), float(prob[node]))
            lines.append(f"{indent}{'└─' if last else '├─'}{label}")
            add(node, indent + ("  " if last else "│ "))

    add(ROOT, "")
    if bonus_token is not None:
        lines.append(style.bonus(bonus_token))
    return "\n".join(lines)


def quoted(text: str) -> str:
    """Return `text` in double quotes; characters that a terminal obeys or hides are escaped."""
    return '"' + "".join(_printable(char) for char in text) + '"'


def wants_colour(stream: TextIO) -> bool:
    """Return whether to colour output on `stream`: a terminal, without NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend(policy_scores: bool = True) -> str:
    """Return the meaning of the signs; `policy_scores`: whether the numbers are calibrated."""
    kind = "calibrated probability of acceptance" if policy_scores else "the drafter's probability"
    return f"● accepted  ○ rejected  => the bonus token; numbers: {kind} of the path"


def _printable(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    if char.isprintable():
        return char
    point = ord(char)
    if point < 0x100:
        return f"\\x{point:02x}"
    return f"\\u{point:04x}" if point < 0x10000 else f"\\U{point:08x}"
