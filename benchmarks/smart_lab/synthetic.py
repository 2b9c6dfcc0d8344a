"""Synthetic recordings: trees and answers drawn so that EAGLE-2's tree yields a given number of
tokens.

How predictable the text is moves slowly, as in real text; confidences fall off from child to child,
and the target chooses a child with its confidence times a trust that falls with depth. Nothing else
is claimed of them.

Needed by `simulate --acceptance`, tools/gpu_check.sh and most of
tests/lab.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from smart_decoding.core.policies.eagle2 import Eagle2
from smart_decoding.core.tree import ROOT, DraftTrees, FloatArray, IntArray
from smart_decoding.errors import ConfigError
from smart_lab.recording import Recording
from smart_lab.sweep import Fixed

CHILDREN, WIDTH, LEVELS = 10, 12, 8
TRUST = np.array(
    [0.95, 0.93, 0.91, 0.9, 0.89, 0.88, 0.87, 0.86]
)  # chosen over confidence, by depth
SHARE = 0.5 ** np.arange(1, CHILDREN)  # of what the first child leaves, for the others
EASES = (-6.0, 12.0)
SPREAD = 1.6  # standard deviation of the first child's confidence, as a logit


def synthetic(
    tokens_per_round: float,
    answers: int = 24,
    length: int = 120,
    context: int = 200,
    tree: Mapping[str, int] | None = None,
    seed: int = 0,
    spread: float = SPREAD,
) -> Recording:
    """Return a recording whose rounds under a setting of `eagle2` (default: EAGLE-2's tree) yield
    `tokens_per_round` on average over positions. spread: how far confidences lie apart.

    Raises ConfigError for a number that such a tree cannot yield."""
    low, high = EASES
    possible = 1 < tokens_per_round < LEVELS + 1
    for _ in range(9 if possible else 0):
        ease = (low + high) / 2
        tried = _draw(ease, min(8, answers), min(40, length), context, seed, spread)
        found = _yield(tried, tree or {})
        low, high = (ease, high) if found < tokens_per_round else (low, ease)
    if not possible or not EASES[0] + 0.01 < low < EASES[1] - 0.01:
        raise ConfigError(
            f"{tokens_per_round:g} tokens per round cannot be had from a tree of {LEVELS} levels"
        )
    return _draw((low + high) / 2, answers, length, context, seed, spread)


def _yield(recording: Recording, tree: Mapping[str, int]) -> float:
    """Return tokens per round, over positions that are not cut short by the answer's end."""
    whole = np.concatenate(
        [a.first + np.arange(max(0, a.positions - LEVELS)) for a in recording.answers]
    )
    options: dict[str, Any] = dict(tree)
    return float(Fixed.draw(Eagle2(**options), recording).emitted[whole].mean())


def _draw(
    ease: float,
    answers: int,
    length: int,
    context: int,
    seed: int,
    spread: float,
) -> Recording:
    rng = np.random.default_rng(seed)
    mood = rng.normal(size=answers)
    drawn = []
    moods = np.empty((answers, length))
    for t in range(length):
        moods[:, t] = mood
        mood = 0.9 * mood + 0.45 * rng.normal(size=answers)
    moods -= moods.mean()  # so that few answers are as hard as many
    for answer in range(answers):
        output = 100 + np.arange(
            length
        )  # every token is another one, so that a wrong child is never right
        trees = [
            _tree(rng, ease + float(moods[answer, t]), output[t + 1 :], spread)
            for t in range(length - 1)
        ]
        drawn.append((context, length, output.tolist(), trees, "synthetic"))
    return Recording.of(drawn)


def _tree(rng: np.random.Generator, ease: float, truth: IntArray, spread: float) -> DraftTrees:
    """Return one wide tree; `truth`: the tokens that follow."""
    trees = DraftTrees.empty(1)
    parents: IntArray = np.array([ROOT])
    right = ROOT  # the deepest node on the answer's path
    for level in range(min(LEVELS, len(truth))):
        prob = _children(rng, ease, len(parents), spread)
        token = np.tile(10 + np.arange(CHILDREN), (len(parents), 1))
        where = np.flatnonzero(parents == right)
        first, right = len(trees), -2
        if len(where):
            rank = int(np.searchsorted(np.cumsum(prob[where[0]] * TRUST[level]), rng.random()))
            if rank < CHILDREN:
                token[where[0], rank] = truth[level]
                right = first + int(where[0]) * CHILDREN + rank
        trees.append(
            np.zeros(token.size, np.int64),
            token.ravel(),
            np.repeat(parents, CHILDREN),
            prob.ravel(),
        )
        new = np.arange(first, len(trees))
        parents = np.sort(new[np.argsort(-trees.path_prob[new], kind="stable")[:WIDTH]])
    return trees


def _children(rng: np.random.Generator, ease: float, count: int, spread: float) -> FloatArray:
    """[count, CHILDREN] confidences, falling."""
    first = 1.0 / (1.0 + np.exp(-(ease + spread * rng.normal(size=(count, 1)))))
    others = (
        (1 - first) * (0.2 + 0.5 * first) * SHARE / SHARE.sum()
    )  # a surprising token is often among no children
    prob: FloatArray = -np.sort(-np.concatenate((first, others), axis=1), axis=1)
    return prob
