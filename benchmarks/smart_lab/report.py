"""The terminal's tables of what only the laboratory measures, after those of `smart bench`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from smart_decoding.bench import report
from smart_lab import tables
from smart_lab.results import LabResults


def everything(result: Mapping[str, Any]) -> str:
    """All tables of a result."""
    results = LabResults.from_dict(result)
    first = report.warnings(results)
    if result.get("acceptance"):
        model = result["provenance"]["weights"]["model"]
        kind = str(result["acceptance"]).upper()
        first.insert(0, f"{kind}: compute is real, tokens are a recording's ({model})")
    parts = report.comparison(results)
    if results.sampled:
        heat = results.sampled[0].get("temperature")
        parts += report.comparison(replace(results, runs=results.sampled), f"At temperature {heat}")
    parts += [*report.load_table(results), *tables.sections(results)]
    return report.printed(first, parts)
