"""Writes docs/grafana.json: one panel per line of PANELS."""

from __future__ import annotations

import json
from pathlib import Path

S = "smart:"


def share(part: str, whole: str) -> str:
    """A query for one counter's growth over another's."""
    return f"rate({S}{part}[1m]) / rate({S}{whole}[1m])"


def quantiles(name: str) -> list[tuple[str, str]]:
    """(legend, query) of a histogram's quantiles."""
    return [
        (f"p{int(100 * q)}", f"histogram_quantile({q}, sum by (le) (rate({S}{name}_bucket[5m])))")
        for q in (0.5, 0.95, 0.99)
    ]


PANELS: list[tuple[str, str, list[tuple[str, str]]]] = [
    (
        "Tokens per second",
        "short",
        [
            ("generated", f"rate({S}generation_tokens_total[1m])"),
            ("prompt", f"rate({S}prompt_tokens_total[1m])"),
        ],
    ),
    ("Speedup over plain decoding, estimated", "short", [("speedup", f"{S}speedup_estimate")]),
    (
        "Requests",
        "short",
        [("running", f"{S}num_requests_running"), ("waiting", f"{S}num_requests_waiting")],
    ),
    ("Time to first token", "s", quantiles("time_to_first_token_seconds")),
    ("Time per output token", "s", quantiles("time_per_output_token_seconds")),
    ("Latency", "s", quantiles("e2e_request_latency_seconds")),
    (
        "Accepted of verified nodes",
        "percentunit",
        [
            (
                "accepted",
                share(
                    "spec_decode_num_accepted_tokens_total", "spec_decode_num_draft_tokens_total"
                ),
            )
        ],
    ),
    (
        "Rounds with speculation off",
        "percentunit",
        [("off", f"1 - {share('drafting_rounds_total', 'rounds_total')}")],
    ),
    (
        "Predicted over real round seconds",
        "short",
        [("ratio", share("predicted_round_seconds_total", "checked_round_seconds_total"))],
    ),
    (
        "Rows and levels per round",
        "short",
        [
            ("rows", share("verify_rows_total", "rounds_total")),
            ("levels", share("draft_levels_total", "rounds_total")),
        ],
    ),
    (
        "Controller's share of the time",
        "percentunit",
        [("controller", share("controller_seconds_total", "round_seconds_total"))],
    ),
    ("Calibration error", "percentunit", [("accepted / expected - 1", f"{S}calibration_error")]),
    ("KV memory in use", "percentunit", [("KV", f"{S}kv_cache_usage_perc")]),
    (
        "Answers ended per second",
        "short",
        [("{{finished_reason}}", f"rate({S}request_success_total[1m])")],
    ),
]


def panel(place: int, title: str, unit: str, queries: list[tuple[str, str]]) -> dict[str, object]:
    """One graph, the `place`-th from the top left."""
    source = {"type": "prometheus", "uid": "${source}"}
    return {
        "id": place + 1,
        "type": "timeseries",
        "title": title,
        "datasource": source,
        "gridPos": {"x": 8 * (place % 3), "y": 7 * (place // 3), "w": 8, "h": 7},
        "fieldConfig": {
            "defaults": {"unit": unit, "min": None if "error" in title else 0},
            "overrides": [],
        },
        "targets": [
            {"refId": chr(65 + i), "datasource": source, "expr": query, "legendFormat": legend}
            for i, (legend, query) in enumerate(queries)
        ],
    }


def dashboard() -> dict[str, object]:
    """The whole file."""
    return {
        "title": "SMART",
        "uid": "smart-decoding",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {"list": [{"name": "source", "type": "datasource", "query": "prometheus"}]},
        "panels": [panel(i, *each) for i, each in enumerate(PANELS)],
    }


if __name__ == "__main__":
    path = Path(__file__).parents[1] / "docs" / "grafana.json"
    path.write_text(json.dumps(dashboard(), indent=1) + "\n")
