"""docs/grafana.json: each of its queries asks for what /metrics has."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import generate_latest

from smart_decoding.core.policies import make_policy
from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.server.metrics import Metrics

ROOT = Path(__file__).parents[2]
if not (ROOT / "docs" / "grafana.json").is_file():
    pytest.skip("the docs are not in the source distribution", allow_module_level=True)
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docs" / "grafana.json").read_text())
TARGETS = [(panel["title"], target) for panel in DASHBOARD["panels"] for target in panel["targets"]]
_NAME = re.compile(r"smart:[a-z0-9_]+")


@pytest.fixture(scope="module")
def exported(load: Any) -> dict[str, tuple[str, set[str]]]:
    """Kind and labels of every series of a server under the policy `smart`, once an answer has
    ended."""
    metrics = Metrics("m")
    llm = load()
    llm.engine.policy = make_policy("smart")
    metrics.start(llm)
    llm.engine_thread.observers.append(metrics)
    llm.generate("a", SamplingParams(max_tokens=4, ignore_eos=True))
    text = generate_latest(metrics).decode()
    kinds = {}
    found = {}
    for name, kind in re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE):
        kinds[name] = kind
    for name, labels in re.findall(r"^(smart:\w+){([^}]*)}", text, re.MULTILINE):
        kind = kinds.get(name) or "counter"  # the series of a histogram only grow
        found.setdefault(name, (kind, set()))[1].update(re.findall(r"(\w+)=", labels))
    return found


@pytest.mark.parametrize(
    ("title", "target"), TARGETS, ids=[f"{t}-{q['refId']}" for t, q in TARGETS]
)
def test_a_query_asks_for_what_there_is(title: str, target: dict[str, Any], exported: Any) -> None:
    query = target["expr"]
    names = _NAME.findall(query)
    assert names
    assert query.count("(") == query.count(")")
    for name in names:
        assert name in exported, f"{title}: the server has no {name}"
        kind, _ = exported[name]
        rated = re.search(rf"rate\({name}\[\w+\]\)", query) is not None
        assert rated == (kind == "counter"), f"{title}: {name} is a {kind}"
    for labels in re.findall(r"by \((\w+)\)", query):
        assert all(labels in exported[name][1] for name in names)
    for label in re.findall(r"{{(\w+)}}", target["legendFormat"]):
        assert all(label in exported[name][1] for name in names)


def test_panels_do_not_overlap_and_have_ids_of_their_own() -> None:
    cells = [
        (p["gridPos"]["x"] + dx, p["gridPos"]["y"] + dy)
        for p in DASHBOARD["panels"]
        for dx in range(p["gridPos"]["w"])
        for dy in range(p["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])
