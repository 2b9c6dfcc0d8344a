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
        given = [field.name for field in fields(self) if getattr(self, field.name) is not None]
        if len(given) != 1:
            names = ", ".join(field.name for field in fields(self))
            raise ConfigError(
                f"structured_outputs={given} is not allowed: give exactly one of {names}"
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_text(self.json))
        for name in ("regex", "grammar"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                raise ConfigError(
                    f"structured_outputs={{{name!r}: {value!r}}} is not allowed: it must be a text"
                )
        if self.json_object is not None and self.json_object is not True:
            given_value = {"json_object": self.json_object}
            raise ConfigError(f"structured_outputs={given_value} is not allowed: give True")
        if self.choice is not None:
            good = isinstance(self.choice, list | tuple) and all(
                isinstance(each, str) and each for each in self.choice
            )
            if not good or not self.choice:
                raise ConfigError(
                    f"structured_outputs={{'choice': {self.choice!r}}} is not allowed: it must be "
                    "a list of non-empty texts"
                )
            object.__setattr__(self, "choice", tuple(self.choice))


def _schema_text(schema: object) -> str:
    """A JSON schema as text. Raises ConfigError if it is none."""
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

    dear: its masks take long. From then on they are computed in another thread, and drafts, which
    need more of them, are not worth it. client: whose turn it is there."""

    error: ConfigError | None
    dear: bool
    client: str

    def compute_beside(self) -> None:
        """To be computed in another thread from the first mask on."""
        ...

    def ready(self, seconds: float = 0.0) -> bool:
        """Whether the next mask is known, so that a round does not wait for it. Waits so long."""
        ...

    def allowed(self, path: Sequence[int]) -> NDArray[np.bool_]:
        """[vocab] the tokens that may follow the committed ones and `path`; at least one, which
        means nothing after an error."""
        ...

    def accepts(self, path: Sequence[int]) -> bool:
        """Whether `path` may follow the committed tokens."""
        ...

    def before_error(self, tokens: Sequence[int]) -> Sequence[int]:
        """Those of a round's tokens that were drawn before `allowed` came upon an error."""
        ...

    def append(self, tokens: Sequence[int]) -> None:
        """Commits tokens of the answer, unless they end it."""
        ...

    def take_seconds(self) -> float:
        """Seconds spent in here since the last call."""
        ...


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
