"""Grammars that would hold up or kill a server, for soak.py's hostile clients: each is refused, or
fails on its way, and nobody else may notice.

Needed by soak.py.
"""

from __future__ import annotations

import random
from typing import Any


def bomb(rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A path, and what is not in every body. No two are alike, for compiled ones are kept."""
    name = f"b{rng.randrange(2**31)}"
    structure = rng.choice([_quadratic, _huge, _choices, _deep, _ambiguous, _blank])(name)
    body = {"prompt": "the sea", "max_tokens": 100, "temperature": 0}
    return "/v1/completions", {**body, "structured_outputs": structure}


def _quadratic(name: str) -> dict[str, Any]:
    return {"json": {"type": "object", "properties": {f"{name}_{i}": {} for i in range(6000)}}}


def _huge(name: str) -> dict[str, Any]:
    return {"json": {"const": name * 130_000}}


def _choices(name: str) -> dict[str, Any]:
    return {"choice": [f"{name}{i}" for i in range(150_000)]}


def _deep(name: str) -> dict[str, Any]:
    defs: dict[str, Any] = {
        f"{name}{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/{name}{i + 1}"}}}
        for i in range(2000)
    }
    defs[f"{name}2000"] = {"type": "string"}
    return {"json": {"$defs": defs, "$ref": f"#/$defs/{name}0"}}


def _ambiguous(name: str) -> dict[str, Any]:
    rules = [f"r{i}: r{(i + 1) % 80} r{(i + 2) % 80} | /[a-z ]/" for i in range(80)]
    return {"grammar": "\n".join([f'start: "{name}"' + 30 * " r0", *rules])}


def _blank(name: str) -> dict[str, Any]:
    return {"grammar": f'root ::= "{name}' + "\n" * 64_000}
