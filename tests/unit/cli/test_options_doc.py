"""docs/options.md names every option with its default."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest

from smart_decoding.core.policies import POLICIES
from smart_decoding.drafters.ngram import NgramDrafter

TEXT = (Path(__file__).parents[3] / "docs" / "options.md").read_text(encoding="utf-8")
OFFERED = {
    "cost",
    "calibration",
    "forecast",
    "eos_token_ids",
    "vocab",
    "top_k",
}  # by the engine
TAKES_TOP_K = {"eagle2"}


def documented(name: str) -> dict[str, str]:
    (row,) = re.findall(rf"^\| `{name}` \|.*\| (.*)\|$", TEXT, re.MULTILINE)
    return dict(re.findall(r"`(\w+)` ([\w.]+)", row))


@pytest.mark.parametrize(("name", "kind"), [*POLICIES.items(), ("ngram", NgramDrafter)])
def test_options_and_defaults(name: str, kind: Any) -> None:
    offered = OFFERED - ({"top_k"} if name in TAKES_TOP_K else set())
    found = (
        inspect.signature(kind).parameters.values() if kind.__init__ is not object.__init__ else ()
    )
    assert documented(name) == {p.name: str(p.default) for p in found if p.name not in offered}
