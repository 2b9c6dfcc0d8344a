"""Grammars that would hold up or kill a server: one kind of client of soak.py. Each must be
refused, or fail on its way, and nobody else notice."""

from __future__ import annotations

import random
from typing import Any


def bomb(rng: random.Random) -> dict[str, Any]:
    """`structured_outputs` that no server takes; no two are alike, for compiled ones are kept."""
    name = f"b{rng.randrange(2**31)}"
    return rng.choice([_quadratic, _huge, _choices, _deep, _ambiguous])(name)


def is_refusal(reason: str) -> bool:
    """Whether it is how a bomb should end: a 400, a full queue, or an error on the way."""
    return reason in ("400", "429") or reason.startswith("in the stream: structured_outputs")


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
    return {"grammar": "\n".join([f'start: "{name}" r0', *rules])}
