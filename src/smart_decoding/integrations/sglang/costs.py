"""Costs of rounds, from the file that SMART_SGLANG_COSTS names."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np

from smart_decoding.errors import ConfigError

COSTS = "SMART_SGLANG_COSTS"


class TierCosts:
    """Seconds of one round by batch size and drafted steps, from a table.

    Between its entries they are linear, beyond them constant.

    {"seconds": {"1": {"0": 0.011, "1": 0.013, "3": 0.016}, "16": {...}}}: batch size -> steps ->
    seconds. For trees also {"nodes": {"1": 4, "3": 12}}: how many nodes are verified after so many
    steps, in the same rounds."""

    def __init__(
        self,
        table: Mapping[int, Mapping[int, float]],
        nodes: Mapping[int, int] = MappingProxyType({}),
    ) -> None:
        self.batches = sorted(table)
        self._table = {batch: dict(sorted(row.items())) for batch, row in table.items()}
        self.nodes = dict(nodes)

    @classmethod
    def load(cls, path: Path) -> TierCosts:
        """Load a file. Raises ConfigError if it is not such a table."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            table = {
                int(batch): {int(k): float(seconds) for k, seconds in row.items()}
                for batch, row in content["seconds"].items()
            }
            nodes = {int(k): int(count) for k, count in content.get("nodes", {}).items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is no file of costs for {COSTS}: {error}") from error
        numbers = [seconds for row in table.values() for seconds in row.values()]
        if not table or not all(0 in row for row in table.values()) or min(table) < 1:
            raise ConfigError(
                f"{path}: every batch size needs the seconds of 0 steps (plain decoding)"
            )
        if not all(math.isfinite(seconds) and seconds > 0 for seconds in numbers):
            raise ConfigError(f"{path}: seconds must be positive")
        if any(not 1 <= k <= count for k, count in nodes.items()):
            raise ConfigError(f"{path}: k steps, from 1 on, have at least k nodes")
        return cls(table, nodes)

    def seconds(self, batch: int, steps: int) -> float:
        """Return seconds of one round: drafting, verifying and all else."""
        of_batch = [
            np.interp(steps, list(self._table[b]), list(self._table[b].values()))
            for b in self.batches
        ]
        return float(np.interp(math.log(max(batch, 1)), np.log(self.batches), of_batch))

    def tokens(self, steps: int) -> int:
        """Return tokens that a round verifies for a request, its last one included."""
        return 1 + (self.nodes[steps] if self.nodes and steps else steps)


def read_costs() -> TierCosts:
    """Load the file that SMART_SGLANG_COSTS names."""
    return TierCosts.load(Path(os.environ[COSTS]))
