"""/metrics in Prometheus' format, with figures that fit what was asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from serving import NAME, Running, post, serving

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.server.metrics import Metrics

_LINE = re.compile(r'(smart:[a-z0-9_]+)\{([a-z_]+="[^"]*"(?:,[a-z_]+="[^"]*")*)\} (-?[0-9.e+-]+)')

HISTOGRAMS = (
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
)


@pytest.fixture(scope="module")
def smart_server(load: Any, short_profile: None) -> Iterator[Running]:
    """With the policy `smart`."""
    with serving(lambda: load(speculative_config={"method": "recycling"})) as running:
        yield running


def read(running: Running) -> dict[str, float]:
    response = httpx.get(f"{running.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    for line in response.text.splitlines():
        if not line.startswith("#"):
            name, labels, value = _LINE.fullmatch(line).groups()
            more = labels.removeprefix(f'model_name="{NAME}"').lstrip(",")
            values[name.removeprefix("smart:") + (f"[{more}]" if more else "")] = float(value)
    return values


def test_counts_are_those_of_the_answers(smart_server: Running) -> None:
    before = read(smart_server)
    body = {"prompt": "abcdefgh", "max_tokens": 64, "ignore_eos": True, "temperature": 0}
    body["model"] = NAME
    for _ in range(3):
        assert post(smart_server, "/v1/completions", json=body).status_code == 200
    assert smart_server.idle()
    after = read(smart_server)

    def grew(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grew("generation_tokens_total") == 3 * 64
    assert grew("prompt_tokens_total") == 3 * 8
    assert grew('request_success_total[finished_reason="length"]') == 3
    for name in HISTOGRAMS:
        assert grew(f"{name}_count") == 3
        assert grew(f"{name}_sum") > 0
        buckets = [value for key, value in after.items() if key.startswith(f"{name}_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == after[f"{name}_count"]
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[name] == 0
    drafted = grew("spec_decode_num_draft_tokens_total")
    accepted = grew("spec_decode_num_accepted_tokens_total")
    assert 0 <= accepted <= drafted <= grew("spec_decode_num_proposed_tokens_total")
    # Every round of one request yields its path and a token.
    assert grew("rounds_total") + accepted >= 3 * 64
    assert grew("rounds_total") <= 3 * 64
    assert grew("drafting_rounds_total") <= grew("rounds_total")
    assert grew("verify_rows_total") >= grew("rounds_total")
    assert 0 < grew("controller_seconds_total") < grew("round_seconds_total")
    assert 0.02 < grew("predicted_round_seconds_total") / grew("checked_round_seconds_total") < 50
    assert after["speedup_estimate"] > 0
    assert 0 <= after["speculation_off_share"] <= 1


def test_drafts_are_the_requests_whose_nodes_are_verified(load: Any) -> None:
    """And nodes beyond the end of an answer are not accepted."""
    llm = load(speculative_config={"method": "ngram", "policy": "static"})
    metrics = Metrics(NAME)
    engine = llm.engine
    drafts = 0
    walked = 0
    requests = []
    metrics.start(llm)
    for end in range(
        20, 30
    ):  # all tokens are the same, and the next one after `end` of them is the last
        more = {"logit_bias": {65: 100}, "min_tokens": end, "stop": llm.tokenizer.decode([65])}
        for speculate in (True, False):
            params = SamplingParams(temperature=0, max_tokens=60, speculate=speculate, **more)
            requests += engine.add_request(f"{end} {speculate}", list(b"abcdefgh"), params)
        while engine.has_unfinished_requests:
            metrics.before(engine)
            metrics.after(engine, engine.step())
            record = engine.last_round
            drafts += np.count_nonzero(np.bincount(record.round.trees.owner[record.round.kept]))
            walked += sum(map(len, record.acceptance.path))
    assert (
        metrics.counts["drafts"] == drafts < sum(request.metrics.rounds for request in requests) / 2
    )
    assert metrics.counts["accepted"] == sum(request.metrics.accepted for request in requests)
    assert 0 < metrics.counts["accepted"] < walked


def test_every_metric_says_what_it_is(smart_server: Running) -> None:
    text = httpx.get(f"{smart_server.url}/metrics").text
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE))
    assert set(kinds) == set(re.findall(r"^# HELP (\S+) \S.*$", text, re.MULTILINE))
    assert all((kind == "counter") == name.endswith("_total") for name, kind in kinds.items())


def test_an_aborted_answer_counts_as_such(smart_server: Running) -> None:
    before = read(smart_server).get('request_success_total[finished_reason="abort"]', 0)
    body = {
        "model": NAME,
        "prompt": "a",
        "max_tokens": 1000,
        "ignore_eos": True,
        "temperature": 1.0,
    }
    with httpx.stream(
        "POST", f"{smart_server.url}/v1/completions", json={**body, "stream": True}
    ) as stream:
        next(stream.iter_lines())
    assert smart_server.idle()
    assert read(smart_server)['request_success_total[finished_reason="abort"]'] == before + 1
