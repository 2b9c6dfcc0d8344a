"""Structured outputs: what the text of an answer must be, and what the engine asks of whoever
enforces it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from smart_decoding.core.tree import ROOT, DraftTrees, IntArray
from smart_decoding.errors import ConfigError


@dataclass(frozen=True)
class StructuredOutputsParams:
    """What the whole text of an answer must be, in vLLM's names; exactly one of them. Raises
    ConfigError.

    json: valid under this JSON schema (a dict, or its text). json_object: true for any JSON object.
    regex: matched by this regular expression. choice: one of these texts.
    grammar: derived from `start` of this context-free grammar, in llguidance's dialect of Lark; or
    from `root` of one in GBNF.
    """

    json: str | Mapping[str, Any] | None = None
    json_object: bool | None = None
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        if self.json_object is False:
            object.__setattr__(self, "json_object", None)
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise ConfigError(
                f"structured_outputs={[*given]} is not allowed: give exactly one of {names}"
            )
        ((name, value),) = given.items()
        if name == "json":
            object.__setattr__(self, name, _schema_text(value))
        elif name == "choice":
            texts = isinstance(value, list | tuple) and all(isinstance(t, str) and t for t in value)
            _require(texts and len(value) > 0, given, "it must be a list of non-empty texts")
            object.__setattr__(self, name, tuple(value))
        elif name == "json_object":
            _require(value is True, given, "give True")
        else:
            _require(isinstance(value, str), given, "it must be a text")


def _require(good: bool, given: Mapping[str, Any], wanted: str) -> None:
    if not good:
        raise ConfigError(f"structured_outputs={given} is not allowed: {wanted}")


def _schema_text(schema: object) -> str:
    """Return a JSON schema as text. Raises ConfigError if it is none."""
    try:
        content = json.loads(schema) if isinstance(schema, str) else schema
        if not isinstance(content, Mapping):
            raise ValueError("it is not a JSON object")
        return json.dumps(content, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"structured_outputs: json is no JSON schema: {error}") from error


class Constraint(Protocol):
    """One answer's grammar, and where in it the answer is. A path: tree tokens from the first level
    on.

    error: why the committed tokens cannot go on, such as a grammar that has outgrown its limits. It
    ends its own request: the round goes on for the others. An error after a path counts only once
    the path is committed.

    expensive: its masks take long. From then on they are computed in another thread, and drafts,
    which need more of them, are not worth it. client: whom that thread counts them for."""

    error: ConfigError | None
    expensive: bool
    client: str

    def compute_in_background(self) -> None:
        """Compute all masks in another thread, from the first one on."""

    def ready(self, seconds: float = 0.0) -> bool:
        """Return whether the next mask is known, so that a round does not wait for it. Waits so
        long."""

    def allowed(self, path: Sequence[int]) -> NDArray[np.bool_]:
        """[vocab] the tokens that may follow the committed ones and `path`; at least one, which
        means nothing after an error."""

    def accepts(self, path: Sequence[int]) -> bool:
        """Return whether `path` may follow the committed tokens."""

    def before_error(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return those of a round's tokens that were drawn before `allowed` came upon an error."""

    def append(self, tokens: Sequence[int]) -> None:
        """Commit tokens of the answer, unless they end it."""


def grammatical(
    constraints: Sequence[Constraint | None], trees: DraftTrees, kept: IntArray
) -> IntArray:
    """Of the nodes `kept` (ascending, prefix-closed) those that their requests' constraints allow:
    the target cannot draw the others, so that verifying them would be in vain."""
    good = np.zeros(len(trees), np.bool_)
    for node in kept.tolist():
        constraint = constraints[trees.owner[node]]
        parent = int(trees.parent[node])
        above = parent == ROOT or bool(good[parent])
        good[node] = above and (
            constraint is None or constraint.accepts(trees.token[trees.path(node)].tolist())
        )
    return kept[good[kept]]
