"""What the laboratory's `bench` wrote: results of `smart bench` with further parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from smart_decoding.bench.results import Results, Run, checked_runs, mapping


@dataclass(frozen=True)
class LabResults(Results):
    """suites, variants, replayed, peers: the laboratory's parts, empty where they were not
    measured."""

    PARTS: ClassVar[Sequence[str]] = (*Results.PARTS, "suites", "variants", "replayed", "peers")

    suites: Sequence[Run] = ()
    variants: Sequence[Run] = ()
    replayed: Mapping[str, Any] = field(default_factory=dict)
    peers: Sequence[Mapping[str, Any]] = ()

    @classmethod
    def parts_of(cls, data: Mapping[str, Any], source: str) -> dict[str, Any]:
        return {
            **super().parts_of(data, source),
            "suites": checked_runs(data.get("suite_runs"), source),
            "variants": checked_runs(data.get("variant_runs"), source),
            "replayed": _replayed(data.get("replayed")),
            "peers": _peers(data.get("peers")),
        }

    @classmethod
    def joined(cls, part: str, found: Sequence[Self]) -> Any:
        """As in Results, but for peers: those of all files."""
        if part == "peers":
            return [peer for each in found for peer in each.peers]
        return super().joined(part, found)


def _replayed(value: Any) -> Mapping[str, Any]:
    """Batch size -> what replay answers; empty if that cannot be read."""
    found = mapping(value)
    parts = [
        mapping(mapping(of_size).get(name))
        for of_size in found.values()
        for name in ("gap", "ablations")
    ]
    return found if parts and all(parts) and all(size.isdigit() for size in found) else {}


def _peers(value: Any) -> Sequence[Mapping[str, Any]]:
    """Peers that have a name."""
    found = value if isinstance(value, Sequence) and not isinstance(value, str) else ()
    return [
        peer for peer in found if isinstance(peer, Mapping) and isinstance(peer.get("name"), str)
    ]
