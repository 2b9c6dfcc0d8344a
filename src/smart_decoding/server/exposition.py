"""Prometheus' text format, with the model's name on every series."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from math import inf

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Histogram:
    """Counts of seconds up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Counts one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


class Exposition:
    """Lines of the format. Names are given without the prefix `smart:`."""

    def __init__(self, model_name: str) -> None:
        escaped = model_name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        self._label = f'model_name="{escaped}"'

    def number(self, name: str, kind: str, text: str, value: float) -> Iterator[str]:
        """A gauge or a counter."""
        yield from self._head(name, kind, text)
        yield f"smart:{name}{{{self._label}}} {value:.9g}"

    def by_reason(self, name: str, text: str, counts: Mapping[str, int]) -> Iterator[str]:
        """A counter for each reason that an answer ended for."""
        yield from self._head(name, "counter", text)
        for reason, count in sorted(counts.items()):
            yield f'smart:{name}{{{self._label},finished_reason="{reason}"}} {count}'

    def histogram(self, name: str, text: str, values: Histogram) -> Iterator[str]:
        """Cumulative buckets, sum and count."""
        yield from self._head(name, "histogram", text)
        total = 0
        for bound, count in zip((*values.bounds, inf), values.counts, strict=True):
            total += count
            shown = "+Inf" if bound == inf else bound
            yield f'smart:{name}_bucket{{{self._label},le="{shown}"}} {total}'
        yield f"smart:{name}_sum{{{self._label}}} {values.sum:.9g}"
        yield f"smart:{name}_count{{{self._label}}} {total}"

    def _head(self, name: str, kind: str, text: str) -> Iterator[str]:
        yield f"# HELP smart:{name} {text}"
        yield f"# TYPE smart:{name} {kind}"
