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
from typing import TextIO

import numpy as np

from smart_decoding.core.tree import ROOT, DraftTrees

_ACCEPTED = "\x1b[1;32m"
_REJECTED = "\x1b[2m"
_RESET = "\x1b[0m"


def draw_tree(
    trees: DraftTrees,
    owner: int,
    path: Sequence[int],
    text_of: Callable[[int], str],
    *,
    colour: bool = False,
    root: str = "",
    bonus_token: int | None = None,
) -> str:
    """Return one request's tree.

    Siblings are ordered by `accept_prob`, or by the drafter's path probability where the policy
    gave none. path: indices of the accepted nodes; text_of: a token's text; colour: with a
    terminal's escapes; root: text before the tree.
    """
    children: dict[int, list[int]] = {}
    for node in trees.nodes_of(owner):
        children.setdefault(int(trees.parent[node]), []).append(int(node))
    prob = np.where(np.isnan(trees.accept_prob), trees.path_prob, trees.accept_prob)
    accepted = {int(node) for node in path}
    lines = [quoted(root)]

    def painted(text: str, code: str) -> str:
        return f"{code}{text}{_RESET}" if colour else text

    def add(parent: int, indent: str) -> None:
        siblings = sorted(children.get(parent, []), key=lambda node: -float(prob[node]))
        for node in siblings:
            last = node == siblings[-1]
            sign, code = ("●", _ACCEPTED) if node in accepted else ("○", _REJECTED)
            label = f"{sign} {quoted(text_of(int(trees.token[node])))} {prob[node]:.2f}"
            lines.append(f"{indent}{'└─' if last else '├─'}{painted(label, code)}")
            add(node, indent + ("  " if last else "│ "))

    add(ROOT, "")
    if bonus_token is not None:
        lines.append(f"=> {painted(quoted(text_of(bonus_token)), _ACCEPTED)}")
    return "\n".join(lines)


def quoted(text: str) -> str:
    """Return `text` in double quotes; characters that a terminal obeys or hides are escaped."""
    return '"' + "".join(map(_printable, text)).replace('"', '\\"') + '"'


def _printable(char: str) -> str:
    shown = char.isprintable() and char != "\\"
    return char if shown else char.encode("unicode_escape").decode()


def wants_colour(stream: TextIO) -> bool:
    """Return whether to colour output on `stream`: a terminal, without NO_COLOR (no-color.org)."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def legend(policy_scores: bool = True) -> str:
    """Return the meaning of the signs; `policy_scores`: whether the numbers are calibrated."""
    kind = "calibrated probability of acceptance" if policy_scores else "the drafter's probability"
    return f"● accepted  ○ rejected  => the bonus token; numbers: {kind} of the path"
