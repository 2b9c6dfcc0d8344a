"""The machines whose costs replays use: those of `benchmarks/results`, and cards by their data
sheets.

Needed by `ablate`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from smart_decoding.core.costs import CostModel
from smart_decoding.errors import ConfigError
from smart_lab.hardware import card, dimensions, roofline

RESULTS = Path(__file__).parents[1] / "results"
CARD, CARD_MODEL = "l40s", "llama-3.1-8b"
RECORDED = "recorded"  # the machine that a recording was made on


def measured(folder: Path = RESULTS) -> dict[str, CostModel]:
    """Machine -> the costs of its latest benchmark that has any."""
    found = {}
    for path in sorted(folder.glob("*/*bench.json")):
        cost = json.loads(path.read_text(encoding="utf-8")).get("cost")
        if cost:
            found[path.parent.name] = CostModel.from_dict(cost)
    return found


def costs_of(names: Sequence[str] = (), recorded: CostModel | None = None) -> dict[str, CostModel]:
    """Return the costs of machines and cards by name; of all measured machines and one card by
    default.

    recorded: costs of the recording's own machine. Raises ConfigError for an unknown name."""
    known = measured()
    if recorded is not None:
        known[RECORDED] = recorded
    result = {}
    for name in names or (*known, CARD):
        if name in known:
            result[name] = known[name]
            continue
        try:
            result[name] = roofline(card(name), dimensions(CARD_MODEL))
        except ConfigError as error:
            raise ConfigError(
                f"no costs of {name!r}; measured: {', '.join(known)}; else {error}"
            ) from error
    return result
