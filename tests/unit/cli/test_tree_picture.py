"""Pictures of trees, as they must look."""

from __future__ import annotations

import numpy as np
import pytest

from smart_decoding.cli.tree_picture import draw_tree, quoted
from smart_decoding.core.tree import ROOT, DraftTrees

WORDS = [" France", " Italy", " is", ",", " a\n", " \x1b[31m", " Paris"]


def two_trees() -> DraftTrees:
    """Request 0 has five nodes, request 1 one."""
    trees = DraftTrees.empty(2)
    trees.append([0, 0, 1], [1, 0, 5], [ROOT, ROOT, ROOT], [0.2, 0.7, 0.9])
    trees.append([0, 0, 0], [3, 2, 4], [1, 1, 0], [0.1, 0.8, 0.5])
    trees.accept_prob = np.array([0.04, 0.81, 0.9, 0.05, 0.64, 0.02])
    return trees


def picture(owner: int = 0, path: tuple[int, ...] = (1, 4), colour: bool = False) -> str:
    text_of = WORDS.__getitem__
    return draw_tree(
        two_trees(), owner, path, text_of, colour=colour, root="capital of", bonus_token=6
    )


def test_a_tree_with_its_accepted_path() -> None:
    assert picture().splitlines() == [
        '"capital of"',
        '├─● " France" 0.81',
        '│ ├─● " is" 0.64',
        '│ └─○ "," 0.05',
        '└─○ " Italy" 0.04',
        '  └─○ " a\\n" 0.02',
        '=> " Paris"',
    ]


def test_without_scores_the_drafters_path_probability_is_shown() -> None:
    trees = two_trees()
    trees.accept_prob[:] = np.nan
    lines = draw_tree(trees, 0, [], WORDS.__getitem__).splitlines()
    assert lines[1] == '├─○ " France" 0.70'
    assert lines[2] == '│ ├─○ " is" 0.56'


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a b", '"a b"'),
        ("\t\r\n", '"\\t\\r\\n"'),
        ('say "x\\"', '"say \\"x\\\\\\""'),
        ("\x1b\x07\x9b", '"\\x1b\\x07\\x9b"'),
        (
            "\u202e\u200b\u2028",
            '"\\u202e\\u200b\\u2028"',
        ),  # direction override, zero width, line separator
        ("\U000e0001", '"\\U000e0001"'),
        ("né漢🙂\ufffd", '"né漢🙂\ufffd"'),
    ],
)
def test_nothing_a_terminal_acts_on_is_printed(text: str, shown: str) -> None:
    assert quoted(text) == shown
    assert shown.isprintable()
