"""Costs of rounds, from the file that SMART_SGLANG_COSTS names."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from smart_decoding.core.costs import Curve
from smart_decoding.errors import ConfigError

COSTS = "SMART_SGLANG_COSTS"


@dataclass(frozen=True, slots=True)
class TierCosts:
    """Seconds of one round (drafting, verifying and all else), by batch size and drafted steps.

    {"seconds": {"1": {"0": 0.011, "1": 0.013, "3": 0.016}, "16": {...}}}: batch size -> steps ->
    seconds. For trees also {"nodes": {"1": 4, "3": 12}}: how many nodes are verified after so many
    steps, in the same rounds."""

    seconds: dict[int, Curve]
    nodes: dict[int, int]

    @classmethod
    def load(cls, path: Path) -> TierCosts:
        """Load a file. Raises ConfigError if it is not such a table."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            curves = {
                int(batch): Curve.from_table({int(k): float(s) for k, s in row.items()})
                for batch, row in content["seconds"].items()
            }
            nodes = {int(k): int(count) for k, count in content.get("nodes", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of costs for {COSTS}: {error}") from error
        if not curves or min(curves) < 1 or any(curve.rows[0] for curve in curves.values()):
            raise ConfigError(
                f"{path}: every batch size needs the seconds of 0 steps (plain decoding)"
            )
        if any(not 1 <= k <= count for k, count in nodes.items()):
            raise ConfigError(f"{path}: k steps, from 1 on, have at least k nodes")
        return cls(curves, nodes)

    def tokens(self, steps: int) -> int:
        """Return tokens that a round verifies for a request, its last one included."""
        return 1 + (self.nodes[steps] if self.nodes and steps else steps)


def read_costs() -> TierCosts:
    """Load the file that SMART_SGLANG_COSTS names."""
    return TierCosts.load(Path(os.environ[COSTS]))
