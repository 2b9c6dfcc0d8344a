"""/metrics in Prometheus' format, with figures that fit what was asked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import NAME, Running, post, serving

from smart_decoding.engine.sampling_params import SamplingParams
from smart_decoding.server.metrics import Metrics

HISTOGRAMS = (
    "time_to_first_token_seconds",
    "time_per_output_token_seconds",
    "e2e_request_latency_seconds",
)


@pytest.fixture(scope="module")
def smart_server(load: Any, short_profile: None) -> Iterator[Running]:
    """With the policy `smart`."""
    with serving(lambda: load(speculative_config={"method": "ngram"})) as running:
        yield running


def read(running: Running, prefix: str = "smart:") -> dict[str, float]:
    response = httpx.get(f"{running.url}/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    values = {}
    samples = [
        sample
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    ]
    for sample in samples:
        if not sample.name.startswith(prefix):
            continue
        labels = {key: value for key, value in sample.labels.items() if key != "engine"}
        assert labels.pop("model_name") == NAME
        more = ",".join(f'{key}="{value}"' for key, value in labels.items())
        values[sample.name.removeprefix(prefix) + (f"[{more}]" if more else "")] = sample.value
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
    assert 0.02 < after['predicted_seconds_ratio[round="plain"]'] < 50
    assert after['expected_tokens_ratio[round="plain"]'] == 1
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
            touched = engine.step()
            llm.record.after(engine, touched)
            metrics.after(engine, touched)
            record = engine.last_round
            drafts += np.count_nonzero(np.bincount(record.round.trees.owner[record.round.kept]))
            walked += sum(map(len, record.acceptance.path))
    assert (
        counted(metrics, "spec_decode_num_drafts")
        == drafts
        < sum(request.metrics.rounds for request in requests) / 2
    )
    accepted = counted(metrics, "spec_decode_num_accepted_tokens")
    assert accepted == sum(request.metrics.accepted for request in requests)
    assert 0 < accepted < walked
    by_depth = "spec_decode_num_accepted_tokens_per_pos"
    deepest = max(max(request.metrics.accepted_lengths, default=0) for request in requests)
    reached = [counted(metrics, by_depth, position=str(i)) for i in range(deepest)]
    assert sum(reached) == accepted
    assert reached == sorted(reached, reverse=True)
    for request in requests:
        lengths = request.metrics.accepted_lengths
        assert sum(lengths.elements()) == request.metrics.accepted
        assert lengths.total() <= request.metrics.rounds


def test_every_metric_says_what_it_is(smart_server: Running) -> None:
    text = httpx.get(f"{smart_server.url}/metrics").text
    for family in text_string_to_metric_families(text):
        assert family.documentation
        assert family.type in ("counter", "gauge", "histogram")
        for sample in family.samples:
            assert (family.type == "counter") == sample.name.endswith("_total")


# What docs.vllm.ai lists under "Production Metrics" and its dashboards ask for.
VLLM = """
    num_requests_running num_requests_waiting kv_cache_usage_perc prompt_tokens_total
    generation_tokens_total prefix_cache_queries_total prefix_cache_hits_total
    num_preemptions_total spec_decode_num_drafts_total spec_decode_num_draft_tokens_total
    spec_decode_num_accepted_tokens_total time_to_first_token_seconds_bucket
    inter_token_latency_seconds_bucket time_per_output_token_seconds_bucket
    request_time_per_output_token_seconds_bucket e2e_request_latency_seconds_bucket
"""


def test_vllms_names_have_the_same_figures(smart_server: Running) -> None:
    text = "a long prompt that fills more than a single page of KV memory " * 2
    body = {"model": NAME, "prompt": text, "max_tokens": 40, "temperature": 0, "ignore_eos": True}
    for _ in range(2):
        assert post(smart_server, "/v1/completions", json=body).status_code == 200
    assert smart_server.idle()
    ours = read(smart_server)
    theirs = read(smart_server, "vllm:")
    assert set(VLLM.split()) <= {name.partition("[")[0] for name in theirs}
    assert theirs.pop('request_success_total[finished_reason="length"]') >= 2
    accepted = theirs["spec_decode_num_accepted_tokens_total"]  # none where it never drafted
    by_depth = 'spec_decode_num_accepted_tokens_per_pos_total[position="0"]'
    assert (by_depth in theirs) == (accepted > 0)
    assert 64 <= theirs["prefix_cache_hits_total"] < theirs["prefix_cache_queries_total"]
    renamed = {"time_per_output_token": "inter_token_latency"}
    renamed["request_time_per_output_token"] = "time_per_output_token"
    for name, value in theirs.items():
        base, found, rest = name.partition("_seconds")
        assert value == ours[renamed.get(base, base) + found + rest]
    gaps = theirs["inter_token_latency_seconds_count"]
    assert 2 <= gaps <= theirs["generation_tokens_total"]


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    return next(
        sample.value
        for family in metrics.collect()
        for sample in family.samples
        if sample.name == f"smart:{name}_total" and labels.items() <= sample.labels.items()
    )


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
