"""Structured outputs: the required form of an answer's text, and the protocol of the grammar that
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
    """The required form of an answer's whole text, in vLLM's names; set exactly one. Raises
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
        forms = {name: value for name, value in vars(self).items() if value is not None}
        if len(forms) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise ConfigError(
                f"structured_outputs={[*forms]} is not allowed: give exactly one of {names}"
            )
        ((name, value),) = forms.items()
        if name == "json":
            object.__setattr__(self, name, _schema_text(value))
        elif name == "choice":
            texts = isinstance(value, list | tuple) and all(isinstance(t, str) and t for t in value)
            _require(texts and len(value) > 0, forms, "it must be a list of non-empty texts")
            object.__setattr__(self, name, tuple(value))
        elif name == "json_object":
            _require(value is True, forms, "give True")
        else:
            _require(isinstance(value, str), forms, "it must be a text")


def _require(good: bool, forms: Mapping[str, Any], hint: str) -> None:
    if not good:
        raise ConfigError(f"structured_outputs={forms} is not allowed: {hint}")


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
    """One answer's grammar, and the answer's place in it. A path is a list of tree tokens from the
    first level on.

    error: why the committed tokens cannot go on, such as a grammar that has outgrown its limits. It
    ends its own request: the round goes on for the others. An error after a path counts only once
    the path is committed.

    expensive: whether its masks take long. Once true, they are computed in another thread, and the
    request does not draft, which would need more masks. client: name of the client that this thread
    counts them for."""

    error: ConfigError | None
    expensive: bool
    client: str

    def compute_in_background(self) -> None:
        """Compute all masks in another thread, from the first one on."""

    def ready(self, seconds: float = 0.0) -> bool:
        """Return whether the next mask is known, so that a round does not wait for it. seconds: to
        wait for the mask, at most."""

    def allowed(self, path: Sequence[int]) -> NDArray[np.bool_]:
        """Return a mask [vocab] of the tokens that may follow the committed ones and `path`. At
        least one may; after an error the mask means nothing."""

    def accepts(self, path: Sequence[int]) -> bool:
        """Return whether `path` may follow the committed tokens."""

    def before_error(self, tokens: Sequence[int]) -> Sequence[int]:
        """Return the tokens of a round that were drawn before an error of `allowed`."""

    def append(self, tokens: Sequence[int]) -> None:
        """Commit tokens of the answer, unless they end it."""


def grammatical(
    constraints: Sequence[Constraint | None], trees: DraftTrees, kept: IntArray
) -> IntArray:
    """Return the nodes of `kept` (ascending, prefix-closed) that their requests' constraints allow.
    The target cannot draw the others: verifying them would be wasted."""
    good = np.zeros(len(trees), np.bool_)
    for node in kept.tolist():
        constraint = constraints[trees.owner[node]]
        parent = int(trees.parent[node])
        above = parent == ROOT or bool(good[parent])
        good[node] = above and (
            constraint is None or constraint.accepts(trees.token[trees.path(node)].tolist())
        )
    return kept[good[kept]]
