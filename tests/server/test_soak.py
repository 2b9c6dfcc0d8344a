"""The short form of `make soak`: 64 clients on the tiny model for some seconds, with and without
speculation."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from serving import serving

from smart_decoding.server import preparation

pytest.importorskip("llguidance")

PATH = Path(__file__).parents[2] / "tools" / "soak.py"
if not PATH.is_file():
    pytest.skip("the tools are not in the source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def tool() -> Any:
    sys.path.append(str(PATH.parent))
    return importlib.import_module("soak")


@pytest.fixture(scope="module")
def results(tool: Any) -> Any:
    return importlib.import_module("soak_result")


def test_a_short_soak_finds_nothing_wrong(
    tool: Any, load: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "SLOW", 0.02)
    monkeypatch.setattr(preparation, "SECONDS", 0.2)
    size = {"max_num_seqs": 16, "max_model_len": 2048}
    args = argparse.Namespace(seed=0, seconds=2.4, blocks=2, clients=64, pause=1.5, checked=0.1)
    args.max_gap = 5.0  # on this machine others work, too
    with (
        serving(lambda: load(**size), model_name="soak") as ours,
        serving(lambda: load(**size, speculative_config=False), model_name="soak") as off,
    ):
        result = tool.soak(args, {"static": (ours.url, os.getpid()), "off": (off.url, os.getpid())})
        ours.llm.engine.check_integrity()
    for policy, found in result["policies"].items():
        assert found["wrong"] == []
        assert found["ends"]["read"] > 50
        assert found["ends"]["cancelled"] > 2
        assert found["ends"]["refused"] > 0
        assert found["longest_wait_s"].keys() == {
            "a bystander",
            "a reader",
            tool.SHARED,
            "/health",
            "/metrics",
        }
        assert found["checked"] > 2
        assert (found["rounds_off"] == 1.0) == (policy == "off")
    assert result["over_off"]["static"]["tpot"]["pairs"] > 20


def test_it_notices_what_is_wrong(tool: Any, running: Any, load: Any) -> None:
    """An answer that is not the one alone, a page that is not given back, a server that is
    broken."""
    figures = tool.Figures(memory=[100] * 100 + [200] * 100)
    body = {
        "model": "tiny",
        "prompt": "abc",
        "max_tokens": 5,
        "stream": True,
        "temperature": 0,
        "stream_options": {"include_usage": True},
    }
    figures.answers = [(tool.Plan(0, body, "read", 1, True), "not that")]
    tool.asyncio.run(tool.check_answers(running.url, figures))
    assert len(figures.wrong) == 1
    assert "differs from alone" in figures.wrong[0]
    page = running.llm.engine.pool.take(1)
    tool.check_leaks(running.url, figures)
    running.llm.engine.pool.give(page)
    assert "leak: kv_cache_usage_perc" in figures.wrong[1]
    assert "memory grew" in figures.wrong[2]


def times(tool: Any, blocks: int, seconds: float) -> Any:
    return {
        f"{b}-{i}": tool.Times(0.1, seconds * (1 + b / 10 + i / 100))
        for b in range(blocks)
        for i in range(20)
    }


@pytest.mark.parametrize("blocks", [1, 6])
def test_a_worse_median_is_a_fault(tool: Any, blocks: int) -> None:
    base = times(tool, blocks, 0.01)
    result = {"policies": {"smart": {"wrong": []}}, "over_off": {}}
    for factor in (0.8, 1.0, 1.5):
        found = tool.ratio(times(tool, blocks, 0.01 * factor), base, "tpot")
        assert found["low"] <= found["value"] <= found["high"]
        assert found["value"] == pytest.approx(factor, abs=1e-4)
        result["over_off"] = {"smart": {"tpot": found, "ttft": tool.ratio(base, base, "ttft")}}
        assert bool(tool.faults(result)) == (factor > 1)


def test_refused_requests_are_faults_and_nothing_to_compare_is_one(tool: Any) -> None:
    """A server that refuses everything must not pass."""
    figures = tool.Figures()
    body = {"seed": 1}
    refuse = tool.httpx.MockTransport(
        lambda request: tool.httpx.Response(int(request.url.host[1:]))
    )

    async def ask_all() -> None:
        for status in (429, 503):
            async with tool.httpx.AsyncClient(
                transport=refuse, base_url=f"http://s{status}"
            ) as client:
                plan = tool.Plan(0, body, "read", 1, False)
                await tool.ask(client, "own", plan, "0-0", figures)

    tool.asyncio.run(ask_all())
    assert figures.wrong == ["429: seed 1", "503: seed 1"]
    assert figures.times == {}
    result = {
        "policies": {"smart": {"wrong": []}},
        "over_off": {"smart": {"tpot": tool.ratio({}, {}, "tpot")}},
    }
    assert tool.faults(result) == ["smart: median tpot: too few answers to compare (0)"]


def test_a_bystander_who_is_refused_is_told_of(tool: Any) -> None:
    """Not taken for one who was answered at once."""
    figures = tool.Figures()
    original = tool.httpx.AsyncClient

    def answer(request: Any) -> Any:
        return tool.httpx.Response(200 if request.url.path == "/v1/completions" else 500)

    def client(**given: Any) -> Any:
        return original(**given | {"transport": tool.httpx.MockTransport(answer)})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool.httpx, "AsyncClient", client)
        with pytest.raises(tool.httpx.HTTPStatusError):
            tool.asyncio.run(tool.stand_by("http://x", figures))
    assert figures.gaps.keys() == set()


@pytest.mark.parametrize("judged", [False, True])
def test_pass_says_what_was_looked_at(results: Any, judged: bool) -> None:
    each = {"checked": 3, "memory_judged": judged}
    line = results.verdict({"faults": [], "policies": {"smart": each, "off": each}})
    assert line.startswith("PASS")
    assert "all 6 answers" in line
    assert "significantly" in line
    assert ("memory did not grow" in line) == judged != ("not judged" in line)
    assert results.verdict({"faults": ["a leak"]}) == "FAIL\na leak"
