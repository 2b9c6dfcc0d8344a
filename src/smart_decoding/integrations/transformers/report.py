"""What one call did."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Report:
    """Counts of one `generate` call. rounds: forwards that decoded; drafted / verified / accepted:
    tree nodes.

    layout: 'tree', or 'chain' where the model's attention takes no tree mask. drafter: 'none' if
    speculation was off.
    """

    drafter: str
    policy: str
    layout: str
    tokens: int
    rounds: int
    drafted: int
    verified: int
    accepted: int
